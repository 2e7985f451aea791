"""Checks that a sidecar belongs to the model beside it. A sidecar is input like any other file."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from ckptkit.checkpoints.element_types import WEIGHTS
from ckptkit.checkpoints.prediction import with_prediction
from ckptkit.checkpoints.problems import Problems
from ckptkit.errors import InputError
from ckptkit.formats.quantised.archive import Quantised
from ckptkit.formats.safetensors import Header
from ckptkit.formats.sidecar import EXTRAS, FOLDER, HEADERS, ORIGINALS, Sidecar
from ckptkit.tables.bounds import check_counts
from ckptkit.tables.family import Family
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import count_in_hf
from ckptkit.tensors import Tensor

ORIGINAL = "original"
"""What `--quantise` calls the quantised source that a sidecar keeps the scales of."""


def notes_of_scales(sidecar: Sidecar) -> list[str]:
    """A note where a sidecar was read that keeps the scales of a quantised original."""
    archive = sidecar.quantised
    if archive is None or not archive.absent:
        return []
    return [f"{FOLDER}/ keeps the scales of the original: --to hf --quantise {ORIGINAL} gives {archive.scheme} again"]


def read_scales(archive: Quantised, threads: int | None = None) -> tuple[str, frozenset[str]]:
    """The SHA-256 of what a sidecar keeps of an archive, and the names of codes among it.

    Args:
        archive: The archive, or what a sidecar keeps of it: there the codes have been chosen already.
        threads: How many threads read.

    Raises:
        InputError: The scales, or the codes beside them, are not those that a sidecar was written with.
        StorageError: A file cannot be read.
    """
    from ckptkit.io.scales import Scales, survey

    parts = [Scales(item.codes, item.kind, item.parts[item.scales]) for item in archive.stored.values()]
    own = {item.scales for item in archive.stored.values()}
    others = {name: tensor for name, tensor in archive.scales.items() if name not in own}
    digest, apart = survey(parts, others, archive.dtype, threads)
    if archive.digest is not None:
        apart = archive.apart
    if apart:
        codes = {name: archive.stored[name].parts[name] for name in apart}
        digest, _ = survey(parts, others | codes, archive.dtype, threads)
    if archive.digest not in (None, digest):
        raise InputError(
            "the scales, or the codes beside them, are not those that it was written with",
            where=archive.path,
            hint="name the archive with --quantise like:ARCHIVE, or remove the folder to go without it",
        )
    return digest, apart


def check_extras(extras: Mapping[str, Tensor], family: Family, config: ModelConfig, root: Path) -> None:
    """Checks that the tensors of a sidecar are those of the model that have no place in Megatron.

    Args:
        extras: Hugging Face name -> tensor.
        family: The family of the model.
        config: Its config.
        root: The folder with the sidecar.

    Raises:
        InputError: One is a tensor that the checkpoint also has, or that the model does not have.
    """
    others = sorted(name for name in extras if not family.is_extra(name, config))
    if not others:
        return
    own = {name for item in family.items(config) for name in item.parts} | {copy.hf for copy in family.replicas}
    twice = next((name for name in others if name in own), None)
    what = f"holds {others[0]}, which {config.architecture} does not have"
    if twice is not None:
        what = f"holds {twice}, which the checkpoint has itself"
    raise InputError(what, where=root / FOLDER / EXTRAS, hint="remove the file to go without its tensors")


def check_originals(originals: Mapping[str, Tensor], family: Family, config: ModelConfig, root: Path) -> None:
    """Checks that the originals of a sidecar are tensors of the model that Megatron has with other numbers.

    Args:
        originals: Hugging Face name -> tensor.
        family: The family of the model.
        config: Its config.
        root: The folder with the sidecar.

    Raises:
        InputError: One is none of them, or has another shape or a type without numbers.
    """
    if not originals:
        return
    parts = (item.parts for item in family.items(config) if item.row.numbers is not None)
    known = {name: shape for own in parts for name, shape in own.items()}
    for name, tensor in sorted(originals.items()):
        if known.get(name) == tensor.shape and tensor.dtype.name in WEIGHTS:
            continue
        what = f"holds {name}, {tensor.dtype}{list(tensor.shape)}"
        expected = f"the config says {list(known[name])}" if name in known else "which Megatron has as it is, or not"
        raise InputError(
            f"{what}, {expected}", where=root / FOLDER / ORIGINALS, hint="remove the file to go without its tensors"
        )


def with_originals(
    items: Mapping[str, Item], tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a Megatron checkpoint, with the originals of those that have other numbers in Hugging Face.

    Args:
        items: Canonical name -> item.
        tensors: Canonical name -> tensor.
        originals: Hugging Face name -> tensor, checked by `check_originals`.
    """
    found = dict(tensors)
    for key, item in items.items() if originals else ():
        if item.row.numbers is not None and key in found and item.hf[0] in originals:
            found[key] = item.row.numbers.kept(found[key], originals[item.hf[0]])
    return found


def notes_of_originals(items: Mapping[str, Item], tensors: Mapping[str, Tensor]) -> list[str]:
    """A note where the numbers of Hugging Face follow from those of Megatron alone, so that they are rounded.

    Args:
        items: Canonical name -> item.
        tensors: Canonical name -> tensor.
    """
    numbered = {key for key, item in items.items() if item.row.numbers is not None and key in tensors}
    rounded = len(numbered) - len(originals_of(items, tensors))
    if not rounded:
        return []
    return [
        f"{rounded} norms are stored less one, and there are no originals of them: in Hugging Face they are rounded"
    ]


def notes_of_moved(items: Mapping[str, Item], tensors: Mapping[str, Tensor]) -> list[str]:
    """A note where originals do not count, because Megatron's numbers are not those that were made of them.

    Their numbers are read.

    Args:
        items: Canonical name -> item.
        tensors: Canonical name -> tensor.

    Raises:
        InputError: A file is gone or ends early.
        StorageError: A file cannot be read.
    """
    numbered = {key: item.row.numbers for key, item in items.items() if key in tensors}
    moved = {key: numbers.moved(tensors[key]) for key, numbers in numbered.items() if numbers is not None}
    changed = [key for key, count in moved.items() if count]
    if not changed:
        return []
    of = sum(prod(tensors[key].shape) for key in changed)
    return [
        f"{sum(moved.values())} of {of} numbers of {len(changed)} of {len(moved)} norms are not those made of the"
        f" originals in {FOLDER}/{ORIGINALS}: they were trained, or it is another model's. In Hugging Face they are"
        " rounded"
    ]


def originals_of(items: Mapping[str, Item], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors that a sidecar keeps, because Megatron has them with other numbers.

    Args:
        items: Canonical name -> item.
        tensors: Canonical name -> tensor.
    """
    numbered = ((item, tensors[key]) for key, item in items.items() if item.row.numbers is not None and key in tensors)
    found = ((item.hf[0], item.row.numbers.original(tensor)) for item, tensor in numbered if item.row.numbers)
    return {name: original for name, original in found if original is not None}


def check_sidecar(sidecar: Sidecar, family: Family, config: ModelConfig, root: Path) -> int | None:
    """Checks the headers of a sidecar against the model that its config.json describes.

    The number of tokens is not checked here: the caller compares it with `args` and with `--vocab-size`.

    Args:
        sidecar: As it was read.
        family: The family of the model.
        config: Its config.
        root: The folder with the sidecar.

    Returns:
        The number of tokens in headers, or None if there are none.

    Raises:
        InputError: They lack tensors, have others, or disagree with the extras.
    """
    if not sidecar.headers:
        return None
    described, tokens = _model_of(sidecar.headers, family, config, root)
    for name, tensor in sorted(sidecar.extras.items()):
        if name not in described or described[name].shape != tensor.shape:
            what = f"{name}, {list(tensor.shape)}, is not in {HEADERS}/"
            raise InputError(what, where=root / FOLDER / EXTRAS, hint="remove the file to go without its tensors")
    return tokens


def _described(headers: Mapping[str, Header]) -> dict[str, Tensor]:
    """Name in the headers -> a placeholder tensor with the type and shape."""
    return {
        name: Tensor.full(entry.dtype, entry.shape)
        for header in headers.values()
        for name, entry in header.entries.items()
    }


def _model_of(
    headers: Mapping[str, Header], family: Family, config: ModelConfig, root: Path
) -> tuple[dict[str, Tensor], int | None]:
    """The tensors in the headers under canonical names, checked like an opened directory, and the number of tokens."""
    problems, where = Problems(root / FOLDER / HEADERS), root / FOLDER / HEADERS
    tokens: int | None = None
    described = _described(headers)
    check_counts(config, described.values(), where)
    try:
        config = with_prediction(family, config, count_in_hf, described)
        model, _ = family.unfuse(described, config)
        left = dict(model)
        for item in family.items(config):
            for name, shape in item.parts.items():
                if item.row.split.padded and name in left and left[name].shape:
                    tokens = left[name].shape[0] if tokens is None else tokens
                    shape = (tokens, *shape[1:])
                problems.take(left, name, shape)
            for slot in item.slots:
                if slot.hf in left:
                    problems.take(left, slot.hf, slot.shape)
        copies = {copy.hf for copy in family.copies(config)}
        problems.unknown(name for name in left if name not in copies and not family.is_extra(name, config))
        problems.check()
    except InputError as error:
        raise InputError(error.what, where=where, hint="pass --hf-reference instead") from None
    return model, tokens
