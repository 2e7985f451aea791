"""Conversions that several processes carry out: the same bytes for any number, whatever happens to a process."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.adapters.commands import merge_adapters
from ckptkit.conversion.convert import convert
from ckptkit.conversion.execution import ConversionResult
from ckptkit.editing.commands import Output, average
from ckptkit.io import shares
from ckptkit.io.world import World
from ckptkit.sharding.grid import Parallelism
from ckptkit.surgery.build import build
from tests.lora import save_adapter
from tests.models import files_of, save_llama
from tests.ranks import exit_codes, in_threads, start_processes
from tests.surgery.pairs import recipe, save_pair

ROOT = Path(__file__).resolve().parent.parent
GRID = Parallelism(2, 2)
Convert = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("meg") / "model"
    convert(source, path, to="torch", grid=GRID)
    return files_of(path)


def check(work: Callable[[World, Path], ConversionResult], size: int, folder: Path) -> None:
    """Whether a world writes what one process writes, in shares of equal size."""
    alone = work(World(), folder / "alone")
    first, *others = in_threads(size, lambda world: work(world, folder / "together"))
    assert isinstance(first, ConversionResult), first
    assert all(isinstance(other, ConversionResult) for other in others), others
    assert files_of(folder / "together") == files_of(folder / "alone")
    assert first.hashes == alone.hashes != {}
    written = [rank["bytes_written"] for rank in first.ranks]
    assert len(written) == size and sum(written) == first.bytes_total
    assert max(written) <= 1.25 * first.bytes_total / size


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"to": "torch", "grid": Parallelism(4)}),
        (4, {"to": "torch_dist", "grid": GRID}),
        (7, {"to": "hf", "dtype": "bfloat16", "shard_size": 300_000}),
    ],
)
def test_convert(source: Path, tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    check(lambda world, out: convert(source, out, hash=True, world=world, **options), size, tmp_path)


def test_tensor_parallel_ranks_cut_at_one_height(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large outputs are: every row of a matrix is read by one process, which writes its columns into all files."""
    monkeypatch.setattr(shares, "_SHARE", 1)
    check(lambda world, out: convert(source, out, to="torch", grid=Parallelism(4), hash=True, world=world), 3, tmp_path)


def test_merge(source: Path, tmp_path: Path) -> None:
    adapter = [(save_adapter(tmp_path / "adapter", source, target_modules="all-linear"), 1.0)]
    check(
        lambda world, out: merge_adapters(source, adapter, out, to="torch", grid=GRID, hash=True, world=world),
        3,
        tmp_path,
    )


@pytest.mark.slow
def test_surgery(source: Path, tmp_path: Path) -> None:
    check(
        lambda world, out: average([source, source], Output(out), weights=[1.0, 2.0], hash=True, world=world),
        2,
        tmp_path,
    )


def test_split_llama(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair")
    check(lambda world, out: build(recipe(pair, "mlp"), out, hash=True, world=world), 3, tmp_path)


def start(size: int, source: Path, target: Path, *options: str, launcher: str = "torchrun") -> list[Any]:
    """The ranks of a command, with the environment that a launcher gives them."""
    command = [sys.executable, "-m", "ckptkit", "convert", str(source), str(target), "--to", "torch", "--tp", "2"]
    found = []
    for rank in range(size):
        variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": "one"}
        if launcher == "srun":
            variables = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), "SLURM_STEP_ID": "0"}
        found.append(
            subprocess.Popen(
                [*command, "--pp", "2", *options],
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("srun", marks=pytest.mark.slow)])
def test_the_command(source: Path, expected: dict[str, bytes], tmp_path: Path, launcher: str) -> None:
    """Rank 0 speaks for all."""
    ranks = start(2, source, tmp_path / "out", "--json", launcher=launcher)
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert files_of(tmp_path / "out") == expected
    result = json.loads(outputs[0][0])
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    assert outputs[1] == ("", "") and outputs[0][1] == ""


def test_the_command_fails_on_all_ranks(source: Path, tmp_path: Path) -> None:
    """Each says what it met, rank 0 as JSON, too; an option that fits nothing is met by all."""
    ranks = start(2, source, tmp_path / "out", "--json", "--pipeline-model-parallel-layout", "E|t|L")
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert json.loads(outputs[0][0])["error"]["exit_code"] == 2
    assert outputs[1][0] == "" and outputs[1][1].startswith("error: rank 1: ")
    assert list(tmp_path.iterdir()) == []


def killed_at_random(seed: int, source: Path, expected: dict[str, bytes], folder: Path) -> str:
    """Kills ranks of a conversion at a random moment and resumes with another number; where they were killed."""
    draw = random.Random(seed)
    target, size = folder / f"out{seed}", draw.randint(2, 4)
    pids = start_processes(
        size, lambda world: convert(source, target, to="torch", grid=GRID, world=world, threads=1), timeout=8
    )
    partial = folder / f".{target.name}.ckptkit-partial"
    while not partial.exists() and not target.exists():
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.6))
    victims = draw.sample(range(size), draw.randint(1, size - 1))
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    codes = exit_codes(pids, within=100)
    assert None not in codes, "a rank hangs"
    for rank, code in enumerate(codes):
        assert code in ((-signal.SIGKILL, 0) if rank in victims else (5, 0)), codes
    if target.exists():
        assert files_of(target) == expected
    if codes[0] == 0:
        assert target.exists()
    state = "put in place" if target.exists() else "resumed"
    again = in_threads(
        draw.randint(1, 4),
        lambda world: convert(source, target, to="torch", grid=GRID, world=world, resume=True, overwrite=True),
    )
    assert all(isinstance(result, ConversionResult) for result in again), again
    assert files_of(target) == expected and not partial.exists()
    shutil.rmtree(target)
    assert list(folder.iterdir()) == []
    return state


def test_random_kills(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    for seed in range(2):
        killed_at_random(seed, source, expected, tmp_path)


@pytest.mark.slow
def test_a_hundred_random_kills(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    states = [killed_at_random(seed, source, expected, tmp_path) for seed in range(100, 200)]
    assert {"resumed"} <= set(states)


def test_an_error_of_the_system_on_one_rank(source: Path, tmp_path: Path) -> None:
    pids = start_processes(
        3,
        lambda world: convert(source, tmp_path / "out", to="torch", grid=GRID, world=world),
        faults={1: "enospc:100000"},
    )
    assert exit_codes(pids) == [5, 5, 5]
    assert not (tmp_path / "out").exists()


ATTEMPTS = """
import os, runpy, sys
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.environ["CKPTKIT_FAULT"] = "kill:100000"
runpy.run_module("ckptkit", run_name="__main__")
"""


@pytest.mark.slow
def test_torchrun_restarts(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The same command is started again, and goes on."""
    script = tmp_path / "attempts.py"
    script.write_text(ATTEMPTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command += ["--max-restarts", "1", str(script), "convert", str(source), str(tmp_path / "out"), "--to", "torch"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--tp", "2", "--pp", "2", "--json"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == expected
    last = done.stdout[done.stdout.rfind("\n{") + 1 :]  # an attempt that failed says so as JSON, too
    assert len(json.loads(last)["ranks"]) == 3


def in_namespaces() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-n", "true"]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not in_namespaces(), reason="needs network namespaces")
def test_nodes_without_a_network(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Four nodes as four network namespaces that share a folder."""
    command = ["unshare", "-n", "--uts", "sh", "-c", 'hostname node$RANK; exec "$@"', "sh"]
    command += [sys.executable, "-m", "ckptkit", "convert", str(source), str(tmp_path / "out"), "--to", "torch"]
    ranks = [
        subprocess.Popen(
            [*command, "--tp", "2", "--pp", "2", "--json"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "4"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert files_of(tmp_path / "out") == expected
    assert [rank["host"] for rank in json.loads(outputs[0])["ranks"]] == [f"node{rank}" for rank in range(4)]
