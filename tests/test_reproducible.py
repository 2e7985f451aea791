"""The same input gives the same bytes: for any number of threads, and whatever order Python's hashes have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.make_damaged import SOUND
from tests.models import files_of

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ("0", "1", "4242")
WAYS = (
    ("hf", "torch", {"threads": 1}),
    ("hf", "torch", {"threads": 8}),
    ("hf", "torch_dist", {"threads": 1}),
    ("hf", "torch_dist", {"threads": 8}),
    ("hf", "packed", {"threads": 8, "shard_size": 700}),
    ("torch", "hf", {"threads": 8}),
    ("torch_dist", "hf", {"threads": 8, "dtype": "float32"}),
)
CONVERT = f"""
import sys
from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
for number, (base, to, options) in enumerate({WAYS!r}):
    grid = Parallelism(2) if to.startswith("torch") else Parallelism()
    convert(f"{SOUND}/{{base}}", f"{{sys.argv[1]}}/{{number}}-{{to}}", to=to, grid=grid, **options)
print(hash("a"))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    found, hashes = {}, set()
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", CONVERT, str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        hashes.add(done.stdout)
        found[seed] = files_of(folder)
    assert len(hashes) == len(SEEDS)  # the seeds do make a difference to Python
    return found


def test_hash_seeds_make_no_difference(outputs: dict[str, dict[str, bytes]]) -> None:
    first, *others = outputs.values()
    assert all(other == first for other in others)
    assert {name.split("/")[0] for name in first} == {f"{number}-{to}" for number, (_, to, _) in enumerate(WAYS)}


@pytest.mark.parametrize(("one", "eight"), [("0-torch", "1-torch"), ("2-torch_dist", "3-torch_dist")])
def test_threads_make_no_difference(outputs: dict[str, dict[str, bytes]], one: str, eight: str) -> None:
    files = outputs[SEEDS[0]]

    def below(folder: str) -> dict[str, bytes]:
        return {name.removeprefix(folder): data for name, data in files.items() if name.startswith(f"{folder}/")}

    assert below(one) == below(eight) != {}
