"""A candidate in a narrower type: the reference is judged with its weights rounded to it, and every report says so."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ckptkit import convert, verify
from ckptkit.cli.app import app
from ckptkit.dtypes import DTYPES
from ckptkit.errors import VerificationError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.rounding import loses
from tests.models import save_model

Saved = Callable[..., Path]
TO: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf"},
    "packed": {"to": "packed"},
    "torch": {"to": "torch", "grid": Parallelism(2)},
    "torch_dist": {"to": "torch_dist", "grid": Parallelism(1, 2)},
}


def triples() -> list[Any]:
    """Every pair of reference, candidate and type; the other half of the triples is slow."""
    every = itertools.product(enumerate(["hf", "torch"]), enumerate(TO), enumerate(["bfloat16", "float16"]))
    return [
        pytest.param(
            *(name for _, name in triple), marks=() if sum(at for at, _ in triple) % 2 == 0 else pytest.mark.slow
        )
        for triple in every
    ]


@pytest.mark.parametrize(("reference", "candidate", "dtype"), triples())
def test_a_rounded_conversion_is_the_same_model(
    llama: Saved, tmp_path: Path, pool: RankPool, reference: str, candidate: str, dtype: str
) -> None:
    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "wide", **TO[reference])
    convert(source, tmp_path / "narrow", dtype=dtype, **TO[candidate])
    report = verify(tmp_path / "wide", tmp_path / "narrow", tolerance=1e-5, pool=pool)
    assert report.passed, report.levels[-1].summary
    cast = {"bfloat16": "F32 -> BF16", "float16": "F32 -> F16"}[dtype]
    assert report.levels[1].details["casts"] == [cast] and cast in report.levels[1].summary
    assert report.levels[2].details["reference_rounded"] == [cast]
    assert any("rounded" in text and cast in text for text in report.levels[2].messages)


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen3", "gemma3_text", "apertus", pytest.param("gpt_oss", marks=pytest.mark.slow)]
)
def test_families_whose_weights_transformers_arranges_anew(tmp_path: Path, pool: RankPool, kind: str) -> None:
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "narrow", to="torch", dtype="bfloat16", grid=Parallelism(2))
    report = verify(source, tmp_path / "narrow", tolerance=1e-5, pool=pool)
    assert report.passed, report.levels[-1].summary
    assert report.levels[2].details["reference_rounded"] == ["F32 -> BF16"]


@pytest.mark.parametrize("reference", ["hf", "torch"])
def test_rounding_hides_no_fault(llama: Saved, tmp_path: Path, pool: RankPool, reference: str) -> None:
    """One weight of the candidate is off by an eighth of itself, which no rounding to BF16 explains."""
    from safetensors.torch import load_file, save_file

    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "wide", **TO[reference])
    convert(source, tmp_path / "narrow", to="hf", dtype="bfloat16")
    file = max((tmp_path / "narrow").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.125
    save_file(tensors, file, {"format": "pt"})
    report = verify(tmp_path / "wide", tmp_path / "narrow", keep_going=True, pool=pool)
    assert [level.passed for level in report.levels] == [True, False, False]
    assert report.levels[2].details["location"]["place"] == "layer 1 mlp"


def test_without_rounding_the_two_would_differ(
    llama: Saved, tmp_path: Path, pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptkit.verification import levels
    from ckptkit.verification.rounding import Rounding

    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "narrow", to="torch", dtype="bfloat16", grid=Parallelism(2))
    monkeypatch.setattr(levels, "rounding_of", lambda *_, **__: Rounding())
    report = verify(source, tmp_path / "narrow", pool=pool)
    assert not report.passed and report.levels[2].details["reference_rounded"] == []


def mixed(source: Path, target: Path, narrow: Callable[[str], bool]) -> Path:
    """A copy some of whose weights are in BF16."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name in tensors:
        if narrow(name):
            tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_only_some_weights_are_narrower(llama: Saved, tmp_path: Path, pool: RankPool) -> None:
    source = llama("gqa", num_hidden_layers=2)
    candidate = mixed(source, tmp_path / "mixed", lambda name: "mlp" in name or "embed" in name)
    report = verify(source, candidate, tolerance=1e-5, pool=pool)
    assert report.passed, report.levels[-1].summary
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    report = verify(tmp_path / "meg", candidate, tolerance=1e-5, pool=pool)
    assert report.passed, report.levels[-1].summary


def test_weights_that_cannot_be_told_apart_are_no_verdict(tmp_path: Path, pool: RankPool) -> None:
    """transformers fuses Mixtral's experts, so that no single one can be rounded."""
    source = save_model(tmp_path / "hf", "mixtral")
    candidate = mixed(source, tmp_path / "mixed", lambda name: ".experts.1." in name)
    with pytest.raises(VerificationError, match="only some weights of the candidate are in a narrower type"):
        verify(source, candidate, pool=pool)


def test_a_wider_candidate_needs_no_rounding(llama: Saved, tmp_path: Path, pool: RankPool) -> None:
    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "narrow", to="hf", dtype="bfloat16")
    convert(tmp_path / "narrow", tmp_path / "wide", to="torch", dtype="float32", grid=Parallelism(2))
    report = verify(tmp_path / "narrow", tmp_path / "wide", pool=pool)
    assert report.passed and report.levels[2].details["reference_rounded"] == []


def test_every_report_says_so(llama: Saved, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "narrow", to="hf", dtype="bfloat16")
    files = {name: tmp_path / f"r.{name}" for name in ("json", "junit", "html")}
    options = [str(part) for name, file in files.items() for part in (f"--{name}", file)]
    result = CliRunner().invoke(app, ["verify", str(source), str(tmp_path / "narrow"), *options])
    assert result.exit_code == 0, result.output
    told = "weights rounded as the candidate stores them (F32 -> BF16)"
    assert told in " ".join(result.stdout.split())
    assert json.loads(files["json"].read_text())["levels"][2]["details"]["reference_rounded"] == ["F32 -> BF16"]
    assert "(F32 -&gt; BF16)" in files["html"].read_text()
    outputs = [str(element.text) for element in ElementTree.parse(files["junit"]).iter("system-out")]
    assert any(told in text for text in outputs)


@pytest.mark.parametrize(
    ("source", "target", "rounds"),
    [
        ("F32", "BF16", True),
        ("F32", "F16", True),
        ("F64", "F32", True),
        ("BF16", "F16", True),
        ("F16", "BF16", True),
        ("BF16", "F32", False),
        ("F16", "F32", False),
        ("F32", "F64", False),
        ("F32", "F32", False),
        ("I64", "I64", False),
    ],
)
def test_which_casts_round(source: str, target: str, rounds: bool) -> None:
    assert loses(DTYPES[source], DTYPES[target]) == rounds
