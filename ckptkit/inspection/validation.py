"""`validate`: whether a checkpoint is whole and agrees with itself. It may read headers only, or every byte.

The checks run in order: each file alone, then tensors against config, then checksums, then values. All damaged files
are named. Later checks need sound files, so they do not run after a damaged one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.element_types import check_element_types
from ckptkit.checkpoints.locating import Place, find_place
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.sidecar_contents import read_scales
from ckptkit.errors import InputError
from ckptkit.formats.format import Format
from ckptkit.formats.hf import BIN_INDEX, HF, INDEX, is_weights, read_shard, weight_files
from ckptkit.formats.hub import locate
from ckptkit.formats.json_files import LARGEST, JsonError, decode
from ckptkit.formats.registry import format_of
from ckptkit.formats.sidecar import FOLDER, TENSORS
from ckptkit.formats.torch_file.zipfiles import Member, open_archive
from ckptkit.inspection.hashing import files_in
from ckptkit.inspection.values import Survey, survey
from ckptkit.io.plan import Comparison
from ckptkit.io.reading import compare, difference
from ckptkit.io.regular import open_header, read_bounded
from ckptkit.io.stores.mirror import shown
from ckptkit.io.threads import Progress, Readers, read_all
from ckptkit.tensors import Tensor

SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class SoundnessCheck:
    """One question about a checkpoint.

    Attributes:
        name: `files`, `tensors`, `checksums` or `values`.
        summary: One line.
        problems: Errors; the checkpoint should not be used.
        warnings: Oddities.
    """

    name: str
    summary: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class Validation:
    """Whether a checkpoint is sound.

    Attributes:
        path: Where it is.
        format: Its format, or None if it could not be opened.
        architecture: Hugging Face class name, or None.
        grid: The stored grid, or None.
        checks: The questions that were asked, in order.
        not_asked: Checks that did not run, after a failed one or because the options exclude them.
        notes: Notes for the user.
        seconds: Time it took.
    """

    path: str
    format: str | None
    architecture: str | None
    grid: str | None
    checks: list[SoundnessCheck]
    not_asked: list[str]
    notes: list[str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every question was answered with yes."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The validation as JSON values."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {"schema": SCHEMA, **asdict(self), "checks": checks, "passed": self.passed}


QUESTIONS = ("files", "tensors", "checksums", "values")


def validate(
    path: str | Path,
    *,
    checksums: bool = True,
    values: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    **source: Any,
) -> Validation:
    """Checks files, headers, sizes, index, and config against tensors; on request every byte.

    Args:
        path: A checkpoint of any format.
        checksums: Also read the data of files that carry checksums (torch's zip archives).
        values: Also read every weight: none may be NaN or infinite, no matrix all zero, copies must be equal.
        threads: How many read; by default one for each core.
        progress: Called with (bytes done, bytes in all), anew for each question that reads data.
        hf_reference: Hugging Face directory that describes a Megatron checkpoint.
        iteration: Number of the iteration, if `path` is a root with several.
        source: Further options of `open_checkpoint`.

    Raises:
        InputError: The path holds no checkpoint.
        UnsupportedError: The checkpoint may be sound, but no family or format here fits it.
        UsageError: The options contradict the checkpoint.
        StorageError: A file cannot be read.
    """
    started = time.monotonic()
    reads = partial(read_all, threads=threads, progress=progress)
    with ExitStack() as stack:
        folder = stack.enter_context(locate(path)).path
        if hf_reference is not None:
            hf_reference = stack.enter_context(locate(hf_reference)).path
        place = find_place(folder, iteration, referenced=hf_reference is not None)
        format = format_of(place.folder)
        checks = [_files(place, format)]
        checkpoint: Checkpoint | None = None
        if checks[0].passed:
            opening = partial(open_checkpoint, folder, hf_reference=hf_reference, iteration=iteration, **source)
            checkpoint, answer = _tensors(opening, reads)
            checks.append(answer)
        if checksums and checks[0].passed:
            checks.append(_checksums(place.folder, format, reads, _sum_of_scales(checkpoint, threads)))
        if values and checkpoint is not None and checks[1].passed:
            checks.append(_values(checkpoint, reads))
    asked = {check.name for check in checks}
    return Validation(
        path=str(path),
        format=checkpoint.format if checkpoint else None,
        architecture=checkpoint.config.architecture if checkpoint else None,
        grid=str(checkpoint.grid) if checkpoint else None,
        checks=[_shown(check) for check in checks],
        not_asked=[name for name in QUESTIONS if name not in asked],
        notes=[shown(note) for note in checkpoint.notes] if checkpoint else [],
        seconds=time.monotonic() - started,
    )


Reads = Callable[..., list[Any]]


def _shown(check: SoundnessCheck) -> SoundnessCheck:
    """A check whose sentences name stores by their addresses."""
    return replace(check, problems=list(map(shown, check.problems)), warnings=list(map(shown, check.warnings)))


def _files(place: Place, format: Format | None) -> SoundnessCheck:
    """Every file alone: headers and sizes of weights, what else there is beside them."""
    errors = [error for check in _weight_checks(place, format) if (error := _caught(check))]
    warnings = _total_size(place.folder) if format is HF and not errors else []
    files = files_in(place)
    headers = (f"{FOLDER}/headers/", f"{FOLDER}/quantised/headers/")  # copies of the headers alone
    small = {name: file for name, file in files.items() if not is_weights(name) or name.startswith(headers)}
    errors += [error for name, file in small.items() if (error := _caught(partial(_check_small, name, file)))]
    summary = f"{len(files) - len(small):,} files with weights, {len(small):,} others"
    return SoundnessCheck("files", summary, _one_for_each_file(errors), warnings)


def _caught(check: Callable[[], object]) -> InputError | None:
    try:
        check()
    except InputError as error:
        return error
    return None


def _one_for_each_file(errors: Iterable[InputError]) -> list[str]:
    """A file that is cut short spoils every tensor in it: that is one problem."""
    by_file: dict[str | None, list[InputError]] = {}
    for error in errors:
        by_file.setdefault(error.where, []).append(error)
    return [f"{first}{f' (and {len(more):,} more in it)' if more else ''}" for first, *more in by_file.values()]


def _weight_checks(place: Place, format: Format | None) -> Iterator[Callable[[], object]]:
    """A check for each part that holds weights, those in the sidecar included."""
    if format is not None:
        yield from format.checks(place.folder)
    for name in TENSORS:
        if (file := place.root / FOLDER / name).is_file():
            yield partial(read_shard, file)


def _check_small(name: str, file: Path) -> None:
    """Checks that the start of a small file fits the kind in its name."""
    with open_header(file) as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise InputError("a Git-LFS pointer instead of the file", where=file, hint="run `git lfs pull`")
    if name.endswith(".json"):
        try:
            decode(read_bounded(file, LARGEST))
        except JsonError as error:
            raise InputError(f"not valid JSON ({error})", where=file) from None


def _total_size(folder: Path) -> list[str]:
    """An index that promises another size than there is: transformers does not look at it, but others do."""
    names, index = weight_files(folder)
    stated = ((index or {}).get("metadata") or {}).get("total_size")
    if stated is None:
        return []
    found = sum(tensor.nbytes for name in names for tensor in read_shard(folder / name)[0].values())
    name = INDEX if (folder / INDEX).is_file() else BIN_INDEX
    return [] if stated == found else [f"{name} says total_size {stated:,}, the tensors have {found:,} bytes"]


def _tensors(opening: Callable[[], Checkpoint], reads: Reads) -> tuple[Checkpoint | None, SoundnessCheck]:
    """Index against shards, config and args against tensors, through the family's table; stated shapes of codes."""
    try:
        checkpoint = opening()
        check_element_types(checkpoint)
    except InputError as error:
        return None, SoundnessCheck("tensors", "they do not make up the model", [str(error)])
    covered = ", ".join(f"{count:,} {what}" for what, count in checkpoint.coverage.items())
    summary = f"{len(checkpoint.tensors):,} tensors of {checkpoint.config.architecture} ({covered})"
    return checkpoint, SoundnessCheck(
        "tensors", summary, [*checkpoint.disagreements, *_stated_shapes(checkpoint, reads)]
    )


def _stated_shapes(checkpoint: Checkpoint, reads: Reads) -> list[str]:
    """What is wrong with the shapes that a quantised archive states beside its codes, each of two numbers."""
    quantised = checkpoint.sidecar.quantised
    stated = [] if quantised is None else list(quantised.comparisons())

    def look(readers: Readers, one: Comparison) -> list[str]:
        same = difference(one.left, one.right, readers=(readers.first, readers.second)) is None
        return [] if same else [f"{checkpoint.path}: {one.what}"]

    return [problem for found in reads(stated, look, lambda one: one.left.nbytes) for problem in found]


def _sum_of_scales(checkpoint: Checkpoint | None, threads: int | None) -> list[str] | None:
    """What is wrong with the checksum of the scales that a sidecar keeps of a quantised original; None without them."""
    archive = None if checkpoint is None else checkpoint.sidecar.quantised
    if archive is None or archive.digest is None:
        return None
    error = _caught(partial(read_scales, archive, threads))
    return [str(error)] if error else []


def _checksums(folder: Path, format: Format | None, reads: Reads, of_scales: list[str] | None) -> SoundnessCheck:
    """CRC-32 of every record of torch's archives, and the sum of a sidecar's scales; safetensors has no checksums."""
    tasks = [] if format is None else list(_records(folder, format))
    if not tasks and of_scales is None:
        return SoundnessCheck("checksums", "its files carry none (`ckptkit hash` makes some)")
    answers: list[_Sums] = reads(tasks, _check_sums, lambda task: task.size)
    without = sum(answer.without for answer in answers)
    warnings = [f"{without:,} records were written without checksums"] if without else []
    problems = [text for answer in answers for text in answer.problems] + (of_scales or [])
    also = "" if of_scales is None else ", and the scales of a quantised original"
    return SoundnessCheck(
        "checksums", f"{sum(answer.checked for answer in answers):,} records{also}", problems, warnings
    )


@dataclass(frozen=True)
class _Records:
    """An archive of torch.save at `start` of a file, whole or one record of it, and how many bytes are to be read."""

    file: Path
    start: int
    length: int | None
    size: int
    member: Member | None = None


@dataclass(frozen=True)
class _Sums:
    """The outcome of checking the checksums of records."""

    checked: int
    without: int
    problems: list[str]


def _records(folder: Path, format: Format) -> Iterator[_Records]:
    """Large archives record by record; those that are small and many, as the chunks of torch_dist, whole."""
    for archive in format.archives(folder):
        if archive.length is not None:
            yield _Records(archive.file, archive.start, archive.length, archive.length)
            continue
        for member in open_archive(archive.file).members.values():
            yield _Records(archive.file, archive.start, None, member.size, member)


def _check_sums(readers: Readers, task: _Records) -> _Sums:
    try:
        members = [task.member] if task.member else open_archive(task.file, task.start, task.length).members.values()
        checked = [member for member in members if member.checked]
        problems = [
            f"{task.file}: record {member.name} is damaged: its checksum is wrong; fetch or copy it again"
            for member in checked
            if readers.first.crc32(task.file, member.offset, member.size) != member.crc
        ]
    except InputError as error:
        return _Sums(0, 0, [str(error)])
    return _Sums(len(checked), sum(not member.checked and member.size > 0 for member in members), problems)


def _values(checkpoint: Checkpoint, reads: Reads) -> SoundnessCheck:
    """Every weight: finite, no matrix all zero; copies of one tensor equal."""
    tensors = sorted(checkpoint.hf_tensors(()).items())
    found = reads(tensors, _survey, lambda item: item[1].nbytes)
    problems: list[str] = []
    warnings: list[str] = []
    for (name, tensor), about in zip(tensors, found, strict=True):
        if about.nan or about.inf:
            problems.append(f"{name}: {about.nan:,} NaN and {about.inf:,} infinite of {tensor.numel:,} elements")
        elif about.zero and tensor.numel:
            (problems if len(tensor.shape) > 1 else warnings).append(f"{name} is all zero")
    for comparison in checkpoint.comparisons:
        if error := _caught(partial(compare, comparison)):
            problems.append(str(error))
    elements = sum(tensor.numel for _, tensor in tensors)
    summary = f"{elements:,} elements of {len(tensors):,} tensors, {len(checkpoint.comparisons):,} copies"
    return SoundnessCheck("values", summary, problems, warnings)


def _survey(readers: Readers, item: tuple[str, Tensor]) -> Survey:
    _, tensor = item
    return sum((survey(chunk, tensor.out_dtype) for chunk in readers.first.chunks(tensor)), Survey())
