"""`verify --rollouts` on models whose engine is transformers: correct ones pass, and what differs is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ckptkit.cli.app import app
from ckptkit.errors import InputError, UsageError
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reference import load_model
from ckptkit.verification.reports.report import VerificationReport
from ckptkit.verification.rollouts.verify import verify_engine
from tests.rollouts import sample, write
from tests.verification.rollouts.conftest import Recorded


def details(report: VerificationReport) -> dict[str, Any]:
    (level,) = report.levels
    assert level.name == "rollouts"
    return level.details


def passed(report: VerificationReport) -> dict[str, bool]:
    return {check.name: check.passed for check in report.levels[0].checks}


def test_the_same_on_a_grid_packed(dense: Recorded, pool: RankPool) -> None:
    report = verify_engine(
        dense.path, dense.megatron, dense.file, engine_dtype="float32", max_kl=1e-6, packed=True, pool=pool
    )
    assert report.passed, report.levels[0].summary
    assert passed(report) == dict.fromkeys(("finite", "mean", "p99", "scale", "kl"), True)
    found = details(report)
    assert found["columns"].keys() == {"reference", "candidate"} and found["judged"] == "candidate"
    assert found["turns"] == found["rows"] == 5 and found["sampled"] == 5 * 24
    assert found["columns"]["candidate"]["mean"] < 1e-4
    assert any("engine, reference and candidate agree" in line for line in report.levels[0].messages)
    recorded = [value for record in dense.records for value in record["logprobs"]]
    assert found["engine_perplexity"] == pytest.approx(math.exp(-np.mean(recorded)))
    assert any(name.startswith("megatron.") for name in found["megatron_modules"])


def test_figures_are_those_of_the_models(dense: Recorded, tmp_path: Path) -> None:
    """An engine with other weights; k3 and the worst token are found again with transformers alone."""
    other = tmp_path / "other"
    model = load_model(dense.path, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    model.save_pretrained(other)
    records = sample(other)
    report = verify_engine(dense.path, dense.path, write(tmp_path / "r.jsonl", records), engine_dtype="float32")
    assert not report.passed
    trained, log_ratios = load_model(dense.path, torch.float32), []
    for record in records:
        ids = torch.tensor([record["prompt_token_ids"] + record["token_ids"]])
        with torch.no_grad():
            found = trained(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        log_ratios.append(found[len(record["prompt_token_ids"]) - 1 :] - torch.tensor(record["logprobs"]).double())
    whole = torch.cat(log_ratios)
    ours = details(report)
    figures = ours["columns"]["candidate"]
    assert figures["k3"] == pytest.approx(float((whole.expm1() - whole).mean()), rel=1e-3)
    assert figures["largest"] == pytest.approx(float(whole.abs().max()), rel=1e-3)
    worst = ours["worst"][0]
    record = records[worst["row"]]
    at = worst["position"] - len(record["prompt_token_ids"])
    assert record["token_ids"][at] == worst["token"]
    assert abs(float(log_ratios[worst["row"]][at])) == pytest.approx(float(whole.abs().max()))
    assert any("the engine computed something else" in line for line in report.levels[0].messages)
    assert ours["candidate_mean"] < 1e-5


def test_an_unknown_temperature_is_named(dense: Recorded, tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", sample(dense.path, temperature=0.7))
    report = verify_engine(None, dense.path, file, engine_dtype="float32")
    assert not report.passed and not passed(report)["scale"]
    assert details(report)["fitted_temperature"] == pytest.approx(0.7, abs=1e-3)
    assert "recorded at temperature 0.7" in report.levels[0].summary
    known = verify_engine(None, dense.path, file, engine_dtype="float32", temperature=0.7)
    assert known.passed and details(known)["fitted_temperature"] is None
    assert not verify_engine(None, dense.path, file, engine_dtype="float32", temperature=0.8).passed


def test_renormalised_log_probabilities_are_named(dense: Recorded, tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", sample(dense.path, top_p=0.8))
    report = verify_engine(None, dense.path, file, engine_dtype="float32")
    assert details(report)["renormalised"] and not report.passed
    assert 0.8 <= details(report)["kept"] < 1.0


def test_the_engines_routing_is_replayed(sparse: Recorded, pool: RankPool) -> None:
    report = verify_engine(None, sparse.megatron, sparse.file, engine_dtype="float32", pool=pool)
    assert report.passed, report.levels[0].summary
    found = details(report)
    assert found["judged"] == "replayed" and found["columns"].keys() == {"candidate", "replayed"}
    assert found["routing"]["recorded"] == sum(len(r["routed_experts"]) for r in sparse.records)
    assert len(found["routing"]["layers"]) == 3 and found["routing"]["tokens"] < 0.02


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_routing_is_followed_and_counted(
    sparse: Recorded, tmp_path: Path, pool: RankPool, packed: bool
) -> None:
    """The recording is turned by one expert, and the log-probabilities stay."""
    turned = [{**r, "routed_experts": ((np.array(r["routed_experts"]) + 1) % 4).tolist()} for r in sparse.records]
    file = write(tmp_path / "r.jsonl", turned)
    report = verify_engine(None, sparse.megatron, file, engine_dtype="float32", packed=packed, pool=pool)
    found = details(report)
    assert not report.passed
    assert found["columns"]["candidate"]["mean"] < 1e-4 < found["columns"]["replayed"]["mean"]
    assert found["routing"]["tokens"] > 0.9


def test_transformers_follows_a_part_of_a_routing(sparse: Recorded, tmp_path: Path) -> None:
    """Only what was recorded is prescribed: here from the third token on."""
    later = [{**r, "routed_experts": r["routed_experts"][2:], "routed_experts_prompt_start": 2} for r in sparse.records]
    report = verify_engine(sparse.path, sparse.path, write(tmp_path / "r.jsonl", later), engine_dtype="float32")
    assert report.passed, report.levels[0].summary
    assert details(report)["routing"]["recorded"] == sum(len(r["routed_experts"]) - 2 for r in sparse.records)


def test_what_cannot_be_asked(dense: Recorded, sparse: Recorded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model has no experts"):
        verify_engine(None, dense.path, write(tmp_path / "r", sparse.records))
    with pytest.raises(UsageError, match="not in the vocabulary"):
        verify_engine(None, dense.path, write(tmp_path / "v", [{**dense.records[0], "prompt_token_ids": [9999]}]))
    with pytest.raises(UsageError, match="REFERENCE is a Hugging Face directory"):
        verify_engine(dense.megatron, dense.path, dense.file)
    with pytest.raises(UsageError, match="--save-logits"):
        verify_engine(None, dense.path, dense.file, save_logits="x")


def test_the_command_writes_every_report(dense: Recorded, tmp_path: Path) -> None:
    files = {name: tmp_path / f"r.{name}" for name in ("json", "junit", "html", "markdown")}
    options = [str(part) for name, file in files.items() for part in (f"--{name}", file)]
    command = ["verify", str(dense.path), "--rollouts", str(dense.file), "--engine-dtype", "float32", *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(files["json"].read_text())
    assert document["verdict"] == "same" and document["reference"] == str(dense.file)
    assert [level["name"] for level in document["levels"]] == ["rollouts"]
    assert "Error by position" in files["html"].read_text()
    assert "rollouts" in files["markdown"].read_text() and 'name="rollouts"' in files["junit"].read_text()
    assert CliRunner().invoke(app, [*command, "--max-kl", "0"]).exit_code in (0, 1)


@pytest.mark.parametrize(
    "options",
    [
        ["a"],
        ["a", "b", "--temperature", "0.7"],
        ["a", "--rollouts", "r", "--level", "weights"],
        ["a", "--rollouts", "r", "--prompt", "x"],
        ["a", "--rollouts", "r", "--adapter", "p"],
    ],
)
def test_requests_that_make_no_sense(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["verify", *options]).exit_code == 2
