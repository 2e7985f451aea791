"""Weights that lie in a Hugging Face directory twice: in two formats, or once whole and once in shards.

transformers reads the first kind that is there. Many repositories hold the same weights as safetensors and as pickles;
that is no choice. Others would be chosen in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptkit.errors import CkptkitError, InputError
from ckptkit.formats.hf import Shards, read_shard, weight_sets
from ckptkit.io.regular import open_header
from ckptkit.tensors import Literal, Region, Tensor

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_SAMPLE = 2048
_OPTIONAL = ("lm_head.weight", "inv_freq")
_AWAY = "move the one that is not wanted out of the folder"


def check_second_weights(path: Path, shards: Shards) -> list[str]:
    """Compares the weights that are read with others in the directory, by names, shapes, types and sampled values.

    Returns:
        Notes about those that are the same.

    Raises:
        InputError: There are others, or adapters that may or may not have been merged.
    """
    (used, _), *others = weight_sets(path, shards.names) or [("", [])]
    if adapter := next((name for name in _ADAPTERS if (path / name).is_file()), None):
        what = f"two sets of weights, {used} and {adapter}: nothing says whether the adapters are merged"
        raise InputError(what, where=path, hint="move the adapters away if they are, else merge them with peft")
    notes = []
    for name, files in others:
        try:
            tensors = {key: tensor for file in files for key, tensor in read_shard(path / file)[0].items()}
        except CkptkitError as error:
            notes.append(f"{name}, which {used} outranks, cannot be read: {error.what}")
            continue
        if difference := _difference(shards.tensors, tensors):
            what = f"two sets of weights, {used} and {name}, which differ ({difference})"
            raise InputError(what, where=path, hint=_AWAY)
        notes.append(f"{name} holds the same weights as {used} (compared by samples), and is not read")
    return notes


def _difference(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str | None:
    alone = sorted(name for name in ours.keys() ^ others.keys() if not name.endswith(_OPTIONAL))
    if alone:
        return f"one has no {alone[0]}"
    for name in ours.keys() & others.keys():
        one, other = ours[name], others[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"{name} is {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        if _sample(one) != _sample(other):
            return f"the values of {name}"
    return None


def _sample(tensor: Tensor) -> bytes:
    """Bytes from the middle of a tensor."""
    count = min(tensor.numel, _SAMPLE // tensor.dtype.itemsize)
    start = (tensor.numel - count) // 2
    found = b""
    for piece in tensor.reshape((tensor.numel,)).rows(start, start + count).runs():
        if isinstance(piece, Region):
            with open_header(piece.file) as file:
                file.seek(piece.offset)
                found += file.read(piece.width * piece.rows)
        elif isinstance(piece, Literal) and isinstance(piece.data, bytes):
            found += piece.data[piece.offset : piece.offset + piece.width * piece.rows]
    return found
