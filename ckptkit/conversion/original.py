"""The quantised original of a model: what a sidecar keeps of it, and `--quantise original`, which gives it back."""

from __future__ import annotations

from dataclasses import replace

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.sidecar_contents import ORIGINAL, notes_of_scales, read_scales
from ckptkit.conversion.quantising import Quantise
from ckptkit.errors import InputError
from ckptkit.formats.sidecar import FOLDER
from ckptkit.sizes import human_size

_UNREAD = "0" * 64
"""In place of a SHA-256 in the plan of a dry run, which reads no scales."""


def of_original(wanted: Quantise | None, source: Checkpoint) -> Quantise | None:
    """What `--quantise` asks for, with the quantised original where it asks for that.

    Args:
        wanted: As it was given.
        source: The model.

    Raises:
        InputError: Nothing is known of a quantised original.
    """
    if wanted is None or wanted.text != ORIGINAL:
        return wanted
    archive = source.sidecar.quantised
    if archive is None or not archive.stored:
        raise InputError(
            f"--quantise {ORIGINAL}: nothing is kept of a quantised original",
            where=source.path,
            hint="name the quantised directory that it was (--quantise like:ARCHIVE), or a scheme",
        )
    return replace(wanted, like=archive)


def with_scales_read(source: Checkpoint, *, headers_only: bool, threads: int | None) -> Checkpoint:
    """A model with what its scales must be read for: their SHA-256, and the codes that do not follow from numbers.

    Args:
        source: The model.
        headers_only: Whether nothing may be read. The plan then has no codes.
        threads: How many threads read.

    Raises:
        InputError: The scales, or the codes beside them, are not those that a sidecar was written with.
    """
    archive = source.sidecar.quantised
    if archive is None or not archive.stored:
        return source
    known = (archive.digest or _UNREAD, archive.apart)
    digest, apart = known if headers_only else read_scales(archive, threads)
    found = replace(archive, digest=digest, apart=apart)
    return replace(source, sidecar=replace(source.sidecar, quantised=found))


def notes_of_kept(source: Checkpoint, *, megatron: bool, wanted: Quantise | None) -> list[str]:
    """What becomes of the scales of a quantised original.

    Args:
        source: The model, after all changes.
        megatron: Whether the output is Megatron's, and has a sidecar.
        wanted: What `--quantise` asks for.
    """
    archive, kept = source.sidecar.quantised, source.sidecar.kept
    if archive is None or not archive.stored or wanted is not None:
        return []
    if not megatron:
        return notes_of_scales(source.sidecar)
    if kept is None:
        why = "only convert keeps them" if archive.digest is None else "the model has other tensors by now"
        return [f"the scales of the quantised original are not kept: {why}"]
    size = human_size(sum(tensor.nbytes for tensor in kept.scales.values()))
    codes = f", and {len(kept.apart):,} of the tensors of codes, which do not follow from them" if kept.apart else ""
    return [f"{FOLDER}/ keeps its scales ({size}){codes}: --to hf --quantise {ORIGINAL} gives the codes back"]
