"""One record says how a verification runs, from keyword arguments to the JSON that a rank reads."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest

from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.errors import UsageError
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.verification.question import Question, VerifyKeywords
from ckptkit.verification.ranks.jobs import LogitsJob, TrainabilityPart, TrainingPart
from ckptkit.verification.run_options import STEPS, TIMEOUT, TOLERANCE, RunKeywords, RunOptions

OTHER: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "tolerance": 1e-3,
    "replay": False,
    "packed": True,
    "sequence_parallel": True,
    "cp": 2,
    "dp": 2,
    "dp_kind": "fsdp2",
    "recompute": True,
    "capacity": 4096,
    "train_steps": 3,
    "optimizer": "sgd",
    "lr": 0.5,
    "train_only": "*adapter*",
    "save_logits": "logits.safetensors",
    "timeout": 60.0,
    "tp": 2,
    "pp": 3,
    "ep": 4,
}
"""A value for every option that is not its default."""


def members(hint: Any) -> set[Any]:
    return set(get_args(hint)) if isinstance(hint, UnionType) else {hint}


def test_keywords_are_the_fields_and_accept_their_types() -> None:
    keywords, record = get_type_hints(RunKeywords), get_type_hints(RunOptions)
    assert list(keywords) == [field.name for field in fields(RunOptions)]
    for name, hint in keywords.items():
        assert members(record[name]) <= members(hint) <= members(record[name]) | {None.__class__, Path}


def test_what_is_asked_is_written_down_once() -> None:
    keywords, record = get_type_hints(VerifyKeywords), get_type_hints(Question)
    own = {name: hint for name, hint in keywords.items() if name not in get_type_hints(RunKeywords)}
    assert own == {name: hint for name, hint in record.items() if name != "run"}
    question = Question.of(tokens=[[1]], hash=True, cp=2, lr=0.5)
    assert (question.tokens, question.hash, question.run) == ([[1]], True, {"cp": 2, "lr": 0.5})
    assert question.options == RunOptions(cp=2, lr=0.5)
    assert Question.of().levels == ("structure", "weights", "logits")


@pytest.mark.parametrize(
    ("asked", "level", "steps"),
    [
        ({}, "logits", 0),
        ({"train_steps": 3}, "training", 3),
        ({"level": "gradients", "train_steps": 2}, "training", 2),
        ({"level": "training"}, "training", STEPS),
        ({"level": "weights", "train_steps": 2}, "weights", 2),
    ],
    ids=str,
)
def test_steps_of_training_ask_for_the_last_level(asked: Any, level: str, steps: int) -> None:
    question = Question.of(**asked)
    assert (question.level, question.options.train_steps) == (level, steps)


def test_every_option_reaches_the_rank() -> None:
    assert set(OTHER) == {field.name for field in fields(RunOptions)}
    options = RunOptions.of(**OTHER)
    assert vars(options) == OTHER
    opening = SourceOptions("ref", 3, StatedGrid(2, last_stage_layers=1), 9)
    part = TrainingPart("folder", 3, ["output_layer.weight"], "sdpa")
    run = options.config(Parallelism(2, first_stage_layers=1), 16)
    job = LogitsJob("a", run, [[1]], "out", options, opening=opening, rounded={"*": "bfloat16"}, training=part)
    assert LogitsJob.from_json(job.to_json()) == job
    learning = replace(job, training=None, trainability=TrainabilityPart(3, 0.1, 1, 2, ["output_layer.weight"]))
    assert LogitsJob.from_json(learning.to_json()) == learning
    assert all(getattr(options, name) != getattr(RunOptions(), name) for name in OTHER)


def test_a_run_is_configured_by_the_options_its_grid_and_its_window() -> None:
    grid = Parallelism(2)
    run = RunOptions.of(**OTHER).config(grid, 16)
    assert vars(run) == {"grid": grid, "window": 16, **{name: OTHER[name] for name in vars(run).keys() & OTHER.keys()}}
    assert (run.world_size, run.copies, run.changes_candidate) == (8, 4, True)
    assert RunConfig() == RunOptions().config(Parallelism(), 0)


def test_none_is_the_default_and_paths_become_text() -> None:
    options = RunOptions.of(tolerance=None, timeout=None, save_logits=Path("a/b"))
    assert (options.tolerance, options.timeout, options.save_logits) == (TOLERANCE, TIMEOUT, "a/b")
    assert RunOptions.of(tolerance=0.0).tolerance == 0.0


def test_the_reference_runs_plainly() -> None:
    plain = RunOptions.of(**OTHER).plain()
    assert not plain.config(Parallelism(), 0).changes_candidate
    assert (plain.device, plain.dtype, plain.replay, plain.timeout) == ("cuda", "float32", False, 60.0)
    trained = (plain.train_steps, plain.optimizer, plain.lr, plain.train_only)
    assert trained == (3, "sgd", 0.5, "*adapter*") and not plain.recompute
    assert RunOptions(dtype="float64").plain().dtype == "float64"
    low = RunOptions.of(**OTHER).in_dtype("float16")
    assert vars(low) == {**OTHER, "dtype": "float16"}


def test_options_of_the_level_logits() -> None:
    assert RunOptions().for_logits_only() == []
    assert RunOptions.of(**OTHER).for_logits_only() == [
        "--packed",
        "--sequence-parallel",
        "--cp",
        "--dp",
        "--recompute",
        "--capacity",
        "--train-steps",
        "--optimizer",
        "--lr",
        "--train-only",
        "--save-logits",
        "--tp",
        "--pp",
        "--ep",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "tpu"},
        {"dtype": "int8"},
        {"cp": 0},
        {"dp": 0},
        {"dp_kind": "zero"},
        {"optimizer": "lion"},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"capacity": 0},
        {"train_steps": -1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_cannot_run(wrong: dict[str, Any]) -> None:
    RunOptions().check()
    with pytest.raises(UsageError):
        RunOptions.of(**wrong).check()
