"""Megatron-LM's `--ckpt-format torch`: one `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` for each model parallel rank.

Layer numbers in a file are local to its stage; with virtual stages a file holds `model0`, `model1`, ... instead of
`model`. Source: `get_checkpoint_name` and `generate_state_dict` of Megatron-LM's `training/checkpointing.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ckptkit.dtypes import DType
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.format import Archive, Format
from ckptkit.formats.torch_file.pickles import (
    Namespace,
    Record,
    TorchDType,
    UnreadableTensor,
    lay_out_torch_file,
    read_torch_file,
)
from ckptkit.io.plan import OutputFile
from ckptkit.io.regular import read_bounded
from ckptkit.io.segments import Cut, Form
from ckptkit.tensors import Tensor

TRACKER = "latest_checkpointed_iteration.txt"
FILE, DISTRIBUTED_OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
_VERL_FILE = "model.pt"
_LONGEST_TRACKER = 1 << 16
_ITERATION = re.compile(r"release|(?:iter|global_step|step)_(\d{1,18})")
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")

_BEFORE_CORE = ("language_model", "encoder", "word_embeddings_for_head")

RankKey = tuple[int, int, int]
"""(pp_rank, tp_rank, ep_rank), as in the name of a rank's folder."""

RankFile = dict[str, dict[str, Tensor]]
"""Chunk (`model`, or `model0`, `model1`, ...) -> local tensor name -> tensor."""


@dataclass(frozen=True)
class OptimizerState:
    """The size of the optimizer state in a checkpoint, which is left out.

    Attributes:
        tensors: Number of tensors, as far as the headers show it.
        nbytes: Their size.
    """

    tensors: int = 0
    nbytes: int = 0

    def __bool__(self) -> bool:
        return self.tensors > 0 or self.nbytes > 0

    def __add__(self, other: OptimizerState) -> OptimizerState:
        return OptimizerState(self.tensors + other.tensors, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class TorchFiles:
    """An opened checkpoint.

    Attributes:
        path: The folder with the `mp_rank_*` folders.
        root: The folder with the tracker file, or `path` itself.
        args: `args` as plain values.
        ranks: (pp_rank, tp_rank, ep_rank) -> chunks.
        chunks: How many model chunks (virtual stages) every rank has.
        optimizer: The optimizer's state beside the model.
    """

    path: Path
    root: Path
    args: dict[str, Any]
    ranks: dict[RankKey, RankFile]
    chunks: int
    optimizer: OptimizerState = OptimizerState()


def iteration_folder(path: Path, iteration: int | None = None) -> Path:
    """The folder that holds one iteration of a checkpoint: the one asked for, or the tracker file's, or the only one.

    Args:
        path: The checkpoint's root; any other folder is given back as it is.
        iteration: Number of the iteration.

    Raises:
        InputError: The tracker names an iteration that is not there.
        UsageError: There is no such iteration, or there are several and nothing says which.
    """
    if iteration is not None:
        found = _folder_of(path, str(iteration))
        if found is None:
            there = ", ".join(folder.name for folder in iterations(path)) or "none"
            raise UsageError(f"no iteration {iteration} in it", where=path, hint=f"iterations that are there: {there}")
        return found
    tracker = path / TRACKER
    if not tracker.is_file():
        return _only_iteration(path)
    text = read_bounded(tracker, _LONGEST_TRACKER).decode("utf-8", "replace").strip()
    if text != "release" and not re.fullmatch(r"[0-9]{1,18}", text):
        raise InputError(f"expected an iteration or `release`, found {text[:40]!r}", where=tracker)
    found = _folder_of(path, text)
    if found is None:
        name = text if text == "release" else f"iter_{int(text):07d}"
        raise InputError(f"names {name}, which is not there", where=tracker)
    return found


def _folder_of(path: Path, text: str) -> Path | None:
    """An iteration's folder by Megatron's name, by verl's or by NeMo-RL's, whichever is there."""
    number = 0 if text == "release" else int(text)
    names = ["release"] if text == "release" else [f"iter_{number:07d}", f"global_step_{number}", f"step_{number}"]
    return next((path / name for name in names if (path / name).is_dir()), None)


def iterations(path: Path) -> list[Path]:
    """The folders of iterations, the number of none larger than that of the next."""
    found = [(match, item) for item in path.iterdir() if (match := _ITERATION.fullmatch(item.name)) and item.is_dir()]
    return [item for _, item in sorted(found, key=lambda pair: int(pair[0][1] or -1))]


def _only_iteration(path: Path) -> Path:
    """Without a tracker file: the root's only iteration, or the folder itself if it has none."""
    found = iterations(path)
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found[-4:])
        hint = "choose with --iteration, or give the folder of one"
        raise UsageError(f"several iterations ({names}) and no {TRACKER}", where=path, hint=hint)
    return found[0] if found else path


def has_iterations(path: Path) -> bool:
    """Whether a directory is the root of a Megatron checkpoint, whose iterations are folders in it."""
    return (path / TRACKER).is_file() or bool(iterations(path))


def is_torch_legacy(path: Path) -> bool:
    """Whether a folder holds `mp_rank_*` folders."""
    return path.is_dir() and any(_RANK.match(item.name) for item in path.iterdir())


def open_torch_legacy(path: Path, root: Path, *, pp: int | None = None, ep: int | None = None) -> TorchFiles:
    """Opens every rank's file; tensors are not read.

    Args:
        path: The folder with the `mp_rank_*` folders.
        root: The folder with the tracker file, or `path` itself.
        pp: Pipeline parallel size, where `args` do not say: the names of the folders alone are ambiguous.
        ep: Expert parallel size, likewise.

    Raises:
        InputError: A file is missing or damaged, or ranks disagree.
    """
    folders = [item for item in sorted(path.iterdir()) if _RANK.match(item.name)]
    contents = {folder: _read_rank(folder) for folder in folders}
    args = _common_args(contents)
    stages = _size(args, "pipeline_model_parallel_size") or pp or 1
    with_experts = stages == 1 and (_size(args, "expert_model_parallel_size") or ep or 1) > 1
    ranks = {_ranks_of(folder, with_experts): _chunks(content, folder) for folder, content in contents.items()}
    counts = {len(chunks) for chunks in ranks.values()}
    if len(counts) > 1:
        raise InputError("ranks hold different numbers of virtual stages", where=path)
    optimizer = sum((_optimizer(content, folder) for folder, content in contents.items()), OptimizerState())
    return TorchFiles(path, root, args, ranks, counts.pop(), optimizer)


def _size(args: Mapping[str, Any], name: str) -> int | None:
    """A size in the arguments, or None. Values that are no numbers are refused where all arguments are read."""
    size = args.get(name)
    return size if isinstance(size, int) else None


def _optimizer(content: Mapping[str, Any], folder: Path) -> OptimizerState:
    """A rank's optimizer: inside its file, or for the distributed optimizer in one beside it, which is not opened."""
    tensors: list[Tensor] = []
    seen: set[int] = set()  # a damaged file may hold an object that contains itself
    pending = [content.get("optimizer")]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, Record):
            pending += [value.args, value.state]
        elif isinstance(value, Namespace):
            pending += value.fields.values()
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
    beside = folder / DISTRIBUTED_OPTIMIZER
    size = beside.stat().st_size if beside.is_file() else 0
    return OptimizerState(len(tensors), size + sum(tensor.nbytes for tensor in tensors))


def rank_folder(rank: RankKey, pp: int, ep: int) -> str:
    """The folder of a rank on a grid of `pp` stages and `ep` expert parallel ranks."""
    pp_rank, tp_rank, ep_rank = rank
    name = f"mp_rank_{tp_rank:02d}"
    if pp > 1:
        name += f"_{pp_rank:03d}"
    return name if ep == 1 else f"{name}_{ep_rank:03d}"


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of one model chunk that one rank holds; they are cut while they are written.

    Attributes:
        names: Their local names.
        wholes: The tensors that they are cut from.
        cuts: How each is cut.
        forms: Element type and shape of each.
        states: Local names of the empty `_extra_state`s after them.
    """

    names: tuple[str, ...]
    wholes: tuple[Tensor, ...]
    cuts: list[Cut]
    forms: list[tuple[DType, tuple[int, ...]]]
    states: tuple[str, ...] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Shards:
        """Shards that are cut already."""
        forms = [(tensor.out_dtype, tensor.shape) for tensor in tensors.values()]
        return cls(tuple(tensors), tuple(tensors.values()), [_as_it_is] * len(forms), forms)

    def tensors(self) -> dict[str, Tensor]:
        """Local name -> shard."""
        return {name: cut(whole) for name, whole, cut in zip(self.names, self.wholes, self.cuts, strict=True)}

    def written(self) -> Iterator[tuple[Tensor, Cut]]:
        """The whole tensor and the cut of each shard that has bytes."""
        return (
            (whole, cut)
            for whole, cut, (_, shape) in zip(self.wholes, self.cuts, self.forms, strict=True)
            if prod(shape)
        )

    def blank(self) -> dict[str, Tensor | None]:
        """The content of a file without its bytes."""
        tensors = (Tensor.full(dtype, shape) for dtype, shape in self.forms)
        return {**dict(zip(self.names, tensors, strict=True)), **dict.fromkeys(self.states)}


def lay_out_torch_legacy(
    ranks: Mapping[RankKey, Mapping[str, Shards]], args: Mapping[str, Any], dtype: str
) -> list[OutputFile]:
    """The files of a checkpoint that Megatron-LM's `--load` finds as `release`.

    Args:
        ranks: (pp_rank, tp_rank, ep_rank) -> chunk -> its shards.
        args: Arguments as plain values.
        dtype: torch's name of the parameters' type, for `args.params_dtype`.
    """
    pp = 1 + max(pp_rank for pp_rank, _, _ in ranks)
    ep = 1 + max(ep_rank for _, _, ep_rank in ranks)
    namespace = Namespace({**args, "params_dtype": TorchDType(dtype)})
    files = [OutputFile.small(TRACKER, b"release")]
    forms: dict[object, Form] = {}
    for rank, chunks in sorted(ranks.items()):
        kind = tuple((key, shards.names, shards.states, tuple(shards.forms)) for key, shards in chunks.items())
        if kind not in forms:
            blanks = {key: shards.blank() for key, shards in chunks.items()}
            content = {"args": namespace, "checkpoint_version": 3.0, "iteration": 0, **blanks}
            file = lay_out_torch_file(FILE, content)
            tensors = [tensor for blank in blanks.values() for tensor in blank.values() if tensor is not None]
            forms[kind] = Form.of(file.size, file.segments, file.checksums, tensors)
        path = f"release/{rank_folder(rank, pp, ep)}/{FILE}"
        written = [pair for shards in chunks.values() for pair in shards.written()]
        files.append(OutputFile.filled(path, forms[kind], written))
    return files


def _ranks_of(folder: Path, with_experts: bool) -> RankKey:
    """Where a folder's rank is; the second number of two is the expert parallel rank if `with_experts`."""
    match = _RANK.match(folder.name)
    assert match is not None
    tp_rank, second, third = (int(group or 0) for group in match.groups())
    return (0, tp_rank, second) if with_experts and match.group(3) is None else (second, tp_rank, third)


def _read_rank(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file() and (folder / _VERL_FILE).is_file():
        return _read_chunks(folder / _VERL_FILE)
    if not file.is_file():
        raise InputError(f"no {FILE}", where=folder)
    content = read_torch_file(file)
    if not isinstance(content, dict):
        raise InputError("not a Megatron checkpoint (no dictionary inside)", where=file)
    return content


def _read_chunks(file: Path) -> dict[str, Any]:
    """A rank's file as verl wrote it until 0.4: a list of the state dicts of its model chunks, and no args."""
    chunks = read_torch_file(file)
    if not isinstance(chunks, list) or not chunks:
        raise InputError("not a list of model chunks", where=file)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _common_args(contents: Mapping[Path, Any]) -> dict[str, Any]:
    """The arguments of all ranks, which must not contradict one another."""
    first: dict[str, Any] | None = None
    for folder, content in contents.items():
        args = content.get("args")
        fields = plain_values(args.fields) if isinstance(args, Namespace) else {}
        if first is None:
            first = fields
        for key in first.keys() & fields.keys():
            if key not in _PER_RANK and first[key] != fields[key]:
                raise InputError(f"args.{key} is {fields[key]!r}, another rank has {first[key]!r}", where=folder / FILE)
    return first or {}


_PER_RANK = {"rank", "local_rank", "data_parallel_rank", "expert_tensor_parallel_rank"}


def plain_values(fields: Mapping[str, object]) -> dict[str, Any]:
    """Arguments that are numbers, strings, sequences or None: the only ones that describe a model."""
    plain = (bool, int, float, str, list, tuple, type(None))
    return {key: value for key, value in fields.items() if isinstance(value, plain)}


def _chunks(content: Mapping[str, Any], folder: Path) -> RankFile:
    keys = ["model"] if "model" in content else [key for key in content if _is_chunk(key)]
    if not keys:
        raise InputError("holds no `model`", where=folder / FILE)
    keys.sort(key=lambda key: int(key[5:] or 0))
    return {key: _tensors(content[key], folder / FILE) for key in keys}


def _is_chunk(key: object) -> bool:
    return isinstance(key, str) and re.fullmatch(r"model[0-9]{1,9}", key) is not None


def _tensors(chunk: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(chunk, dict):
        raise InputError("`model` is not a dictionary of tensors", where=file)
    tensors = {}
    for name, value in chunk.items():
        if not isinstance(name, str):
            raise InputError(f"a tensor whose name is a {type(name).__name__}", where=file)
        if name.endswith("_extra_state"):
            continue
        if isinstance(value, UnreadableTensor):
            raise value.error(name, file)
        if name in _BEFORE_CORE and isinstance(value, dict):
            raise UnsupportedError(
                f"the layout that Megatron-LM had before Megatron-Core (`model` holds `{name}`)",
                where=file,
                hint="convert it with Megatron-LM's tools/checkpoint/convert.py (--loader legacy --saver core)",
            )
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is not a tensor", where=file)
        tensors[name.removeprefix("module.")] = value
    return tensors


def _files(folder: Path) -> list[Path]:
    """Every rank's files, the optimizer's included."""
    return sorted(folder.glob("mp_rank_*/*.pt"))


def _checks(folder: Path) -> Iterator[Callable[[], object]]:
    return (partial(read_torch_file, file) for file in _files(folder))


TORCH = Format("torch", is_torch_legacy, _checks, lambda folder: map(Archive, _files(folder)))
