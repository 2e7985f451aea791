"""Arguments by which stored bytes are laid out, and that are not read: refused by name rather than overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit.errors import UnsupportedError

LAYOUTS: Mapping[str, str] = {
    "mtp_num_layers": "layers of multi-token prediction",
    "heterogeneous_layers_config_path": "layers whose sizes are in a file of their own",
    "heterogeneous_layers_config_encoded_json": "layers whose sizes are in a JSON of their own",
    "moe_single_grouped_weight": "the weights of all experts as one parameter",
    "moe_single_grouped_bias": "the biases of all experts as one parameter",
    "moe_shared_expert_glu_interleave_size": "shared experts whose gate and up rows alternate",
}
"""Argument -> what it lays out, in every format; without it or with a value that is false, there is no such thing."""

SHARD_LAYOUTS: Mapping[str, str] = {
    "standalone_embedding_stage": "a pipeline stage for the embedding alone",
    "encoder_pipeline_model_parallel_size": "pipeline stages of an encoder",
    "encoder_tensor_model_parallel_size": "an encoder with a tensor parallel size of its own",
    "moe_extended_tp": "experts that are split over expert parallel ranks, too",
}
"""The same for files of ranks alone: a distributed checkpoint holds whole tensors. Releases until 0.12 have these."""


def refuse_unread_layouts(args: Mapping[str, Any], *, sharded: bool) -> None:
    """Names the argument, if there is one, by which stored bytes are laid out in a way that is not read.

    Args:
        args: Stored arguments.
        sharded: Whether the files are those of ranks.

    Raises:
        UnsupportedError: There is such an argument.
    """
    known = {**LAYOUTS, **(SHARD_LAYOUTS if sharded else {})}
    if found := [name for name in known if args.get(name)]:
        texts = (f"{name} {args[name]!r} ({known[name]})" for name in found)
        raise UnsupportedError(
            f"the checkpoint's args lay out its weights in a way that is not read: {'; '.join(texts)}",
            hint="export it to Hugging Face with the tool that wrote it, and convert that",
        )
