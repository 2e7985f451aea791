"""What a killed run left is gone on with only as far as it is still what the journal says, from the same sources."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, StorageError, UsageError
from ckptkit.io import faults
from ckptkit.io.commit import Destination
from ckptkit.io.engine import run
from ckptkit.io.leftovers import strangers
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.io.segments import Segment
from ckptkit.io.source import MOST_SAMPLES, Fingerprint, TouchedError, fingerprints, sample_of
from ckptkit.tensors import Tensor
from tests.io.test_commit import contents, in_child

SIZE = 1 << 20
FILES = ("a/copy", "b/copy", "halves", "small")
HIDDEN = 300_001
"""A byte that no sample of a file of this size holds; a test looks."""


def write_source(path: Path, seed: int) -> None:
    path.write_bytes(np.random.default_rng(seed).bytes(SIZE))


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "source").mkdir()
    paths = tmp_path / "source" / "first", tmp_path / "source" / "second"
    for seed, path in enumerate(paths):
        write_source(path, seed)
    return paths


@pytest.fixture
def plan(sources: tuple[Path, Path]) -> Plan:
    """A copy of each source, a file with the end of one and the start of the other, and one of no source."""
    first, second = map(str, sources)
    half = (1, SIZE // 2)
    segments = (
        Segment(0, Tensor.from_file(first, SIZE // 2, DTYPES["U8"], half)),
        Segment(SIZE // 2, Tensor.from_file(second, 0, DTYPES["U8"], half)),
    )
    copies = [OutputFile.copy(name, path, SIZE) for name, path in (("a/copy", first), ("b/copy", second))]
    return Plan((*copies, OutputFile("halves", SIZE, segments), OutputFile.small("small", b"{}")))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "out"


@pytest.fixture
def partial(plan: Plan, out: Path) -> Path:
    """What a run leaves that is killed when all its files are durable."""
    killed(plan, out)
    return out.parent / ".out.ckptkit-partial"


def killed(plan: Plan, out: Path, step: str = "sync", **options: bool) -> None:
    def work() -> None:
        with faults.inject(f"kill:{step}"):
            Destination(out, plan, **options).write(threads=1)

    assert in_child(work) == 137


def resumed(plan: Plan, out: Path, **options: bool) -> set[str]:
    """Goes on, and says which files it kept."""
    with Destination(out, plan, resume=True, **options) as destination:
        kept = set(destination.journal.finished())
        result = run(plan, destination.directory, journal=destination.journal)
        assert result.kept == sum(file.size for file in plan.files if file.path in kept)
        destination.commit()
    return kept


def expected_of(plan: Plan, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run gives now."""
    run(plan, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def write_at(path: Path, offset: int, *, keep_time: bool = True) -> None:
    """Changes a byte in place, and sets the time back as a tool may that means well."""
    times = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_copy(path: Path) -> None:
    copy = path.with_name("copy-of-it")
    shutil.copy2(path, copy)
    copy.rename(path)


class TestFinishedFiles:
    def test_untouched_ones_are_kept(self, plan: Plan, out: Path, partial: Path, tmp_path: Path) -> None:
        numbers = {name: (partial / "output" / name).stat().st_ino for name in FILES}
        assert resumed(plan, out) == set(FILES)
        assert {name: (out / name).stat().st_ino for name in FILES} == numbers
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("offset", [0, HIDDEN, SIZE - 1])
    @pytest.mark.parametrize("keep_time", [False, True])
    def test_one_that_was_written_to(
        self, plan: Plan, out: Path, partial: Path, tmp_path: Path, offset: int, keep_time: bool
    ) -> None:
        write_at(partial / "output" / "halves", offset, keep_time=keep_time)
        assert resumed(plan, out) == set(FILES) - {"halves"}
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("offset", [None, 0, HIDDEN, SIZE - 1])
    def test_a_copied_directory(self, plan: Plan, out: Path, partial: Path, tmp_path: Path, offset: int | None) -> None:
        """Times and inodes are others; so all bytes are compared."""
        partial.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", partial)
        if offset is not None:
            write_at(partial / "output" / "a" / "copy", offset)
        assert resumed(plan, out) == set(FILES) - (set() if offset is None else {"a/copy"})
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("field", ["size", "sample", "version"])
    def test_a_line_that_says_something_else(
        self, plan: Plan, out: Path, partial: Path, tmp_path: Path, field: str
    ) -> None:
        lines = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
        line = next(line for line in lines if line.get("path") == "b/copy")
        line[field] = {"size": 5, "sample": "0" * 64, "version": [1, 2, 3]}[field]
        (partial / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        # Of other times alone the bytes tell that nothing happened.
        assert resumed(plan, out) == set(FILES) - (set() if field == "version" else {"b/copy"})
        assert contents(out) == expected_of(plan, tmp_path)

    def test_each_line_has_a_checksum(self, plan: Plan, partial: Path) -> None:
        first, *lines = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
        assert first["ckptkit_journal"] == 2 and len(first["sources"]) == 2
        for line in lines:
            place = partial / "output" / line["path"]
            assert line["sample"] == sample_of(place, place.stat().st_size, MOST_SAMPLES)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a file": lambda output: (output / "model.safetensors").write_bytes(b"evil"),
    "a hidden file": lambda output: (output / "a" / ".hidden").write_bytes(b"x"),
    "a folder": lambda output: (output / "folder" / "below").mkdir(parents=True),
    "a folder with a file": lambda output: put(output / "folder" / "file"),
    "a pipe": lambda output: os.mkfifo(output / "a" / "pipe"),
}


def put(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")


class TestForeignFiles:
    @pytest.mark.parametrize("kind", FOREIGN)
    def test_they_are_removed(self, plan: Plan, out: Path, partial: Path, tmp_path: Path, kind: str) -> None:
        FOREIGN[kind](partial / "output")
        assert resumed(plan, out) == set(FILES)
        assert contents(out) == expected_of(plan, tmp_path)
        assert {path.name for path in out.rglob("*") if path.is_dir()} == {"a", "b"}

    def test_a_folder_in_place_of_a_file(self, plan: Plan, out: Path, partial: Path, tmp_path: Path) -> None:
        (partial / "output" / "small").unlink()
        put(partial / "output" / "small" / "file")
        assert resumed(plan, out) == set(FILES) - {"small"}
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("kind", FOREIGN)
    def test_meanwhile(self, plan: Plan, out: Path, kind: str, tmp_path: Path) -> None:
        with (
            pytest.raises(StorageError, match="did not write; run again with --resume"),
            Destination(out, plan) as there,
        ):
            run(plan, there.directory, journal=there.journal)
            FOREIGN[kind](there.directory)
            there.commit()
        assert not out.exists()
        assert resumed(plan, out) == set(FILES)
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("name", ["output/a/link", "output/link", "output/a", "output", "journal.jsonl", ""])
    def test_links_are_refused(self, plan: Plan, out: Path, partial: Path, tmp_path: Path, name: str) -> None:
        place = partial / name if name else partial
        elsewhere = tmp_path / "elsewhere"
        if place.exists():
            place.rename(elsewhere)
        else:
            elsewhere.mkdir()
        before = contents(elsewhere)
        place.symlink_to(elsewhere)
        with pytest.raises(InputError, match="a symbolic link among the files of an earlier run"):
            Destination(out, plan, resume=True).write()
        assert contents(elsewhere) == before and not out.exists()

    def test_what_is_expected_is_no_stranger(self, tmp_path: Path) -> None:
        for name in ("a/b/c", "d"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert not list(strangers(tmp_path, {"a/b/c", "d", "missing"}))
        assert list(strangers(tmp_path, {"d"})) == [tmp_path / "a"]
        assert list(strangers(tmp_path, {"a/b", "d"})) == [tmp_path / "a" / "b"]


class TestSources:
    """A source between two runs."""

    @pytest.mark.parametrize("change", [lambda path: write_at(path, HIDDEN), replace_by_copy])
    def test_one_of_other_inode_or_ctime_is_copied_again(
        self,
        plan: Plan,
        sources: tuple[Path, Path],
        out: Path,
        partial: Path,
        tmp_path: Path,
        change: Callable[[Path], object],
    ) -> None:
        change(sources[0])
        killed(plan, out, resume=True)
        assert resumed(plan, out) == set(FILES)  # the second run noted what it found
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("change", [lambda path: write_at(path, HIDDEN), replace_by_copy])
    def test_and_what_comes_from_others_is_kept(
        self, plan: Plan, sources: tuple[Path, Path], out: Path, partial: Path, change: Callable[[Path], object]
    ) -> None:
        change(sources[0])
        assert resumed(plan, out) == {"b/copy", "small"}

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda path: write_at(path, 0), "content"),
            (lambda path: write_at(path, SIZE - 1), "content"),
            (lambda path: write_at(path, HIDDEN, keep_time=False), "time"),
            (lambda path: os.utime(path, ns=(0, 0)), "time"),
            (lambda path: os.truncate(path, SIZE + 1), "size and time and content"),
        ],
    )
    def test_a_changed_one_is_refused(
        self,
        plan: Plan,
        sources: tuple[Path, Path],
        out: Path,
        partial: Path,
        change: Callable[[Path], object],
        what: str,
    ) -> None:
        change(sources[1])
        message = f"its {what} changed since the run that is to be resumed; run without --resume to start over"
        with pytest.raises(InputError, match=message) as caught:
            Destination(out, plan, resume=True).write()
        assert caught.value.where == str(sources[1])
        assert (partial / "journal.jsonl").exists() and not out.exists()
        Destination(out, plan).write()

    def test_written_to_while_converting(
        self, plan: Plan, sources: tuple[Path, Path], out: Path, tmp_path: Path
    ) -> None:
        """The time is set back; what is there stays, and the next run copies again what came from that file."""
        destination = Destination(out, plan)
        with pytest.raises(TouchedError, match="source changed while converting; run again with --resume"), destination:
            run(plan, destination.directory, journal=destination.journal)
            write_at(sources[0], HIDDEN)
            destination.commit()
        assert not out.exists()
        assert resumed(plan, out) == {"b/copy", "small"}
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("step", ["drop-journal", "rename", "clean-up"])
    def test_after_the_last_step(
        self, plan: Plan, sources: tuple[Path, Path], out: Path, tmp_path: Path, step: str
    ) -> None:
        """A destination that is in place is of the old bytes."""
        killed(plan, out, step)
        write_at(sources[0], HIDDEN)
        if step == "clean-up":
            with pytest.raises(UsageError, match="the destination exists"):
                Destination(out, plan, resume=True).write()
        Destination(out, plan, resume=True, overwrite=True).write()
        assert contents(out) == expected_of(plan, tmp_path)
        assert [path.name for path in out.parent.iterdir()] == ["out"]


class TestOtherVersions:
    @pytest.mark.parametrize("version", [1, 3, "x", None])
    def test_a_journal_of_another_version(self, plan: Plan, out: Path, partial: Path, version: object) -> None:
        """Files of the two are not mixed."""
        (partial / "journal.jsonl").write_text(json.dumps({"ckptkit_journal": version, "plan": "0" * 64}) + "\n")
        with pytest.raises(InputError, match=r"another version of ckptkit wrote.*; run without --resume"):
            Destination(out, plan, resume=True).write()
        assert (partial / "output" / "a" / "copy").exists() and not out.exists()
        Destination(out, plan).write()

    @pytest.mark.parametrize("first", [b"", b"\0\0\n", b"[]\n", b'{"ckptkit_journal": 2, "plan": "'])
    def test_a_journal_without_a_first_line(
        self, plan: Plan, out: Path, partial: Path, tmp_path: Path, first: bytes
    ) -> None:
        (partial / "journal.jsonl").write_bytes(first)
        assert resumed(plan, out) == set()
        assert contents(out) == expected_of(plan, tmp_path)

    @pytest.mark.parametrize("stated", [None, [], {"x": 5}, {"x": [1]}])
    def test_sources_that_are_none(self, plan: Plan, out: Path, partial: Path, stated: object) -> None:
        first, *lines = (partial / "journal.jsonl").read_text().splitlines()
        changed = {**json.loads(first), "sources": stated}
        (partial / "journal.jsonl").write_text("\n".join([json.dumps(changed), *lines, ""]))
        assert resumed(plan, out) == {"small"}  # which of the sources were touched, nobody knows

    @pytest.mark.parametrize(
        "line",
        [b"{}", b"5", b'{"path": 5, "size": 1, "sha256": null, "sample": "", "version": [1, 2, 3]}', b"{" * 5000],
    )
    def test_other_lines_do_not_count(self, plan: Plan, out: Path, partial: Path, line: bytes) -> None:
        first, second, *rest = (partial / "journal.jsonl").read_bytes().splitlines()
        (partial / "journal.jsonl").write_bytes(b"\n".join([first, second, line, *rest, b""]))
        assert len(resumed(plan, out)) == 1


class TestSamples:
    def test_hidden_bytes_are_hidden(self, sources: tuple[Path, Path]) -> None:
        """Or the tests above would show less than they say."""
        before = sample_of(sources[0], SIZE, MOST_SAMPLES)
        write_at(sources[0], HIDDEN)
        assert sample_of(sources[0], SIZE, MOST_SAMPLES) == before

    @pytest.mark.parametrize("size", [0, 1, 4096, MOST_SAMPLES * 4096])
    def test_small_files_are_read_whole(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(size))
        found = {sample_of(path, size, MOST_SAMPLES)}
        for offset in range(0, size, 977):
            write_at(path, offset)
            found.add(sample_of(path, size, MOST_SAMPLES))
        assert len(found) == 1 + len(range(0, size, 977))

    def test_large_files_are_sampled_at_both_ends_and_between(self, sources: tuple[Path, Path]) -> None:
        noticed = 0
        for offset in range(0, SIZE, 4096):
            before = sample_of(sources[0], SIZE, MOST_SAMPLES)
            write_at(sources[0], offset)
            noticed += sample_of(sources[0], SIZE, MOST_SAMPLES) != before
            if offset in (0, SIZE - 4096):
                assert noticed
        assert MOST_SAMPLES // 2 < noticed <= MOST_SAMPLES

    def test_many_files_take_bounded_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        monkeypatch.setattr(Fingerprint, "of", lambda path, samples=0: asked.append(samples) or here)
        here = Fingerprint(str(tmp_path), 0, 0, 0, 0, 0)
        for count, each in ((1, MOST_SAMPLES), (100, MOST_SAMPLES), (512, 8), (50_000, 4)):
            asked.clear()
            fingerprints(f"file{number}" for number in range(count))
            assert asked == [each] * count

    def test_no_sample_unless_asked_for(self, sources: tuple[Path, Path]) -> None:
        plain, sampled = Fingerprint.of(str(sources[0])), Fingerprint.of(str(sources[0]), 26)
        assert plain.sample == "" and len(sampled.sample) == 64
        assert plain == sampled and plain.identity != sampled.identity
