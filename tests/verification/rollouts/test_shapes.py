"""Records in the shapes that engines and trainers write; the fixture names the source of each."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ckptkit.errors import InputError
from ckptkit.verification.rollouts.records import turns_of
from fixtures import make_shapes
from fixtures.make_shapes import LAYERS, LOGPROBS, PLACE, PROMPT, TOKENS, TOPK, routing

CASES: list[dict[str, Any]] = json.loads(PLACE.read_text(encoding="utf-8"))


def test_the_fixture_is_what_its_maker_writes() -> None:
    assert json.loads(json.dumps([*make_shapes.sglang(), *make_shapes.slime(), *make_shapes.verl()])) == CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["shape"]))
def test_every_record_is_read(case: dict[str, Any]) -> None:
    """The engine's ids and log-probabilities, and its routing where it recorded one; no more than it saw."""
    assert all(len(source["commit"]) == 40 and source["files"] for source in case["sources"])
    if "refused" in case:
        with pytest.raises(InputError, match=case["refused"]):
            turns_of(case["record"], "f", 1)
        return
    name, (turn,) = turns_of(case["record"], "f", 1)
    assert name == case["shape"]
    assert (turn.prompt, turn.tokens, turn.logprobs) == (PROMPT, TOKENS, LOGPROBS)
    assert (turn.routing is not None) == ("from" in case)
    if turn.routing is not None:
        found = turn.routing.shaped((1, 2), LAYERS, TOPK, 4)
        assert found.start == case["from"]
        assert np.array_equal(found.experts, np.array(routing(5))[found.start :, 1:])


@pytest.mark.parametrize("shape", ["slime", "verl"])
def test_routing_that_ends_before_a_sampled_token_is_refused(shape: str) -> None:
    """Only what no engine sampled may be cut off."""
    record = next(case["record"] for case in CASES if case["shape"] == shape)
    if shape == "slime":
        record = {**record, "rollout_routed_experts": routing(4)}
    else:
        zeros = [[0] * TOPK] * LAYERS
        record = {**record, "routed_experts": [[zeros, zeros, *routing(4), *[zeros] * 5]]}
    _, (turn,) = turns_of(record, "f", 1)
    assert turn.routing is not None and turn.tokens == TOKENS
    with pytest.raises(InputError, match=r"went through the engine|not filled in"):
        turn.routing.shaped((1, 2), LAYERS, TOPK, 4)
