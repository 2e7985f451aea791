"""The modules that replace megatron-core's, each against an independent one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ckptkit.errors import UnsupportedError
from ckptkit.megatron import compat
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from tests.precision import relative_error, settled

compat.import_megatron()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from ckptkit.megatron import attention  # noqa: E402
from ckptkit.megatron.activations import activation  # noqa: E402
from ckptkit.megatron.config import transformer_config  # noqa: E402
from ckptkit.megatron.moe import Router  # noqa: E402
from ckptkit.megatron.norms import RMSNorm  # noqa: E402
from ckptkit.megatron.rotary import RotaryEmbedding, attention_factor, inverse_frequencies  # noqa: E402

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3 elsewhere": {
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("theta", [10000.0, 12e6])
@pytest.mark.parametrize("head_dim", [8, 128])
def test_frequencies_are_those_of_transformers(kind: str, theta: float, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values: dict[str, Any] = {"rope_type": kind.split()[0], "rope_theta": theta, **ROPES[kind]}
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=dict(values)
    )
    expected = LlamaRotaryEmbedding(config)
    rope = Rope(
        theta,
        values["rope_type"],
        values.get("factor", 1.0),
        values.get("low_freq_factor", 1.0),
        values.get("high_freq_factor", 4.0),
        values.get("original_max_position_embeddings", 8192),
    )
    frequencies = expected.get_buffer("inv_freq")
    assert torch.allclose(inverse_frequencies(rope, head_dim), frequencies, rtol=1e-6, atol=0)
    cos, _ = expected(torch.zeros(1), torch.arange(300)[None])
    assert torch.allclose(RotaryEmbedding(rope, head_dim)(300)[:, 0, 0].cos(), cos[0], rtol=0, atol=1e-4)
    unscaled = inverse_frequencies(replace(rope, kind="default"), head_dim)
    assert torch.allclose(unscaled, frequencies, rtol=1e-2, atol=0) == (kind == "default")


def test_other_scalings_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="longrope"):
        inverse_frequencies(Rope(1e4, "longrope"), 8)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_yarn_is_that_of_transformers(truncate: bool, head_dim: int) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    values = {
        **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
        **{"truncate": truncate, "original_max_position_embeddings": 4096},
    }
    expected = GptOssRotaryEmbedding(GptOssConfig(head_dim=head_dim, rope_parameters=dict(values)))
    rope = Rope(150000.0, "yarn", 32.0, original_max_position=4096, truncate=truncate)
    frequencies = expected.get_buffer("inv_freq")
    assert torch.allclose(inverse_frequencies(rope, head_dim), frequencies, rtol=1e-6, atol=0)
    other = inverse_frequencies(replace(rope, truncate=not truncate), head_dim)
    assert not torch.allclose(other, frequencies, rtol=1e-3, atol=0)
    assert attention_factor(rope) == pytest.approx(expected.attention_scaling, rel=1e-12)


def exactly_normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` over its root mean square, in fp64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()


def assert_rounded_alike(
    ours: torch.Tensor, theirs: torch.Tensor, *, last: torch.Tensor, other_order: torch.Tensor | None = None
) -> None:
    """Two norms agree; in half precision bit for bit, which tells what they round when.

    Args:
        ours: What one made.
        theirs: What the other made.
        last: The values that are rounded after something inexact, in fp64; only where that is `settled` do bits count.
        other_order: What rounding at another place would give before it is rounded; None where there is only one.
    """
    assert ours.dtype == theirs.dtype
    if ours.dtype == torch.float32:
        assert relative_error(ours, theirs) < 1e-6
        return
    mask = settled(last, ours.dtype)
    assert torch.equal(ours[mask], theirs[mask])
    assert other_order is None or not torch.equal(other_order.to(ours.dtype)[mask], theirs[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    ours, theirs = RMSNorm(_Config(dtype), 48, eps=1e-4), LlamaRMSNorm(48, eps=1e-4).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
    x = torch.randn(3, 5, 48, dtype=dtype)
    normed, weight = exactly_normed(x, 1e-4), theirs.weight.double()
    assert_rounded_alike(ours(x), theirs(x), last=normed, other_order=weight * normed)
    assert ours.weight.dtype == dtype
    assert ours.weight.sequence_parallel is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centred_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    torch.manual_seed(0)
    config = _Config(dtype)
    config.layernorm_zero_centered_gamma = True
    ours, theirs = RMSNorm(config, 48, eps=1e-4), Gemma3RMSNorm(48, eps=1e-4).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
    x = torch.randn(3, 5, 48, dtype=dtype)
    normed, weight = exactly_normed(x, 1e-4), 1 + theirs.weight.double()
    assert_rounded_alike(ours(x), theirs(x), last=weight * normed, other_order=weight * normed.to(dtype).double())
    ours.zero_centered = False
    assert not torch.allclose(ours(x), theirs(x), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xielu_is_that_of_transformers(one_rank: Parallelism, dtype: torch.dtype) -> None:
    from transformers.activations import XIELUActivation

    torch.manual_seed(0)
    ours, theirs = activation("xielu", dtype), XIELUActivation(dtype=dtype)
    assert isinstance(ours, torch.nn.Module)
    assert activation("xielu", dtype) is not ours
    state = {"alpha_p": torch.tensor([0.7], dtype=dtype), "alpha_n": torch.tensor([-0.4], dtype=dtype)}
    ours.load_state_dict(state)
    theirs.load_state_dict(state, strict=False)
    x = torch.cat((torch.linspace(-4, 4, 501), torch.tensor([-0.0, 1e-7, -1e-7, -2e-6]))).to(dtype)
    assert relative_error(ours(x), theirs(x)) < (1e-6 if dtype == torch.float32 else 2.0**-7)
    for module in (ours, theirs):
        module(x).float().square().sum().backward()
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name).grad
        assert parameter.grad is not None and expected is not None and expected.abs() > 1
        assert relative_error(parameter.grad, expected) < (1e-5 if dtype == torch.float32 else 2.0**-5)


def test_other_activations_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"relu9.*known: silu, .*xielu"):
        activation("relu9", torch.float32)


MOE = ModelConfig(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    32,
    60,
    (LayerConfig(4, 2, 8, 48, Rope(1e4), moe=True),),
    False,
    1e-5,
    128,
    num_experts=8,
    experts_per_token=3,
    moe_ffn_hidden_size=16,
)


def router_of(config: ModelConfig, dtype: torch.dtype) -> Router:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    megatron = transformer_config(config, Parallelism(), dtype=dtype, device=torch.device("cpu"))
    return Router(config=megatron, pg_collection=get_default_pg_collection())


def sure_tokens(number: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [number, 32] and weights [8, 32] of a router whose logits are the same however they are summed up.

    They are multiples of a quarter, which both types hold, and the three experts of a token are at least that far from
    all others.
    """
    x, weight = torch.randint(-3, 4, (2 * number, 32)) / 4, torch.randint(-1, 2, (8, 32)).float()
    ordered = (x @ weight.T).sort(-1, descending=True).values
    assert ordered.abs().max() < 64
    sure = x[ordered[:, 2] > ordered[:, 3]][:number]
    assert len(sure) == number
    return sure.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalised", [True, False])
def test_routing_is_that_of_transformers(one_rank: Parallelism, renormalised: bool, dtype: torch.dtype) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    torch.manual_seed(0)
    ours = router_of(replace(MOE, norm_topk_prob=renormalised), dtype)
    theirs = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=renormalised)
    ).to(dtype)
    x, weight = sure_tokens(200, dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        ours.weight.copy_(weight)
        probabilities, chosen = ours(x[:, None])
        _, weights, experts = theirs(x[:, None])
    expected = torch.zeros(200, 8, dtype=dtype).scatter(1, experts, weights)
    assert torch.equal(chosen, torch.zeros(200, 8, dtype=torch.bool).scatter(1, experts, True))
    assert torch.allclose(probabilities.to(dtype), expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)
    assert torch.allclose(probabilities.sum(-1), torch.ones(200)) == renormalised


def test_routers_that_megatron_core_lacks_are_refused(one_rank: Parallelism) -> None:
    with pytest.raises(UnsupportedError, match="single expert"):
        router_of(replace(MOE, experts_per_token=1), torch.float32)
    assert router_of(replace(MOE, experts_per_token=1, norm_topk_prob=False), torch.float32).topk == 1


class _Config:
    sequence_parallel = True
    layernorm_zero_centered_gamma = False
    kv_channels = 16
    window_size: tuple[int, int] | None = None

    def __init__(self, dtype: torch.dtype = torch.float32, window: int | None = None) -> None:
        self.params_dtype = dtype
        self.window_size = None if window is None else (window - 1, 0)


def core(window: int | None = None) -> attention.ExactAttention:
    return attention.ExactAttention(_Config(window=window), attn_mask_type=AttnMaskType.causal)  # type: ignore[arg-type]


def inputs(length: int, batch: int = 2, heads: int = 6, groups: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(length, batch, number, 16, dtype=torch.float64) for number in (heads, groups, groups)]


def expected_attention(parts: list[torch.Tensor], window: int | None) -> torch.Tensor:
    """torch's own attention, with a mask written out."""
    query, key, value = (part.permute(1, 2, 0, 3) for part in parts)
    length = query.size(2)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        visible &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
        assert visible.sum(-1).tolist() == [min(i + 1, window) for i in range(length)]
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, enable_gqa=True)
    return output.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("block", [1, 3, 4, 1024])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 100])
def test_attention_is_exact(monkeypatch: pytest.MonkeyPatch, window: int | None, block: int) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    parts = inputs(11)
    # The softmax is computed in fp32, as in transformers.
    assert torch.allclose(core(window)(*parts), expected_attention(parts, window), atol=1e-5)
    assert not torch.allclose(core(window)(*parts), expected_attention(parts, 3), atol=1e-3)


def test_attention_scores_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    query, key, value = inputs(9, batch=1, heads=2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * 0.5
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = torch.softmax((1.5 * torch.tanh(scores / 1.5)).masked_fill(hidden, float("-inf")), -1)
    expected = torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)
    options: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal, "softmax_scale": 0.5}
    capped = attention.ExactAttention(_Config(), softcap=1.5, **options)  # type: ignore[arg-type]
    assert torch.allclose(capped(query, key, value), expected, atol=1e-5)
    uncapped = attention.ExactAttention(_Config(), **options)  # type: ignore[arg-type]
    assert not torch.allclose(uncapped(query, key, value), expected, atol=1e-2)


def with_sinks(parts: list[torch.Tensor], window: int | None = None) -> attention.ExactAttention:
    config = _Config(parts[0].dtype, window)
    config.num_attention_heads, config.tensor_model_parallel_size = parts[0].size(2), 1
    options: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal, "sinks": True}
    found = attention.ExactAttention(config, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        found.softmax_offset.copy_(torch.randn(parts[0].size(2)))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("window", [None, 1, 5])
def test_sinks_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    parts = [part.float() for part in inputs(11)]
    ours = with_sinks(parts, window)
    sinks = torch.nn.Parameter(ours.softmax_offset.detach().clone())  # type: ignore[union-attr]
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(11, 11, dtype=torch.bool).tril(-window)
    module = type("Module", (), {"num_key_value_groups": 3, "sinks": sinks, "training": False})()
    query, key, value = (part.permute(1, 2, 0, 3) for part in parts)
    mask = torch.zeros(11, 11).masked_fill(hidden, float("-inf"))
    expected, _ = eager_attention_forward(module, query, key, value, mask, scaling=16**-0.5)
    found = ours(*parts)
    assert torch.allclose(found, expected.permute(1, 0, 2, 3).flatten(2), atol=1e-6)
    for output in (found, expected):
        output.square().sum().backward()
    assert torch.allclose(ours.softmax_offset.grad, sinks.grad, rtol=1e-4)  # type: ignore[union-attr, arg-type]
    assert sinks.grad is not None and sinks.grad.abs().min() > 1e-4
    assert not torch.allclose(found, core(window)(*parts), atol=1e-2)


def test_sinks_are_those_of_megatron_core(one_rank: Parallelism) -> None:
    """Of its own attention, which knows no packed rows and makes the mask of a window on a GPU."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    initialize_rng_tracker(inference_rng_tracker=True)
    cpu, layer = torch.device("cpu"), LayerConfig(6, 2, 16, 48, Rope(1e4))
    model = replace(MOE, layers=(layer,), num_experts=0, sinks=True)
    config = transformer_config(model, Parallelism(), dtype=torch.float32, device=cpu)
    assert config.softmax_type == "learnable"
    with compat.runs_on(cpu):
        theirs = DotProductAttention(config, 1, AttnMaskType.causal, "self", attention_dropout=0.0)
        parts = [part.float() for part in inputs(11)]
        ours = with_sinks(parts)
        theirs.load_state_dict(ours.state_dict())
        hidden = torch.ones(2, 1, 11, 11, dtype=torch.bool).triu(1)
        found, expected = ours(*parts), theirs(*parts, hidden)
    assert torch.allclose(found, expected, atol=1e-6)
    for output in (found, expected):
        output.square().sum().backward()
    own, other = ours.softmax_offset, theirs.softmax_offset
    assert own is not None and torch.allclose(own.grad, other.grad, rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_do_not_see_one_another(window: int | None) -> None:
    bounds = torch.tensor([0, 4, 5, 5, 11], dtype=torch.int32)
    parts = inputs(11, batch=1)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=6, max_seqlen_kv=6
    )
    found = core(window)(*(part.squeeze(1) for part in parts), packed_seq_params=packed)
    apart = [core(window)(*(part[a:b] for part in parts)).squeeze(1) for a, b in ((0, 4), (4, 5), (5, 11))]
    assert torch.allclose(found, torch.cat(apart), atol=1e-6)
    joined = core(window)(*parts).squeeze(1)
    assert not torch.allclose(joined, found, atol=1e-3)
    assert list(attention.segments(packed)) == [(0, 4), (4, 5), (5, 5), (5, 11)]


def test_attention_refuses_what_it_does_not_do() -> None:
    with pytest.raises(UnsupportedError, match="no mask"):
        core()(*inputs(3), torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="only causal"):
        attention.ExactAttention(_Config(), attn_mask_type=AttnMaskType.padding)  # type: ignore[arg-type]
