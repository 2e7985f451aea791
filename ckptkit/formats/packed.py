"""The packed format: unsharded Megatron tensors (fused QKV, fused gate/up) in safetensors files, without ranks.

The files are called as in a Hugging Face directory (`model.safetensors`, or shards with an index). Beside them,
`megatron_args.json` holds the `args` of Megatron-LM. There is no config.json, so no program takes it for a Hugging Face
model. (The packed format has nothing to do with packed inputs, which are sequences joined in one row.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

from ckptkit.formats.hf import Shards, lay_out_shards, read_shards
from ckptkit.formats.json_files import read_json
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor

ARGS = "megatron_args.json"
_STARTS = ("decoder.", "embedding.", "language_model.decoder.", "language_model.embedding.")


@dataclass(frozen=True)
class PackedFiles:
    """An opened directory of the packed format: Megatron names with global layer numbers -> tensors, and the `args`."""

    path: Path
    tensors: dict[str, Tensor]
    args: dict[str, Any]


def is_packed(names: Iterable[str]) -> bool:
    """Whether tensor names are Megatron's."""
    return any(map(methodcaller("startswith", _STARTS), names))


def open_packed(path: Path, shards: Shards | None = None) -> PackedFiles:
    """Opens a directory of the packed format; only headers are read.

    Args:
        path: The directory.
        shards: The result of `read_shards`, if it is known already.

    Raises:
        InputError: A file is missing or damaged.
    """
    args = read_json(path / ARGS) if (path / ARGS).is_file() else {}
    return PackedFiles(path, (shards or read_shards(path)).tensors, args)


def lay_out_packed(tensors: Mapping[str, Tensor], args: Mapping[str, Any], shard_size: int) -> list[OutputFile]:
    """The files of a model in the packed format.

    Args:
        tensors: Megatron name -> whole tensor.
        args: Arguments, JSON values only.
        shard_size: Largest size of a shard in bytes.
    """
    text = json.dumps(args, indent=2, sort_keys=True).encode() + b"\n"
    return [*lay_out_shards(tensors, shard_size), OutputFile.small(ARGS, text)]
