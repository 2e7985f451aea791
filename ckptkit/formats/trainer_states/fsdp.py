"""The shards of a model that FSDP trained, one `model_world_size_W_rank_R.pt` for each rank, as verl saves them.

Each file is what torch.save made of the sharded state dict of that rank: `DTensor`s (FSDP2, and FSDP1 on a device mesh)
or `ShardedTensor`s (FSDP1 without one), and plain tensors that every rank holds whole. On a mesh (ddp, fsdp) every
row of ranks holds a copy of the model; copies are compared before anything is committed.

Source: `fsdp_checkpoint_manager.py` and `model_merger` of verl, which joins by the same rule (but takes the first copy
for the others).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.dcp.chunks import ChunkError
from ckptkit.formats.format import Archive, Format
from ckptkit.formats.json_files import read_json
from ckptkit.formats.torch_file.pickles import read_torch_file
from ckptkit.formats.torch_legacy import OptimizerState
from ckptkit.formats.trainer_states.dtensors import Copy, NoTensor, held, join
from ckptkit.formats.trainer_states.module_state import ModuleState
from ckptkit.io.plan import Comparison
from ckptkit.tensors import Tensor

CONFIG = "fsdp_config.json"
_RANK = re.compile(r"model_world_size_([1-9]\d*)_rank_(0|[1-9]\d*)\.pt")
_OPTIMIZER = re.compile(r"optim_world_size_\d+_rank_\d+\.pt")


def is_fsdp(path: Path) -> bool:
    """Whether a folder holds such shards."""
    return path.is_dir() and any(_RANK.fullmatch(item.name) for item in path.iterdir())


def open_fsdp(path: Path, wanted: Callable[[str], bool] = lambda key: True) -> ModuleState:
    """Opens every rank's file; tensors are not read.

    Args:
        path: The folder.
        wanted: Key -> whether its tensor is taken.

    Raises:
        InputError: A rank is missing or damaged, its pickle names something that no checkpoint needs, or ranks do not
            fit together.
        UnsupportedError: A tensor is placed in a way that is not known.
    """
    states = {rank: _read_rank(file) for rank, file in _rank_files(path).items()}
    for rank, state in states.items():
        if other := sorted(state.keys() ^ states[0].keys()):
            raise InputError(f"{other[0]} is on one of the ranks 0 and {rank} only", where=path)
    tensors: dict[str, Tensor] = {}
    comparisons: list[Comparison] = []
    for key in filter(wanted, states[0]):
        tensors[key], copies = _whole(path, key, states)
        comparisons += (_comparison(key, copy) for copy in copies)
    notes = (f"joined from the shards of {len(states)} ranks of FSDP",)
    return ModuleState(path, "fsdp", tensors, tuple(comparisons), _optimizer(path), notes)


def _rank_files(path: Path) -> dict[int, Path]:
    """The files of all ranks, by rank.

    Raises:
        InputError: Some are missing, or there are those of several world sizes.
    """
    found: dict[int, dict[int, Path]] = {}
    for item in path.iterdir():
        if match := _RANK.fullmatch(item.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = item
    if len(found) > 1:
        sizes = " and ".join(str(size) for size in sorted(found))
        raise InputError(f"shards of world sizes {sizes}", where=path, hint="keep those of one run in the folder")
    ((size, files),) = found.items()
    stated = read_json(path / CONFIG).get("world_size", size) if (path / CONFIG).is_file() else size
    if stated != size:
        raise InputError(f"states world size {stated}, but the shards come from {size} ranks", where=path / CONFIG)
    there = sum(rank < size for rank in files)
    if there < size:
        first = next(rank for rank in count() if rank not in files)
        name = f"model_world_size_{size}_rank_{first}.pt"
        more = f" and {size - there - 1:,} more" if size - there > 1 else ""
        raise InputError(f"{name}{more} missing", where=path, hint="fetch the shards of all ranks")
    if extra := sorted(rank for rank in files if rank >= size):
        raise InputError(f"{files[extra[0]].name} belongs to no rank of {size}", where=path)
    return dict(sorted(files.items()))


def _read_rank(file: Path) -> Mapping[str, object]:
    content = read_torch_file(file)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError("not a state dict", where=file)
    return content


def _whole(path: Path, key: str, states: Mapping[int, Mapping[str, object]]) -> tuple[Tensor, list[Copy]]:
    try:
        return join([held(state[key], rank) for rank, state in states.items()])
    except NoTensor as error:
        raise InputError(f"{key} {error}", where=path) from None
    except ChunkError as error:
        raise InputError(f"tensor {key}: {error}", where=path) from None
    except UnsupportedError as error:
        raise UnsupportedError(f"{key}: {error.what}", where=path, hint=error.hint) from None


def _comparison(key: str, copy: Copy) -> Comparison:
    return Comparison(copy.first.local, copy.second.local, f"{key} on ranks {copy.first.rank} and {copy.second.rank}")


def _optimizer(path: Path) -> OptimizerState:
    """The size of the optimizer's files. They are not opened, because a conversion does not need them."""
    return OptimizerState(0, sum(item.stat().st_size for item in path.iterdir() if _OPTIMIZER.fullmatch(item.name)))


def _checks(folder: Path) -> Iterator[Callable[[], object]]:
    return (partial(read_torch_file, file) for file in sorted(folder.glob("model_*.pt")))


FSDP = Format("fsdp", is_fsdp, _checks, lambda folder: map(Archive, sorted(folder.glob("*.pt"))), bare=True)
