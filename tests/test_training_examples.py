"""The examples of training run from the shell on CPU ranks, and what comes back is what was trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptkit.verification.reference import load_model
from ckptkit.verification.tokens import default_rows
from ckptkit.verification.training.batches import counted
from tests.lora import adapted, save_adapter
from tests.models import save_llama
from tests.ranks import torchrun_on_cpu
from tests.surgery.pairs import build_split, save_pair

EXAMPLES = Path(__file__).parents[1] / "examples"
ADAPTER_ONLY = (
    "--tp",
    "2",
    "--pp",
    "2",
    "--first-stage-layers",
    "2",
    "--sequence-parallel",
    "--train-only",
    "*adapter*",
)


def torchrun(example: str, ranks: int, *arguments: object) -> tuple[float, float]:
    """The loss before and after."""
    printed = torchrun_on_cpu(EXAMPLES / example, ranks, *arguments)
    found = re.search(r"^loss (\S+) -> (\S+);", printed, re.M)
    assert found is not None, printed
    return float(found[1]), float(found[2])


@torch.no_grad()
def loss_of(model: torch.nn.Module, vocabulary: int) -> float:
    """The loss of the examples' rows in transformers."""
    total, tokens = 0.0, 0
    for row in default_rows(vocabulary, 4):
        ids = torch.tensor([row])
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        counts = torch.tensor(counted(row)[:-1])
        total, tokens = total - float(scores[counts].sum()), tokens + int(counts.sum())
    return total / tokens


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, ADAPTER_ONLY),
        pytest.param(2, ("--tp", "2", "--packed", "128", "--recompute"), marks=pytest.mark.slow),
    ],
    ids=["adapter only", "full"],
)
def test_train_split_llama(tmp_path: Path, ranks: int, options: tuple[str, ...]) -> None:
    source = build_split(tmp_path / "split", save_pair(tmp_path / "pair", dtype="float32"))
    before, after = torchrun("train_split_llama.py", ranks, source, tmp_path / "out", "--steps", 4, *options)
    assert after < before
    trained = load_model(tmp_path / "out" / "hf", torch.float32)
    assert loss_of(trained, trained.config.vocab_size) == pytest.approx(after, abs=2e-3)
    assert loss_of(load_model(source, torch.float32), trained.config.vocab_size) == pytest.approx(before, abs=2e-3)
    old, new = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out" / "hf"))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    expected = {name for name in old if "adapter" in name} if "--train-only" in options else set(old)
    assert moved == expected


@pytest.mark.slow
def test_train_lora(tmp_path: Path) -> None:
    from peft import PeftModel

    base = save_llama(tmp_path / "base")
    start = save_adapter(tmp_path / "start", base)
    before, after = torchrun(
        "train_lora.py", 2, base, start, tmp_path / "out", "--tp", 2, "--sequence-parallel", "--steps", 4
    )
    assert after < before
    assert loss_of(adapted(base), 250) == pytest.approx(before, abs=2e-3)
    trained = PeftModel.from_pretrained(load_model(base, torch.float32), str(tmp_path / "out" / "adapter"))
    assert loss_of(trained, 250) == pytest.approx(after, abs=2e-3)


def test_what_load_megatron_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ckptkit import load_megatron
    from ckptkit.errors import UsageError

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="runs on the ranks of torchrun"):
        load_megatron("a")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="no dtype"):
        load_megatron("a", dtype="int8")
    from ckptkit import Parallelism

    base = save_llama(tmp_path / "base")
    with pytest.raises(UsageError, match="3 ranks do not divide"):
        load_megatron(base, Parallelism(2))
