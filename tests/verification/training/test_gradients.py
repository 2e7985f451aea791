"""Gradients of every family on every kind of grid, by megatron-core's own means, against transformers."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.errors import UsageError, VerificationError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LevelResult
from ckptkit.verification.training.batches import Sharing
from ckptkit.verification.training.level import NOTHING_BELOW, VALUE_LOSS, verify_gradients, verify_training
from tests.megatron.test_families_against_transformers import EXPERTS
from tests.models import MODELS
from tests.verification.conftest import DEVICE
from tests.verification.training.conftest import SPLIT_KINDS, Sources

EXACT = 5e-5
"""The largest error seen is 1.3e-5; a gradient that is not reduced is off by far more."""
LLAMA_KINDS = ["gqa", "tied", "llama3", "biased"]

Way = tuple[Parallelism, dict[str, Any]]
SP = {"sequence_parallel": True}
PACKED = {"packed": True, "capacity": 100}
RECOMPUTE = {"recompute": True}
WAYS: list[Way] = [
    (Parallelism(2), {**SP, **RECOMPUTE}),
    (Parallelism(1, 2), PACKED),
    (Parallelism(2, 2), {}),
    (Parallelism(1, 2, 2), RECOMPUTE),
    (Parallelism(2), {"dp": 2, **SP, **PACKED}),
    (Parallelism(2, 2), {**SP, **PACKED, **RECOMPUTE}),
    (Parallelism(4), {}),
    (Parallelism(1, 2, 2), {**PACKED, **RECOMPUTE, "dp": 2}),
]
"""Every pair of tensor, pipeline, virtual and data parallelism, sequence parallelism, packed rows and recomputation
that goes together is in one of them."""
EXPERT_WAYS: list[Way] = [
    (Parallelism(2, ep=2), {**SP, **RECOMPUTE}),
    (Parallelism(ep=2), {"dp": 2, **PACKED}),
    (Parallelism(1, 2, ep=2), PACKED),
    (Parallelism(2, ep=2, etp=1), SP),
    (Parallelism(ep=4), RECOMPUTE),
    (Parallelism(4, ep=2, etp=2), {**SP, **PACKED}),
    (Parallelism(1, 2, 2, ep=2), {}),
]
ROWS = [48, 48, 48, 37, 21]
"""Lengths of the rows: an odd number of odd lengths, and longer than every window."""


def ways_of(kind: str) -> list[Way]:
    """How models of a kind run; megatron-core trains experts on several tensor ranks only if it splits sequences."""
    if kind not in EXPERTS:
        return WAYS
    return [*EXPERT_WAYS, *(way for way in WAYS if way[0].tp == 1 or way[1].get("sequence_parallel"))]


def has_delta_nets(kind: str) -> bool:
    return "linear_key_head_dim" in MODELS.get(kind, ("", {}))[1]


def kinds_by_family() -> dict[str, list[str]]:
    families: dict[str, list[str]] = {"llama": LLAMA_KINDS, "split": SPLIT_KINDS}
    for kind in MODELS:
        families.setdefault(kind.split("-")[0], []).append(kind)
    return families


def cases() -> list[Any]:
    """Each family in one way, and each way for one family at least; all kinds in all ways are slow."""
    quick: list[tuple[str, Way]] = []
    for turn in range(3):
        for at, kinds in enumerate(kinds_by_family().values()):
            kind = kinds[turn % len(kinds)]
            ways = ways_of(kind)
            fresh = [way for way in ways if all(way != known for _, known in quick)]
            if turn == 0 or fresh:
                quick.append((kind, (fresh or ways)[at % len(fresh or ways)]))
    every = [(kind, way) for kinds in kinds_by_family().values() for kind in kinds for way in ways_of(kind)]
    slow = [case for case in every if case not in quick]
    marked = [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]
    return marked


def named(value: Any) -> str:
    if isinstance(value, str):
        return value
    grid, how = value
    return "-".join([str(grid), *(name if given is True else f"{name}{given}" for name, given in how.items())])


def rows() -> list[list[int]]:
    from ckptkit.verification.tokens import default_rows

    return [row[:length] for row, length in zip(default_rows(250, len(ROWS)), ROWS, strict=True)]


def gradients_of(source: Path, folder: Path, pool: RankPool, way: Way, **options: Any) -> LevelResult:
    grid, how = way
    convert(source, folder / "meg", to="torch", spec="local", grid=grid)
    sides = Side(source, "hf"), Side(folder / "meg", "megatron")
    given = {"tolerance": EXACT, "tokens": rows(), "device": DEVICE, **how, **options}
    return verify_gradients(*sides, pool=pool, **given)


def record(kind: str, way: Way, answer: LevelResult) -> None:
    """Appends a line of figures to the file that CKPTKIT_GRADIENT_REPORT names (see benchmarks/gradient_table.py)."""
    if target := os.environ.get("CKPTKIT_GRADIENT_REPORT"):
        details = answer.details
        error = max(tensor["error"] for tensor in details["worst"])
        ratio = max((tensor["rms"] / tensor["noise"] for tensor in details["worst"] if tensor["noise"]), default=None)
        figures = {"error": error, "ratio": ratio, "passed": answer.passed, "versions": details["versions"]}
        line = {"kind": kind, "grid": str(way[0]), "how": way[1], "dtype": details["dtype"], **figures}
        with open(target, "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)


@pytest.mark.parametrize(("kind", "way"), cases(), ids=named)
def test_gradients(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    # Through gated norms, which divide by what a head reads, rounding errors of heads that read little are large.
    answer = gradients_of(sources[kind], tmp_path, pool, way, dtype="float64" if has_delta_nets(kind) else "float32")
    record(kind, way, answer)
    assert answer.passed, answer.summary
    assert answer.details["missing"] == answer.details["surplus"] == []
    assert answer.details["candidate_ran"]["sequence_parallel"] == way[1].get("sequence_parallel", False)


def some_slow(cases: list[Any], quick: int = 2) -> list[Any]:
    """The first few cases, and the others marked as slow."""
    return [*cases[:quick], *(pytest.param(*case, marks=pytest.mark.slow) for case in cases[quick:])]


GEMMA4 = [
    ("gemma4_text-moe", (Parallelism(2, ep=2), {**SP, **RECOMPUTE})),
    ("gemma4_text-dense", (Parallelism(2, 2), {**SP, **PACKED})),
    ("gemma4_text-e2b", (Parallelism(1, 2, 2), RECOMPUTE)),
    ("gemma4_text-e4b", (Parallelism(4), {})),
    ("gemma4", (Parallelism(2), {"dp": 2, **SP, **PACKED})),
    ("gemma4-moe", (Parallelism(1, 2, ep=2), PACKED)),
]


OTHERS = [
    ("gqa", (Parallelism(2, 2), {**SP, **PACKED})),
    ("tied", (Parallelism(1, 2, 2), RECOMPUTE)),
    ("qwen2", (Parallelism(2), {"dp": 2, **SP, **PACKED})),
    ("qwen3", (Parallelism(4), {})),
    ("qwen3_moe", (Parallelism(2, ep=2), {**SP, **RECOMPUTE})),
    ("mistral", (Parallelism(1, 2), PACKED)),
    ("ministral", (Parallelism(2), {**SP, **RECOMPUTE})),
    ("mixtral", (Parallelism(ep=2), {"dp": 2, **PACKED})),
    ("apertus", (Parallelism(2, 2), {})),
    ("gemma3_text", (Parallelism(1, 2, 2), {**PACKED, **RECOMPUTE, "dp": 2})),
    ("split-mlp", (Parallelism(2), {"dp": 2, **SP, **PACKED})),
]


@pytest.mark.parametrize(("kind", "way"), [*some_slow(GEMMA4), *some_slow(OTHERS, 0)], ids=named)
def test_float64(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    """What is left is megatron-core's 1 / number of tokens, which is in float32 whatever the model is in."""
    answer = gradients_of(sources[kind], tmp_path, pool, way, dtype="float64", tolerance=1e-7)
    record(kind, way, answer)
    assert answer.passed, answer.summary


SHARDED = {"dp_kind": "fsdp2"}
FSDP2: list[tuple[str, Way]] = [
    ("mixtral", (Parallelism(ep=2), {"dp": 2, **SHARDED, **PACKED})),
    ("tied", (Parallelism(1, 2), {"dp": 2, **SHARDED, **RECOMPUTE})),
    ("gqa", (Parallelism(2), {"dp": 2, **SHARDED, **SP, **PACKED, **RECOMPUTE})),
    ("tied", (Parallelism(1, 2, 2), {"dp": 2, **SHARDED})),
    ("gqa", (Parallelism(), {"dp": 4, **SHARDED})),
    ("qwen3_moe", (Parallelism(2, ep=2, etp=1), {**SHARDED, **SP, **PACKED})),
    ("gemma3_text", (Parallelism(), {"dp": 2, "cp": 2, **SHARDED, **PACKED})),
    ("gemma4_text-e2b", (Parallelism(1, 2), {"dp": 2, **SHARDED, **RECOMPUTE})),
    ("gemma4_text-moe", (Parallelism(ep=2), {"dp": 2, **SHARDED, **RECOMPUTE})),
    ("apertus", (Parallelism(2, 2), {**SHARDED, **SP})),
    ("split-mlp", (Parallelism(2), {"dp": 2, **SHARDED})),
    ("gqa-value", (Parallelism(2), {"dp": 2, **SHARDED, **SP})),
]


@pytest.mark.parametrize(("kind", "way"), some_slow(FSDP2), ids=named)
def test_fsdp2(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    answer = gradients_of(sources[kind], tmp_path, pool, way)
    record(kind, way, answer)
    assert answer.passed, answer.summary
    assert answer.details["candidate_ran"]["replication"] == "fsdp2"


def test_a_torch_that_only_averages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FSDPModule

    from ckptkit.megatron.fully_sharded import FullySharded

    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(VerificationError, match="only averages gradients; take a newer torch"):
        FullySharded(None, None)  # type: ignore[arg-type]


VALUES: list[tuple[str, Way]] = [
    ("gqa-value", (Parallelism(2), {**SP, **RECOMPUTE})),
    ("gemma3_text-value", (Parallelism(1, 2), PACKED)),
    ("tied-value", (Parallelism(1, 2, 2), {"dp": 2})),
    ("qwen3-value", (Parallelism(2, 2), {})),
    ("qwen3_moe-value", (Parallelism(2, ep=2), {**SP, **PACKED})),
    ("mistral-value", (Parallelism(), {"cp": 4, **PACKED})),
    ("gemma3-value", (Parallelism(2), {"cp": 2, **SP, **PACKED})),
    ("gemma4_text-e2b-value", (Parallelism(1, 2), {"dp": 2, **PACKED})),
    ("gemma4_text-moe-value", (Parallelism(ep=2), {"dp": 2})),
    ("apertus-value", (Parallelism(4), {})),
]


@pytest.mark.parametrize(("kind", "way"), some_slow(VALUES), ids=named)
def test_value_models(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    """The loss is the squared difference from values that follow from the tokens, on both sides."""
    answer = gradients_of(sources[kind], tmp_path, pool, way)
    record(kind, way, answer)
    assert answer.passed, answer.summary
    assert VALUE_LOSS in answer.details["messages"] and NOTHING_BELOW not in answer.details["messages"]


def test_a_value_head_of_zeros_keeps_gradients_from_the_layers(
    sources: Sources, tmp_path: Path, pool: RankPool
) -> None:
    """The level says so, and steps of training, which move the head first, do compare the layers."""
    convert(sources["gqa"], tmp_path / "hf", to="hf", head="value", head_init="zeros")
    answer = gradients_of(tmp_path / "hf", tmp_path, pool, (Parallelism(2), SP))
    assert answer.passed, answer.summary
    assert answer.details["tensors"] == 2 and NOTHING_BELOW in answer.details["messages"]
    sides = Side(tmp_path / "hf", "hf"), Side(tmp_path / "meg", "megatron")
    steps = verify_training(*sides, tokens=rows(), pool=pool, device=DEVICE, train_steps=2, optimizer="sgd")
    assert steps.passed, steps.summary
    assert steps.details["tensors"] > 20


@pytest.mark.parametrize(
    ("value", "targets", "words"), [(True, None, "has no next-token loss"), (False, [[1.0]], "has no values")]
)
def test_a_loss_that_a_model_does_not_have(value: bool, targets: Any, words: str) -> None:
    from types import SimpleNamespace

    from ckptkit.megatron.training import Training

    training: Any = SimpleNamespace(pipeline=SimpleNamespace(chunks=[SimpleNamespace(value_head=value)]))
    with pytest.raises(UsageError, match=words):
        Training._check_targets(training, Sharing(1, 0).deal([[5]], {}, targets))


LOW = [
    ("gqa", (Parallelism(2), {**SP, **RECOMPUTE})),
    ("apertus", (Parallelism(2, 2), {})),
    ("mixtral", (Parallelism(2, ep=2), {**SP, **PACKED})),
    ("gemma4_text-e2b", (Parallelism(1, 2), PACKED)),
    ("gqa", (Parallelism(2), {"dp": 2, **SHARDED, **SP, **PACKED})),
    ("mixtral", (Parallelism(ep=2), {"dp": 2, **SHARDED})),
    ("qwen3-value", (Parallelism(1, 2), {})),
]


@pytest.mark.parametrize(("kind", "way"), some_slow(LOW), ids=named)
def test_bfloat16(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    answer = gradients_of(sources[kind], tmp_path, pool, way, dtype="bfloat16")
    record(kind, way, answer)
    assert answer.passed, answer.summary
    (check,) = (check for check in answer.checks if check.name == "noise floor")
    assert "times the reference's own" in check.summary


def test_the_ways_cover_every_pair() -> None:
    def features(way: Way) -> set[str]:
        grid, how = way
        sizes = {"tp": grid.tp > 1, "pp": grid.pp > 1, "vpp": grid.vpp > 1, "ep": grid.ep > 1}
        return {name for name, given in {**sizes, **how}.items() if given and name != "capacity"}

    together = {frozenset(pair) for way in [*WAYS, *EXPERT_WAYS] for pair in itertools.combinations(features(way), 2)}
    names = ("tp", "pp", "vpp", "dp", "ep", "sequence_parallel", "packed", "recompute")
    wanted = {frozenset(pair) for pair in itertools.combinations(names, 2)}
    # Four ranks have room for virtual stages or for tensor parallelism, not for both.
    assert wanted - together == {frozenset(("vpp", other)) for other in ("tp", "sequence_parallel")}


def test_a_run_leaves_no_process_groups_behind(sources: Sources, tmp_path: Path) -> None:
    """A group has threads; a model that is still referred to would keep those of its run."""

    def threads(ranks: RankPool) -> list[int]:
        (parent,) = ranks.start()._started  # which has forked the ranks
        forked = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(forked) == 2
        return [len(os.listdir(f"/proc/{rank}/task")) for rank in forked]

    with RankPool(2) as ranks:
        counts = []
        for number in range(2):
            (tmp_path / str(number)).mkdir()
            gradients_of(sources["mixtral"], tmp_path / str(number), ranks, (Parallelism(ep=2), {}))
            counts.append(threads(ranks))
    assert counts[0] == counts[1]


def test_the_row_of_the_padding_token(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    """transformers does not train it where it is looked up; Megatron does, and the report says so."""
    import torch

    from ckptkit.verification.reference import load_model

    source, pad, name = sources["apertus"], 3, "model.embed_tokens.weight"
    model = load_model(source, torch.float32)
    assert model.get_input_embeddings().padding_idx == pad
    tokens = [[pad, 5, 6, pad, 7, 8, 9, 10], [11, pad, 12, 13]]
    model(input_ids=torch.tensor(tokens[:1])).logits.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert not gradient[pad].any() and gradient[5].any()

    (tmp_path / "without").mkdir()
    way = (Parallelism(2), SP)
    answer = gradients_of(source, tmp_path, pool, way, tokens=tokens)
    assert answer.passed, answer.summary
    (message,) = (line for line in answer.details["messages"] if "padding" in line)
    assert f"row {pad} of {name}" in message
    share = float(re.search(r"\(([\d.e+-]+) of the largest", message)[1])  # type: ignore[index]
    assert share > 1e-3
    answer = gradients_of(source, tmp_path / "without", pool, way, tokens=[[11, 12, 13, 14]])
    assert answer.passed and not any("padding" in line for line in answer.details["messages"])
