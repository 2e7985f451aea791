"""Several processes write to one store, as torchrun, Slurm and Ray start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ckptkit.io.stores.parts import lay_out_parts
from ckptkit.io.stores.team import shares
from ckptkit.sharding.grid import Parallelism
from tests.io.stores.uploads import (
    HF,
    SMALL,
    expected,
    only,
    server_fixture,  # noqa: F401  a fixture
)
from tests.stores import BUCKET, Server

SMALL_PARTS = """
import sys
from ckptkit.io.stores.parts import Sizes
from tests.io.stores.uploads import SMALL
Sizes.of_environment = classmethod(lambda cls: SMALL)
from ckptkit.__main__ import main
main()
"""
"""The command line with small parts: a rank of the small model has some."""


def ranks(
    size: int, prefix: str, *options: str, faults: Mapping[int, str] = {}, launch: str = "1", **environment: str
) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SMALL_PARTS, "convert", str(HF), f"s3://{BUCKET}/{prefix}", "--json", *options]
    found = []
    for rank in range(size):
        own = {"RANK": str(rank), "WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": launch, **environment}
        own["CKPTKIT_FAULT"] = faults.get(rank, "")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found.append(subprocess.Popen(command, env={**os.environ, **own}, **pipes))  # type: ignore[call-overload]
    return found


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    answers = []
    try:
        for process in processes:
            said, complaint = process.communicate(timeout=120)
            answers.append((process.returncode, said, complaint))
    finally:
        for process in processes:
            process.kill()
    return answers


@pytest.mark.parametrize("to", ["hf", "torch"])
def test_the_bytes_of_one_process(server: Server, tmp_path: Path, to: str) -> None:
    how: dict[str, Any] = {"to": to, **({"grid": Parallelism(tp=2)} if to == "torch" else {})}
    options = ["--to", to, *(["--tp", "2"] if to == "torch" else [])]
    first, *others = ended(ranks(2, f"team/{to}", *options))
    assert first[0] == 0, first[2]
    assert [code for code, *_ in others] == [0] and not others[0][1] and not others[0][2]
    assert only(server, f"team/{to}", expected(tmp_path, **how))
    result = json.loads(first[1])
    assert [one["rank"] for one in result["ranks"]] == [0, 1]
    assert sum(one["bytes_written"] for one in result["ranks"]) == result["bytes_total"]
    assert all(one["bytes_written"] for one in result["ranks"])


def test_a_rank_that_dies_ends_the_run_and_it_goes_on(server: Server, tmp_path: Path) -> None:
    processes = ranks(2, "dies/a", "--to", "hf", CKPTKIT_RANK_TIMEOUT="5", faults={1: "kill:share"})
    (code, _, said), (killed, *_) = ended(processes)
    assert (code, killed) == (5, 137)
    assert "rank 1" in said and "no sign of life" in said and len(said.splitlines()) == 1
    assert server.keys("dies/a") == [] and server.uploads("dies/a/")
    (code, _, said), *_ = ended(ranks(1, "dies/a", "--to", "hf", "--resume", launch="2"))
    assert code == 0, said
    assert only(server, "dies/a", expected(tmp_path))


def test_rank_0_that_dies_ends_the_others(server: Server) -> None:
    processes = ranks(2, "leader/a", "--to", "hf", CKPTKIT_RANK_TIMEOUT="5", faults={0: "kill:complete"})
    (killed, *_), (code, _, said) = ended(processes)
    assert (killed, code) == (137, 5) and "Traceback" not in said
    assert server.keys("leader/a") == []


def test_another_plan_is_refused(server: Server) -> None:
    first = ranks(1, "plans/a", "--to", "hf", WORLD_SIZE="2")
    second = ranks(2, "plans/a", "--to", "hf", "--dtype", "float16")
    second[0].kill()
    (code, _, said), _, (other, *_) = ended([*first, *second])
    assert code == other == 2 and "another plan than rank 0" in said
    assert server.keys("plans/a") == []


def test_shares_are_all_parts_once() -> None:
    from ckptkit.io.plan import OutputFile, Plan
    from ckptkit.io.segments import Checksum

    plan = Plan(
        tuple(
            OutputFile(f"{number}", 10_000 + number, (), (Checksum(0, 9, (20,)),) if number % 3 == 0 else ())
            for number in range(7)
        )
    )
    layout = lay_out_parts(plan.files, SMALL)
    live = {index: frozenset(range(1, 10)) - {index} for index in range(7)}
    for size in (1, 2, 3, 8):
        found = shares(plan, layout, live, size)
        assert len(found) == size
        for index, numbers in live.items():
            mine = [share[index] for share in found if index in share]
            assert sorted(number for one in mine for number in one) == sorted(numbers)
            assert len(mine) == 1 or index % 3
