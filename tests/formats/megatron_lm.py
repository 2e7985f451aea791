"""Megatron-LM's own way into a checkpoint: its command line, `load_args_from_checkpoint` and `load_checkpoint`.

The wheel of megatron-core 0.19.2 holds that part of Megatron-LM. A job of `megatron_ranks` with the action
`megatron_lm` names the folder with the tracker file; its options go to `model_flags` and to the command line. Only
models that are Hugging Face's, too, are loaded so: what is converted has the arguments that ckptkit writes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from tests.formats.megatron_ranks import (
    EXPERT_FFN,
    EXPERTS,
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDTH,
    Job,
    Ranks,
    is_moe,
    is_tied,
)

SEQUENCE = 16
DIVISIBLE_BY = 8


def model_flags(model: str) -> list[str]:
    """The same, as somebody types it who does not use `--use-checkpoint-args`."""
    values = {
        "num-layers": LAYERS,
        "hidden-size": HIDDEN,
        "ffn-hidden-size": FFN,
        "seq-length": SEQUENCE,
        "max-position-embeddings": SEQUENCE,
        "num-attention-heads": HEADS,
        "num-query-groups": GROUPS,
        "kv-channels": WIDTH,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    if is_moe(model, 0):
        values |= {"num-experts": EXPERTS, "moe-ffn-hidden-size": EXPERT_FFN, "moe-router-topk": 2}
    switches = ["--group-query-attention", "--swiglu", "--disable-bias-linear"]
    if not is_tied(model):
        switches.append("--untie-embeddings-and-output-weights")
    return [*switches, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def _flags(job: Job, cuda: bool) -> list[str]:
    """The command line of a job: the model, or `--use-checkpoint-args`; and what this environment asks for."""
    flags = ["--use-checkpoint-args"] if job.metadata.get("use_checkpoint_args") else model_flags(job.model)
    values = {
        "load": job.folder,
        "tensor-model-parallel-size": job.tp,
        "pipeline-model-parallel-size": job.pp,
        "expert-model-parallel-size": job.ep,
        "micro-batch-size": 1,
        "train-iters": 1,
        "lr": 0.001,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": VOCAB - 1,
        "make-vocab-size-divisible-by": DIVISIBLE_BY,
        "transformer-impl": "local",
        "distributed-backend": "gloo",
        "moe-token-dispatcher-type": "allgather",
        "dist-ckpt-strictness": job.strict,
        "ckpt-format": job.metadata.get("ckpt_format", "torch_dist"),
    }
    switches = [
        "--qk-layernorm",
        "--exit-on-missing-checkpoint",
        "--no-masked-softmax-fusion",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
        "--no-gradient-accumulation-fusion",
        "--no-persist-layer-norm",
        "--no-rope-fusion",
        *([] if cuda else ["--use-cpu-initialization"]),
    ]
    return [*flags, *switches, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def run(ranks: Ranks, store: Any, job: Job) -> None:
    """One rank of a job: arguments, model, weights; every parameter must have its golden values, bit for bit."""
    import torch
    from megatron.core import parallel_state
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import unset_global_variables

    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(job.world_size), LOCAL_RANK="0")
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.argv = ["megatron_lm", *_flags(job, ranks.cuda)]
    args = parse_and_validate_args()  # before there are process groups, as training does
    torch.distributed.init_process_group("gloo", store=store, rank=ranks.rank, world_size=job.world_size)
    try:
        with contextlib.nullcontext() if ranks.cuda else _cuda_is_cpu():
            _load(ranks, job, args)
        torch.distributed.barrier()
    finally:
        unset_global_variables()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _load(ranks: Ranks, job: Job, args: Any) -> None:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.checkpointing import load_checkpoint

    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
    )
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    assert args.padded_vocab_size == VOCAB, args.padded_vocab_size
    (chunk,) = ranks.chunks(job, core_transformer_config_from_args(args))
    ranks.forget(chunk)
    iteration, _ = load_checkpoint([chunk], None, None, strict=True)
    assert iteration == 0, iteration
    ranks.compare(job, chunk)


def _cuda_is_cpu() -> Any:
    """Makes tensors on the CPU where Megatron-LM asks for `device="cuda"`, as it does to agree on an iteration."""
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    return OnCpu()
