"""What is recorded of Megatron-LM and of Transformer Engine's modules is what is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fixtures import make_megatron_lm, make_te_keys
from tests.formats.rank_pool import RankProcesses

pytestmark = pytest.mark.te


def test_keys_of_modules(te_ranks: RankProcesses, report: Callable[[dict[str, Any]], None]) -> None:
    recorded = json.loads(make_te_keys.FILE.read_text(encoding="utf-8"))["models"]
    found = make_te_keys.models(te_ranks)
    different = make_te_keys.differences(recorded, found)
    counts = {kind: {spec: sum(keys["torch_dist"].values()) for spec, keys in of.items()} for kind, of in found.items()}
    report({"kind": "keys", "keys": counts, "different": different, "passed": not different})
    assert different == []


def test_the_command_line_and_what_it_restores(te_ranks: RankProcesses) -> None:
    """Of another release than the recorded one, too: then this says what changed."""
    recorded = json.loads(make_megatron_lm.FILE.read_text(encoding="utf-8"))
    assert make_megatron_lm.differences(recorded, make_megatron_lm.facts()) == []
