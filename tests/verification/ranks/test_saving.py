"""Ranks that save together: an iteration is whole or absent, and no rank waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from ckptkit.errors import CkptkitError, StorageError, UsageError
from ckptkit.verification.ranks import saving
from ckptkit.verification.ranks.saving import save_iteration

Rank = Callable[..., Any]
CONTENT = {"iteration": 5, "model": {"weight": torch.arange(3.0)}}


class Ranks:
    """Threads for ranks; `agree` meets as collectives do, and gives up after a while as they do not."""

    def __init__(self, number: int = 2) -> None:
        self.number, self.barrier = number, Barrier(number, timeout=20)
        self.problems: list[str | None] = [None] * number

    def agree_of(self, rank: int) -> saving.Agree:
        def agree(problem: str | None) -> list[tuple[int, str]]:
            self.problems[rank] = problem
            self.barrier.wait()
            found = [(number, text) for number, text in enumerate(self.problems) if text is not None]
            self.barrier.wait()
            return found

        return agree

    def save(self, folder: Path, owns: list[str | None], iteration: int = 5) -> list[Any]:
        """What each rank gets: the folder, or what it raised."""

        def one(rank: int) -> Any:
            try:
                agree = self.agree_of(rank)
                return save_iteration(folder, iteration, owns[rank], CONTENT, first=rank == 0, agree=agree)
            except CkptkitError as error:
                return error

        with ThreadPoolExecutor(self.number) as pool:
            return list(pool.map(one, range(self.number)))


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_iteration_is_there_with_all_files(tmp_path: Path) -> None:
    (tmp_path / ".iter_0000005.partial" / "mp_rank_07").mkdir(parents=True)  # left by a run that was killed
    (tmp_path / ".iter_0000005.partial" / "mp_rank_07" / saving.FILE).write_text("stale")
    found = Ranks(3).save(tmp_path, ["mp_rank_00", "mp_rank_01", None])
    assert found == [tmp_path / "iter_0000005"] * 3
    files = {f"iter_0000005/mp_rank_0{rank}/{saving.FILE}" for rank in range(2)}
    assert contents(tmp_path) == files | {"latest_checkpointed_iteration.txt"}
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5"
    loaded = torch.load(tmp_path / "iter_0000005" / "mp_rank_01" / saving.FILE)
    assert torch.equal(loaded["model"]["weight"], CONTENT["model"]["weight"])  # type: ignore[index]


def test_one_rank_that_cannot_write_is_the_error_of_all(tmp_path: Path) -> None:
    assert Ranks().save(tmp_path, ["mp_rank_00", "mp_rank_01"], 4)[0] == tmp_path / "iter_0000004"
    before = contents(tmp_path)
    found = Ranks().save(tmp_path, ["mp_rank_00", "not/there"])
    assert [type(error) for error in found] == [StorageError] * 2
    assert {str(error) for error in found} == {str(found[0])} and "No such file" in str(found[0])
    assert contents(tmp_path) == before  # the tracker still names the iteration before
    assert not (tmp_path / ".iter_0000005.partial").exists()


def test_a_full_disk_is_an_error_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    found = Ranks().save(tmp_path, ["mp_rank_00", "mp_rank_01"])
    assert all(isinstance(error, StorageError) and "file write failed" in str(error) for error in found)
    assert not contents(tmp_path)


@pytest.mark.parametrize(("iteration", "words"), [(5, "there already"), (0, "1 or more")])
def test_what_is_refused_on_every_rank(tmp_path: Path, iteration: int, words: str) -> None:
    (tmp_path / "iter_0000005" / "mp_rank_02").mkdir(parents=True)  # of another grid
    found = Ranks().save(tmp_path, ["mp_rank_00", "mp_rank_01"], iteration)
    assert all(isinstance(error, UsageError) and words in str(error) for error in found)
    assert not contents(tmp_path) and not (tmp_path / ".iter_0000005.partial").exists()
