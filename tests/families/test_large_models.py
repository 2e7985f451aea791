"""Models of hundreds of billions of parameters have the size that is published, by the table alone.

`fixtures/large_models.json` says where each config is from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planning import FIXTURE, large_models, write_sparse
from ckptkit import convert
from ckptkit.families import family_of

MODELS: dict[str, dict[str, Any]] = json.loads(FIXTURE.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name: str) -> None:
    """Layers of multi-token prediction do not count; what GLM-4.5 is published with is not said."""
    raw = MODELS[name]["config"]
    family = family_of(raw, name)
    count = sum(item.parameters for item in family.items(family.parse(raw)))
    assert abs(count / 1e9 - MODELS[name]["billions"]) < (2.5 if name == "GLM-4.5" else 1)


def test_the_config_of_gpt_oss_has_the_defaults_of_the_class() -> None:
    large = MODELS["gpt-oss-120b"]["config"]
    family = family_of(large, "")
    assert replace(family.parse(large), dtype=None) == family.parse({})


def test_multi_token_prediction_of_deepseek_v3() -> None:
    """It is published with 14 billion more: a layer, and in its files copies of the embedding and of the head."""
    family = family_of({"architectures": ["DeepseekV3ForCausalLM"]}, "")
    config = replace(family.parse({}), mtp_layers=1)
    added = [item for item in family.items(config) if item.key.startswith("mtp.")]
    copies = [copy for copy in family.copies(config) if copy.hf.startswith("model.layers.61.")]
    parameters = sum(item.parameters for item in added) + len(copies) * config.vocab_size * config.hidden_size
    assert len(copies) == 2 and abs(parameters / 1e9 - 14) < 1


LISTED = {model.name: model for model in large_models()}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LISTED if name != "GLM-4.5-Air"]


@pytest.mark.parametrize("name", ["GLM-4.5-Air", *SLOW])
def test_dry_run_at_true_size(tmp_path: Path, name: str) -> None:
    """Every tensor of the files is used, layers of multi-token prediction included, and nothing is written."""
    model = LISTED[name]
    count = write_sparse(tmp_path / "hf", model)
    for to in ("torch", "torch_dist"):
        result = convert(tmp_path / "hf", tmp_path / "meg", to=to, grid=model.parallelism, dry_run=True)
        assert result.coverage["used"] + result.coverage["replicas"] == count
        assert any("of multi-token prediction beside" in note for note in result.notes) == bool(model.predicted)
        assert sum(file["bytes"] for file in result.files) > 1.9e9 * MODELS[name]["billions"]
    assert not (tmp_path / "meg").exists()
