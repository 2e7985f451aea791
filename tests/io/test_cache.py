"""Finished tiles are shared by threads: each is made once, and an error reaches everybody who waits for it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptkit.io.cache import Cache

LIMIT = 16


def tiles() -> Cache[bytes]:
    return Cache(LIMIT, len)


def test_no_two_threads_make_the_same_tile() -> None:
    kept, started, made = tiles(), threading.Barrier(4), list[int]()

    def make() -> bytes:
        made.append(1)
        return b"tile"

    def ask(_: int) -> bytes:
        started.wait()
        return kept.get(0, make)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [b"tile"] * 4
    assert len(made) == 1


def test_whether_a_value_is_being_made() -> None:
    kept, begun, end = tiles(), threading.Event(), threading.Event()

    def make() -> bytes:
        begun.set()
        assert end.wait(30)
        return b"tile"

    assert not kept.makes(0)
    with ThreadPoolExecutor(1) as threads:
        made = threads.submit(kept.get, 0, make)
        assert begun.wait(30)
        assert kept.makes(0) and not kept.makes(1)
        end.set()
        assert made.result() == b"tile"
    assert not kept.makes(0)


def test_few_are_kept() -> None:
    kept, made = tiles(), list[int]()

    def ask(number: int) -> None:
        kept.get(number, lambda: made.append(number) or b"x")  # type: ignore[func-returns-value]

    for number in (*range(LIMIT), 0, LIMIT, 0, 1):
        ask(number)
    assert made == [*range(LIMIT), LIMIT, 1]  # 0 was asked for again in time, 1 was not


def test_an_error_is_not_kept() -> None:
    kept = tiles()

    def fail() -> bytes:
        raise OSError("no")

    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            kept.get(0, fail)
    assert kept.get(0, lambda: b"now") == b"now"
