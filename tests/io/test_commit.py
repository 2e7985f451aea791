"""A destination is absent, old or new: never anything between, wherever a run dies."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, InputError, StorageError, UsageError
from ckptkit.io import commit, faults, system
from ckptkit.io.commit import Destination
from ckptkit.io.engine import run
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.io.segments import Segment
from ckptkit.io.source import Seen
from ckptkit.tensors import Tensor

BF16 = DTYPES["BF16"]
STEPS = ["sync", "drop-journal", "rename", "clean-up"]
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a file system")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "model").write_bytes(np.random.default_rng(0).bytes(8192))
    return directory


@pytest.fixture
def plan(source: Path) -> Plan:
    tensor = Tensor.from_file(str(source / "model"), 0, BF16, (64, 64))
    shards = [tensor.cols(0, 32), tensor.cols(32, 64)]
    ranks = [OutputFile(f"rank{i}/model", 4096, (Segment(0, shard),)) for i, shard in enumerate(shards)]
    return Plan((*ranks, OutputFile.copy("copy", str(source / "model"), 8192), OutputFile.small("config", b"{}")))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    parent = tmp_path / "parent"
    parent.mkdir()
    return parent / "out"


@pytest.fixture
def expected(plan: Plan, tmp_path: Path) -> dict[str, bytes]:
    run(plan, tmp_path / "reference")
    return contents(tmp_path / "reference")


OLD = {"old/model": b"old", "config": b"xx"}


def fill(path: Path) -> None:
    for name, data in OLD.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def siblings(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()} - {path.name}


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a fork and returns its exit status: 0, 1 if it raised, 137 if a fault killed it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(plan: Plan, out: Path, fault: str, **options: bool) -> int:
    def work() -> None:
        with faults.inject(fault):
            Destination(out, plan, **options).write(threads=1)

    return in_child(work)


def write_two_files(plan: Plan, out: Path, hash: bool = False) -> None:
    """Dies right after the journal heard of a second file."""
    with Destination(out, plan) as destination:
        journal, seen = destination.journal, []

        class DyingJournal:
            finished = staticmethod(journal.finished)

            def record(self, path: str, size: int, sha256: str | None) -> None:
                journal.record(path, size, sha256)
                seen.append(path)
                if len(seen) == 2:
                    os._exit(137)

        run(plan, destination.directory, threads=1, journal=DyingJournal(), hash=hash)


class TestCommit:
    def test_new(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        destination = Destination(out, plan)
        assert siblings(out) == set()
        seen: list[tuple[int, int]] = []
        assert destination.write(progress=lambda done, total: seen.append((done, total))).hashes == {}
        assert contents(out) == expected
        assert siblings(out) == set()
        assert seen[-1] == (plan.nbytes, plan.nbytes)
        assert destination.free > plan.nbytes
        assert destination.resume_hint is None

    def test_into_an_empty_directory(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        out.mkdir()
        Destination(out, plan).write()
        assert contents(out) == expected

    def test_through_a_symbolic_link(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        (out.parent / "link").symlink_to(out)
        Destination(out.parent / "link", plan).write()
        assert contents(out) == expected
        assert (out.parent / "link").is_symlink()

    def test_hashes(self, plan: Plan, out: Path) -> None:
        hashes = Destination(out, plan).write(hash=True).hashes
        assert hashes.keys() == {file.path for file in plan.files}

    def test_mode_follows_the_umask(self, plan: Plan, out: Path) -> None:
        mask = os.umask(0o027)
        try:
            Destination(out, plan).write()
        finally:
            os.umask(mask)
        assert stat.S_IMODE(out.stat().st_mode) == 0o750
        assert stat.S_IMODE((out / "config").stat().st_mode) == 0o640

    @pytest.mark.parametrize("can_exchange", [True, False])
    def test_overwrite(
        self, plan: Plan, out: Path, expected: dict[str, bytes], can_exchange: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not can_exchange:
            monkeypatch.setattr(commit, "exchange", lambda left, right: False)
        fill(out)
        Destination(out, plan, overwrite=True).write()
        assert contents(out) == expected
        assert siblings(out) == set()

    def test_never_on_an_exception(self, plan: Plan, out: Path) -> None:
        destination = Destination(out, plan)
        with pytest.raises(KeyError), destination:
            run(plan, destination.directory, journal=destination.journal)
            raise KeyError
        assert not out.exists()
        assert "--resume" in (destination.resume_hint or "")

    def test_never_without_being_told(self, plan: Plan, out: Path) -> None:
        with Destination(out, plan) as destination:
            run(plan, destination.directory, journal=destination.journal)
        assert not out.exists()

    @pytest.mark.parametrize("damage", ["nothing", "remove", "cut"])
    def test_only_what_is_complete(self, plan: Plan, out: Path, damage: str) -> None:
        destination = Destination(out, plan)
        with pytest.raises(StorageError, match="not complete"), destination:
            if damage != "nothing":
                run(plan, destination.directory, journal=destination.journal)
            if damage == "remove":
                (destination.directory / "config").unlink()
            if damage == "cut":
                os.truncate(destination.directory / "copy", 100)
            destination.commit()
        assert not out.exists()

    def test_no_journal_outside(self, plan: Plan, out: Path) -> None:
        with pytest.raises(RuntimeError):
            _ = Destination(out, plan).journal


class TestPlace:
    def refuse(self, error: type[CkptkitError], message: str, path: Path, plan: Plan, **options: object) -> None:
        with pytest.raises(error, match=message):
            Destination(path, plan, **options)  # type: ignore[arg-type]

    def test_filled(self, plan: Plan, out: Path) -> None:
        fill(out)
        self.refuse(UsageError, "exists; choose another, or pass --overwrite", out, plan)
        Destination(out, plan, overwrite=True)
        assert contents(out) == OLD
        assert siblings(out) == set()

    def test_filled_meanwhile(self, plan: Plan, out: Path) -> None:
        destination = Destination(out, plan)
        with destination:
            run(plan, destination.directory, journal=destination.journal)
            fill(out)
            with pytest.raises(UsageError, match="exists"):
                destination.commit()
        assert contents(out) == OLD

    def test_a_file(self, plan: Plan, out: Path) -> None:
        out.write_bytes(b"x")
        self.refuse(UsageError, "is a file", out, plan, overwrite=True)
        assert out.read_bytes() == b"x"

    def test_without_a_parent(self, plan: Plan, out: Path) -> None:
        self.refuse(StorageError, "parent directory does not exist", out / "below", plan)

    def test_the_source_itself(self, plan: Plan, source: Path) -> None:
        self.refuse(UsageError, "holds the source", source, plan, overwrite=True)

    def test_above_the_source(self, plan: Plan, source: Path) -> None:
        self.refuse(UsageError, "holds the source", source.parent, plan, overwrite=True)

    def test_above_the_source_through_a_link(self, plan: Plan, source: Path, out: Path) -> None:
        out.symlink_to(source)
        self.refuse(UsageError, "holds the source", out, plan, overwrite=True)

    def test_inside_the_source(self, plan: Plan, source: Path) -> None:
        self.refuse(UsageError, "lies inside the source", source / "out", plan, sources=[source])
        Destination(source / "out", plan, sources=[source / "model"])

    def test_the_current_directory(self, plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(out)
        monkeypatch.chdir(out / "old")
        self.refuse(UsageError, "home or the current directory", out, plan, overwrite=True)

    def test_the_home_directory(self, plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(out)
        monkeypatch.setenv("HOME", str(out))
        self.refuse(UsageError, "home or the current directory", out, plan, overwrite=True)

    def test_a_mount_point(self, plan: Plan) -> None:
        self.refuse(UsageError, "mount point", Path("/proc"), plan, overwrite=True)

    def test_a_missing_source(self, plan: Plan, source: Path, out: Path) -> None:
        (source / "model").unlink()
        with pytest.raises(InputError, match="source file is gone"):
            Destination(out, plan).write()

    @pytest.mark.parametrize(("mode", "message"), [(0o555, "cannot be written"), (0o000, "permission denied")])
    def test_a_parent_without_permission(self, plan: Plan, mode: int, message: str) -> None:
        # Not under pytest's directory: that one is closed to the user that root becomes here.
        with tempfile.TemporaryDirectory() as place:
            os.chmod(place, 0o755)
            parent = Path(place, "parent")
            parent.mkdir()
            (parent / "out").mkdir()
            parent.chmod(mode)

            def work() -> None:
                if os.geteuid() == 0:
                    os.setuid(65534)
                self.refuse(StorageError, message, parent / "out" / "below" if mode == 0 else parent / "out", plan)

            assert in_child(work) == 0
            parent.chmod(0o755)

    def test_no_room(self, plan: Plan, out: Path) -> None:
        huge = Tensor.full(BF16, (1 << 40, 1 << 10))
        self.refuse(
            StorageError,
            r"not enough space: the output needs 2.25 PB, [\d.]+ [TGMk]B are free",
            out,
            Plan((OutputFile("f", huge.nbytes, (Segment(0, huge),)),)),
        )


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "mounted"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=256k"):
        pytest.skip("mounting is not permitted")
    yield place
    libc.umount2(os.fsencode(place), 2)


@root
class TestSmallDisk:
    def test_checked_before(self, mounted: Path) -> None:
        with pytest.raises(StorageError, match=r"not enough space: the output needs 1.05 MB, 2[56]\d kB are free"):
            Destination(mounted / "out", Plan((OutputFile("f", 1 << 20, ()),)))
        assert not list(mounted.iterdir())

    def test_filled_up_meanwhile(self, mounted: Path, plan: Plan, expected: dict[str, bytes]) -> None:
        destination = Destination(mounted / "out", plan)
        (mounted / "other").write_bytes(bytes(248 << 10))
        with pytest.raises(StorageError, match="no space left on the device"):
            destination.write()
        assert not (mounted / "out").exists()
        (mounted / "other").unlink()
        Destination(mounted / "out", plan, resume=True).write()
        assert contents(mounted / "out") == expected

    def test_room_that_an_earlier_run_left(self, mounted: Path, source: Path) -> None:
        plan = Plan((OutputFile("a", 150 << 10, (Segment(0, Tensor.full(BF16, (75, 1 << 10))),)),))
        assert killed(plan, mounted / "out", "kill:sync") == 137
        for resume in (True, False):
            Destination(mounted / "out", plan, resume=resume)
        Destination(mounted / "out", plan).write()

    def test_a_finished_run_needs_no_room(self, mounted: Path, plan: Plan) -> None:
        Destination(mounted / "out", plan).write()
        (mounted / "other").write_bytes(bytes(220 << 10))
        with pytest.raises(StorageError, match="not enough space"):
            Destination(mounted / "out2", plan)
        Destination(mounted / "out", plan, resume=True).write()

    def test_mount_point(self, mounted: Path, plan: Plan) -> None:
        with pytest.raises(UsageError, match="mount point"):
            Destination(mounted, plan)

    def test_read_only(self, mounted: Path, plan: Plan) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mount(b"none", os.fsencode(mounted), None, 32 | 1, None) == 0  # MS_REMOUNT | MS_RDONLY
        with pytest.raises(StorageError, match="cannot be written"):
            Destination(mounted / "out", plan)


class TestLock:
    def test_second_run(self, plan: Plan, out: Path) -> None:
        with Destination(out, plan), pytest.raises(UsageError, match="another conversion is writing"):
            Destination(out, plan).write()
        Destination(out, plan).write()

    def test_second_process(self, plan: Plan, out: Path) -> None:
        ready, go = os.pipe()
        child = os.fork()
        if not child:
            with Destination(out, plan):
                os.write(go, b"x")
                time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        try:
            with pytest.raises(UsageError, match="another conversion is writing"):
                Destination(out, plan).write()
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
        Destination(out, plan).write()  # the lock died with its owner
        assert siblings(out) == set()

    def test_stale_file(self, plan: Plan, out: Path) -> None:
        (out.parent / ".out.ckptkit-lock").touch()
        Destination(out, plan).write()

    def test_no_locks(self, plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(fd: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(commit.fcntl, "flock", refuse)
        with pytest.raises(StorageError, match="has no locks"):
            Destination(out, plan).write()


class TestSourceSafety:
    def write_while(self, plan: Plan, out: Path, change: Callable[[], object]) -> None:
        destination = Destination(out, plan)
        with destination:
            run(plan, destination.directory, journal=destination.journal)
            change()
            destination.commit()

    def test_changed(self, plan: Plan, source: Path, out: Path) -> None:
        model = source / "model"
        data = model.read_bytes()
        with pytest.raises(InputError, match="source changed while converting"):
            self.write_while(plan, out, lambda: model.write_bytes(data))
        assert not out.exists()

    def test_replaced(self, plan: Plan, source: Path, out: Path) -> None:
        model, times = source / "model", (source / "model").stat()

        def replace_file() -> None:
            (source / "new").write_bytes(model.read_bytes())
            os.utime(source / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
            (source / "new").rename(model)

        with pytest.raises(InputError, match="source changed"):
            self.write_while(plan, out, replace_file)

    def test_before_the_run(self, plan: Plan, source: Path, out: Path) -> None:
        """The plan is of headers that were read before."""
        seen = Seen.of(source)
        Destination(out, plan, seen=[seen]).write()
        (source / "new").write_bytes((source / "model").read_bytes())
        (source / "new").rename(source / "model")
        with pytest.raises(InputError, match="source changed"):
            Destination(out, plan, seen=[seen], overwrite=True).write()

    def test_gone(self, plan: Plan, source: Path, out: Path) -> None:
        with pytest.raises(InputError, match="source file is gone"):
            self.write_while(plan, out, (source / "model").unlink)

    @pytest.mark.parametrize(("fault", "error", "left"), [("read-end", InputError, 0), ("read-eio", StorageError, 1)])
    def test_only_what_can_be_gone_on_with_stays(
        self, plan: Plan, out: Path, fault: str, error: type[CkptkitError], left: int
    ) -> None:
        """What was written from sources that are at fault is of no use once they are repaired: that is another plan."""
        fill(out)
        destination = Destination(out, plan, overwrite=True)
        with faults.inject(f"{fault}:100"), pytest.raises(error):
            destination.write()
        assert contents(out) == OLD
        assert len(siblings(out)) == left
        assert (destination.resume_hint is None) == (left == 0)


class TestKilled:
    """Forks that die at a byte or at a step, and what a second run makes of the remains."""

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("at", [0, 1, 100, 4096, 4097, 8191, 8192, 12000, 16384, 16385])
    def test_at_a_byte(self, plan: Plan, out: Path, expected: dict[str, bytes], at: int, overwrite: bool) -> None:
        if overwrite:
            fill(out)
        assert killed(plan, out, f"kill:{at}", overwrite=overwrite) == 137
        assert (contents(out) == OLD) if overwrite else not out.exists()
        Destination(out, plan, overwrite=overwrite, resume=True).write(hash=True)
        assert contents(out) == expected
        assert siblings(out) == set()

    @pytest.mark.parametrize("resume", [False, True])
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("step", STEPS)
    def test_at_a_step(
        self, plan: Plan, out: Path, expected: dict[str, bytes], step: str, overwrite: bool, resume: bool
    ) -> None:
        if overwrite:
            fill(out)
        assert killed(plan, out, f"kill:{step}", overwrite=overwrite) == 137
        if step == "clean-up":
            assert contents(out) == expected
        else:
            assert (contents(out) == OLD) if overwrite else not out.exists()
        Destination(out, plan, overwrite=True, resume=resume).write()
        assert contents(out) == expected
        assert siblings(out) == set()

    @pytest.mark.parametrize("step", [*STEPS, "between-renames"])
    def test_where_nothing_can_be_exchanged(
        self, plan: Plan, out: Path, expected: dict[str, bytes], step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(commit, "exchange", lambda left, right: False)
        fill(out)
        assert killed(plan, out, f"kill:{step}", overwrite=True) == 137
        old = out.parent / ".out.ckptkit-old"
        here = out if out.exists() else old
        assert contents(here) == (expected if step == "clean-up" else OLD)
        assert old.exists() == (step == "between-renames")
        if old.exists():
            with pytest.raises(UsageError, match="exists"):  # found again, so not to be replaced unasked
                Destination(out, plan).write()
            assert contents(out) == OLD
        Destination(out, plan, overwrite=True).write()
        assert contents(out) == expected
        assert siblings(out) == set()

    def test_an_empty_directory_does_not_take_the_old_models_place(
        self, plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Job scripts make the directory before they start; the next run may fail for its own reasons."""
        monkeypatch.setattr(commit, "exchange", lambda left, right: False)
        fill(out)
        assert killed(plan, out, "kill:between-renames", overwrite=True) == 137
        out.mkdir()
        with faults.inject("enospc:100"), pytest.raises(StorageError):
            Destination(out, plan, overwrite=True).write()
        assert contents(out) == OLD

    def test_no_files_of_the_replaced_output_come_back(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        """After the exchange, the partial directory holds an old output with files of the very same sizes."""
        for name, data in expected.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(bytes(len(data)))
        (out / "stale").write_bytes(b"x")
        assert killed(plan, out, "kill:clean-up", overwrite=True) == 137
        Destination(out, plan, overwrite=True, resume=True).write()
        assert contents(out) == expected

    @pytest.mark.parametrize("fault", ["eio:100", "enospc:9000", "eio:sync", "eio:rename", "eio:drop-journal"])
    def test_errors(self, plan: Plan, out: Path, expected: dict[str, bytes], fault: str) -> None:
        fill(out)
        destination = Destination(out, plan, overwrite=True)
        with faults.inject(fault), pytest.raises(StorageError, match=r"input/output|no space") as caught:
            destination.write()
        assert "\n" not in str(caught.value) and "--resume to continue" in str(caught.value)
        assert destination.resume_hint is not None
        assert contents(out) == OLD
        Destination(out, plan, overwrite=True, resume=True).write()
        assert contents(out) == expected


class TestResume:
    def stop_after_two(self, plan: Plan, out: Path) -> Path:
        """A run that dies when its second file has become durable; returns what it leaves."""
        assert in_child(lambda: write_two_files(plan, out)) == 137
        partial = out.parent / ".out.ckptkit-partial"
        lines = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
        assert [line.get("path") for line in lines] == [None, "rank0/model", "rank1/model"]
        return partial

    def test_keeps_what_is_durable(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        partial = self.stop_after_two(plan, out)
        before = {name: (partial / "output" / name).stat().st_ino for name in ("rank0/model", "rank1/model")}
        stamp = (partial / "output/rank0/model").stat().st_mtime_ns
        with Destination(out, plan, resume=True) as destination:
            result = run(plan, destination.directory, journal=destination.journal)
            destination.commit()
        assert (result.kept, result.written) == (8192, 8194)
        assert contents(out) == expected
        assert {name: (out / name).stat().st_ino for name in before} == before
        assert (out / "rank0/model").stat().st_mtime_ns == stamp

    def test_without_it_all_is_done_again(self, plan: Plan, out: Path) -> None:
        self.stop_after_two(plan, out)
        with Destination(out, plan) as destination:
            assert run(plan, destination.directory, journal=destination.journal).kept == 0

    @pytest.mark.parametrize("damage", ["cut", "remove"])
    def test_what_lost_bytes_is_done_again(
        self, plan: Plan, out: Path, expected: dict[str, bytes], damage: str
    ) -> None:
        file = self.stop_after_two(plan, out) / "output/rank0/model"
        if damage == "cut":
            os.truncate(file, 100)
        else:
            file.unlink()
        Destination(out, plan, resume=True).write()
        assert contents(out) == expected

    @pytest.mark.parametrize("change", ["plan", "source"])
    def test_another_plan_is_refused(self, plan: Plan, source: Path, out: Path, change: str) -> None:
        self.stop_after_two(plan, out)
        if change == "plan":
            plan = replace(plan, files=(*plan.files[:-1], OutputFile.small("config", b"[]")))
        else:
            os.utime(source / "model", ns=(0, 0))
        with pytest.raises(InputError, match="run without --resume to start over"):
            Destination(out, plan, resume=True).write()
        Destination(out, plan).write()

    @pytest.mark.parametrize("tail", [b'{"path": "copy", "size": 81', b"\x00\xff\n", b"[1]\n", b"{}\n"])
    def test_a_torn_line_does_not_count(self, plan: Plan, out: Path, expected: dict[str, bytes], tail: bytes) -> None:
        partial = self.stop_after_two(plan, out)
        with open(partial / "journal.jsonl", "ab") as journal:
            journal.write(tail)
        assert killed(plan, out, "kill:5000", resume=True) == 137
        text = (partial / "journal.jsonl").read_text()
        assert all(json.loads(line) for line in text.splitlines())
        Destination(out, plan, resume=True).write()
        assert contents(out) == expected

    def test_an_empty_journal(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        os.truncate(self.stop_after_two(plan, out) / "journal.jsonl", 0)
        Destination(out, plan, resume=True).write()
        assert contents(out) == expected

    def test_nothing_to_resume(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        Destination(out, plan, resume=True).write()
        assert contents(out) == expected


class TestFinished:
    """Killed after its last step: nothing tells of the run but what lies at the destination."""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_nothing_is_done_again(self, plan: Plan, out: Path, expected: dict[str, bytes], overwrite: bool) -> None:
        Destination(out, plan).write()
        number = out.stat().st_ino
        seen: list[tuple[int, int]] = []
        destination = Destination(out, plan, overwrite=overwrite, resume=True)
        hashes = destination.write(hash=True, progress=lambda done, total: seen.append((done, total))).hashes
        assert (out.stat().st_ino, contents(out)) == (number, expected)
        assert hashes.keys() == expected.keys() and seen == [(plan.nbytes, plan.nbytes)]
        assert siblings(out) == set()

    def test_an_equal_size_is_not_enough(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        Destination(out, plan).write()
        other = bytes(len(expected["copy"]))
        (out / "copy").write_bytes(other)
        with pytest.raises(UsageError, match="exists; choose another, or pass --overwrite"):
            Destination(out, plan, resume=True).write()
        assert (out / "copy").read_bytes() == other
        assert siblings(out) == set()
        Destination(out, plan, overwrite=True, resume=True).write()
        assert contents(out) == expected

    def test_only_if_asked_to_resume(self, plan: Plan, out: Path) -> None:
        Destination(out, plan).write()
        with pytest.raises(UsageError, match="exists"):
            Destination(out, plan)

    def test_an_unfinished_run_goes_on(self, plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
        """Its partial directory counts, not the equal model that it was to replace."""
        Destination(out, plan).write()
        number = out.stat().st_ino
        assert killed(plan, out, "kill:sync", overwrite=True) == 137
        Destination(out, plan, overwrite=True, resume=True).write()
        assert out.stat().st_ino != number
        assert contents(out) == expected
        assert siblings(out) == set()


class TestDigest:
    def test_repeatable(self, plan: Plan) -> None:
        assert plan.digest(()) == plan.digest(())

    def test_every_part_counts(self, plan: Plan) -> None:
        first, *rest = plan.files
        tensor = first.segments[0].tensor
        others = [
            replace(first, path="other"),
            replace(first, size=first.size + 1),
            replace(first, segments=(Segment(1, tensor),)),
            replace(first, segments=(Segment(0, tensor.astype(DTYPES["F16"])),)),
            replace(first, segments=(Segment(0, tensor.rows(0, 1)),)),
            replace(first, segments=(Segment(0, Tensor.full(BF16, (64, 32))),)),
            replace(first, segments=(Segment(0, Tensor.full(BF16, (64, 32), b"\0\1")),)),
            replace(first, segments=(Segment(0, Tensor.from_bytes(bytes(4096), BF16, (64, 32))),)),
            replace(first, segments=(Segment(0, Tensor.from_bytes(bytes(4095) + b"x", BF16, (64, 32))),)),
        ]
        digests = {Plan((file, *rest)).digest(()) for file in [first, *others]}
        assert len(digests) == 1 + len(others)


class TestSystem:
    def test_allocate_falls_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system, "_call", lambda *_: False)
        with open(tmp_path / "f", "wb") as file:
            system.allocate(file.fileno(), 1000)
        assert (tmp_path / "f").read_bytes() == bytes(1000)

    def test_writeback_is_only_a_hint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[tuple[object, ...]] = []
        with open(tmp_path / "f", "wb") as file:
            system.start_writeback(file.fileno())
        system.start_writeback(-1)
        monkeypatch.setattr(system, "_call", lambda *arguments: called.append(arguments))
        system.start_writeback(3)
        name, fd, offset, size, _ = called[0]
        assert (name, fd, offset.value, size.value) == ("sync_file_range", 3, 0, 0)  # type: ignore[attr-defined]

    def test_unknown_call(self) -> None:
        assert not system._call("no_such_function")

    def test_error_of_a_call(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            system.exchange(tmp_path / "a", tmp_path / "b")

    def test_unknown_errors_keep_their_text(self) -> None:
        assert str(system.storage_error(OSError(errno.ELOOP, "Too many links"), "here")) == "here: Too many links"
