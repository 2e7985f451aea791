"""float64 is float64 throughout: what asks for float32 inside a model gets none."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ckptkit.verification.double_precision import double_precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_who_asks_for_float32_gets_it_unless_float64_is_there(dtype: torch.dtype) -> None:
    tensor = torch.arange(4).to(dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    with double_precision():
        found = [tensor.float(), tensor.to(torch.float32), tensor.to("cpu", dtype=torch.float32)]
        found.append(tensor.type(torch.float32))
        assert [one.dtype for one in found] == [kept] * 4
        assert tensor.type(torch.int32).dtype == torch.int32 and tensor.type() == tensor.to(dtype).type()
        assert tensor.to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.softmax(tensor, -1, dtype=torch.float32).dtype == kept
    assert tensor.to(torch.float32).dtype == torch.float32


def test_a_norm_of_transformers_computes_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    norm = LlamaRMSNorm(16, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator, dtype=torch.float64))
        with double_precision():
            found = norm(hidden)
    expected = norm.weight.detach() * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (found - expected).abs().max() <= 1e-14 * expected.abs().max()
