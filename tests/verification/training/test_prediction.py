"""Gradients of layers of multi-token prediction: of both libraries, on grids, and faults that are seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_layers

from ckptkit import convert, open_checkpoint, verify
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LevelResult
from ckptkit.verification.sides import Side
from ckptkit.verification.training.level import PREDICTION_LOSS, verify_gradients, verify_training
from tests.megatron.test_families_against_transformers import rewrite, shards
from tests.models import add_prediction, save_model
from tests.verification.conftest import DEVICE
from tests.verification.test_prediction import PREDICTS, halves_exchanged
from tests.verification.training.test_gradients import EXACT, PACKED, RECOMPUTE, SHARDED, SP, Way, named, rows
from tests.verification.training.test_training import in_this_job

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(modeling_layers, "MtpModel", None), "get_weight_conversions"),
    reason="this transformers runs no multi-token prediction",
)

LAYER = "model.layers.4."
"""The first of them: the models have four layers."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Kind and number of layers of multi-token prediction -> a model, saved once."""
    known: dict[tuple[str, int], Path] = {}

    def saved(kind: str, count: int = 2) -> Path:
        if (kind, count) not in known:
            known[kind, count] = add_prediction(save_model(tmp_path_factory.mktemp("hf") / kind, kind), count)
        return known[kind, count]

    return saved


def sides_of(model: Path, candidate: Path, count: int = 2) -> tuple[Side, Side]:
    return Side(model, "hf", prediction=count), Side(candidate, "megatron", prediction=count)


def gradients_of(
    model: Path, folder: Path, pool: RankPool, way: Way, count: int = 2, change: Any = None, **options: Any
) -> LevelResult:
    grid, how = way
    convert(model, folder / "meg", to="torch", spec="local", grid=grid)
    if change is not None:
        rewrite(shards(folder / "meg")[-1], lambda content: change(content["model"]))
    given = {"tolerance": EXACT, "tokens": rows(), "device": DEVICE, **how, **options}
    return verify_gradients(*sides_of(model, folder / "meg", count), pool=pool, **given)


QUICK: list[tuple[str, int, Way]] = [
    ("deepseek_v3", 2, (Parallelism(1, 2), {"cp": 2, **PACKED})),
    ("glm4_moe", 1, (Parallelism(2, ep=2), {**SP, **RECOMPUTE})),
]
WAYS: list[Way] = [
    (Parallelism(), {}),
    (Parallelism(2, 2), {**SP, **PACKED}),
    (Parallelism(1, 2, 2, ep=2), {}),
    (Parallelism(1, 2), {"dp": 2, **PACKED, **RECOMPUTE}),
    (Parallelism(1, 2), {"cp": 2, **RECOMPUTE}),
    (Parallelism(2), {"cp": 2, **SP, **PACKED}),
    (Parallelism(ep=2), {"cp": 4}),
    (Parallelism(ep=2), {"dp": 2, **SHARDED, **PACKED}),
]
SLOW = [(kind, 1 + at % 3, way) for kind in PREDICTS for at, way in enumerate(WAYS)]


def named_case(value: Any) -> str:
    return str(value) if isinstance(value, int) else named(value)


@pytest.mark.parametrize(
    ("kind", "count", "way"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=named_case
)
def test_gradients(
    source: Callable[..., Path], tmp_path: Path, pool: RankPool, kind: str, count: int, way: Way
) -> None:
    answer = gradients_of(source(kind, count), tmp_path, pool, way, count)
    assert answer.passed, answer.summary
    assert answer.details["missing"] == answer.details["surplus"] == []
    places = {place["place"] for place in answer.details["places"]}
    assert {f"layer {4 + number}" for number in range(count)} <= places
    assert PREDICTION_LOSS in answer.details["messages"]
    if way[0].pp > 1:
        assert any(check.name == "copies" and check.passed for check in answer.checks)


APART: list[tuple[str, Way]] = [
    ("qwen3_5", (Parallelism(1, 2), PACKED)),
    ("qwen3_5", (Parallelism(2, 2), SP)),
    ("qwen3_next", (Parallelism(2, ep=2), {**SP, **RECOMPUTE})),
    ("qwen3_5_text", (Parallelism(1, 2, 2), {})),
    ("qwen3_5_moe", (Parallelism(ep=2), PACKED)),
]
"""Archives have one such layer apart; the head of `qwen3_5` is its embedding."""


@pytest.mark.parametrize(
    ("kind", "way"), [APART[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in APART[1:])], ids=named_case
)
def test_gradients_of_a_layer_that_is_apart(
    source: Callable[..., Path], tmp_path: Path, pool: RankPool, kind: str, way: Way
) -> None:
    answer = gradients_of(source(kind, 1), tmp_path, pool, way, 1, dtype="float64", tolerance=1e-5)
    assert answer.passed, answer.summary
    assert answer.details["missing"] == answer.details["surplus"] == []
    assert PREDICTION_LOSS in answer.details["messages"]
    sides = sides_of(source(kind, 1), tmp_path / "meg", 0)
    plain = verify_gradients(*sides, pool=pool, device=DEVICE, **way[1]).details
    assert answer.details["tensors"] > plain["tensors"] and PREDICTION_LOSS not in plain["messages"]


SLOW_TYPES: list[tuple[str, Way, dict[str, Any]]] = [
    ("deepseek_v3", (Parallelism(1, 2), {"cp": 2}), {"dtype": "float64", "tolerance": 1e-7}),
    ("glm4_moe", (Parallelism(1, 2, ep=2), PACKED), {"dtype": "float64", "tolerance": 1e-7}),
    ("glm4_moe_lite", (Parallelism(2, ep=2), SP), {"dtype": "bfloat16"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way", "options"), SLOW_TYPES, ids=str)
def test_types(
    source: Callable[..., Path], tmp_path: Path, pool: RankPool, kind: str, way: Way, options: dict[str, Any]
) -> None:
    answer = gradients_of(source(kind), tmp_path, pool, way, **options)
    assert answer.passed, answer.summary


def test_verify_asks_for_them(source: Callable[..., Path], tmp_path: Path, pool: RankPool) -> None:
    """At the levels of a command; what a model without these layers is compared with has none of their gradients."""
    model = source("glm4_moe", 1)
    convert(model, tmp_path / "meg", to="torch", spec="local", grid=Parallelism(1, 2))
    report = verify(model, tmp_path / "meg", level="gradients", pool=pool, device=DEVICE)
    assert report.passed, report.levels[-1].summary
    assert [level.name for level in report.levels[2:]] == ["logits", "prediction", "gradients"]
    with_them = report.levels[-1].details
    assert any(place["place"] == "layer 4" for place in with_them["places"])
    plain = verify_gradients(*sides_of(model, tmp_path / "meg", 0), pool=pool, device=DEVICE).details
    assert with_them["tensors"] > plain["tensors"] and PREDICTION_LOSS not in plain["messages"]
    assert with_them["losses"]["reference"][0] > plain["losses"]["reference"][0] * 1.05


STEPS: list[tuple[str, Way]] = [
    ("glm4_moe", (Parallelism(1, 2), {"train_only": f"{LAYER}*", "optimizer": "sgd"})),
    ("deepseek_v3", (Parallelism(2, ep=2), {"optimizer": "sgd", "lr": 1e-3, **SP})),
    ("glm4_moe_lite", (Parallelism(1, 2), {"optimizer": "adamw", "cp": 2})),
]


@pytest.mark.parametrize(
    ("kind", "way"), [STEPS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in STEPS[1:])], ids=named_case
)
def test_steps(source: Callable[..., Path], tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    grid, how = way
    convert(source(kind), tmp_path / "meg", to="torch", spec="local", grid=grid)
    sides = sides_of(source(kind), tmp_path / "meg")
    answer = verify_training(*sides, tokens=rows(), pool=pool, device=DEVICE, train_steps=2, **how)
    assert answer.passed, answer.summary
    assert PREDICTION_LOSS in answer.details["messages"]
    if "train_only" in how:
        assert {place["place"] for place in answer.details["places"]} == {"layer 4"}


# Faults ---------------------------------------------------------------------------------------------------------------


def test_halves_exchanged_in_the_file(source: Callable[..., Path], tmp_path: Path, pool: RankPool) -> None:
    """Of the tensors of its first layer hardly one has the right gradient then; the loss differs, too."""
    name = "mtp.layers.0.eh_proj.weight"

    def change(model: dict[str, Any]) -> None:
        model[name] = halves_exchanged(model[name])

    answer = gradients_of(source("glm4_moe"), tmp_path, pool, (Parallelism(1, 2), {}), change=change)
    assert not answer.passed
    assert f"{LAYER}eh_proj.weight" in answer.details["differing"]


FAULTS: dict[str, tuple[Way, list[str], str]] = {
    # opener -> how it runs, the checks that fail, and what they say
    "louder": ((Parallelism(), {}), ["loss", "gradients"], LAYER),
    "frozen": ((Parallelism(), {}), ["present"], f"none for {LAYER}"),
    "own_labels": ((Parallelism(), {}), ["loss", "gradients"], LAYER),
    "own_counts": ((Parallelism(), {}), ["loss", "gradients"], LAYER),
    "apart": ((Parallelism(1, 2), {}), ["gradients", "copies"], "the embedding of the last stage"),
    "within_the_cut": ((Parallelism(), {"cp": 2}), ["loss", "gradients"], LAYER),
}
QUICK_FAULTS = ("louder", "frozen", "apart", "within_the_cut")


@pytest.mark.parametrize(
    "fault", [name if name in QUICK_FAULTS else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_faults_are_seen(source: Callable[..., Path], tmp_path: Path, pool: RankPool, fault: str) -> None:
    """Each is a mistake of a runtime: the weights are right."""
    way, failing, words = FAULTS[fault]
    answer = gradients_of(source("glm4_moe"), tmp_path, pool, way, opener=f"{__name__}:{fault}")
    assert [check.name for check in answer.checks if not check.passed] == failing, answer.summary
    assert words in answer.summary


def changed(change: Callable[[Any], None]) -> Callable[..., Any]:
    """An opener that changes the pipeline of a rank before it trains."""

    def opened(path: str, **options: Any) -> Any:
        def stand_in(original: Any) -> Any:
            def training(pipeline: Any, *how: Any) -> Any:
                change(pipeline)
                return original(pipeline, *how)

            return training

        in_this_job("Training", stand_in)
        return open_checkpoint(path, **options)

    return opened


def replacing(module: str, name: str, stand_in: Callable[[Any], Any]) -> Callable[..., Any]:
    """An opener that replaces something of a module of `ckptkit.megatron` while a rank runs."""

    def opened(path: str, **options: Any) -> Any:
        def training(original: Any) -> Any:
            from importlib import import_module

            from ckptkit.megatron.stand_ins import replaced

            place = import_module(f"ckptkit.megatron.{module}")

            class Training(original):  # type: ignore[misc]
                def run(self, *args: Any, **options: Any) -> Any:
                    with replaced([(place, name, stand_in(getattr(place, name)))]):
                        return super().run(*args, **options)

            return Training

        in_this_job("Training", training)
        return open_checkpoint(path, **options)

    return opened


def _louder(pipeline: Any) -> None:
    for chunk in pipeline.chunks:
        chunk.config.mtp_loss_scaling_factor *= 2


def _frozen(pipeline: Any) -> None:
    for chunk in pipeline.chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not name.startswith("mtp.layers.0."))


def _own_labels(right: Any) -> Any:
    """The labels of the model's own loss."""

    def loss(states: Any, labels: Any, counted: Any, params: Any, losses_of: Any) -> Any:
        return right(states, labels, counted, params, lambda shifted, state: losses_of(labels, state))

    return loss


def _own_counts(right: Any) -> Any:
    """The positions of the model's own loss, among those that have a label."""

    def loss(states: Any, labels: Any, counted: Any, params: Any, losses_of: Any) -> Any:
        return torch.where(counted, right(states, labels, counted, params, losses_of), 0.0)

    return loss


def _within_the_cut(right: Any) -> Any:
    """A shift that does not leave the part of a rank."""
    return lambda held, params: torch.nn.functional.pad(held[:, 1:], (0, 1))


def _apart(right: Any) -> Any:
    """Copies of the embedding whose gradients nobody adds up."""
    return lambda mtp_layers: right(0)


louder, frozen = changed(_louder), changed(_frozen)
own_labels = replacing("model", "prediction_loss", _own_labels)
own_counts = replacing("model", "prediction_loss", _own_counts)
within_the_cut = replacing("prediction", "following", _within_the_cut)


def apart(path: str, **options: Any) -> Any:
    def stand_in(original: Any) -> Any:
        def training(pipeline: Any, *how: Any) -> Any:
            from ckptkit.megatron import training as module
            from ckptkit.megatron.stand_ins import replaced

            with replaced([(module, "_finalised", _apart(module._finalised))]):
                return original(pipeline, *how)

        return training

    in_this_job("Training", stand_in)
    return open_checkpoint(path, **options)
