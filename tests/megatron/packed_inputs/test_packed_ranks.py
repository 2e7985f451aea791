"""Packed rows, sequence parallelism and replicas on ranks, through `verify`; and what must not pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.errors import UsageError, VerificationError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.pool import RankPool
from tests.models import LLAMAS, save_llama, save_model

LENGTHS = (40, 3, 17, 1, 40)
TOKENS = [[(7 * i + 3 * i * i + 5 * n) % 250 for i in range(n)] for n in LENGTHS]
EXACT = 2e-5

Converted = Callable[[str, Parallelism], tuple[Path, Path]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A model of a kind, and its shards on a grid, each made once."""
    folder = tmp_path_factory.mktemp("ranks")
    made: dict[tuple[str, Parallelism], Path] = {}

    def get(kind: str, grid: Parallelism) -> tuple[Path, Path]:
        source, target = folder / kind, folder / f"{kind}-{len(made)}"
        if not source.exists():
            (save_llama if kind in LLAMAS else save_model)(source, kind)
        if (kind, grid) not in made:
            convert(source, target, to="torch", grid=grid, spec="local")
            made[kind, grid] = target
        return source, made[kind, grid]

    return get


def check(converted: Converted, pool: RankPool, kind: str, grid: Parallelism, **how: Any) -> Any:
    report = verify(*converted(kind, grid), tokens=TOKENS, tolerance=EXACT, pool=pool, **how)
    replicas = how.get("dp", 1)
    assert report.levels[-1].details["candidate_ran"] == {
        "packed": how.get("packed", False),
        "sequence_parallel": how.get("sequence_parallel", False),
        "context_parallel": 1,
        "replicas": replicas,
        "replication": how.get("dp_kind", "ddp") if replicas > 1 else None,
        "devices": ["cpu"],
    }
    return report


PACKED = [
    ("gqa", Parallelism(2)),
    ("tied", Parallelism(2, 2)),
    ("gemma3_text-capped", Parallelism(1, 2)),
    ("qwen3_moe-mixed", Parallelism(2, ep=2)),
]
MORE_PACKED = [
    ("gqa", Parallelism(4)),
    ("gqa", Parallelism(1, 2, 2)),
    ("biased", Parallelism(4)),
    ("qwen2-windowed", Parallelism(2)),
    ("qwen3", Parallelism(2, 2)),
    ("mistral", Parallelism(2)),
    ("mixtral-windowed", Parallelism(2, ep=2, etp=1)),
    ("gpt_oss", Parallelism(2, ep=2)),
    ("qwen3_moe", Parallelism(1, 2, ep=2)),
    ("apertus", Parallelism(2)),
]


@pytest.mark.parametrize(
    ("kind", "grid"), [*PACKED, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_PACKED)], ids=str
)
def test_packed_rows_on_ranks(converted: Converted, pool: RankPool, kind: str, grid: Parallelism) -> None:
    report = check(converted, pool, kind, grid, packed=True, sequence_parallel=grid.tp > 1)
    assert report.passed, report.levels[-1].summary


@pytest.mark.parametrize("packed", [False, True])
def test_sequence_parallelism_alone(converted: Converted, pool: RankPool, packed: bool) -> None:
    """79 tokens in all, and rows of 1 and 3: none a multiple of the ranks."""
    report = verify(
        *converted("gqa", Parallelism(4)),
        tokens=TOKENS[:4],
        tolerance=EXACT,
        pool=pool,
        sequence_parallel=True,
        packed=packed,
    )
    assert report.passed, report.levels[-1].summary


REPLICAS = [
    ("gqa", Parallelism(2), "ddp", True),
    ("qwen3_moe-mixed", Parallelism(ep=2), "fsdp2", False),
    ("tied", Parallelism(1, 2), "fsdp2", True),
]
MORE_REPLICAS = [
    ("qwen3_moe-mixed", Parallelism(ep=2), "ddp", True),
    ("gqa", Parallelism(2), "fsdp2", True),
    ("tied", Parallelism(1, 2), "ddp", False),
    ("gemma3_text-capped", Parallelism(2), "fsdp2", False),
]


@pytest.mark.parametrize(
    ("kind", "grid", "by", "packed"),
    [*REPLICAS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_REPLICAS)],
    ids=str,
)
def test_replicas(converted: Converted, pool: RankPool, kind: str, grid: Parallelism, by: str, packed: bool) -> None:
    report = check(converted, pool, kind, grid, dp=2, dp_kind=by, packed=packed)
    assert report.passed, report.levels[-1].summary


def test_a_fault_in_a_shard_is_seen_when_packed(converted: Converted, pool: RankPool, tmp_path: Path) -> None:
    import shutil

    import torch

    source, target = converted("gqa", Parallelism(2))
    broken = tmp_path / "broken"
    shutil.copytree(target, broken)
    file = next(broken.glob("**/mp_rank_01/model_optim_rng.pt"))
    state = torch.load(file, weights_only=False)
    state["model"]["decoder.layers.2.mlp.linear_fc2.weight"][0] *= 1.01
    torch.save(state, file)
    report = verify_logits(
        Side(source, "hf"),
        Side(broken, "megatron"),
        tokens=TOKENS,
        tolerance=EXACT,
        pool=pool,
        packed=True,
        sequence_parallel=True,
    )
    assert report.location is not None and report.location.place == "layer 2 mlp"
    assert not report.passed


def test_what_only_megatron_can_be_asked(converted: Converted, pool: RankPool) -> None:
    source, _ = converted("gqa", Parallelism(2))
    whole = converted("gqa", Parallelism())[1]
    for arguments, text in (
        ({"packed": True}, "megatron-core runs"),
        ({"dp": 2}, "megatron-core runs"),
        ({"sequence_parallel": True}, "megatron-core runs"),
        ({"dp": 0}, "--dp must be at least 1"),
        ({"dp_kind": "zero"}, "choose ddp or fsdp2"),
    ):
        with pytest.raises(UsageError, match=text):
            verify(source, source, pool=pool, **arguments)
    with pytest.raises(UsageError, match="TP 2 or more"):
        verify(source, whole, pool=pool, sequence_parallel=True)


def test_seats_follow_the_order_of_megatron() -> None:
    from ckptkit.megatron.replicas import seat

    grid = Parallelism(2, 2, ep=2, etp=1)
    seats = [seat(grid, 2, rank) for rank in range(8)]
    assert [found.replica for found in seats] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [found.number for found in seats] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert [found.place.pp for found in seats] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(found.place == list(grid.ranks())[found.number] for found in seats)


def test_replicas_that_differ_are_seen(one_rank: Parallelism, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    from ckptkit.megatron import replicas

    group, device = dist.group.WORLD, torch.device("cpu")
    assert group is not None
    logits = torch.randn(3, 5)
    replicas.check_alike(None, group, device)
    replicas.check_alike(logits, group, device)

    def other(tensor: torch.Tensor, src: int, group: Any) -> None:
        tensor[1, 2] += 1e-3

    monkeypatch.setattr(dist, "broadcast", other)
    with pytest.raises(VerificationError, match="computes other logits"):
        replicas.check_alike(logits, group, device)


SCRIPT = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM
import ckptkit

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
from ckptkit.megatron.packed_inputs.model import shard

model = AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager").eval()
packed = shard(ckptkit.convert_to_packed(model))
tokens, bounds = torch.arange(9 + rank), torch.tensor([0, 4, 9 + rank], dtype=torch.int32)
with torch.no_grad():
    found = packed(tokens, bounds)
    rows = tokens.split(bounds.diff().tolist())
    expected = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
back, state = packed.to_hf_state_dict(), model.state_dict()
same = all(torch.equal(back[name], value) for name, value in state.items())
dcp.save({"model": get_model_state_dict(packed)}, checkpoint_id=folder / "dcp")
print(json.dumps({"error": float((found - expected).abs().max() / expected.abs().max()), "same": same}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gqa", "qwen3_moe"])
def test_fsdp2_on_two_ranks(tmp_path: Path, kind: str) -> None:
    """Each rank has tokens of its own; the checkpoint that both wrote becomes the files that it all came from."""
    (save_llama if kind in LLAMAS else save_model)(tmp_path / "hf", kind)
    command, without_gpus = [sys.executable, "-c", SCRIPT], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=without_gpus)
        for rank in range(2)
    ]
    answers = [json.loads(rank.communicate(timeout=300)[0].splitlines()[-1]) for rank in ranks]
    assert all(answer["same"] and answer["error"] < EXACT for answer in answers)
    convert(tmp_path / "dcp", tmp_path / "back", to="hf", hf_reference=tmp_path / "hf")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="which model it is"):
        convert(tmp_path / "dcp", tmp_path / "other", to="hf")
