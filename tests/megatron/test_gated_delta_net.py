"""Gated DeltaNet against transformers, and against megatron-core's own computation."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ckptkit.megatron import compat
from ckptkit.sharding.grid import Parallelism
from tests.megatron.double_precision import double_precision
from tests.megatron.qwen3_next import CONFIG, hf_model, local_state
from tests.megatron.test_modules import exactly_normed
from tests.precision import relative_error, settled

compat.import_megatron()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.ssm import gated_delta_net as core  # noqa: E402

from ckptkit.megatron import delta_rule  # noqa: E402
from ckptkit.megatron.gated_delta_net import GatedNorm  # noqa: E402
from ckptkit.megatron.model import build_chunks, load_strict  # noqa: E402
from ckptkit.megatron.packed_inputs.batch import PackedBatch  # noqa: E402

CPU = torch.device("cpu")

HEADS = {"keys": 4, "values": 8, "key_dim": 8, "value_dim": 12}


def drawn(length: int, batch: int = 2) -> list[torch.Tensor]:
    """Queries, keys, values, logarithms of decays, and rates, in fp64; half of the decays forget nearly everything."""
    torch.manual_seed(length)
    keys, values = HEADS["keys"], HEADS["values"]
    query, key = (torch.randn(batch, length, keys, HEADS["key_dim"], dtype=torch.float64) for _ in range(2))
    value = torch.randn(batch, length, values, HEADS["value_dim"], dtype=torch.float64)
    decay = -F.softplus(torch.randn(batch, length, values, dtype=torch.float64) - 2)
    decay = decay * torch.where(torch.rand(values) < 0.5, 10.0, 0.1)
    return [query, key, value, decay, torch.rand(batch, length, values, dtype=torch.float64)]


@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_the_rule_is_that_of_transformers(length: int) -> None:
    """Token by token, in double precision, forwards and backwards."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    found, expected = drawn(length), drawn(length)
    with double_precision():
        for part in (*found, *expected):
            part.requires_grad_()
        ours = delta_rule.gated_delta_rule(*found)
        theirs, _ = torch_recurrent_gated_delta_rule(*expected, use_qk_l2norm_in_kernel=True)
        weight = torch.randn(ours.shape, dtype=torch.float64)
        for output in (ours, theirs):
            (output * weight).sum().backward()
    assert ours.dtype == torch.float64 and relative_error(ours, theirs) < 1e-12
    for part, other in zip(found, expected, strict=True):
        assert part.grad is not None and other.grad is not None
        assert relative_error(part.grad, other.grad) < 1e-11 or (length == 1 and not other.grad.any())


def test_chunks_are_only_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [part.float() for part in drawn(50)]
    whole = delta_rule.gated_delta_rule(*parts)
    for size in (1, 3, 50):
        monkeypatch.setattr(delta_rule, "CHUNK", size)
        assert relative_error(delta_rule.gated_delta_rule(*parts), whole) < 1e-5


def test_decays_beyond_the_range_of_exponents() -> None:
    """What forgets at once, many times in a chunk, has no infinities in it."""
    query, key, value, decay, rate = (part.float() for part in drawn(70))
    decay = (decay - 200.0).requires_grad_()
    output = delta_rule.gated_delta_rule(query, key, value, decay, rate)
    output.square().sum().backward()
    assert output.isfinite().all() and decay.grad is not None and decay.grad.isfinite().all()


def gated_norms(dtype: torch.dtype) -> tuple[GatedNorm, Any]:
    """Ours, whose weights are one less, and that of transformers, with the same effect."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    torch.manual_seed(0)
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False, layernorm_zero_centered_gamma=True)
    ours, theirs = GatedNorm(config, 12, 1e-4), Qwen3NextRMSNormGated(12, 1e-4).to(dtype)
    with torch.no_grad():
        ours.weight.uniform_(-0.5, 1.0)
        ours.weight.copy_((ours.weight + 1.0) - 1.0)  # so that 1 more has no rounding error
        theirs.weight.copy_(ours.weight + 1.0)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_norm_is_that_of_transformers(one_rank: Parallelism, dtype: torch.dtype) -> None:
    ours, theirs = gated_norms(dtype)
    x, gate = (torch.randn(40, 12, dtype=dtype) for _ in range(2))
    weight, normed = theirs.weight.double(), exactly_normed(x, 1e-4)
    # What is rounded last comes from something rounded before; only where that is settled, bits tell something.
    scaled = (weight * normed.to(dtype).double()).to(dtype).double()
    with torch.no_grad():
        found, expected = ours.gated(x, gate), theirs(x, gate)
    if dtype == torch.float32:
        assert relative_error(found, expected) < 1e-6
    else:
        mask = settled(normed, dtype) & settled(scaled * F.silu(gate.double()), dtype)
        assert torch.equal(found[mask], expected[mask])
        other = (weight * normed * F.silu(gate.double())).to(dtype)
        assert not torch.equal(other[mask], expected[mask])
    ours.zero_centered = False
    assert relative_error(ours.gated(x, gate), expected) > 0.1


# A whole model --------------------------------------------------------------------------------------------------------

ANGLES = 1e-6
"""What rotary angles in fp32, which both libraries have, may do to a model that computes in fp64."""
ROWS = [list(range(100, 170)), [9], [10, 11], [5, 6, 7, 8, 9] * 8]
"""Longer than a chunk, shorter than the convolution, and in between."""


def run(chunk: Any, tokens: torch.Tensor, params: PackedSeqParams | None = None) -> torch.Tensor:
    with compat.runs_on(CPU):
        output: torch.Tensor = chunk(tokens, torch.arange(tokens.size(1))[None], None, packed_seq_params=params)
    return output


def built(state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> Any:
    (chunk,) = build_chunks(CONFIG, Parallelism(), 250, dtype=dtype, device=CPU)
    load_strict(chunk, state)
    return chunk


def test_a_layer_is_that_of_megatron_core(one_rank: Parallelism, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own computation lacks one function without flash-linear-attention, where it is to be deterministic."""

    def l2norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    home = sys.modules[core.GatedDeltaNet.__init__.__module__]
    monkeypatch.setattr(home, "l2norm", l2norm, raising=False)
    layer = built(local_state(hf_model().state_dict()), torch.float32).decoder.layers[0].self_attention
    states = torch.randn(100, 2, 96)
    with torch.no_grad(), compat.runs_on(CPU):
        found, bias = layer(states)
        expected, _ = core.GatedDeltaNet.forward(layer, states, None)
    assert bias is None and relative_error(found, expected) < 1e-5


def packed(chunk: Any, rows: list[list[int]]) -> torch.Tensor:
    """Logits of rows that follow one another in one."""
    batch = PackedBatch.of_rows(rows)
    return run(chunk, batch.input_ids[None], batch.params())[0]


def test_a_model_is_that_of_transformers(one_rank: Parallelism) -> None:
    """Logits and gradients in double precision but for rotary angles, of rows alone and packed."""
    with double_precision():
        model = hf_model(torch.float64)
        chunk = built(local_state(model.state_dict()))
        expected = [model(torch.tensor([row]), use_cache=False).logits[0] for row in ROWS]
        for row, logits in zip(ROWS, expected, strict=True):
            assert relative_error(run(chunk, torch.tensor([row]))[0], logits) < ANGLES
        found = packed(chunk, ROWS)
        assert relative_error(found, torch.cat(expected)) < ANGLES
        direction = torch.randn(found.shape, dtype=found.dtype)
        for logits in (found, torch.cat(expected)):
            (logits * direction).sum().backward()
    wanted = local_state({name: parameter.grad for name, parameter in model.named_parameters()}, gradients=True)
    gradients = {name: parameter.grad for name, parameter in chunk.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and relative_error(gradient, wanted[name]) < 10 * ANGLES, name
