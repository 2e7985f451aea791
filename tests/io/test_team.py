"""Many ranks write what one would write; where one fails, dies or stops, all end, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, InputError, StorageError, UsageError
from ckptkit.io import meeting
from ckptkit.io.commit import Destination, take_part
from ckptkit.io.engine import run
from ckptkit.io.plan import Comparison, OutputFile, Plan
from ckptkit.io.segments import Checksum, Segment
from ckptkit.io.source import fingerprints
from ckptkit.io.team import Outcome
from ckptkit.io.world import World
from ckptkit.tensors import Tensor
from tests.ranks import exit_codes, in_threads, start_processes

BF16, F32 = DTYPES["BF16"], DTYPES["F32"]
ROWS, WIDTH = 512, 256
SIZE = ROWS * WIDTH * 2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(np.random.default_rng(0).integers(0, 1 << 14, ROWS * WIDTH, np.uint16).tobytes())
    return path


def make_plan(source: Path) -> Plan:
    """Casts at odd bytes, columns that go to several files, checksums over and after borders, runs, fillings."""
    tensor = Tensor.from_file(str(source), 0, BF16, (ROWS, WIDTH))
    columns = [tensor.cols(start, start + 64) for start in range(0, WIDTH, 64)]
    cast = OutputFile("cast", 3 + 2 * SIZE, (Segment(3, tensor.astype(F32)),))
    sums = (Checksum(10, SIZE - 5000, (4, SIZE - 3)), Checksum(SIZE - 5000, SIZE - 3, (SIZE + 4094,)))
    summed = OutputFile("deep/summed", SIZE + 9000, (Segment(10, tensor.rows(0, ROWS - 8)),), sums)
    return Plan(
        (
            OutputFile.small("config", b"{}"),
            cast,
            *(OutputFile(f"rank{i}", SIZE // 4, (Segment(0, part),)) for i, part in enumerate(columns)),
            summed,
            OutputFile.copy("copy", str(source), SIZE),
            OutputFile("empty", 0, ()),
        ),
        (Comparison(tensor, tensor.rows(0, ROWS), "one and the same"), Comparison(columns[0], columns[0], "columns")),
    )


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    run(make_plan(source), tmp_path / "reference")
    return contents(tmp_path / "reference")


def writing(
    source: Path, out: Path, *, hash: bool = False, seen: Callable[[int, int], None] | None = None, **options: bool
) -> Callable[[World], Outcome | None]:
    """What each rank does."""

    def work(world: World) -> Outcome | None:
        plan = make_plan(source)
        if world.first:
            return Destination(out, plan, **options).write(threads=2, hash=hash, progress=seen, world=world)
        take_part(out, plan, world, seen=(), threads=2, hash=hash)
        return None

    return work


@pytest.mark.parametrize(("size", "hash"), [(1, True), (2, False), (4, True), (7, False)])
def test_any_number_writes_the_same(
    source: Path, tmp_path: Path, expected: dict[str, bytes], size: int, hash: bool
) -> None:
    out, seen = tmp_path / "parent" / "out", []
    out.parent.mkdir()
    outcome, *others = in_threads(size, writing(source, out, hash=hash, seen=lambda *progress: seen.append(progress)))
    assert isinstance(outcome, Outcome) and others == [None] * (size - 1)
    assert contents(out) == expected
    assert list(out.parent.iterdir()) == [out]
    alone = run(make_plan(source), tmp_path / "alone", hash=True).hashes
    assert outcome.hashes == (alone if hash else {})
    total = sum(map(len, expected.values()))
    written = [rank.bytes_written for rank in outcome.ranks]
    assert [rank.rank for rank in outcome.ranks] == list(range(size))
    assert sum(written) == total and max(written) <= 1.25 * total / size
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_more_ranks_than_pages(tmp_path: Path) -> None:
    plan = Plan((OutputFile.small("config", b"{}"), OutputFile("empty", 0, ())))

    def work(world: World) -> Outcome | None:
        if world.first:
            return Destination(tmp_path / "out", plan).write(hash=True, world=world)
        take_part(tmp_path / "out", plan, world, seen=(), threads=1, hash=True)
        return None

    outcome, *others = in_threads(3, work)
    assert isinstance(outcome, Outcome) and others == [None, None]
    assert contents(tmp_path / "out") == {"config": b"{}", "empty": b""}
    assert sorted(rank.bytes_written for rank in outcome.ranks) == [0, 0, 2]


@pytest.mark.parametrize("start", ["{}", '{"live": 3}', '{"live": ["x"]}', '{"live": [99]}', '{"live": [0, 0]}', "[]"])
def test_what_rank_0_says_is_checked(source: Path, tmp_path: Path, start: str) -> None:
    folder = tmp_path / ".out.ckptkit-partial" / "ranks"
    folder.mkdir(parents=True)

    def work(world: World) -> None:
        if not world.first:
            take_part(tmp_path / "out", make_plan(source), world, seen=(), threads=1, hash=False)
            return
        voice = meeting.Voice(folder, "run", 0)
        voice.say(**meeting.hello())
        meeting.call(folder, world, "run")
        while not (folder / "run-1.jsonl").exists():
            time.sleep(0.01)
        with open(folder / "run-0.jsonl", "a", encoding="utf-8") as file:
            file.write(f'{{"start": {start}}}\n')
        while b"bye" not in (folder / "run-1.jsonl").read_bytes():
            time.sleep(0.01)
        voice.close()

    _, error = in_threads(2, work)
    assert isinstance(error, InputError) and "not what rank 0 says" in str(error)


def test_a_difference_of_plans_is_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    work = [writing(source, tmp_path / "out"), writing(other, tmp_path / "out")]
    first, second = in_threads(2, lambda world: work[world.rank](world))
    assert isinstance(first, UsageError) and "rank 1" in str(first) and "another plan" in str(first)
    assert isinstance(second, UsageError) and second.told
    assert not (tmp_path / "out").exists()


def test_an_error_of_one_rank_is_that_of_all(source: Path, tmp_path: Path) -> None:
    def work(world: World) -> None:
        plan = make_plan(source)
        if world.rank == 2:
            raise_in = Comparison(plan.comparisons[0].left, Tensor.full(BF16, (ROWS, WIDTH)), "two norms")
            plan = Plan(plan.files, (raise_in, raise_in))
        if world.first:
            Destination(tmp_path / "out", plan).write(world=world)
        else:
            take_part(tmp_path / "out", plan, world, seen=(), threads=2, hash=False)

    found = in_threads(3, work)
    assert all(isinstance(error, InputError) and "two norms" in str(error) for error in found)
    assert str(found[0]).startswith("rank 2 on ")
    assert [error.told for error in found if isinstance(error, CkptkitError)] == [False, True, False]
    # The error may be of one machine alone, so what is finished stays; and another plan may take the place.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.ckptkit-partial", "source"]
    assert isinstance(in_threads(2, writing(source, tmp_path / "out"))[0], Outcome)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_rank_that_does_not_come_is_not_waited_for(source: Path, tmp_path: Path) -> None:
    error = in_threads(2, lambda world: writing(source, tmp_path / "out")(world) if world.first else None, timeout=0.1)
    assert isinstance(error[0], StorageError) and "rank 1 of 2 did not come" in str(error[0])
    (_, error) = in_threads(
        2, lambda world: None if world.first else writing(source, tmp_path / "out")(world), timeout=0.1
    )
    assert isinstance(error, StorageError) and "rank 0 did not come" in str(error)


def test_one_rank_twice(source: Path, tmp_path: Path) -> None:
    def work(world: World) -> object:
        return writing(source, tmp_path / "out")(World(min(world.rank, 1), 2, "a launch"))

    first, *others = in_threads(3, work)
    refused = [error for error in others if isinstance(error, UsageError)]
    assert isinstance(first, Outcome)
    assert len(refused) == 1 and "another process is rank 1" in str(refused[0])


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_killed_rank_ends_all_and_resume_finishes(
    source: Path, tmp_path: Path, expected: dict[str, bytes], dies: int
) -> None:
    out = tmp_path / "out"
    codes = exit_codes(start_processes(3, writing(source, out), faults={dies: "kill:200000"}))
    assert codes == [137 if rank == dies else 5 for rank in range(3)]
    assert not out.exists()
    outcome, *_ = in_threads(2, writing(source, out, resume=True))
    assert isinstance(outcome, Outcome) and contents(out) == expected
    assert not (tmp_path / ".out.ckptkit-partial").exists()


@pytest.mark.parametrize("step", ["sync", "drop-journal", "rename", "clean-up"])
def test_rank_0_killed_in_the_commit(source: Path, tmp_path: Path, expected: dict[str, bytes], step: str) -> None:
    out = tmp_path / "out"
    assert exit_codes(start_processes(2, writing(source, out), faults={0: f"kill:{step}"})) == [137, 5]
    assert out.exists() == (step == "clean-up")
    found = in_threads(4, writing(source, out, resume=True, hash=True))
    assert isinstance(found[0], Outcome) and found[1:] == [None] * 3
    assert contents(out) == expected and len(found[0].hashes) == len(expected)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_noticed(
    source: Path, tmp_path: Path, expected: dict[str, bytes], stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_OLD_RANKS", 0.5)
    out = tmp_path / "out"

    def work(world: World) -> object:
        if world.rank != stopped:
            return writing(source, out)(world)

        def stop(done: int, total: int) -> None:
            if done:
                os.kill(os.getpid(), signal.SIGSTOP)

        plan = make_plan(source)
        if world.first:
            return Destination(out, plan).write(world=world, progress=stop, check=lambda path: stop(1, 1))
        real = meeting.Voice.say

        def say(self: meeting.Voice, **message: object) -> None:
            real(self, **message)
            if "plan" in message:
                stop(1, 1)

        meeting.Voice.say = say  # type: ignore[method-assign]  # in this process alone
        return take_part(out, plan, world, seen=(), threads=2, hash=False)

    pids = start_processes(2, work, timeout=1.0)
    try:
        other = 1 - stopped
        assert exit_codes(pids[other : other + 1]) == [5]
        assert not out.exists()
        # It may write when it goes on, so nobody else may meanwhile.
        (error, *_) = in_threads(1, writing(source, out, resume=True))
        assert isinstance(error, UsageError), error
    finally:
        os.kill(pids[stopped], signal.SIGKILL)
    assert exit_codes(pids[stopped : stopped + 1]) == [-signal.SIGKILL]
    outcome, *_ = in_threads(2, writing(source, out, resume=True))
    assert isinstance(outcome, Outcome) and contents(out) == expected


def test_what_an_earlier_run_left_confuses_nobody(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    exit_codes(start_processes(3, writing(source, out), faults={0: "kill:100000", 1: "kill:100000", 2: "kill:100000"}))
    folder = tmp_path / ".out.ckptkit-partial" / "ranks"
    assert (folder / "call.json").exists()
    late: list[object] = []

    def work(world: World) -> object:
        if world.first:
            time.sleep(0.5)  # the others see the old call first
        return writing(source, out, resume=world.first)(world)

    late = in_threads(3, work)
    assert isinstance(late[0], Outcome) and late[1:] == [None, None]
    assert contents(out) == expected


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (b"no json\n", "not what"),
        (b"[1]\n", "not what"),
        (b'{"part": 99, "sums": []}\n', "not what"),
        (b'{"part": 6, "sums": [[1]]}\n', "not what"),
        (b'{"something": "of later"}\n', "has ended"),
    ],
)
def test_what_ranks_say_is_checked(source: Path, tmp_path: Path, said: bytes, what: str) -> None:
    def work(world: World) -> None:
        plan = make_plan(source)
        if world.first:
            Destination(tmp_path / "out", plan).write(world=world)
            return
        folder = tmp_path / ".out.ckptkit-partial" / "ranks"
        while (called := meeting.called(folder, world)) is None:
            time.sleep(0.01)
        voice = meeting.Voice(folder, called, 1)
        voice.say(**meeting.hello(), plan=plan.digest(fingerprints(plan.sources())), hash=False)
        while b"start" not in (folder / f"{called}-0.jsonl").read_bytes():
            time.sleep(0.01)
        with open(folder / f"{called}-1.jsonl", "ab") as file:
            file.write(said)
        voice.say(bye=True)
        voice.close()

    error, _ = in_threads(2, work)
    assert isinstance(error, CkptkitError) and what in str(error)


def test_other_launches_are_not_answered(source: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    meeting.call(tmp_path / "ranks", World(0, 3, "theirs"), "abc")
    assert meeting.called(tmp_path / "ranks", World(1, 3, "theirs")) == "abc"
    assert meeting.called(tmp_path / "ranks", World(1, 3, "ours")) is None
    assert meeting.called(tmp_path / "ranks", World(1, 4, "theirs")) is None
