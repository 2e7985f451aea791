"""The public functions on grids, inside the caller's torchrun: what they compute, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import LLAMAS, save_llama, save_model
from tests.ranks import torchrun_on_cpu

PROGRAM = Path(__file__).parent / "programs" / "on_grids.py"
EXACT = 2e-5


def answers(ranks: int, *arguments: object) -> list[dict[str, Any]]:
    """What each rank found."""
    found: list[dict[str, Any]] = json.loads(torchrun_on_cpu(PROGRAM, ranks, *arguments).splitlines()[-1])
    return found


def saved(folder: Path, kind: str) -> Path:
    return save_llama(folder, kind) if kind in LLAMAS else save_model(folder, kind)


PACKED: list[Any] = [
    ("qwen3_moe", 2, 2, "sequence_parallel"),
    pytest.param(("gqa", 2, 1), marks=pytest.mark.slow),
    pytest.param(("qwen3", 2, 1), marks=pytest.mark.slow),
    pytest.param(("qwen3-biased", 2, 1, "sequence_parallel"), marks=pytest.mark.slow),
    pytest.param(("qwen3_moe", 1, 2), marks=pytest.mark.slow),
    pytest.param(("gemma4_text-moe", 1, 2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_models_on_grids_against_transformers(tmp_path: Path, case: tuple[Any, ...]) -> None:
    """Sharded by FSDP2 over the replicas, too; each replica has rows of its own."""
    kind, tp, ep, *how = case
    for found in answers(4, "packed", saved(tmp_path / "hf", kind), tp, ep, *how):
        assert found["same"] and found["logits"] < EXACT, found
        assert found["gradients"] < 1e-4, found


CUT: list[Any] = [
    ("gqa", 1, 2, "packed"),
    pytest.param(("mistral", 2, 1, "sequence_parallel"), marks=pytest.mark.slow),
    pytest.param(("gemma3_text", 2, 1, "sequence_parallel", "packed"), marks=pytest.mark.slow),
    pytest.param(("tied", 1, 2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CUT, ids=str)
def test_load_megatron_with_and_without_context_parallelism(tmp_path: Path, case: tuple[Any, ...]) -> None:
    kind, tp, pp, *how = case
    for found in answers(4, "cut", saved(tmp_path / "hf", kind), tp, pp, *how):
        assert found["sizes"][0] == 2 and found["sizes"][1] == found["sizes"][2] > 0
        assert found["logits"] < EXACT and found["loss"] < 1e-5 and found["gradients"] < 1e-4, found


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from ckptkit import Parallelism, convert_to_packed, load_megatron
    from ckptkit.errors import UsageError
    from ckptkit.verification.reference import load_model

    dense, sparse = (load_model(saved(tmp_path / kind, kind), torch.float32) for kind in ("gqa", "qwen3_moe"))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (dense, {"grid": Parallelism(1, 2)}, "pipeline stages"),
        (dense, {"sequence_parallel": True}, "TP2 or more"),
        (sparse, {"grid": Parallelism(2)}, "sequence parallelism only"),
        (dense, {"grid": Parallelism(ep=2)}, "expert"),
        (dense, {"grid": Parallelism(2)}, "needs a process group of a multiple of 2 ranks, here are 1"),
    ]
    for model, how, words in wrong:
        with pytest.raises(UsageError, match=words):
            convert_to_packed(model, **how)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"3 ranks do not divide over TP1 .* CP2, which has 2"):
        load_megatron(tmp_path / "gqa", cp=2)
    with pytest.raises(UsageError, match="cp must be at least 1"):
        load_megatron(tmp_path / "gqa", cp=0)
