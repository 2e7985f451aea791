"""Which attention is taken by flash attention; what it computes is tested on CUDA machines (tests/gpu)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckptkit.megatron import compat

compat.import_megatron()

from ckptkit.megatron.packed_inputs import kernels  # noqa: E402


def query(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, width: int = 128) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype, size=lambda axis: width)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.EXACT, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    "other",
    [{"device": "cpu"}, {"dtype": torch.float32}, {"width": 512}, {"width": 12}],
    ids=lambda other: next(iter(other)),
)
def test_flash_attention_serves_half_precision_on_cuda(other: dict[str, Any]) -> None:
    assert kernels.flash_serves(query(), None)
    assert not kernels.flash_serves(query(**other), None)
    assert not kernels.flash_serves(query(), 30.0)


@pytest.mark.parametrize(("value", "serves"), [("1", False), ("0", True), ("", True)])
def test_the_environment_keeps_it_out(monkeypatch: pytest.MonkeyPatch, value: str, serves: bool) -> None:
    monkeypatch.setenv(kernels.EXACT, value)
    assert kernels.flash_serves(query(), None) == serves
