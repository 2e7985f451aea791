"""Real Megatron-Core models on a grid of processes: they save and load distributed checkpoints for the tests.

The program of a rank (see `rank_pool`): `python -m tests.formats.megatron_ranks RANK`. It is one because
`dist_checkpointing.save` starts processes that import the main module again. Every parameter has a value that only
its global name and place decide (`golden`), and shards are cut here with torch alone, so neither side judges itself.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.formats import hybrid_model
from tests.formats.rank_pool import RankProcesses, incoming

LAYERS, HIDDEN, HEADS, GROUPS, WIDTH, FFN, VOCAB = 4, 32, 4, 2, 8, 48, 96
EXPERTS, EXPERT_FFN, SHARED_FFN = 4, 16, 24


@dataclass(frozen=True)
class Job:
    """One save or load.

    Attributes:
        action: `save` or `load` a distributed checkpoint, `refuse` to; `save_torch` or `load_torch` mp_rank files; or
            `megatron_lm` (see the module of that name).
        folder: The checkpoint, without the tracker file (but with it for `megatron_lm`).
        model: `dense`, `tied` or `moe`; `mixed` is a `moe` whose first layer is dense. `qwen3`, `qwen3_tied` and
            `qwen3_moe` are models that exist at Hugging Face, too, and so is `gpt_oss` (see `golden_hf`).
        schema: `gpt`, or `hybrid` for the real HybridModel.
        strict: What `dist_checkpointing.load` gets. By default it returns every difference of keys, and a job that
            loads allows none but `LAST_NORMS`.
        metadata: What `sharded_state_dict` gets as `metadata`; for `megatron_lm`, `use_checkpoint_args`.
        layout: `pipeline_model_parallel_layout` of GPTModel.
        dp: Replicas, as data parallel ranks are.
    """

    action: str
    folder: str
    model: str = "dense"
    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int = 1
    dtype: str = "float32"
    strict: str = "return_all"
    schema: str = "gpt"
    metadata: dict[str, Any] = field(default_factory=dict)
    layout: str | None = None
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.ep * self.dp


def run(ranks: RankProcesses, jobs: list[Job]) -> list[str]:
    """Runs jobs one after the other.

    Returns:
        What went wrong with each: nothing, or the end of what the ranks said.
    """
    return [ranks.run(job.world_size, asdict(job)) for job in jobs]


def arguments(job: Job | None = None) -> dict[str, Any]:
    """What `args` says of the model of a job on its grid, as plain values; by default of a dense one on TP2 x PP2."""
    job = job or Job("save", "", tp=2, pp=2)
    hybrid = job.schema == "hybrid"
    moe = [is_moe(job.model, layer) for layer in range(LAYERS)]
    return {
        "num_layers": 2 * LAYERS if hybrid else LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "padded_vocab_size": VOCAB,
        "tensor_model_parallel_size": job.tp,
        "pipeline_model_parallel_size": job.pp,
        **({"virtual_pipeline_model_parallel_size": job.vpp} if job.vpp > 1 else {}),
        **({"expert_model_parallel_size": job.ep} if job.ep > 1 else {}),
        **({"pipeline_model_parallel_layout": job.layout} if job.layout is not None else {}),
        **({"hybrid_layer_pattern": hybrid_model.pattern(moe, job.pp * job.vpp)} if hybrid else {}),
    }


def golden(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """The values of a whole tensor, which its canonical name decides."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of a model."""
    sizes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
    }
    if not is_tied(model):
        sizes["output_layer.weight"] = (VOCAB, HIDDEN)
    rows = (HEADS + 2 * GROUPS) * WIDTH
    for layer in range(LAYERS):
        if is_gpt_oss(model):
            sizes.update({f"decoder.layers.{layer}.{name}": shape for name, shape in _gpt_oss(rows).items()})
            continue
        block = {
            "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
            "self_attention.linear_qkv.weight": (rows, HIDDEN),
            **({"self_attention.linear_qkv.bias": (rows,)} if has_extras(model) else {}),
            "self_attention.linear_proj.weight": (HIDDEN, HEADS * WIDTH),
            "self_attention.q_layernorm.weight": (WIDTH,),
            "self_attention.k_layernorm.weight": (WIDTH,),
            **(_moe(has_extras(model)) if is_moe(model, layer) else _mlp("mlp", FFN)),
        }
        if not is_moe(model, layer):
            block["mlp.linear_fc1.layer_norm_weight"] = (HIDDEN,)
        sizes.update({f"decoder.layers.{layer}.{name}": shape for name, shape in block.items()})
    return sizes


LAST_NORMS = {f"decoder.{norm}._extra_state" for norm in ("final_layernorm", "final_norm")}
"""States of the last norm, which these ranks' modules may not ask for, or not find in what they saved themselves.

That norm is Transformer Engine's where it is installed, in the local spec, too; but not in the spec of a whole block
(`get_gpt_decoder_block_spec`), which these ranks use, and which has a norm of its own.
"""


def is_gpt_oss(model: str) -> bool:
    """Whether heads have sinks, every linear layer has a bias, and tensor parallel ranks share no expert."""
    return model == "gpt_oss"


def is_moe(model: str, layer: int) -> bool:
    return model in ("moe", "qwen3_moe", "gpt_oss") or (model == "mixed" and layer > 0)


def is_tied(model: str) -> bool:
    return model in ("tied", "qwen3_tied")


def has_extras(model: str) -> bool:
    """Whether a model has what Qwen3 has not: biases of q, k and v, and shared experts beside the others."""
    return not model.startswith(("qwen3", "gpt_oss"))


def _mlp(prefix: str, ffn: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.linear_fc1.weight": (2 * ffn, HIDDEN), f"{prefix}.linear_fc2.weight": (HIDDEN, ffn)}


def _moe(shared: bool) -> dict[str, tuple[int, ...]]:
    experts: dict[str, tuple[int, ...]] = {}
    for expert in range(EXPERTS):
        experts[f"mlp.experts.linear_fc1.weight{expert}"] = (2 * EXPERT_FFN, HIDDEN)
        experts[f"mlp.experts.linear_fc2.weight{expert}"] = (HIDDEN, EXPERT_FFN)
    return {
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "mlp.router.weight": (EXPERTS, HIDDEN),
        **(_mlp("mlp.shared_experts", SHARED_FFN) if shared else {}),
        **experts,
    }


def _gpt_oss(rows: int) -> dict[str, tuple[int, ...]]:
    experts = _moe(shared=False)
    biases = {name.replace("weight", "bias"): shape[:1] for name, shape in experts.items() if "linear_fc" in name}
    return {
        "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": (rows, HIDDEN),
        "self_attention.linear_qkv.bias": (rows,),
        "self_attention.linear_proj.weight": (HIDDEN, HEADS * WIDTH),
        "self_attention.linear_proj.bias": (HIDDEN,),
        "self_attention.core_attention.softmax_offset": (HEADS,),
        "mlp.router.bias": (EXPERTS,),
        **experts,
        **biases,
    }


def weights(model: str, dtype: str = "float32") -> dict[str, Any]:
    """Canonical name -> values of every tensor of a model."""
    return {name: golden(name, shape, dtype) for name, shape in shapes(model).items()}


def shard(name: str, tensor: Any, rank: int, size: int) -> Any:
    """What tensor parallel rank `rank` holds of a tensor, by Megatron's partition rules."""
    import torch

    if re.search(r"\.bias\d+$", name):
        return tensor
    if re.search(r"linear_fc1\.weight\d*$", name):
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if re.search(r"(linear_qkv\.(weight|bias)|softmax_offset|word_embeddings\.weight|output_layer\.weight)$", name):
        return tensor.chunk(size)[rank]
    if re.search(r"(linear_proj\.weight|linear_fc2\.weight\d*)$", name):
        return tensor.chunk(size, dim=-1)[rank]
    return tensor


_LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def canonical(name: str, layer_numbers: list[int], job: Job, ep_rank: int) -> str:
    """The canonical name of a parameter of a local-spec model chunk."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        name = "decoder.final_layernorm.weight" if name == "decoder.final_norm.weight" else name
        return "embedding.word_embeddings.weight" if is_tied(job.model) and name == "output_layer.weight" else name
    layer, rest = layer_numbers[int(match[1])], match[2]
    if job.schema == "hybrid":
        assert rest.startswith(("mlp.", "pre_mlp_layernorm.") if layer % 2 else ("self_attention.", "input_layernorm."))
        layer //= 2
    if not (is_moe(job.model, layer) and rest == "pre_mlp_layernorm.weight"):
        rest = _LOCAL_NAMES.get(rest, rest)
    if expert := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", rest):
        rest = f"mlp.experts.{expert[2]}{int(expert[1]) + ep_rank * EXPERTS // job.ep}"
    return f"decoder.layers.{layer}.{rest}"


def cuda_is_cpu(replace: Callable[[Any, str, Any], object]) -> None:
    """Lets Megatron-Core run where there is no GPU; `replace` is `setattr`, or one that is undone later."""
    import torch

    replace(torch.cuda, "current_device", lambda: "cpu")
    replace(torch.cuda, "synchronize", lambda *args: None)
    replace(torch.cuda, "get_device_properties", lambda *args: SimpleNamespace(major=9, minor=0))
    replace(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)


def is_replicated(name: str) -> bool:
    """Whether tensor parallel ranks hold a tensor of Hugging Face alike."""
    return "norm" in name or name.endswith(("mlp.gate.weight", "o_proj.bias")) or ".router." in name


class Ranks:
    """One rank's part in the jobs."""

    def __init__(self, rank: int) -> None:
        import torch

        self.rank = rank
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.set_device(rank % torch.cuda.device_count())
        else:
            cuda_is_cpu(setattr)

    def run(self, job: Job, path: str) -> None:
        """Runs one job in process groups of its own, which meet in a file."""
        import torch
        from megatron.core import parallel_state, tensor_parallel

        store = torch.distributed.FileStore(path, job.world_size)
        if job.action == "megatron_lm":
            from tests.formats import megatron_lm

            megatron_lm.run(self, store, job)
            return
        torch.distributed.init_process_group("gloo", store=store, rank=self.rank, world_size=job.world_size)
        parallel_state.initialize_model_parallel(
            job.tp,
            job.pp,
            job.vpp if job.vpp > 1 else None,
            expert_model_parallel_size=job.ep,
            expert_tensor_parallel_size=1 if is_gpt_oss(job.model) else None,
        )
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
        try:
            getattr(self, job.action)(job, self.build(job))
            torch.distributed.barrier()
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()

    def build(self, job: Job) -> list[Any]:
        """The model chunks of this rank."""
        import torch
        from megatron.core.transformer.transformer_config import TransformerConfig

        dtype = getattr(torch, job.dtype)
        moe = {
            "num_moe_experts": EXPERTS,
            "moe_ffn_hidden_size": EXPERT_FFN,
            "moe_shared_expert_intermediate_size": SHARED_FFN if has_extras(job.model) else None,
            "moe_token_dispatcher_type": "allgather",
            "moe_layer_freq": [0, *[1] * (LAYERS - 1)] if job.model == "mixed" else 1,
        }
        gpt_oss = {
            "add_bias_linear": True,
            "qk_layernorm": False,
            "softmax_type": "learnable",
            "expert_tensor_parallel_size": 1,
        }
        options: dict[str, Any] = dict(
            num_layers=2 * LAYERS if job.schema == "hybrid" else LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            kv_channels=WIDTH,
            ffn_hidden_size=FFN,
            normalization="RMSNorm",
            qk_layernorm=True,
            add_bias_linear=False,
            add_qkv_bias=has_extras(job.model),
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            tensor_model_parallel_size=job.tp,
            pipeline_model_parallel_size=job.pp,
            virtual_pipeline_model_parallel_size=job.vpp if job.vpp > 1 else None,
            pipeline_model_parallel_layout=job.layout,
            expert_model_parallel_size=job.ep,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=not self.cuda,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )
        options |= moe if is_moe(job.model, LAYERS - 1) else {}
        config = TransformerConfig(**options | (gpt_oss if is_gpt_oss(job.model) else {}))
        return self.hybrid_chunks(job, config) if job.schema == "hybrid" else self.chunks(job, config)

    def hybrid_chunks(self, job: Job, config: Any) -> list[Any]:
        """The model chunks of this rank of the real HybridModel."""
        from megatron.core import parallel_state

        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        chunks = []
        for stage in range(job.vpp):
            model = hybrid_model.build(
                config,
                is_moe(job.model, 0),
                hybrid_model.pattern([is_moe(job.model, layer) for layer in range(LAYERS)], job.pp * job.vpp),
                stage if job.vpp > 1 else None,
                vocab_size=VOCAB,
                max_sequence_length=16,
                pre_process=pp_rank == 0 and stage == 0,
                post_process=pp_rank == job.pp - 1 and stage == job.vpp - 1,
                share_embeddings_and_output_weights=is_tied(job.model),
            )
            chunks.append(model.cuda() if self.cuda else model)
        return chunks

    def chunks(self, job: Job, config: Any) -> list[Any]:
        """The model chunks of this rank with a config of Megatron-Core, local spec."""
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        chunks = []
        for stage in range(job.vpp):
            vp_stage = stage if job.vpp > 1 else None
            spec = get_gpt_decoder_block_spec(config, False, vp_stage=vp_stage)
            model = GPTModel(
                config=config,
                transformer_layer_spec=spec,
                vocab_size=VOCAB,
                max_sequence_length=16,
                pre_process=pp_rank == 0 and stage == 0,
                post_process=pp_rank == job.pp - 1 and stage == job.vpp - 1,
                share_embeddings_and_output_weights=is_tied(job.model),
                position_embedding_type="none",
                vp_stage=vp_stage,
            )
            chunks.append(model.cuda() if self.cuda else model)
        return chunks

    def expected(self, job: Job, chunk: Any) -> dict[str, Any]:
        """Parameter name -> the values that this rank must hold."""
        from megatron.core import parallel_state

        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        ep_rank = parallel_state.get_expert_model_parallel_rank()
        tp_rank, whole = parallel_state.get_tensor_model_parallel_rank(), weights(job.model, job.dtype)
        result = {}
        for name, _ in chunk.named_parameters():
            key = canonical(name, layers, job, ep_rank)
            cut = not (is_gpt_oss(job.model) and ".experts." in name)
            result[name] = shard(key, whole[key], tp_rank, job.tp) if cut else whole[key]
        return result

    def sharded(self, job: Job, chunks: list[Any]) -> dict[str, Any]:
        """The sharded state dict of all chunks, keyed as Megatron-LM keys it."""
        names = self.keys(chunks)
        metadata = dict(job.metadata)
        if metadata:
            from megatron.core import parallel_state

            metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {
            name: chunk.sharded_state_dict(metadata=metadata or None) for name, chunk in zip(names, chunks, strict=True)
        }

    def save(self, job: Job, chunks: list[Any]) -> None:
        """Saves golden values."""
        import argparse

        import torch
        from megatron.core import dist_checkpointing

        self.fill(job, chunks)
        state = self.sharded(job, chunks)
        state["args"] = argparse.Namespace(**arguments(job), params_dtype=torch.bfloat16)
        state.update(checkpoint_version=3.0, iteration=7)
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        content = {"singleton_local_shards": bool(job.metadata.get("singleton_local_shards"))}
        dist_checkpointing.save(state, job.folder, content_metadata=content)

    def fill(self, job: Job, chunks: list[Any]) -> None:
        """Gives every parameter its golden values."""
        import torch

        with torch.no_grad():
            for chunk in chunks:
                expected = self.expected(job, chunk)
                for name, parameter in chunk.named_parameters():
                    parameter.copy_(expected[name])

    def file(self, job: Job) -> Path:
        """This rank's file of a checkpoint of format `torch`."""
        from megatron.core import parallel_state

        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" if job.pp > 1 else ""
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if job.ep > 1 else ""
        return Path(job.folder) / name / "model_optim_rng.pt"

    def save_torch(self, job: Job, chunks: list[Any]) -> None:
        """Saves golden values as Megatron-LM's format `torch`."""
        import argparse

        import torch

        self.fill(job, chunks)
        state: dict[str, Any] = {"args": argparse.Namespace(**arguments(job)), "checkpoint_version": 3.0}
        state.update(zip(self.keys(chunks), (chunk.state_dict() for chunk in chunks), strict=True))
        file = self.file(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)

    def load_torch(self, job: Job, chunks: list[Any]) -> None:
        """Loads mp_rank files strictly, and compares every parameter with its golden values, bit for bit."""
        import torch

        state = torch.load(self.file(job), weights_only=True)  # megatron-core has registered what `args` consist of
        for key, chunk in zip(self.keys(chunks), chunks, strict=True):
            self.forget(chunk)
            chunk.load_state_dict(state[key], strict=True)
            self.compare(job, chunk)

    @staticmethod
    def keys(chunks: list[Any]) -> list[str]:
        """What Megatron-LM calls the chunks of a rank."""
        return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]

    def load(self, job: Job, chunks: list[Any]) -> None:
        """Loads, and compares every parameter with its golden values, bit for bit."""
        from megatron.core import dist_checkpointing

        for chunk in chunks:
            self.forget(chunk)
        state = self.sharded(job, chunks)
        loaded = dist_checkpointing.load(state, job.folder, strict=job.strict)
        if job.strict == "return_all":
            loaded, *differences = loaded
            assert set().union(*differences) <= LAST_NORMS, (job, differences)
        for name, chunk in zip(state, chunks, strict=True):
            chunk.load_state_dict(loaded.get(name, {}), strict=True)
            self.compare(job, chunk)
        layers = 2 * LAYERS if job.schema == "hybrid" else LAYERS
        assert loaded["args"].num_layers == layers, loaded["args"]

    def wrapped(self, job: Job, chunks: list[Any]) -> list[Any]:
        """The chunks as a training program has them: replicas with a distributed optimizer, which gathers on demand."""
        if job.dp == 1:
            return chunks
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        config = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )
        return [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]

    def save_hf(self, job: Job, chunks: list[Any]) -> None:
        """Saves golden values with ckptkit, straight from the running model."""
        import ckptkit

        self.fill(job, chunks)
        saved = ckptkit.save_hf(self.wrapped(job, chunks), job.folder, **job.metadata)
        holds = any(True for chunk in chunks for _ in chunk.parameters())  # a stage of a layout may be empty
        assert holds <= saved.bytes_written < saved.bytes_total or job.world_size == 1, saved
        assert saved.bytes_total == sum(saved.files.values()), saved

    def load_hf(self, job: Job, chunks: list[Any]) -> None:
        """Fills the running model with ckptkit, and compares every parameter with its golden values, bit for bit."""
        import ckptkit

        for chunk in chunks:
            self.forget(chunk)
        ckptkit.load_hf(self.wrapped(job, chunks), job.folder, **job.metadata)
        for chunk in chunks:
            self.compare(job, chunk)

    def slices(self, job: Job, chunks: list[Any]) -> None:
        """What the ranks hold of Hugging Face's tensors, put together, is every element once."""
        import torch

        import ckptkit
        from tests.formats.golden_hf import hf_weights

        self.fill(job, chunks)
        mine = list(ckptkit.state_dict_of(self.wrapped(job, chunks), **job.metadata))
        memory = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
        copied = {part.name for part in mine if part.local.untyped_storage().data_ptr() not in memory}
        assert all(is_gpt_oss(job.model) and "experts." in name for name in copied), copied
        everyone: list[Any] = [None] * job.world_size
        parts = [(part.name, part.shape, part.offsets, part.local.cpu().clone()) for part in mine]
        torch.distributed.all_gather_object(everyone, parts)
        expected = hf_weights(job.model, job.dtype)
        found = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
        elements = 0
        for name, shape, offsets, local in (part for rank in everyone for part in rank):
            assert shape == tuple(expected[name].shape)
            box = tuple(slice(start, start + size) for start, size in zip(offsets, local.shape, strict=True))
            assert torch.isnan(found[name][box]).all() or job.dp > 1 or is_replicated(name), name
            found[name][box] = local
            elements += local.numel()
        wrong = [name for name, value in expected.items() if not torch.equal(value, found[name])]
        assert not wrong, wrong

    def differing(self, job: Job, chunks: list[Any]) -> None:
        """A weight that two ranks should hold alike, and do not, is not saved; nothing is."""
        import torch

        import ckptkit
        from ckptkit.errors import InputError

        self.fill(job, chunks)
        if self.rank == 1:
            with torch.no_grad():
                chunks[-1].decoder.layers[0].self_attention.q_layernorm.weight.add_(1)
        try:
            ckptkit.save_hf(chunks, job.folder, **job.metadata)
        except InputError as error:
            assert "should be equal" in str(error), error
        else:
            raise AssertionError("it was saved")
        assert not Path(job.folder).exists()

    def other_model(self, job: Job, chunks: list[Any]) -> None:
        """A checkpoint of another model is refused by all ranks, and the model stays as it is."""
        import ckptkit
        from ckptkit.errors import InputError

        self.fill(job, chunks)
        try:
            ckptkit.load_hf(chunks, job.folder)
        except InputError as error:
            assert "does not fit" in str(error), error
        else:
            raise AssertionError("it was loaded")
        for chunk in chunks:
            self.compare(job, chunk)

    def forget(self, chunk: Any) -> None:
        """Leaves nothing in the parameters that could pass for loaded."""
        import torch

        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))

    def compare(self, job: Job, chunk: Any) -> None:
        """Whether every parameter has its golden values, bit for bit."""
        import torch

        expected = self.expected(job, chunk)
        wrong = [key for key, value in chunk.named_parameters() if not torch.equal(value.cpu(), expected[key])]
        assert not wrong, f"rank {self.rank} of {job}: {wrong}"

    def refuse(self, job: Job, chunks: list[Any]) -> None:
        """Loads something that Megatron-Core must refuse."""
        from megatron.core import dist_checkpointing

        try:
            dist_checkpointing.load(self.sharded(job, chunks), job.folder, strict=job.strict)
        except Exception as error:
            print(f"refused: {type(error).__name__}: {str(error)[:300]}")
            return
        raise AssertionError(f"rank {self.rank}: {job} was not refused")


def main(rank: int) -> int:
    """Runs jobs until there are no more, or one fails."""
    warnings.simplefilter("ignore")
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

    ranks = Ranks(rank)
    for job, store in incoming():
        try:
            ranks.run(Job(**job), store)
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
