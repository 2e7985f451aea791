"""Models of tens to hundreds of billions of parameters have the size that is published, by the table alone.

`fixtures/large_configs.json` says of each where its config is from. DeepSeek-V3 and Kimi-K2 are published with a
stretched rotary embedding (YaRN), which is not in there: no shape depends on it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.families import family_of

LARGE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "large_configs.json").read_text(encoding="utf-8")
)
"""Name -> config, its source, and parameters as published, without multi-token prediction, to a billion."""


@pytest.mark.parametrize("name", LARGE)
def test_parameters(name: str) -> None:
    large = LARGE[name]
    family = family_of(large["config"], name)
    count = sum(item.parameters for item in family.items(family.parse(large["config"])))
    assert abs(count - large["parameters"]) < 1e9


def test_multi_token_prediction_of_deepseek_v3() -> None:
    """It is published with 14 billion more: a layer, and in its files copies of the embedding and of the head."""
    raw = LARGE["DeepSeek-V3"]["config"]
    family = family_of(raw, "")
    config = replace(family.parse(raw), mtp_layers=1)
    added = [item for item in family.items(config) if item.key.startswith("mtp.")]
    copies = [copy for copy in family.copies(config) if copy.hf.startswith("model.layers.61.")]
    parameters = sum(item.parameters for item in added) + len(copies) * config.vocab_size * config.hidden_size
    assert len(copies) == 2 and abs(parameters / 1e9 - 14) < 1
