"""A process that dies while it writes to a store: readers see no checkpoint, or a whole one, and --resume goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.model import SHAPES, write_model
from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.io.stores.uploads import only, server_fixture  # noqa: F401  a fixture
from tests.models import files_of
from tests.stores import BUCKET, Server

PART = 5 << 20
HF, TORCH = ["--to", "hf"], ["--to", "torch", "--tp", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 17 MB: a few parts."""
    shape = replace(SHAPES["tiny"], hidden=256, ffn=704, heads=8, vocab=16000)
    return write_model(tmp_path_factory.mktemp("source") / "model", 17_000_000, shape, shards=2).path


@pytest.fixture(scope="module")
def outputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, bytes]]]:
    folder = tmp_path_factory.mktemp("expected")
    convert(source, folder / "hf", to="hf")
    convert(source, folder / "torch", to="torch", grid=Parallelism(tp=2))
    yield {name: files_of(folder / name) for name in ("hf", "torch")}


def command(source: Path, prefix: str, options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "ckptkit", "convert", str(source), f"s3://{BUCKET}/{prefix}", *options]


def environment(fault: str = "") -> dict[str, str]:
    return {**os.environ, "CKPTKIT_PART_SIZE": str(PART), "CKPTKIT_FAULT": fault}


def run(source: Path, prefix: str, options: Sequence[str], fault: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(source, prefix, options), env=environment(fault), capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("step", ["part-2", "last"])
def test_killed_and_resumed(server: Server, source: Path, outputs: dict[str, dict[str, bytes]], step: str) -> None:
    prefix = f"killed/{step}"
    assert run(source, prefix, TORCH, f"kill:{step}").returncode == 137
    assert "latest_checkpointed_iteration.txt" not in server.keys(prefix)
    assert (server.keys(prefix) == []) == step.startswith("part")
    done = run(source, prefix, [*TORCH, "--resume"])
    assert done.returncode == 0, done.stderr
    assert only(server, prefix, outputs["torch"])


def test_a_signal_says_how_to_go_on(server: Server, source: Path) -> None:
    process = subprocess.Popen(
        command(source, "signal/a", HF), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not server.parts("signal/") and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == 143
    assert len(said.splitlines()) == 1 and "--resume" in said
    assert server.keys("signal/a") == []
    assert [key for key in server.keys("signal") if "lock" in key] == []


def test_many_kills_at_random(server: Server, source: Path, outputs: dict[str, dict[str, bytes]]) -> None:
    """Fifty processes die at a random moment, some of them while they resume; the last run leaves the very bytes."""
    draw = random.Random(0)
    kills, number, found = 0, 0, set()
    started = time.monotonic()
    assert run(source, "random/usual", TORCH).returncode == 0
    usual = time.monotonic() - started
    while kills < 50:
        number += 1
        name, options = draw.choice([("hf", HF), ("torch", TORCH)])
        prefix, resume = f"random/{number}", []
        while True:
            process = subprocess.Popen(
                command(source, prefix, [*options, *resume]),
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                process.wait(draw.uniform(0.3, 1.0) * usual)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            files = server.contents(prefix)
            marker = "config.json" if name == "hf" else "latest_checkpointed_iteration.txt"
            assert files.items() <= outputs[name].items()
            assert marker not in files or files == outputs[name]
            found.add("whole" if marker in files else "some" if files else "parts" if server.parts(prefix) else "none")
            resume = ["--resume"]
            if process.returncode == 0 or draw.random() < 0.6:
                break
        done = run(source, prefix, [*options, *resume])
        assert done.returncode == 0, done.stderr
        assert only(server, prefix, outputs[name])
        for key in server.keys(prefix):
            server.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{key}")
    assert {"none", "parts"} <= found
