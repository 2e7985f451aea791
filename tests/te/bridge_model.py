"""Megatron-Bridge loads a checkpoint and computes: `python -m tests.te.bridge_model CHECKPOINT EXPECTED MODEL_TYPE`.

Prints a JSON line: which tensors differ from the checkpoint's, and how far the logits are from the expected ones.
Without a GPU the modules are built and loaded on the CPU, and compute nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

from tests.formats.megatron_ranks import cuda_is_cpu
from tests.formats.test_run_config import FUSIONS
from tests.te.ranks import let_modules_be_built

LIMIT = 200
"""Seconds, after which it says where it hangs."""


def main(checkpoint: str, expected: str, model_type: str) -> None:
    """One rank, with the modules that Megatron-Bridge takes by itself."""
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    import torch
    from megatron.core import parallel_state, tensor_parallel

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)
    else:
        cuda_is_cpu(setattr)
        let_modules_be_built()
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        if cuda:
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        model = load(checkpoint, model_type, cuda)
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        answer = {
            "wrong": wrong(checkpoint, state),
            "parameters": len([*model.parameters()]),
            "modules": sorted({type(part).__name__ for part in model.modules() if [*part.parameters(False)]}),
        }
        if cuda:
            answer["max"] = compare(model, expected)
        print(json.dumps(answer))
        torch.distributed.destroy_process_group()


def load(checkpoint: str, model_type: str, cuda: bool) -> Any:
    """The model that Megatron-Bridge makes of a checkpoint, less what needs APEX, and on the CPU a GPU."""
    from megatron.bridge.training import model_load_save
    from megatron.core.transformer.enums import AttnBackend

    load_config = model_load_save.load_model_config

    def without_fusions(path: str) -> tuple[Any, Any]:
        config, args = load_config(path)
        for name in ("gradient_accumulation_fusion",) if cuda else FUSIONS:
            setattr(config, name, False)
        if getattr(config, "attention_backend", None) is AttnBackend.flash:  # its kernels take no float32
            config.attention_backend = AttnBackend.unfused
        return config, args

    model_load_save.load_model_config = without_fusions
    how = {"model_type": model_type} if model_type else {}
    found = model_load_save.load_megatron_model(checkpoint, use_cpu_init=not cuda, **how)
    return (found[0] if isinstance(found, list) else found).eval()


def compare(model: Any, expected: str) -> float:
    """The largest difference of the logits, relative to the largest of them."""
    import torch
    from safetensors.torch import load_file

    content = load_file(expected)
    rows = content["tokens"].cuda()
    positions = torch.arange(rows.size(1), device="cuda")[None].expand(rows.size(0), -1)
    with torch.no_grad():
        logits = model.cuda()(rows, positions, None)[..., : content["logits"].size(-1)].cpu().double()
    difference = (logits - content["logits"].double()).abs().max().item()
    return float(difference / content["logits"].abs().max().item())


def wrong(checkpoint: str, state: dict[str, Any]) -> list[str]:
    """The tensors of the checkpoint that the model does not hold exactly."""
    import torch

    from ckptkit.checkpoints.opening import open_checkpoint
    from ckptkit.sharding.grid import Parallelism

    tensors = open_checkpoint(Path(checkpoint).parent).shard(grid=Parallelism(), tp_rank=0, spec="te")
    assert len(tensors) > 20

    def held(name: str, tensor: Any) -> bool:
        value = state[name].cpu() if name in state else None
        return value is not None and torch.equal(value[: len(tensor)], tensor[: len(value)])

    return [name for name, tensor in tensors.items() if not held(name, tensor)]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # NCCL's threads would keep the process
