"""vLLM's own server, asked now: what it records is what transformers computes.

Runs where vLLM is installed: `make test-vllm` makes an environment of its own for it. On ranks of megatron-core, which
that environment has not, `test_recorded.py` verifies what the same server recorded before.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from ckptkit.verification.rollouts.verify import verify_engine
from fixtures.make_rollouts import record
from tests.rollouts import RECORDED, save_recorded

pytestmark = pytest.mark.slow
ROUTED = "moe-float32-routed"


@pytest.mark.parametrize("name", [name for name in RECORDED if name != ROUTED])
def test_the_server_says_what_the_model_says(tmp_path: Path, name: str) -> None:
    kind, dtype = RECORDED[name]
    model = save_recorded(tmp_path / "model", kind)
    record(model, tmp_path / "r.jsonl", "--dtype", dtype, chat=name.endswith("chat"))
    report = verify_engine(None, model, tmp_path / "r.jsonl", engine_dtype=dtype)
    assert report.passed, report.levels[0].summary
    print(f"\n{name}: {report.levels[0].summary}")


def test_its_routing_is_replayed_where_it_records_one(tmp_path: Path) -> None:
    model = save_recorded(tmp_path / "model", RECORDED[ROUTED][0])
    try:
        record(model, tmp_path / "r.jsonl", "--dtype", "float32", "--enable-return-routed-experts")
    except SystemExit as error:
        assert "requires" in str(error), error
        pytest.skip("this vLLM records no routing here: " + next(w for w in str(error).splitlines() if "requires" in w))
    report = verify_engine(None, model, tmp_path / "r.jsonl", engine_dtype="float32")
    assert report.passed and report.levels[0].details["judged"] == "replayed", report.levels[0].summary
