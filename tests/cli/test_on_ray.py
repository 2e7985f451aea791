"""When the launcher of `--ray` starts all ranks again, and when it does not; tests/test_on_ray.py has real clusters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ckptkit.cli import on_ray
from ckptkit.errors import StorageError, UsageError


class Cluster(SimpleNamespace):
    """What the launcher asks Ray for: two nodes with a CPU each."""

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": True}, {"Alive": False}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def shutdown(self) -> None:
        pass


def launched(monkeypatch: pytest.MonkeyPatch, *starts: tuple[int, bool]) -> tuple[int, list[str]]:
    """The exit code, and the number of each start, where starts end with these codes and lose a task or not."""
    seen: list[str] = []

    def run(ranks: on_ray._Ranks) -> int:
        code, lost = starts[len(seen)]
        seen.append(ranks.variables["TORCHELASTIC_RESTART_COUNT"])
        assert ranks.size == 2
        ranks.lost += ["rank 1 was lost"] * lost
        return code

    monkeypatch.setattr(on_ray, "_connected", lambda address: Cluster())
    monkeypatch.setattr(on_ray._Ranks, "run", run)
    return on_ray.run_on_ray("auto", None, ["convert"]), seen


@pytest.mark.parametrize(
    ("starts", "code"),
    [
        ([(0, False)], 0),
        ([(3, False)], 3),
        ([(0, True)], 0),  # the task was lost when all was done: another start would find the output there
        ([(5, True), (143, True), (0, False)], 0),
    ],
)
def test_starts(monkeypatch: pytest.MonkeyPatch, starts: list[tuple[int, bool]], code: int) -> None:
    assert launched(monkeypatch, *starts) == (code, [str(number) for number in range(len(starts))])


def test_nobody_tries_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="tasks were lost 4 times"):
        launched(monkeypatch, *[(5, True)] * 9)


def test_more_ranks_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "_connected", lambda address: Cluster())
    with pytest.raises(UsageError, match="4 processes need 3 CPUs of the cluster, which has 2"):
        on_ray.run_on_ray("auto", 4, ["convert"])
