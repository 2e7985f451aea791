"""Megatron-LM's own way into a checkpoint: its command line, `load_args_from_checkpoint` and `load_checkpoint`.

The wheel of megatron-core 0.19.2 holds that part of Megatron-LM. A job of `megatron_ranks` with the action
`megatron_lm` names the folder with the tracker file; its options go to `model_flags` and to the command line.
"""

from __future__ import annotations

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
    SHARED_FFN,
    VOCAB,
    WIDTH,
    Job,
    Ranks,
)

SEQUENCE = 16


def stored_arguments(model: str, tp: int = 1, pp: int = 1, ep: int = 1) -> dict[str, Any]:
    """What `args` of a checkpoint must say so that `--use-checkpoint-args` builds the model from it."""
    moe = {
        "num_experts": EXPERTS,
        "moe_ffn_hidden_size": EXPERT_FFN,
        "moe_shared_expert_intermediate_size": SHARED_FFN,
        "moe_router_topk": 2,
        "moe_layer_freq": 1,
        "moe_grouped_gemm": False,
    }
    return {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "seq_length": SEQUENCE,
        "max_position_embeddings": SEQUENCE,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "kv_channels": WIDTH,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "squared_relu": False,
        "swiglu": True,
        "untie_embeddings_and_output_weights": model != "tied",
        "apply_layernorm_1p": False,
        "normalization": "RMSNorm",
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "padded_vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 8,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        **(moe if model == "moe" else {}),
    }


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
    if model == "moe":
        values |= {
            "num-experts": EXPERTS,
            "moe-ffn-hidden-size": EXPERT_FFN,
            "moe-shared-expert-intermediate-size": SHARED_FFN,
            "moe-router-topk": 2,
        }
    switches = ["--group-query-attention", "--swiglu", "--disable-bias-linear", "--add-qkv-bias"]
    if model != "tied":
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
        "make-vocab-size-divisible-by": 8,
        "transformer-impl": "local",
        "distributed-backend": "gloo",
        "moe-token-dispatcher-type": "allgather",
        "dist-ckpt-strictness": job.strict,
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
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.global_vars import unset_global_variables

    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(job.world_size), LOCAL_RANK="0")
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.argv = ["megatron_lm", *_flags(job, ranks.cuda)]
    args = parse_and_validate_args()  # before there are process groups, as training does
    torch.distributed.init_process_group("gloo", store=store, rank=ranks.rank, world_size=job.world_size)
    try:
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
        torch.distributed.barrier()
    finally:
        unset_global_variables()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
