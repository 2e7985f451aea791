"""`--ray`: ranks as tasks of a Ray cluster, whose nodes are processes here.

`make test-ray` runs them: they need Ray.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_llama
from tests.ranks import own_environment
from tests.stores import BUCKET, Server, found_by_environment

pytest.importorskip("ray", reason="needs Ray: make test-ray")

WITHIN = 200


@pytest.fixture(scope="module")
def store() -> Iterator[Server]:
    """A store that every node finds by its environment, which nodes have from this process."""
    with found_by_environment() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(store: Server) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("ray") / "hf", "gqa")


def start(
    cluster: Any, source: Path | str, target: Path | str, *options: str, **variables: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ckptkit", "convert", str(source), str(target), "--to", "torch", "--tp", "2"]
    return subprocess.Popen(
        [*command, "--ray", cluster.address, *options],
        env=own_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("processes", [None, 1, 4])
def test_the_same_bytes(cluster: Any, source: Path, tmp_path: Path, processes: int | None) -> None:
    options = [] if processes is None else ["--ray-processes", str(processes)]
    command = start(cluster, source, tmp_path / "out", "--json", *options)
    printed, said = command.communicate(timeout=WITHIN)
    assert command.returncode == 0, said
    ranks = json.loads(printed)["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(processes or 2))
    convert(source, tmp_path / "alone", to="torch", grid=Parallelism(2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_from_store_to_store(cluster: Any, store: Server, source: Path, tmp_path: Path) -> None:
    command = start(cluster, store.upload(source, "ray/source"), f"s3://{BUCKET}/ray/out", "--json")
    printed, said = command.communicate(timeout=WITHIN)
    assert command.returncode == 0, said
    assert [rank["rank"] for rank in json.loads(printed)["ranks"]] == [0, 1]
    convert(source, tmp_path / "alone", to="torch", grid=Parallelism(2))
    assert dict(store.contents("ray/out")) == files_of(tmp_path / "alone")
    assert store.uploads("ray") == []


def test_an_error_ends_all(cluster: Any, tmp_path: Path) -> None:
    command = start(cluster, tmp_path / "nothing", tmp_path / "out", "--json")
    printed, said = command.communicate(timeout=WITHIN)
    assert command.returncode == json.loads(printed)["error"]["exit_code"] == 3, said
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_killed_each_time(cluster: Any, source: Path, tmp_path: Path) -> None:
    """Nothing is lost, and nobody tries for ever; one process goes on."""
    command = start(cluster, source, tmp_path / "out", CKPTKIT_FAULT="kill:100000")
    _, said = command.communicate(timeout=WITHIN)
    assert command.returncode == 5, said
    assert "run again with --resume" in said.splitlines()[-1]
    convert(source, tmp_path / "out", to="torch", grid=Parallelism(2), resume=True)
    convert(source, tmp_path / "alone", to="torch", grid=Parallelism(2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def large(folder: Path, source: Path, megabytes: int) -> Path:
    """A model of the same config with random weights and so large a vocabulary that its bytes take a while."""
    folder.mkdir()
    rows = megabytes * (1 << 20) // (2 * 4 * 64)
    raw = json.loads((source / "config.json").read_text())
    raw.update(vocab_size=rows, tie_word_embeddings=False)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    width = tensors["model.embed_tokens.weight"].shape[1]
    draw = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = draw.random((rows, width), np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_node_dies(cluster: Any, source: Path, tmp_path: Path) -> None:
    """Its task is lost; all ranks start again on the nodes that are left, and the bytes are the same."""
    model = large(tmp_path / "hf", source, 400)
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    command = start(cluster, model, tmp_path / "out", "--ray-processes", "4", "--threads", "1")
    ranks = tmp_path / ".out.ckptkit-partial" / "ranks"
    while not (ranks.is_dir() and len(list(ranks.glob("*.jsonl"))) == 4):
        assert command.poll() is None, command.communicate()
        time.sleep(0.002)
    cluster.remove_node(node, allow_graceful=False)
    _, said = command.communicate(timeout=WITHIN)
    assert command.returncode == 0, said
    assert "was lost" in said or "was killed" in said
    convert(model, tmp_path / "alone", to="torch", grid=Parallelism(2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    assert not ranks.parent.exists()


def test_no_cluster(source: Path, tmp_path: Path) -> None:
    class Nowhere:
        address = "127.0.0.1:1"

    command = start(Nowhere, source, tmp_path / "out")
    _, said = command.communicate(timeout=WITHIN)
    assert command.returncode == 2 and "no Ray cluster answers" in said and len(said.splitlines()) == 1, said
