"""`load_hf` and `save_hf` of a running model: seconds and peak memory, beside gathering to one rank and saving there.

    torchrun --nproc-per-node 2 -m benchmarks.live --dir /dev/shm --tp 2 --hidden 4096 --layers 8

Every rank builds its part of a dense model of megatron-core, on CUDA where there is a device. The reference directory
has a config.json of Qwen3 and no weights. `gather` is what converters of live models do: tensor parallel shards are
gathered to rank 0, one parameter after another, kept there in host memory, and saved with safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import AnonymousMemory, remove


def main() -> None:
    """Measures, and rank 0 prints a line for each part as JSON."""
    options = _options()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    folder = Path(options.dir)
    reference, out, gathered = (folder / f"ckptkit-live-{name}" for name in ("reference", "out", "gathered"))
    model = _model(options, cuda)
    if dist.get_rank() == 0:
        for place in (reference, out, gathered):
            remove(place)
        reference.mkdir()
        (reference / "config.json").write_text(json.dumps(_config(options)), encoding="utf-8")
    dist.barrier()

    import ckptkit

    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    _report("model", lambda: None, size)
    _report("save_hf", lambda: ckptkit.save_hf(model, out, hf_reference=reference), size)
    _report("load_hf", lambda: ckptkit.load_hf(model, out), size)
    _report("gather", lambda: _gather(model, gathered), size)
    if dist.get_rank() == 0:
        for place in (reference, out, gathered):
            remove(place)
    dist.destroy_process_group()


def _report(what: str, work: Callable[[], object], size: int) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    dist.barrier()
    started = time.perf_counter()
    with AnonymousMemory() as memory:
        work()
        if cuda:
            torch.cuda.synchronize()
    dist.barrier()
    mine = {
        "seconds": round(time.perf_counter() - started, 3),
        "bytes_of_rank": size,
        "more_host_bytes": memory.peak_bytes - memory.first,
        "more_device_bytes": torch.cuda.max_memory_allocated() - before if cuda else 0,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        most = {key: max(rank[key] for rank in everyone) for key in mine}
        print(json.dumps({"what": what, "ranks": len(everyone), "cuda": cuda, **most}), flush=True)


def _gather(model: Any, folder: Path) -> None:
    """Whole parameters of all tensor parallel ranks on rank 0, saved there (as many bytes, under Megatron's names)."""
    from megatron.core import parallel_state
    from safetensors.torch import save_file

    group, whole = parallel_state.get_tensor_model_parallel_group(), {}
    for name, parameter in model.named_parameters():
        parts = [torch.empty_like(parameter) for _ in range(group.size())]
        dist.all_gather(parts, parameter.detach(), group=group)
        if dist.get_rank() == 0:
            split = getattr(parameter, "tensor_model_parallel", False)
            dim = getattr(parameter, "partition_dim", 0)
            whole[name] = (torch.cat(parts, dim) if split else parts[0]).cpu()
    if dist.get_rank() == 0:
        folder.mkdir()
        save_file(whole, folder / "model.safetensors")
        os.sync()


def _model(options: argparse.Namespace, cuda: bool) -> Any:
    from ckptkit.megatron import parallel
    from ckptkit.megatron.compat import import_megatron, runs_on
    from ckptkit.sharding.grid import Parallelism

    import_megatron()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    parallel.create_groups(Parallelism(options.tp), device=device)
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.hidden // 128,
        num_query_groups=options.groups,
        kv_channels=128,
        ffn_hidden_size=3 * options.hidden,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=options.tp,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=not cuda,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
    )
    with runs_on(device):
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
            vocab_size=options.vocab,
            max_sequence_length=4096,
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
        )
    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def _config(options: argparse.Namespace) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 128,
        "num_key_value_heads": options.groups,
        "head_dim": 128,
        "vocab_size": options.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="a folder that all ranks share")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    return parser.parse_args()


if __name__ == "__main__":
    main()
