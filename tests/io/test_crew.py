"""Work is done with as many threads as the system gives, which may be none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError
from ckptkit.inspection.hashing import hash_checkpoint
from ckptkit.io.crew import Crew, start_threads
from fixtures.make_damaged import SOUND
from tests.models import files_of


@contextmanager
def threads_to_have(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[None]:
    """In here the system gives so many threads and no more, as under a limit on processes."""
    left = [count]
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        yield


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_a_crew_does_all_of_its_work(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    done: list[int] = []
    with threads_to_have(monkeypatch, count):
        crew = Crew(4, "test")
        for number in range(50):
            crew.submit(lambda number=number: done.append(number))  # type: ignore[misc]
        assert list(crew.map(lambda number: number * number, range(50))) == [n * n for n in range(50)]
        crew.close()
    assert sorted(done) == list(range(50))


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_comes_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def work(number: int) -> int:
        if number == 3:
            raise InputError("three")
        return number

    with threads_to_have(monkeypatch, count):
        crew = Crew(2, "test")
        answers = crew.map(work, range(6))
        assert [next(answers) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(InputError, match="three"):
            next(answers)
        crew.close()


def test_threads_are_started_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    event = threading.Event()
    with threads_to_have(monkeypatch, 2):
        started = start_threads([event.wait] * 5, "test")  # type: ignore[list-item]
    event.set()
    assert len(started) == 2
    for thread in started:
        thread.join()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_conversions_do_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    convert(SOUND / "torch", tmp_path / "expected", to="hf")
    expected = hash_checkpoint(tmp_path / "expected")
    seen: list[int] = []
    with threads_to_have(monkeypatch, count):
        convert(SOUND / "torch", tmp_path / "out", to="hf", progress=lambda done, total: seen.append(total - done))
    with threads_to_have(monkeypatch, count):
        hashed = hash_checkpoint(tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert hashed.tensors == expected.tensors
    assert seen[-1] == 0
