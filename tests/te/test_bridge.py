"""Megatron-Bridge loads what `convert` writes, with the modules that it takes itself: `make test-te`.

Without a GPU they are built and loaded on the CPU, and compute nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.models import save_model
from tests.te.conftest import is_there
from tests.te.models import save_expected
from tests.te.test_loads import EXACT, Prepared, Report

pytestmark = pytest.mark.te


def by_bridge(checkpoint: Path, expected: Path, model_type: str) -> dict[str, Any]:
    """What Megatron-Bridge, in a process of its own, makes of a checkpoint."""
    command = [sys.executable, "-m", "tests.te.bridge_model", str(checkpoint / "release"), str(expected), model_type]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture
def source(tmp_path: Path, prepared: Prepared) -> Callable[[str], tuple[Path, Path]]:
    """Kind -> (Hugging Face model, file with its tokens and logits)."""

    def get(kind: str) -> tuple[Path, Path]:
        if not kind.startswith("gemma"):
            return prepared(kind)[:2]
        options: dict[str, Any] = {"tie_word_embeddings": True}
        if kind == "gemma3_text":  # its global layers come in turns, as Megatron-Bridge has them
            types = [*["sliding_attention"] * 5, "full_attention"]
            options |= {"num_hidden_layers": 6, "layer_types": types, "query_pre_attn_scalar": 16}
        path = save_model(tmp_path / "hf", kind, **options)
        save_expected(path, tmp_path / "expected.safetensors")
        return path, tmp_path / "expected.safetensors"

    return get


KINDS = {
    "qwen3": "",
    "qwen3_moe": "",
    "mixtral": "gpt",
    "gemma3_text": "",
    "gemma4_text-dense": "",
    "gemma4_text-moe": "",
}
"""Kind -> how Megatron-Bridge is asked to build it, where there is no run_config.yaml."""


@pytest.mark.parametrize("kind", KINDS)
def test_bridge_loads_it_and_computes_the_same(
    source: Callable[[str], tuple[Path, Path]], report: Report, tmp_path: Path, kind: str
) -> None:
    """Every tensor exact, and logits of transformers in float32."""
    if missing := [name for name in ("megatron.bridge", "transformer_engine") if not is_there(name)]:
        pytest.skip(f"no {' and no '.join(missing)}")
    model, expected = source(kind)
    convert(model, tmp_path / "m", to="torch_dist", grid=Parallelism(2, 2))
    answer = by_bridge(tmp_path / "m", expected, KINDS[kind])
    report({"kind": f"{kind} bridge", "to": "torch_dist", "grid": "TP1", "written": "TP2 x PP2", **answer})
    assert answer["wrong"] == []
    assert answer.get("max", 0.0) <= EXACT, answer
