"""Unsharded Megatron tensors (fused QKV, fused gate/up) in safetensors: one model, no ranks.

The weights are named as Hugging Face names them (`model.safetensors`, or shards with an index), beside
`megatron_args.json` with what Megatron-LM would keep as `args`. There is no config.json, so nothing takes it for a
Hugging Face model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptkit.formats.hf import Shards, lay_out_shards, read_shards
from ckptkit.formats.json_files import read_json
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor

ARGS = "megatron_args.json"


@dataclass(frozen=True)
class PackedFiles:
    """An opened packed directory: Megatron names with global layer numbers -> tensors, and the stored arguments."""

    path: Path
    tensors: dict[str, Tensor]
    args: dict[str, Any]


def is_packed(names: Iterable[str]) -> bool:
    """Whether tensor names are Megatron's."""
    return any(name.removeprefix("language_model.").startswith(("decoder.", "embedding.")) for name in names)


def open_packed(path: Path, shards: Shards | None = None) -> PackedFiles:
    """Opens a packed directory; only headers are read.

    Args:
        path: The directory.
        shards: What `read_shards` gave for it, if that was asked before.

    Raises:
        InputError: A file is missing or damaged.
    """
    args = read_json(path / ARGS) if (path / ARGS).is_file() else {}
    return PackedFiles(path, (shards or read_shards(path)).tensors, args)


def lay_out_packed(tensors: Mapping[str, Tensor], args: Mapping[str, Any], shard_size: int) -> list[OutputFile]:
    """The files of a packed model.

    Args:
        tensors: Megatron name -> whole tensor.
        args: Arguments, JSON values only.
        shard_size: Largest size of a shard in bytes.
    """
    text = json.dumps(args, indent=2, sort_keys=True).encode() + b"\n"
    return [*lay_out_shards(tensors, shard_size), OutputFile.small(ARGS, text)]
