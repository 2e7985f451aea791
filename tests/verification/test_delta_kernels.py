"""What transformers computes DeltaNets with, where kernels are installed that it would take for every type."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.verification.delta_nets import delta_nets, rounded_once, without_kernels
from ckptkit.verification.reference import load_model
from tests.models import save_model

RULE = "torch_chunk_gated_delta_rule"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(save_model(tmp_path_factory.mktemp("hf") / "model", "qwen3_5_text"), torch.float32)


@pytest.fixture
def kernels(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels in the places of the functions of transformers: they give twice the result, and say that they ran."""
    home = sys.modules[type(delta_nets(model)[0]).__module__]
    ran: list[str] = []

    def kernel(name: str, plain: Any) -> Any:
        @functools.wraps(plain)
        def wrapped(*args: Any, **options: Any) -> Any:
            ran.append(name)
            found = plain(*args, **options)
            return 2 * found if isinstance(found, torch.Tensor) else (2 * found[0], *found[1:])

        return wrapped

    for name in (RULE, "causal_conv1d_fn"):
        plain = getattr(home, name)
        monkeypatch.setattr(home, name, kernel(name, getattr(plain, "__wrapped__", plain)))
    yield ran


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(24)[None]).logits
    return found


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "cuda")], ids=str
)
def test_torch_computes_what_a_reference_needs(model: Any, kernels: list[str], dtype: torch.dtype, device: str) -> None:
    other = logits(model)
    assert set(kernels) == {RULE, "causal_conv1d_fn"}
    kernels.clear()
    with without_kernels(model, dtype, device):
        found = logits(model)
        with rounded_once(model):
            logits(model)
    assert not kernels and not torch.equal(found, other)
    assert torch.equal(logits(model), other), "the kernels are there again"


def test_kernels_run_in_16_bits_on_a_gpu_forwards(model: Any, kernels: list[str]) -> None:
    with without_kernels(model, torch.bfloat16, "cuda"):
        logits(model)
        assert kernels
        kernels.clear()
        model(torch.arange(24)[None]).logits.sum().backward()
    assert not kernels


def test_other_models_stay_as_they_are(tmp_path: Path) -> None:
    other = load_model(save_model(tmp_path / "hf", "qwen3"), torch.float32)
    with without_kernels(other, torch.float32, "cpu"):
        assert logits(other).isfinite().all()
