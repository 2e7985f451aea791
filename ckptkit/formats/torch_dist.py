"""Megatron-Core's distributed checkpoint, `--ckpt-format torch_dist`: whole tensors in chunks, whatever the grid.

Keys have no ranks. If all layers are alike, they are stacked on a new first axis
(`decoder.layers.mlp.linear_fc2.weight`, [layers, ...]); otherwise each key has its layer number. Experts are stacked on
the axis after the layers. The functions here take and return names with numbers:
`decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}`.

Source: `sharded_state_dict` and `apply_swiglu_sharded_factory` of megatron-core 0.16.1 and 0.19.2; `common_state` and
the two forms of metadata.json were measured on files of both.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.dcp.reading import DcpFiles, archives_of_dcp, checks_of_dcp, is_dcp, open_dcp
from ckptkit.formats.dcp.writing import NewChunk, NewObject, lay_out_dcp
from ckptkit.formats.format import Format
from ckptkit.formats.json_files import read_json
from ckptkit.formats.torch_file.pickles import Namespace, TorchDType, lay_out_torch_file, read_torch_file
from ckptkit.formats.torch_legacy import TRACKER, OptimizerState, plain_values
from ckptkit.io.plan import OutputFile
from ckptkit.sharding.grid import Parallelism
from ckptkit.tensors import Literal, Tensor, vstack

FOLDER = "release"
CONFIG, COMMON = "metadata.json", "common.pt"
_COMMON_STATE = "common_state/shard_0_1"

_LAYER = re.compile(r"(.*?\blayers)\.(\d+)\.(.+)")
_STACKED = re.compile(r"(?!.*\blayers\.\d+\.)(.*?\blayers)\.(.+)")
# A module, its adapter, or the module inside of one that adapts it.
_MODULE = r"[a-z]\w*(?:\.adapter(?:\.adapter_\w+)?\.linear_(?:in|out)|\.lora_[AB]\.\w+|\.base_layer)?"
_STORED_EXPERT = re.compile(rf"(.*\.experts)\.experts\.(?:(\d+)\.)?({_MODULE})\.(weight|bias)(_[wv])?")
_EXPERT = re.compile(rf"(.*\.experts)\.({_MODULE}\.(?:weight|bias|_extra_state))(\d+)")
_HALF = re.compile(r"(.*\.(?:weight|bias)\d*)_([wv])")
_NOT_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine|opt_param_scheduler")
_ATTENTION, _STACKED_BLOCK = "self_attention.", "decoder.layers"  # layers of multi-token prediction are not stacked
_GROUPED = re.compile(r"((?:.*\.)?self_attention)(_[a-z]+)\.")


@dataclass(frozen=True)
class TorchDistFiles:
    """An opened checkpoint.

    Attributes:
        path: The folder with metadata.json.
        root: The folder with the tracker file, or `path` itself.
        args: `args` as plain values.
        tensors: Name with global layer and expert numbers -> whole tensor, vocabulary padding included.
        stacked: Whether its layers were stacked.
        ignored: Keys that are not of the model (optimizer and random states).
        optimizer: How much that is.
    """

    path: Path
    root: Path
    args: dict[str, Any]
    tensors: dict[str, Tensor]
    stacked: bool
    ignored: tuple[str, ...]
    optimizer: OptimizerState


def is_torch_dist(path: Path) -> bool:
    """Whether a folder says of itself that it is a distributed checkpoint of Megatron-Core."""
    return (path / CONFIG).is_file() and "sharded_backend" in read_json(path / CONFIG)


def open_torch_dist(path: Path, root: Path, wanted: Callable[[str], bool] = lambda key: True) -> TorchDistFiles:
    """Opens a checkpoint; reads metadata and the headers of the model's chunks.

    Args:
        path: The folder with metadata.json.
        root: The folder with the tracker file, or `path` itself.
        wanted: Key -> whether it is read. Nothing of other keys is read, not even headers.

    Raises:
        InputError: Files are missing or damaged, or chunks do not make up their tensors.
        UnsupportedError: Another backend than torch_dist wrote it.
    """
    backend = read_json(path / CONFIG).get("sharded_backend")
    if backend != "torch_dist":
        raise UnsupportedError(
            f"distributed checkpoint of backend {str(backend)[:40]!r}",
            where=path,
            hint="convert it to torch_dist with the megatron-core that wrote it",
        )
    if not is_dcp(path):
        raise InputError("no .metadata", where=path, hint="fetch or copy it again (its name starts with a dot)")
    files = open_dcp(path)
    of_model = [key for key in files.tensors if not _NOT_MODEL.match(key)]
    keys = [key for key in of_model if wanted(key)]
    files.expect(keys)
    found: dict[str, Tensor] = {}
    for key in keys:
        for name, tensor in _canonical(files, key):
            if name in found:
                raise InputError(f"{name} is stored twice (once as {key})", where=path)
            found[name] = tensor
    return TorchDistFiles(
        path,
        root,
        _read_args(files),
        _join_halves(found, path),
        any(_STACKED.fullmatch(key) for key in keys),
        tuple(sorted(files.tensors.keys() - set(of_model))),
        optimizer_state(files, files.tensors.keys() - set(of_model)),
    )


def holds_model(path: Path) -> bool:
    """Whether a folder is a distributed checkpoint with tensors of a model, and not of an optimizer alone."""
    return is_torch_dist(path) and is_dcp(path) and not all(_NOT_MODEL.match(key) for key in open_dcp(path).tensors)


def optimizer_state(files: DcpFiles, keys: Iterable[str]) -> OptimizerState:
    """The size of tensors that do not belong to the model, from `.metadata` alone; their chunks are not read."""
    found = [files.tensors[key] for key in keys]
    sizes = (prod(stored.shape) * stored.dtype.dtype.itemsize for stored in found if stored.dtype.dtype is not None)
    return OptimizerState(len(found), sum(sizes))


def _canonical(files: DcpFiles, key: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of single layers and experts that a stored one consists of."""
    stack = _STACKED.fullmatch(key)
    expert = _STORED_EXPERT.fullmatch(key)
    axes = int(stack is not None) + int(expert is not None and expert[2] is None)
    for index, tensor in files.parts(key, axes):
        name = key if stack is None else f"{stack[1]}.{index[0]}.{stack[2]}"
        if match := _STORED_EXPERT.fullmatch(name):
            prefix, number, module, kind, half = match.groups(default="")
            name = f"{prefix}.{module}.{kind}{int(number) if number else index[-1]}{half}"
        yield name, tensor


def without_group(name: str) -> str:
    """A name without the suffix of attention that is stacked separately (`self_attention_sliding`)."""
    return _GROUPED.sub(r"\1.", name)


def ungrouped(tensors: Mapping[str, Tensor], groups: Sequence[str], stacked: bool, where: Path) -> dict[str, Tensor]:
    """Tensors of attention that was stacked separately for each kind -> the names and numbers of their layers.

    Args:
        tensors: Names as `open_torch_dist` gives them -> tensors.
        groups: Suffix of `self_attention` in the keys of each layer.
        stacked: Whether layers were stacked, so that their numbers count within their kind.
        where: For messages.

    Raises:
        InputError: The kind of a layer is not the one in its keys.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        group = match and _GROUPED.match(match[3])
        if match is None or not group:
            found[name] = tensor
            continue
        of_kind = [number for number, suffix in enumerate(groups) if suffix == group[2]]
        layers = of_kind if stacked else range(len(groups))
        number = int(match[2])
        if number >= len(layers) or layers[number] not in of_kind:
            raise InputError(f"{name}: the config has {len(of_kind)} layers with this attention", where=where)
        found[f"{match[1]}.{layers[number]}.{without_group(match[3])}"] = tensor
    return found


def _join_halves(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Joins gate (`_w`) and up (`_v`) where a writer kept them apart (`singleton_local_shards`)."""
    whole: dict[str, Tensor] = {}
    for name, tensor in found.items():
        match = _HALF.fullmatch(name)
        if match is None:
            whole[name] = tensor
        elif match[2] == "w":
            up = found.get(f"{match[1]}_v")
            if up is None or up.shape != tensor.shape or up.dtype != tensor.dtype:
                raise InputError(f"{name} has no counterpart {match[1]}_v of its shape and dtype", where=path)
            whole[match[1]] = vstack([tensor, up])
        elif f"{match[1]}_w" not in found:
            raise InputError(f"{name} has no counterpart {match[1]}_w", where=path)
    return whole


def _read_args(files: DcpFiles) -> dict[str, Any]:
    """`args` of the common state: in common.pt up to 0.18, one of the objects since."""
    if (files.path / COMMON).is_file():
        state, where = read_torch_file(files.path / COMMON), files.path / COMMON
    elif _COMMON_STATE in files.objects:
        found, where = files.object(_COMMON_STATE), files.path
        state = found[0] if isinstance(found, list) and found else None
    else:
        return {}
    if not isinstance(state, dict):
        raise InputError("the common state is not a dictionary", where=where)
    args = state.get("args")
    return plain_values(args.fields) if isinstance(args, Namespace) else {}


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of a model to write.

    Attributes:
        name: Its name with global layer and expert numbers.
        tensor: The whole of it, vocabulary padding included.
        axis: The axis that tensor parallel ranks divide (negative: from the last), or None if all hold all of it.
        blocks: Equal parts along that axis which are divided each for itself: 2 for gate and up; 0: unequal ones.
        pp_rank: The pipeline rank that holds it.
        states: Names of the empty objects beside it that strict loading asks for, with the same numbers.
    """

    name: str
    tensor: Tensor
    axis: int | None = None
    blocks: int = 1
    pp_rank: int = 0
    states: tuple[str, ...] = ()


def stacks(shapes: Mapping[str, tuple[int, ...]], args: Mapping[str, Any], groups: Sequence[str] = ()) -> bool:
    """Whether stock Megatron-Core stacks the layers of a model: they are alike, and its arguments do not say otherwise.

    Source: `TransformerBlock.sharded_state_dict`.

    Args:
        shapes: Canonical name -> shape.
        args: Arguments of the model.
        groups: Suffix of `self_attention` in the keys of each layer, where different attention is stacked separately.
    """
    if any(args.get(key) for key in ("hetereogenous_dist_checkpoint", "heterogeneous_layers_config_path")):
        return False
    for key in ("moe_layer_freq", "linear_attention_freq"):
        value = args.get(key)
        if isinstance(value, list) or (isinstance(value, int) and value > 1):
            return False
    layers: dict[tuple[str, str, int], set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    for name, shape in shapes.items():
        if match := _LAYER.fullmatch(name):
            number = int(match[2])
            layers[match[1], _group(match[3], groups, number), number].add((match[3], shape))
    kinds = {(block, group, frozenset(content)) for (block, group, _), content in layers.items()}
    return len(kinds) == len({(block, group) for block, group, _ in layers})


def _group(rest: str, groups: Sequence[str], layer: int) -> str:
    """The suffix of `self_attention` for a name (without its layer number), or an empty string."""
    return groups[layer] if groups and rest.startswith(_ATTENTION) else ""


def lay_out_torch_dist(
    tensors: Sequence[GlobalTensor],
    args: Mapping[str, Any],
    *,
    dtype: str,
    grid: Parallelism = Parallelism(),  # noqa: B008  frozen
    stacked: bool | None = None,
    groups: Sequence[str] = (),
) -> list[OutputFile]:
    """The files of a checkpoint that Megatron-LM's `--load` finds as `release`; equal input gives equal bytes.

    Chunks are those that Megatron-Core's ranks would write, each into a file of its own: they never span layers,
    experts, or gate and up, because a loader reads whole chunks into memory.

    Args:
        tensors: The model.
        args: Arguments as plain values.
        dtype: torch's name of the parameters' type, for `args.params_dtype`.
        grid: The grid whose ranks write; the stages are those of the tensors.
        stacked: Whether layers are stacked; by default as `stacks` says.
        groups: Suffix of `self_attention` in the keys of each layer, where different attention is stacked separately.

    Raises:
        UsageError: A tensor does not divide over the ranks, or layers that differ are to be stacked.
    """
    shapes = {item.name: item.tensor.shape for item in tensors}
    if stacked is None:
        stacked = stacks(shapes, args, groups)
    elif stacked and not stacks(shapes, {}, groups):
        raise UsageError("layers that differ cannot be stacked")
    keys = _Keys(shapes, stacked, groups)
    chunks: list[NewChunk] = []
    objects: list[NewObject] = []
    whole: dict[str, tuple[int, ...]] = {}
    for item in tensors:
        place = keys.place(item.name)
        shape = (*place.counts, *item.tensor.shape)
        if whole.setdefault(place.key, shape) != shape:
            raise UsageError(f"{item.name} has another shape than its siblings")
        chunks.append(_chunk(item, place, grid))
        (file,) = _files(_first_rank(item, place, grid), 1)
        objects += [NewObject(keys.of_state(name), _EMPTY_STATE, file) for name in item.states]
    common = {
        "args": Namespace({**args, "ckpt_format": "torch_dist", "params_dtype": TorchDType(dtype)}),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": _content(stacked),
    }
    return [
        OutputFile.small(TRACKER, FOLDER.encode()),
        *lay_out_dcp(FOLDER, whole, chunks, objects),
        lay_out_torch_file(f"{FOLDER}/{COMMON}", common),
        OutputFile.small(f"{FOLDER}/{CONFIG}", json.dumps(_BACKEND).encode()),
    ]


_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _content(stacked: bool) -> dict[str, object]:
    """Metadata for a model that loads the keys. With it, a model that does not stack its layers finds each one, too."""
    content: dict[str, object] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return content if stacked else {**content, "non_homogeneous_layers": True}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes: `at[n]` of `counts[n]` on each axis in front of its own, of the stored tensor `key`."""

    key: str
    at: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    expert: bool = False


class _Keys:
    """Names with layer and expert numbers -> stored keys."""

    def __init__(self, names: Iterable[str], stacked: bool, groups: Sequence[str]) -> None:
        self._stacked = stacked
        self._groups = groups
        self._layers: dict[str, int] = defaultdict(int)
        self._experts: dict[str, int] = defaultdict(int)
        for name in names:
            if match := _LAYER.fullmatch(name):
                self._layers[match[1]] = max(self._layers[match[1]], int(match[2]) + 1)
            if match := _EXPERT.fullmatch(name):
                self._experts[match[1]] = max(self._experts[match[1]], int(match[3]) + 1)

    def place(self, name: str) -> _Place:
        """The stored tensor that one belongs to, and where."""
        expert = _EXPERT.fullmatch(name)
        key = f"{expert[1]}.experts.{expert[2]}" if expert else name
        at = (int(expert[3]),) if expert else ()
        counts = (self._experts[expert[1]],) if expert else ()
        if layer := _LAYER.fullmatch(key):
            stack, number, rest = layer[1], int(layer[2]), layer[3]
            group, count = _group(rest, self._groups, number), self._layers[stack]
            if group:
                rest = f"self_attention{group}.{rest.removeprefix(_ATTENTION)}"
            key = f"{stack}.{number}.{rest}"
            if group and self._stacked:
                number, count = self._groups[:number].count(group), self._groups.count(group)
            if self._stacked and stack.endswith(_STACKED_BLOCK):
                key, at, counts = f"{stack}.{rest}", (number, *at), (count, *counts)
        return _Place(key, at, counts, bool(expert))

    def of_state(self, name: str) -> str:
        """The key of an object beside a tensor."""
        place = self.place(name)
        at, counts = place.at or (0,), place.counts or (1,)
        return f"{place.key}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, counts))}"


def _chunk(item: GlobalTensor, place: _Place, grid: Parallelism) -> NewChunk:
    """The chunks that the ranks which hold a tensor write of it."""
    tensor, offsets = item.tensor, (*place.at, *(0 for _ in item.tensor.shape))
    if item.axis is None:
        return NewChunk(place.key, offsets, tensor, _files(_first_rank(item, place, grid), 1))
    if not item.blocks:
        raise UnsupportedError(f"{item.name}: its parts have unequal sizes, and torch_dist has no form for them")
    size = grid.expert_tp if place.expert else grid.tp
    axis = item.axis % len(tensor.shape)
    if tensor.shape[axis] % (item.blocks * size):
        raise UsageError(
            f"{item.name}: {tensor.shape[axis]} do not divide over {item.blocks} x {size} tensor parallel ranks",
            hint="choose another --tp",
        )
    files = _files(_first_rank(item, place, grid), size) * item.blocks
    return NewChunk(place.key, offsets, tensor, files, axis)


def _first_rank(item: GlobalTensor, place: _Place, grid: Parallelism) -> int:
    """The first rank that holds a tensor."""
    first = item.pp_rank * grid.stage_size
    if not place.expert:
        return first
    expert, count = place.at[-1], place.counts[-1]
    if count % grid.ep:
        raise UsageError(f"{count} experts do not divide over {grid.ep} ranks", hint="choose another --ep")
    return first + expert // (count // grid.ep) * grid.expert_tp


@lru_cache(maxsize=1024)
def _files(first: int, count: int) -> tuple[str, ...]:
    """The files of ranks: a chunk is written by the first rank that holds it."""
    return tuple(f"__{rank}_0.distcp" for rank in range(first, first + count))


def _empty_state() -> bytes:
    """torch.save of `[None]`: a shard's list of states, the only one of which is none."""
    (segment,) = lay_out_torch_file("archive", [None]).segments
    (piece,) = segment.tensor.bands[0].pieces
    assert isinstance(piece, Literal) and isinstance(piece.data, bytes)
    return piece.data


_EMPTY_STATE = _empty_state()


TORCH_DIST = Format("torch_dist", is_torch_dist, checks_of_dcp, archives_of_dcp)
