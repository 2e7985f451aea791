"""Where the alpha of a Megatron adapter is written down. Its tensors do not hold it, and it has no default.

Source: `run_config.yaml` of Megatron-Bridge (`peft` section), `args.json` of ms-swift, `lora_train_meta.json` and
`adapter_config.json` of verl, and the sidecar of ckptkit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.locating import Place
from ckptkit.checkpoints.lora.layouts import Ranks, Record
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.json_files import read_json
from ckptkit.formats.peft import CONFIG
from ckptkit.formats.peft_config import AdapterConfig
from ckptkit.formats.peft_config import scale as scale_of
from ckptkit.formats.run_config import RUN_CONFIG, read_section
from ckptkit.formats.sidecar import FOLDER
from ckptkit.tables.lora import LAYOUTS

RECORD = "adapter.json"
_DORA = "DoRA"
_MOST_MODULES, _MOST_RANK = 10_000_000, 1 << 20


@dataclass(frozen=True)
class Alpha:
    """A stated alpha.

    Attributes:
        value: Alpha.
        rslora: Whether the scale is alpha / sqrt(rank).
        where: Who states it.
        rank: The rank that is stated beside it, if one counts for all modules.
    """

    value: float
    rslora: bool
    where: str
    rank: int | None = None

    def scale(self, rank: int) -> float:
        """The factor of B A."""
        return scale_of(self.value, rank, rslora=self.rslora)


def find_alpha(place: Place, record: Record | None, given: float | None) -> tuple[Alpha, list[str]]:
    """The alpha of an adapter, and a note if the user's outranks another.

    Args:
        place: Where the adapter is.
        record: The record in the sidecar, or None.
        given: The alpha that the user gives, or None.

    Raises:
        InputError: Nobody states it, or two files state different ones.
    """
    found = [] if record is None else [Alpha(float(record.alpha), False, f"{FOLDER}/{RECORD}")]
    for folder in dict.fromkeys(_folders(place)):
        for name, read in _READERS.items():
            with suppress(*(() if given is None else (InputError,))):  # the user's outranks what makes no sense
                found += [] if (alpha := read(folder, name)) is None else [alpha]
    if given is not None:
        others = [f"{one.where} says {one.value:g}" for one in found if (one.value, one.rslora) != (given, False)]
        notes = [f"--lora-alpha {given:g} outranks the files: {'; '.join(others)}"] if others else []
        return Alpha(given, False, "--lora-alpha"), notes
    if not found:
        raise InputError(
            "nothing says the alpha of the adapter, so its scale is not known",
            where=place.folder,
            hint=f"give --lora-alpha, or put {CONFIG} beside the weights",
        )
    if len({(one.value, one.rslora) for one in found}) > 1:
        texts = "; ".join(f"{one.where} says {one.value:g}{' (rslora)' if one.rslora else ''}" for one in found)
        raise InputError(f"two alphas: {texts}", where=place.folder, hint="correct one, or give --lora-alpha")
    return found[0], []


def states_dora(place: Place) -> dict[str, bool]:
    """Who says whether the adapter is one of DoRA: file -> whether it is. Not all files say so.

    Raises:
        InputError: A file is damaged.
    """
    found: dict[str, bool] = {}
    for folder in dict.fromkeys(_folders(place)):
        if section := read_section(folder, "peft"):
            found[str(folder / RUN_CONFIG)] = _class_in(section) == _DORA
        if (folder / CONFIG).is_file():
            found[str(folder / CONFIG)] = AdapterConfig.parse(read_json(folder / CONFIG), folder / CONFIG).dora
    return found


def has_record(root: Path) -> bool:
    """Whether there is a record, so that ckptkit wrote the checkpoint."""
    return (root / FOLDER / RECORD).is_file()


def _folders(place: Place) -> Iterator[Path]:
    """The folders that may have a file that describes the adapter.

    verl has its file around `model/` and `huggingface/`, and an exported adapter in `huggingface/adapter/`.
    Source: `fsdp_checkpoint_manager.py`, `checkpoint_handler.py` and `megatron_checkpoint_manager.py` of verl (commit
    1dda039).
    """
    yield from (place.folder, place.root)
    if place.reference is not None and place.reference.name == "huggingface":
        around = place.reference.parent
        yield from (around, around.parent if around.name == "model" else around, place.reference / "adapter")


def read_record(root: Path) -> Record | None:
    """The record in a sidecar, or None.

    Raises:
        InputError: It is damaged.
    """
    file = root / FOLDER / RECORD
    if not file.is_file():
        return None
    raw = read_json(file)
    layout, rank, alpha, modules = (raw.get(key) for key in ("layout", "rank", "alpha", "modules"))
    hint = "pass --lora-alpha to go without it"
    if layout not in LAYOUTS or not _natural(rank) or not rank or type(alpha) not in (int, float) or not alpha:
        raise InputError("no layout, rank and alpha in it", where=file, hint=hint)
    if not isinstance(modules, dict) or not all(_are_ranks(own, rank) for own in modules.values()):
        raise InputError("its modules have no ranks", where=file, hint=hint)
    names = raw.get("names") or {}
    if not isinstance(names, dict) or not all(_is_shape(shape) for shape in names.values()):
        raise InputError("its names have no shapes", where=file, hint=hint)
    return Record(
        layout,
        rank,
        alpha / rank,
        {name: Ranks(own[0], own[1], float(own[2])) for name, own in modules.items()},
        {name: tuple(shape) for name, shape in names.items()},
    )


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) <= 3 and all(type(size) is int and 0 <= size < 1 << 40 for size in value)
    )


def _are_ranks(own: object, rank: int) -> bool:
    return (
        isinstance(own, list)
        and len(own) == 3
        and all(map(_natural, own[:2]))
        and own[0] > 0
        and own[0] + own[1] <= rank
        and type(own[2]) in (int, float)
        and own[2] != 0
    )


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST_RANK


def _of_bridge(folder: Path, name: str) -> Alpha | None:
    section = read_section(folder, "peft")
    if not section:
        return None
    _refuse_other_classes(section, folder / name)
    return _stated(section, "alpha", folder / name)


def _refuse_other_classes(section: Mapping[str, Any], where: Path) -> None:
    target = _class_in(section)
    if target not in ("LoRA", "CanonicalLoRA", "VLMLoRA", _DORA):
        raise UsageError(f"an adapter of the class {target[:40]}, and LoRA and DoRA are read", where=where)


def _class_in(section: Mapping[str, Any]) -> str:
    return str(section.get("_target_")).rpartition(".")[2]


def _of_swift(folder: Path, name: str) -> Alpha | None:
    return _of_json(folder / name, "lora_alpha", "use_rslora")


def _of_verl(folder: Path, name: str) -> Alpha | None:
    """Verl has one rank and one alpha for all modules; an alpha that it does not know is 0 there, or is left out."""
    file = folder / name
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("lora_alpha") is None:
        return None
    rank = content.get("r")
    if rank is not None and (not _natural(rank) or not rank):
        raise InputError(f"r is {str(rank)[:40]}, which is no rank", where=file)
    return replace(_stated(content, "lora_alpha", file), rank=rank)


def _of_peft(folder: Path, name: str) -> Alpha | None:
    if not (folder / name).is_file():
        return None
    config = AdapterConfig.parse(read_json(folder / name), folder / name)
    return Alpha(config.alpha, config.rslora, str(folder / name))


def _of_json(file: Path, alpha: str, rslora: str) -> Alpha | None:
    if not file.is_file():
        return None
    content = read_json(file)
    return None if content.get(alpha) is None else _stated(content, alpha, file, rslora=bool(content.get(rslora)))


def _stated(values: Mapping[str, Any], key: str, where: Path, *, rslora: bool = False) -> Alpha:
    value = values.get(key)
    if type(value) not in (int, float) or not value:
        raise InputError(f"{key} is {str(value)[:40]}, which is no alpha", where=where, hint="give --lora-alpha")
    return Alpha(float(value), rslora, str(where))


_READERS: Mapping[str, Callable[[Path, str], Alpha | None]] = {
    RUN_CONFIG: _of_bridge,
    "args.json": _of_swift,
    "lora_train_meta.json": _of_verl,
    CONFIG: _of_peft,
}
