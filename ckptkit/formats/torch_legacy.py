"""Megatron-LM's `--ckpt-format torch`: one `mp_rank_TT[_PPP]/model_optim_rng.pt` for each model parallel rank.

Layer numbers in a file are local to its stage; with virtual stages a file holds `model0`, `model1`, ... instead of
`model`. Source: `get_checkpoint_name` and `generate_state_dict` of Megatron-LM's `training/checkpointing.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.pickles import Namespace, TorchDType, UnreadableTensor, lay_out_torch_file, read_torch_file
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")

RankFile = dict[str, dict[str, Tensor]]
"""Chunk (`model`, or `model0`, `model1`, ...) -> local tensor name -> tensor."""


@dataclass(frozen=True)
class TorchFiles:
    """An opened checkpoint.

    Attributes:
        path: The folder with the `mp_rank_*` folders.
        root: The folder with the tracker file, or `path` itself.
        args: `args` as plain values.
        ranks: (pp_rank, tp_rank) -> chunks.
    """

    path: Path
    root: Path
    args: dict[str, Any]
    ranks: dict[tuple[int, int], RankFile]

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """Tensor, pipeline and virtual pipeline sizes that the files themselves show."""
        tp = 1 + max(tp_rank for _, tp_rank in self.ranks)
        pp = 1 + max(pp_rank for pp_rank, _ in self.ranks)
        return tp, pp, len(next(iter(self.ranks.values())))


def iteration_folder(path: Path) -> Path:
    """The folder that holds the ranks of a Megatron checkpoint, through the tracker file where there is one.

    Raises:
        InputError: The tracker names an iteration that is not there.
    """
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not text.isdigit():
        raise InputError(f"expected an iteration or `release`, found {text[:40]!r}", where=tracker)
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise InputError(f"names {folder.name}, which is not there", where=tracker)
    return folder


def is_torch_legacy(path: Path) -> bool:
    """Whether a folder holds `mp_rank_*` folders."""
    return path.is_dir() and any(_RANK.match(item.name) for item in path.iterdir())


def open_torch_legacy(path: Path, root: Path) -> TorchFiles:
    """Opens every rank's file; tensors are not read.

    Raises:
        InputError: Ranks are missing, damaged or disagree.
        UnsupportedError: Experts are sharded over ranks.
    """
    folders = {_ranks_of(item): item for item in sorted(path.iterdir()) if _RANK.match(item.name)}
    contents = {ranks: _read_rank(folder) for ranks, folder in folders.items()}
    args = _common_args(folders, contents)
    if (args.get("expert_model_parallel_size") or 1) > 1:
        raise UnsupportedError("experts sharded over ranks (expert_model_parallel_size above 1)", where=path)
    found = {ranks: _chunks(content, folders[ranks]) for ranks, content in contents.items()}
    files = TorchFiles(path, root, args, found)
    tp, pp, _ = files.grid_shape
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            if (pp_rank, tp_rank) not in found:
                name = rank_folder(tp_rank, pp_rank, pp)
                raise InputError(f"{name} is missing (the others make TP{tp} x PP{pp})", where=path)
    if len({len(chunks) for chunks in found.values()}) > 1:
        raise InputError("ranks hold different numbers of virtual stages", where=path)
    for key, size in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if args.get(key) not in (None, size):
            raise InputError(f"args say {key} {args[key]}, the folders make {size}", where=path)
    return files


def rank_folder(tp_rank: int, pp_rank: int, pp: int) -> str:
    """The folder of a rank."""
    return f"mp_rank_{tp_rank:02d}" if pp == 1 else f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"


def lay_out_torch_legacy(
    ranks: Mapping[tuple[int, int], Mapping[str, Mapping[str, Tensor | None]]], args: Mapping[str, Any], dtype: str
) -> list[OutputFile]:
    """The files of a checkpoint that Megatron-LM's `--load` finds as `release`.

    Args:
        ranks: (pp_rank, tp_rank) -> chunk -> local name -> tensor; None stands for an empty `_extra_state`.
        args: Arguments as plain values.
        dtype: torch's name of the parameters' type, for `args.params_dtype`.
    """
    pp = 1 + max(pp_rank for pp_rank, _ in ranks)
    namespace = Namespace({**args, "params_dtype": TorchDType(dtype)})
    files = [OutputFile.small(TRACKER, b"release")]
    for (pp_rank, tp_rank), chunks in sorted(ranks.items()):
        content = {"args": namespace, "checkpoint_version": 3.0, "iteration": 0}
        content.update({key: dict(chunk) for key, chunk in chunks.items()})
        files.append(lay_out_torch_file(f"release/{rank_folder(tp_rank, pp_rank, pp)}/{FILE}", content))
    return files


def _ranks_of(folder: Path) -> tuple[int, int]:
    match = _RANK.match(folder.name)
    assert match is not None
    if match.group(3):
        raise UnsupportedError("experts sharded over ranks", where=folder)
    return int(match.group(2) or 0), int(match.group(1))


def _read_rank(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise InputError(f"no {FILE}", where=folder)
    content = read_torch_file(file)
    if not isinstance(content, dict):
        raise InputError("not a Megatron checkpoint (no dictionary inside)", where=file)
    return content


def _common_args(folders: Mapping[tuple[int, int], Path], contents: Mapping[tuple[int, int], Any]) -> dict[str, Any]:
    """The arguments of all ranks, which must not contradict one another."""
    first: dict[str, Any] | None = None
    for ranks, content in contents.items():
        args = content.get("args")
        fields = _plain(args.fields) if isinstance(args, Namespace) else {}
        if first is None:
            first = fields
        for key in first.keys() & fields.keys():
            if key not in _PER_RANK and first[key] != fields[key]:
                raise InputError(
                    f"args.{key} is {fields[key]!r}, another rank has {first[key]!r}", where=folders[ranks] / FILE
                )
    return first or {}


_PER_RANK = {"rank", "local_rank", "data_parallel_rank", "expert_tensor_parallel_rank"}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if isinstance(value, bool | int | float | str | list | None)}


def _chunks(content: Mapping[str, Any], folder: Path) -> RankFile:
    keys = ["model"] if "model" in content else sorted(k for k in content if re.fullmatch(r"model\d+", str(k)))
    if not keys:
        raise InputError("holds no `model`", where=folder / FILE)
    keys.sort(key=lambda key: int(key[5:] or 0))
    return {key: _tensors(content[key], folder / FILE) for key in keys}


def _tensors(chunk: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(chunk, dict):
        raise InputError("`model` is not a dictionary of tensors", where=file)
    tensors = {}
    for name, value in chunk.items():
        if str(name).endswith("_extra_state"):
            continue
        if isinstance(value, UnreadableTensor):
            raise value.error(str(name), file)
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is not a tensor", where=file)
        tensors[str(name).removeprefix("module.")] = value
    return tensors
