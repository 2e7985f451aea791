"""Megatron-LM's `--ckpt-format torch`: one `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` for each model parallel rank.

Layer numbers in a file are local to its stage; with virtual stages a file holds `model0`, `model1`, ... instead of
`model`. Source: `get_checkpoint_name` and `generate_state_dict` of Megatron-LM's `training/checkpointing.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError
from ckptkit.formats.pickles import Namespace, TorchDType, UnreadableTensor, lay_out_torch_file, read_torch_file
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")

RankKey = tuple[int, int, int]
"""(pp_rank, tp_rank, ep_rank), which the name of a rank's folder tells."""

RankFile = dict[str, dict[str, Tensor]]
"""Chunk (`model`, or `model0`, `model1`, ...) -> local tensor name -> tensor."""


@dataclass(frozen=True)
class TorchFiles:
    """An opened checkpoint.

    Attributes:
        path: The folder with the `mp_rank_*` folders.
        root: The folder with the tracker file, or `path` itself.
        args: `args` as plain values.
        ranks: (pp_rank, tp_rank, ep_rank) -> chunks.
        chunks: How many model chunks (virtual stages) every rank has.
    """

    path: Path
    root: Path
    args: dict[str, Any]
    ranks: dict[RankKey, RankFile]
    chunks: int


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
        InputError: A file is missing or damaged, or ranks disagree.
    """
    folders = [item for item in sorted(path.iterdir()) if _RANK.match(item.name)]
    contents = {folder: _read_rank(folder) for folder in folders}
    args = _common_args(contents)
    with_experts = (args.get("pipeline_model_parallel_size") or 1) == 1 and (
        args.get("expert_model_parallel_size") or 1
    ) > 1
    ranks = {_ranks_of(folder, with_experts): _chunks(content, folder) for folder, content in contents.items()}
    counts = {len(chunks) for chunks in ranks.values()}
    if len(counts) > 1:
        raise InputError("ranks hold different numbers of virtual stages", where=path)
    return TorchFiles(path, root, args, ranks, counts.pop())


def rank_folder(rank: RankKey, pp: int, ep: int) -> str:
    """The folder of a rank on a grid of `pp` stages and `ep` expert parallel ranks."""
    pp_rank, tp_rank, ep_rank = rank
    name = f"mp_rank_{tp_rank:02d}"
    if pp > 1:
        name += f"_{pp_rank:03d}"
    return name if ep == 1 else f"{name}_{ep_rank:03d}"


def lay_out_torch_legacy(
    ranks: Mapping[RankKey, Mapping[str, Mapping[str, Tensor | None]]], args: Mapping[str, Any], dtype: str
) -> list[OutputFile]:
    """The files of a checkpoint that Megatron-LM's `--load` finds as `release`.

    Args:
        ranks: (pp_rank, tp_rank, ep_rank) -> chunk -> local name -> tensor; None stands for an empty `_extra_state`.
        args: Arguments as plain values.
        dtype: torch's name of the parameters' type, for `args.params_dtype`.
    """
    pp = 1 + max(pp_rank for pp_rank, _, _ in ranks)
    ep = 1 + max(ep_rank for _, _, ep_rank in ranks)
    namespace = Namespace({**args, "params_dtype": TorchDType(dtype)})
    files = [OutputFile.small(TRACKER, b"release")]
    for rank, chunks in sorted(ranks.items()):
        content = {"args": namespace, "checkpoint_version": 3.0, "iteration": 0}
        content.update({key: dict(chunk) for key, chunk in chunks.items()})
        files.append(lay_out_torch_file(f"release/{rank_folder(rank, pp, ep)}/{FILE}", content))
    return files


def _ranks_of(folder: Path, with_experts: bool) -> RankKey:
    """Where a folder's rank is; the second number of two is the expert parallel rank if `with_experts`."""
    match = _RANK.match(folder.name)
    assert match is not None
    tp_rank, second, third = (int(group or 0) for group in match.groups())
    return (0, tp_rank, second) if with_experts and match.group(3) is None else (second, tp_rank, third)


def _read_rank(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise InputError(f"no {FILE}", where=folder)
    content = read_torch_file(file)
    if not isinstance(content, dict):
        raise InputError("not a Megatron checkpoint (no dictionary inside)", where=file)
    return content


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
