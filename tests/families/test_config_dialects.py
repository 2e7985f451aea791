"""The config.json that ten releases of transformers, 4.40 to 5.23, write for one model says the same of it.

Each dialect is what a release wrote for a model that it made, or that it loaded from the file of another release.
`fixtures/config_dialects.json` has the file of transformers 5.23 for each model, and what the others have otherwise.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from ckptkit.families import family_of

FIXTURE = json.loads((Path(__file__).parents[2] / "fixtures" / "config_dialects.json").read_text())


def in_dialect(config: dict[str, Any], dialect: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what a dialect has otherwise."""
    raw = deepcopy(config)
    for path in dialect["unset"]:
        *above, key = path.split("/")
        _inside(raw, above).pop(key)
        while above and not _inside(raw, above):  # no release writes empty objects
            *above, key = above
            _inside(raw, above).pop(key)
    for path, value in dialect["set"].items():
        *above, key = path.split("/")
        _inside(raw, above)[key] = value
    return raw


def _inside(raw: dict[str, Any], above: list[str]) -> dict[str, Any]:
    for key in above:
        if not isinstance(raw.get(key), dict):
            raw[key] = {}
        raw = raw[key]
    return raw


@pytest.mark.parametrize("kind", list(FIXTURE))
def test_every_dialect_describes_the_same_model(kind: str) -> None:
    latest = FIXTURE[kind]["config"]
    family = family_of(latest, kind)
    config = family.parse(latest)
    for dialect in FIXTURE[kind]["dialects"]:
        raw = in_dialect(latest, dialect)
        assert family_of(raw, kind) is family
        assert family.parse(raw) == config, dialect["written_by"]
        assert family.unparse(config, raw) == raw, dialect["written_by"]


def test_the_dialects_include_those_that_differ_most() -> None:
    writers = {who.split()[0] for kind in FIXTURE.values() for one in kind["dialects"] for who in one["written_by"]}
    assert {"4.40.2", "4.44.2", "4.48.3", "4.51.3", "4.55.4", "4.57.6", "5.0.0", "5.5.4", "5.12.1"} <= writers
    stray = [one for one in FIXTURE["gemma3-short"]["dialects"] if one["set"].get(STRAY, 0) is None]
    assert stray, "transformers writes a null rope_theta beside the types of layers"


STRAY = "text_config/rope_parameters/rope_theta"


@pytest.mark.parametrize("kind", ["gemma3-short", "gemma3-scaled", "gemma4", "llama-llama3"])
def test_a_base_that_counts_is_not_ignored(kind: str) -> None:
    """What is beside the types of layers does not count; what is in them, or has no types beside it, does."""
    raw = deepcopy(FIXTURE[kind]["config"])
    config = family_of(raw, kind).parse(raw)
    ropes = raw.get("text_config", raw)["rope_parameters"]
    for part in [ropes.get("full_attention", ropes), ropes.get("sliding_attention", ropes)]:
        part["rope_theta"] += 1.0
    assert family_of(raw, kind).parse(raw) != config
