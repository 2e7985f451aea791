"""Steps of training on both sides, and what of them passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LevelResult
from ckptkit.verification.training.level import verify_training
from tests.verification.conftest import DEVICE
from tests.verification.reports.test_report_schema import documented
from tests.verification.training.conftest import Sources
from tests.verification.training.test_gradients import PACKED, RECOMPUTE, SP, rows, some_slow

Case = tuple[str, Parallelism, dict[str, Any]]
STEPS: list[Case] = [
    ("gqa", Parallelism(2), {"optimizer": "sgd", **SP, **RECOMPUTE}),
    ("tied", Parallelism(1, 2), {"optimizer": "adamw", **PACKED}),
    ("mixtral", Parallelism(ep=2), {"optimizer": "sgd", "lr": 3e-3, "dp": 2}),
    ("qwen3_5_text", Parallelism(2), {"optimizer": "adamw", "dtype": "float64", **SP}),
    ("qwen3_5_text", Parallelism(1, 2), {"optimizer": "sgd", **PACKED}),
    ("qwen3_next", Parallelism(2, ep=2), {"optimizer": "adamw", "dtype": "float64", **SP, **RECOMPUTE}),
    ("qwen3_5_moe", Parallelism(1, 2, ep=2), {"optimizer": "adamw", "dtype": "float64", **PACKED}),
    ("gemma4_text-e2b", Parallelism(2, 2), {"optimizer": "sgd", "lr": 1e-3, **SP}),
    ("gqa", Parallelism(2), {"optimizer": "adamw", "dp": 2, "dp_kind": "fsdp2", **SP}),
    ("qwen3-value", Parallelism(1, 2), {"optimizer": "adamw"}),
]


def steps_of(source: Path, folder: Path, pool: RankPool, grid: Parallelism, **options: Any) -> LevelResult:
    convert(source, folder / "meg", to="torch", spec="local", grid=grid)
    sides = Side(source, "hf"), Side(folder / "meg", "megatron")
    return verify_training(*sides, **{"tokens": rows(), "pool": pool, "device": DEVICE, "train_steps": 3, **options})


def found(answer: LevelResult) -> dict[str, bool]:
    return {check.name: check.passed for check in answer.checks}


@pytest.mark.parametrize(("kind", "grid", "how"), some_slow(STEPS, 4), ids=str)
def test_steps(
    sources: Sources, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, how: dict[str, Any]
) -> None:
    answer = steps_of(sources[kind], tmp_path, pool, grid, **how)
    assert answer.passed, answer.summary
    losses = answer.details["losses"]
    assert set(losses) == {"reference", "candidate", "other attention"}
    for side in losses.values():
        assert len(side) == 4 and side[-1] < side[0]


ONLY: list[Case] = [
    ("split-mlp", Parallelism(2), {"train_only": "*adapter*", **SP, **RECOMPUTE}),
    ("split-linear", Parallelism(1, 2), {"train_only": "*adapter*", **PACKED}),
    ("mixtral", Parallelism(ep=2), {"train_only": "*.layers.1.*experts*"}),
    ("gemma3", Parallelism(1, 2), {"train_only": "*norm*"}),
]


@pytest.mark.parametrize(("kind", "grid", "how"), some_slow(ONLY), ids=str)
def test_nothing_else_moves(
    sources: Sources, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, how: dict[str, Any]
) -> None:
    answer = steps_of(sources[kind], tmp_path, pool, grid, optimizer="sgd", **how)
    assert answer.passed, answer.summary
    assert 0 < answer.details["tensors"] < 40
    (check,) = (check for check in answer.checks if check.name == "frozen")
    assert how["train_only"] in check.summary


FAULTS = {
    # opener -> the checks that fail, and what they say
    "restless": (["frozen", "present"], "decoder.layers.0.mlp.linear_fc2.weight"),
    "hasty": (["losses", "updates"], "limit 1.0e-02"),
    "lazy": (["losses", "present", "updates"], "update: none for model.adapter_linear_2.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_step_are_seen(sources: Sources, tmp_path: Path, pool: RankPool, fault: str) -> None:
    opener, how = f"{__name__}:{fault}", {"optimizer": "sgd", "lr": 1e-3, "train_only": "*adapter*"}
    answer = steps_of(sources["split-mlp"], tmp_path, pool, Parallelism(2), opener=opener, **how)
    failing, words = FAULTS[fault]
    assert set(failing) >= {name for name, passed in found(answer).items() if not passed} > set()
    assert words in answer.summary


def in_this_job(attribute: str, stand_in: Callable[[Any], Any]) -> None:
    """Replaces something of `candidate` in a rank, until its job is done."""
    import torch.distributed as dist

    if not dist.is_initialized():  # the first process opens checkpoints, too
        return
    from ckptkit.verification.training import candidate

    if candidate.train.__name__ == "once":  # an adapter's model is opened twice
        return
    original, train = getattr(candidate, attribute), candidate.train

    def once(*args: Any) -> Any:
        try:
            return train(*args)
        finally:
            setattr(candidate, attribute, original)
            candidate.train = train

    candidate.train = once
    setattr(candidate, attribute, stand_in(original))


def restless(path: str) -> Any:
    """A weight that moves with every step although it is frozen."""
    import torch

    from ckptkit import open_checkpoint

    def stand_in(original: Any) -> Any:
        class Moving(original):  # type: ignore[misc]
            def _run(self, step: int, backwards: bool = True) -> Any:
                if step:
                    with torch.no_grad():
                        self.pipeline.chunks[0].decoder.layers[0].mlp.linear_fc2.weight.view(-1)[0] += 1e-6
                return super()._run(step, backwards)

        return Moving

    in_this_job("_RankTraining", stand_in)
    return open_checkpoint(path)


def hasty(path: str) -> Any:
    """An optimizer with a learning rate one per cent higher."""
    from ckptkit import open_checkpoint

    in_this_job("make_optimizer", lambda original: lambda options, parameters: original(faster(options), parameters))
    return open_checkpoint(path)


def faster(options: Any) -> Any:
    return replace(options, lr=options.rate * 1.01)


def lazy(path: str) -> Any:
    """An optimizer that knows one of the parameters only."""
    from ckptkit import open_checkpoint

    in_this_job("make_optimizer", lambda original: lambda options, parameters: original(options, parameters[:1]))
    return open_checkpoint(path)


def test_losses_that_rise_do_not_pass(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    answer = steps_of(sources["gqa"], tmp_path, pool, Parallelism(), optimizer="sgd", lr=50.0, train_steps=1)
    assert not found(answer)["losses fall"] and "no fall" in answer.summary


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train_only": "nothing"}, "matches no parameter"),
        ({"train_only": "*q_proj*"}, "which Megatron has in one tensor"),
        ({"dtype": "bfloat16"}, "float32 or float64"),
        ({"train_steps": 0}, "needs --train-steps"),
        ({"optimizer": "lion"}, "no optimizer"),
        ({"lr": -1.0}, "positive"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_trained(
    sources: Sources, tmp_path: Path, pool: RankPool, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        steps_of(sources["gqa"], tmp_path, pool, Parallelism(), **wrong)


def test_a_part_of_what_transformers_has_as_one_tensor(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    with pytest.raises(UsageError, match="transformers has as one tensor"):
        steps_of(sources["mixtral"], tmp_path, pool, Parallelism(), train_only="*experts.1.*")


def test_experts_on_tensor_ranks_need_split_sequences(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    with pytest.raises(UsageError, match="--sequence-parallel"):
        steps_of(sources["mixtral"], tmp_path, pool, Parallelism(2))


def test_levels_in_their_order(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    convert(sources["tied"], tmp_path / "meg", to="torch", spec="local", grid=Parallelism(1, 2))
    report = verify(sources["tied"], tmp_path / "meg", pool=pool, device=DEVICE, train_steps=2, optimizer="sgd")
    assert [level.name for level in report.levels] == ["structure", "weights", "logits", "gradients", "training"]
    assert report.passed, [level.summary for level in report.levels]
    assert len(report.levels[-1].details["losses"]["candidate"]) == 3
    fields = documented("`details` of `gradients` and of `training`")
    for level in report.levels[-2:]:
        assert set(level.details) == {re.split(r"[.\[]", field)[0] for field in fields}
        assert {f"worst[].{name}" for name in level.details["worst"][0]} <= fields


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "logits", "recompute": True}, "--recompute needs a later level; this run stops at logits"),
        ({"level": "gradients", "lr": 0.1}, "--lr needs a later level; this run stops at gradients"),
        ({"level": "weights", "train_steps": 2}, "--train-steps needs --level logits"),
    ],
    ids=str,
)
def test_options_without_a_meaning(sources: Sources, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    convert(sources["tied"], tmp_path / "meg", to="torch", spec="local")
    with pytest.raises(UsageError, match=words):
        verify(sources["tied"], tmp_path / "meg", **options)
