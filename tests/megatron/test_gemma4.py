"""Gemma 4 on megatron-core's modules against transformers, and the errors that others made in it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import torch.nn.functional as F

from ckptkit import convert, verify
from ckptkit.errors import UsageError
from ckptkit.families.gemma4_config import parse_text
from ckptkit.megatron import compat
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import Stage
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.jobs import LogitsJob
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.tokens import default_rows
from tests.megatron.double_precision import double_precision
from tests.megatron.gemma4 import KINDS, hf_model, local_state
from tests.megatron.test_modules import assert_rounded_alike, exactly_normed
from tests.precision import MANY_ROWS, relative_error, settled
from tests.verification.conftest import DEVICE

compat.import_megatron()

from ckptkit.megatron import attention, moe, norms, rotary  # noqa: E402
from ckptkit.megatron.config import transformer_config  # noqa: E402
from ckptkit.megatron.gemma4 import attention as gemma4_attention  # noqa: E402
from ckptkit.megatron.gemma4 import layer as gemma4_layer  # noqa: E402
from ckptkit.megatron.gemma4 import moe as gemma4_moe  # noqa: E402
from ckptkit.megatron.gemma4 import per_layer_inputs as inputs  # noqa: E402
from ckptkit.megatron.gemma4.carried import Carried  # noqa: E402
from ckptkit.megatron.layers import block_spec  # noqa: E402
from ckptkit.megatron.model import CausalModel, build_chunks, load_strict  # noqa: E402
from ckptkit.megatron.pipeline import Pipeline  # noqa: E402

CPU = torch.device("cpu")
EXACT = 5e-5
"""Of the largest logit before the cap, in fp32."""
DOUBLE = 1e-9
"""The same in fp64, with the casts to fp32 of both libraries left out."""
PRECAP = {"final_logit_softcapping": None}


def tokens_of(rows: int = 2, length: int = 40) -> torch.Tensor:
    """Three windows long."""
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(7))


def config_of(model: Any) -> ModelConfig:
    return parse_text({**model.config.to_dict(), "architectures": ["Gemma4ForCausalLM"]})


def build(config: ModelConfig, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> CausalModel:
    (chunk,) = build_chunks(config, Parallelism(), 250, dtype=dtype, device=CPU)
    load_strict(chunk, state)
    return chunk


def run(chunk: CausalModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in the dtype of the model."""
    with torch.no_grad(), compat.runs_on(CPU):
        output: torch.Tensor = chunk(tokens, torch.arange(tokens.size(1)).expand(tokens.shape), None)
    return output


@functools.cache
def reference(kind: str, dtype: torch.dtype = torch.float32, capped: bool = True) -> tuple[Any, torch.Tensor]:
    """A model of transformers, and its logits."""
    model = hf_model(kind, dtype, **({} if capped else PRECAP))
    with torch.no_grad():
        return model, model(tokens_of(), use_cache=False).logits


def state_of(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Its weights under Megatron's names, copies that may be changed."""
    model, _ = reference(kind, dtype)
    return {name: value.clone() for name, value in local_state(model.state_dict(), config_of(model)).items()}


def largest(kind: str) -> float:
    """The largest logit before the cap."""
    return float(reference(kind, capped=False)[1].abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capped", [True, False], ids=["capped", "uncapped"])
def test_logits(one_rank: Parallelism, kind: str, capped: bool) -> None:
    model, expected = reference(kind, capped=capped)
    found = run(build(config_of(model), state_of(kind)), tokens_of())
    assert 20 < largest(kind) < 45
    assert (found - expected).abs().max() < EXACT * largest(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_double_precision(one_rank: Parallelism, kind: str) -> None:
    with double_precision():
        model, expected = reference(kind, torch.float64)
        found = run(build(config_of(model), state_of(kind, torch.float64), torch.float64), tokens_of())
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < DOUBLE * largest(kind)


# Errors ---------------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch
State = dict[str, torch.Tensor]
ATTENTION, LAYER = gemma4_attention.ValueNormAttention, gemma4_layer.Gemma4Layer


def layers(change: Callable[[LayerConfig], LayerConfig]) -> Callable[[ModelConfig], ModelConfig]:
    """A change of every layer of a config."""
    return lambda config: replace(config, layers=tuple(change(layer) for layer in config.layers))


def fields(**values: Any) -> Callable[[ModelConfig], ModelConfig]:
    """A change of the model's own fields."""
    return lambda config: replace(config, **values)


def _theta_swapped(layer: LayerConfig) -> LayerConfig:
    return replace(layer, rope=replace(layer.rope, theta=1e6 if layer.rope.theta == 1e4 else 1e4))


def _everything_rotates(layer: LayerConfig) -> LayerConfig:
    return replace(layer, rope=replace(layer.rope, partial=1.0))


def _donors_first(config: ModelConfig) -> ModelConfig:
    first = {layer.window: number for number, layer in reversed(list(enumerate(config.layers)))}
    return layers(lambda x: x if x.kv_donor is None else replace(x, kv_donor=first[x.window]))(config)


def swapped(*endings: tuple[str, str]) -> Callable[[State], None]:
    """A change of weights: exchange tensors of all layers."""

    def change(state: State) -> None:
        for first, second in endings:
            for name in [name for name in state if name.endswith(first)]:
                other = name.removesuffix(first) + second
                state[name], state[other] = state[other], state[name]

    return change


def _gate_and_up_swapped(state: State) -> None:
    for name, value in state.items():
        if "linear_fc1" in name:
            state[name] = torch.cat(value.chunk(2)[::-1])


def _interleaved(state: State) -> None:
    """Queries and keys as if neighbouring channels rotated together."""
    for name in [name for name in state if name.endswith(("linear_qkv.weight", "q_layernorm.weight"))]:
        if name.endswith("linear_qkv.weight"):
            width = state[name.replace("linear_qkv", "q_layernorm")].size(0)
            heads = state[name].unflatten(0, (-1, 2, width // 2))
            state[name] = heads.transpose(1, 2).reshape(state[name].shape)


def filled(ending: str, number: float) -> Callable[[State], None]:
    """A change of weights: a number in place of tensors of all layers."""

    def change(state: State) -> None:
        for name, value in state.items():
            if name.endswith(ending):
                value.fill_(number)

    return change


def _value_after_key_norm(patch: Patch) -> None:
    original = ATTENTION.get_query_key_value_tensors

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        query, key, value = original(self, *args, **options)
        return query, key, self._value_norm(key) if self.k_eq_v else value

    patch.setattr(ATTENTION, "get_query_key_value_tensors", wrong)


def _value_after_rotation(patch: Patch) -> None:
    original = attention.ExactAttention.forward

    def wrong(self: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        full = self.window is None
        return original(self, query, key, norms.normalised(key, 1e-6) if full else value, *args, **options)

    patch.setattr(attention.ExactAttention, "forward", wrong)


def _no_value_norm(patch: Patch) -> None:
    patch.setattr(ATTENTION, "_value_norm", lambda self, value: value)


def _one_plus_weight(patch: Patch) -> None:
    def wrong(self: Any, x: torch.Tensor) -> torch.Tensor:
        off: torch.Tensor = norms.normalised(x, self.eps) * (1.0 + self.weight)
        return off

    patch.setattr(norms.RMSNorm, "forward", wrong)


def _frequencies_of_the_rotating_part(patch: Patch) -> None:
    """Exponents over the channels that rotate, in place of the whole head."""

    def wrong(frequencies: torch.Tensor, rope: Any) -> torch.Tensor:
        rotating = int(rope.partial * len(frequencies))
        inverse = 1.0 / rope.theta ** (torch.arange(rotating).float() / rotating)
        return torch.cat((inverse, torch.zeros(len(frequencies) - rotating)))

    patch.setattr(rotary, "_proportional", wrong)


def _prefix_rotates(patch: Patch) -> None:
    """The classic partial rotation: pairs within the first channels, in place of pairs across the head's halves."""
    original = rotary.RotaryEmbedding.forward

    def wrong(self: Any, length: int) -> torch.Tensor:
        angles = original(self, length)
        rotating = int((self.inv_freq != 0).sum())
        return torch.cat((angles[..., :rotating],) * 2, dim=-1) if rotating < len(self.inv_freq) else angles

    patch.setattr(rotary.RotaryEmbedding, "forward", wrong)


def _scalar_on_the_branch_only(patch: Patch) -> None:
    original = LAYER.forward

    def wrong(self: Any, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        scalar = self.layer_scalar.clone()
        before = self.carried.split(hidden_states)[0].clone()
        self.layer_scalar.fill_(1.0)
        after, context = original(self, hidden_states, *args, **options)
        self.layer_scalar.copy_(scalar)
        return before + (after - before) * scalar, context

    patch.setattr(LAYER, "forward", wrong)


def _scalar_before_the_inputs(patch: Patch) -> None:
    original = LAYER._mix

    def wrong(self: Any, hidden: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        off: torch.Tensor = hidden + (original(self, hidden, own) - hidden) / self.layer_scalar
        return off

    patch.setattr(LAYER, "_mix", wrong)


def _router_input_not_normalised(patch: Patch) -> None:
    patch.setattr(gemma4_moe, "normalised", lambda x, eps: x)


def _router_behind_the_norm(patch: Patch) -> None:
    original = gemma4_moe.ParallelMoELayer.route

    def wrong(self: Any, hidden: torch.Tensor, *args: Any) -> Any:
        return original(self, self._norm_before_experts(hidden), *args)

    patch.setattr(gemma4_moe.ParallelMoELayer, "route", wrong)


def _expert_scale(then: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Patch], None]:
    """Another use of the experts' scales: (weights of the chosen experts, scales) -> weights."""

    def inject(patch: Patch) -> None:
        def wrong(self: Any, logits: torch.Tensor, *args: Any, **options: Any) -> Any:
            weights, chosen = moe.Router.routing(self, logits, *args, **options)
            return then(weights, self.per_expert_scale), chosen

        patch.setattr(gemma4_moe.ScaledRouter, "routing", wrong)

    return inject


def _expert_scale_before_the_choice(patch: Patch) -> None:
    def wrong(self: Any, logits: torch.Tensor, *args: Any, **options: Any) -> Any:
        return moe.Router.routing(self, logits + self.per_expert_scale.log(), *args, **options)

    patch.setattr(gemma4_moe.ScaledRouter, "routing", wrong)


def _without_the_router_root(patch: Patch) -> None:
    original = moe.Router.gating
    patch.setattr(moe.Router, "gating", lambda self, x: original(self, x * self.config.hidden_size**0.5))


def _experts_behind_the_dense_norm(patch: Patch) -> None:
    def wrong(self: Any, dense: Any, experts: Any) -> None:
        self._norm_before_dense, self._norm_before_experts = dense, dense

    patch.setattr(gemma4_moe.ParallelMoELayer, "norms_before", wrong)


def _inputs(name: str, factor: Callable[[ModelConfig], float]) -> Callable[[Patch], None]:
    """A factor too many on a part of the per-layer inputs."""

    def inject(patch: Patch) -> None:
        target = CausalModel.forward.__globals__ if name == "per_layer_inputs" else vars(inputs)
        original = target[name]
        patch.setitem(target, name, lambda owner, model, x, *more: original(owner, model, x, *more) * factor(model))

    return inject


def _projection_not_scaled(patch: Patch) -> None:
    """Nearly the same, since a norm follows: only its epsilon tells."""
    original = norms.RMSNorm.forward

    def wrong(self: Any, x: torch.Tensor) -> torch.Tensor:
        return original(self, x * 96**0.5 if self.weight.size(0) == 12 else x)

    patch.setattr(norms.RMSNorm, "forward", wrong)


def _embedding_scale_of_bfloat16(patch: Patch) -> None:
    model = CausalModel.__init__.__globals__
    patch.setitem(model, "_rounded", lambda value, dtype: float(torch.tensor(value, dtype=torch.bfloat16)))


ERRORS: dict[str, tuple[str, Any]] = {
    # what -> kind, and what is changed: the runtime, the config that it is built from, or the weights
    "v after k_norm": ("31B", _value_after_key_norm),
    "v after k_norm and rotation": ("31B", _value_after_rotation),
    "no v_norm": ("31B", _no_value_norm),
    "no v_norm, small": ("E4B", _no_value_norm),
    "v from its dead slot": ("31B", layers(lambda layer: replace(layer, k_eq_v=False))),
    "norms 1 + w": ("31B", _one_plus_weight),
    "rope denominator 2n": ("31B", _frequencies_of_the_rotating_part),
    "classic prefix rope": ("31B", _prefix_rotates),
    "full rotation": ("31B", layers(_everything_rotates)),
    "theta swapped": ("31B", layers(_theta_swapped)),
    "q and k interleaved": ("31B", _interleaved),
    "window + 1": ("31B", layers(lambda x: replace(x, window=x.window and x.window + 1))),
    "window - 1": ("E2B", layers(lambda x: replace(x, window=x.window and x.window - 1))),
    "scale 1/sqrt(hd)": ("31B", fields(softmax_scale=None)),
    "no layer_scalar": ("31B", filled("layer_scalar", 1.0)),
    "layer_scalar on the branch only": ("31B", _scalar_on_the_branch_only),
    "layer_scalar before the inputs": ("E2B", _scalar_before_the_inputs),
    "no softcap": ("31B", fields(logit_softcap=None)),
    "erf gelu": ("31B", fields(activation="gelu")),
    "embedding scale rounded to bf16": ("31B", _embedding_scale_of_bfloat16),
    "no embedding scale": ("31B", fields(scaled_embedding=False)),
    "gate and up swapped": ("26B", _gate_and_up_swapped),
    "router input not normalised": ("26B", _router_input_not_normalised),
    "router behind the experts' norm": ("26B", _router_behind_the_norm),
    "no router scale": ("26B", filled("router.scale", 1.0)),
    "no router root": ("26B", _without_the_router_root),
    "expert scale before renormalising": (
        "26B",
        _expert_scale(lambda w, s: w * s / (w * s).sum(-1, keepdim=True)),
    ),
    "expert scale dropped": ("26B", _expert_scale(lambda w, s: w)),
    "expert scale before the choice": ("26B", _expert_scale_before_the_choice),
    "not renormalised": ("26B", fields(norm_topk_prob=False)),
    "experts fed the dense norm": ("26B", _experts_behind_the_dense_norm),
    "post_1 and post_2 swapped": (
        "26B",
        swapped(("mlp.post_shared_expert_layernorm.weight", "mlp.post_moe_layernorm.weight")),
    ),
    "pre and pre_2 swapped": ("26B", swapped(("pre_shared_expert_layernorm.weight", "pre_mlp_layernorm.weight"))),
    "inputs without 2^-1/2": ("E2B", _inputs("per_layer_inputs", lambda model: 2.0**0.5)),
    "token half not scaled": ("E2B", _inputs("_looked_up", lambda model: model.per_layer_input_size**-0.5)),
    "projected half twice": ("E2B", _inputs("_projected", lambda model: 2.0)),
    "k and v of the first layer": ("E2B", _donors_first),
    "k and v of its own": ("E2B", layers(lambda layer: replace(layer, kv_donor=None))),
}
ONLY_IN_DOUBLE = {"projection of the inputs not scaled": ("E2B", _projection_not_scaled)}


def error_of(patch: Patch, kind: str, inject: Any, dtype: torch.dtype) -> float:
    """How far logits are off with an error injected, in parts of the largest logit before the cap."""
    model, expected = reference(kind, dtype)
    config, state = config_of(model), state_of(kind, dtype)
    names = inject.__code__.co_varnames[:1]
    if names == ("patch",):
        inject(patch)
    elif names == ("state",):
        inject(state)
    else:
        config = inject(config)
    found = run(build(config, state, dtype), tokens_of())
    return float((found - expected).abs().max()) / largest(kind)


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_caught(one_rank: Parallelism, monkeypatch: Patch, what: str) -> None:
    assert error_of(monkeypatch, *ERRORS[what], torch.float32) > 4 * EXACT


@pytest.mark.parametrize("what", ONLY_IN_DOUBLE)
def test_errors_that_only_double_precision_shows(one_rank: Parallelism, monkeypatch: Patch, what: str) -> None:
    with double_precision():
        assert error_of(monkeypatch, *ONLY_IN_DOUBLE[what], torch.float64) > 10 * DOUBLE


# What training and serving add ----------------------------------------------------------------------------------------


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(chunk: CausalModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all parameters, zero where nothing reads them."""
    chunk.train()
    with compat.runs_on(CPU):
        loss_of(chunk(tokens, torch.arange(tokens.size(1)).expand(tokens.shape), None), tokens).backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in chunk.named_parameters()
    }


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(one_rank: Parallelism, kind: str, recompute: bool) -> None:
    model, _ = reference(kind)
    tokens = tokens_of()
    model.zero_grad()
    loss_of(model(tokens, use_cache=False).logits, tokens).backward()
    theirs = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    config = config_of(model)
    expected = local_state(theirs, config, dead=0.0)
    (chunk,) = build_chunks(config, Parallelism(), 250, dtype=torch.float32, device=CPU, recompute=recompute)
    load_strict(chunk, state_of(kind))
    runs: list[int] = []
    chunk.decoder.layers[0].register_forward_pre_hook(lambda module, args: runs.append(1))
    found = gradients(chunk, tokens)
    assert len(runs) == (2 if recompute else 1)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).abs().max() <= 2e-3 * expected[name].abs().max(), name
    if recompute:
        kept = gradients(build(config, state_of(kind)), tokens)
        assert all(relative_error(value, kept[name]) < EXACT for name, value in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_give_the_logits_of_each_alone(one_rank: Parallelism, kind: str) -> None:
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    config = config_of(reference(kind)[0])
    chunk = build(config, state_of(kind))
    rows = [tokens_of(1, length)[0].tolist() for length in (30, 1, 17)]
    pipeline = Pipeline([chunk], Parallelism(), CPU, 250)
    found = pipeline.forward_packed(PackedBatch.of_rows(rows))
    assert found is not None
    expected = torch.cat([run(chunk, torch.tensor([row]))[0] for row in rows])
    assert (found - expected).abs().max() < EXACT * largest(kind)
    leaking = run(chunk, torch.tensor([[token for row in rows for token in row]]))[0]
    assert (leaking - expected).abs().max() > 0.01 * largest(kind)


def test_the_embeddings_are_bitwise_those_of_transformers(one_rank: Parallelism) -> None:
    model = hf_model("E2B", torch.bfloat16)
    config, text = config_of(model), model.model
    chunk = build(config, local_state(model.state_dict(), config), torch.bfloat16)
    tokens = tokens_of()
    with torch.no_grad(), compat.runs_on(CPU):
        embedded = chunk.embedding(tokens, None)
        expected = text.embed_tokens(tokens)
        # A product of two numbers is rounded once, by every processor alike.
        assert torch.equal(embedded.transpose(0, 1), expected)
        unrounded = (text.embed_tokens.weight[tokens].float() * 96**0.5).to(torch.bfloat16)
        assert (expected != unrounded).float().mean() > 0.05  # the scale is rounded first
        looked_up = text.get_per_layer_inputs(tokens, None)
        assert torch.equal(inputs._looked_up(chunk, config, tokens).transpose(0, 1), looked_up.flatten(2))
        beside = inputs.per_layer_inputs(chunk, config, tokens, embedded).transpose(0, 1)
        own = text.project_per_layer_inputs(expected, looked_up).flatten(2)
    # A product of matrices may be summed up in another order where the tokens are.
    assert torch.allclose(beside.float(), own.float(), rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

    class Config:
        params_dtype, norms_scale_in_fp32 = dtype, True

    torch.manual_seed(0)
    ours, theirs = norms.RMSNorm(Config, 48, eps=1e-4), Gemma4RMSNorm(48, eps=1e-4).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
    x = torch.randn(3, 5, 48, dtype=dtype)
    normed, weight = exactly_normed(x, 1e-4), theirs.weight.double()
    assert_rounded_alike(ours(x), theirs(x), last=weight * normed, other_order=weight * normed.to(dtype).double())
    bare, other = norms.normalised(x, 1e-4).to(dtype), Gemma4RMSNorm(48, 1e-4, with_scale=False)(x)
    assert_rounded_alike(bare, other, last=normed)
    if dtype == torch.bfloat16:
        ours.scales_in_fp32 = False
        mask = settled(weight * normed, dtype) & settled(normed, dtype)
        assert not torch.equal(ours(x)[mask], theirs(x)[mask])


@pytest.mark.parametrize(("partial", "head_dim", "factor"), [(0.25, 16, 1.0), (0.3, 20, 2.0), (1.0, 8, 1.0)])
def test_proportional_frequencies_are_those_of_transformers(partial: float, head_dim: int, factor: float) -> None:
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    from ckptkit.tables.model_config import Rope

    full = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": partial, "factor": factor}
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    sizes: dict[str, Any] = {"num_hidden_layers": 6, "head_dim": 8, "global_head_dim": head_dim}
    embedding = Gemma4TextRotaryEmbedding(Gemma4TextConfig(**sizes, rope_parameters=ropes))
    expected = embedding.get_buffer("full_attention_inv_freq")
    found = rotary.inverse_frequencies(Rope(1e6, "proportional", factor, partial=partial), head_dim)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert (found == 0).any() == (partial < 1)


def test_the_names_of_both_layouts(one_rank: Parallelism) -> None:
    """As Megatron-Bridge has them; loading in the other tests is strict, so here is only what they cannot show."""
    from ckptkit.megatron.model import expected_tensors

    for kind, own in (("31B", "post_mlp_layernorm.weight"), ("26B", "post_ffn_layernorm.weight")):
        state = expected_tensors(build(config_of(reference(kind)[0]), state_of(kind)))
        assert f"decoder.layers.3.{own}" in state
        assert state["decoder.layers.3.layer_scalar"].shape == (1,)
        assert not isinstance(state["decoder.layers.3.layer_scalar"], torch.nn.Parameter)


# Replayed routing -----------------------------------------------------------------------------------------------------


def routing_of_transformers(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits, and layer -> chosen experts [batch, sequence, experts per token]."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    found: dict[int, torch.Tensor] = {}
    routers = [module for module in model.modules() if isinstance(module, Gemma4TextRouter)]
    handles = [
        router.register_forward_hook(
            lambda module, args, output, at=at: found.update({at: output[2].view(*tokens.shape, -1)})
        )
        for at, router in enumerate(routers)
    ]
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, found


def test_routing_is_recorded_and_replayed(one_rank: Parallelism) -> None:
    model, _ = reference("26B")
    tokens = tokens_of(3, 16)
    expected, theirs = routing_of_transformers(model, tokens)
    chunk = build(config_of(model), state_of("26B"))
    pipeline = Pipeline([chunk], Parallelism(), CPU, 250, tokens_per_pass=32)  # two rows, then one
    with moe.record_routing([chunk], length=16) as routing:
        logits = pipeline.forward(tokens)
    assert logits is not None and (logits - expected).abs().max() < EXACT * largest("26B")
    assert routing.experts.keys() == routing.logits.keys() == theirs.keys() == set(range(4))
    assert all(torch.equal(routing.experts[layer], chosen) for layer, chosen in theirs.items())
    assert routing.logits[2].shape == (3, 16, 8) and routing.logits[2].dtype == torch.float32
    assert torch.equal(routing.logits[2].topk(2, dim=-1).indices, routing.experts[2])

    other = {layer: (chosen + 1) % 8 for layer, chosen in theirs.items()}
    with moe.record_routing([chunk]) as rerouted:
        elsewhere = pipeline.forward(tokens, replay=other)
    assert elsewhere is not None and (elsewhere - expected).abs().max() > 0.05 * largest("26B")
    assert all(torch.equal(rerouted.experts[layer], chosen) for layer, chosen in other.items())
    back = pipeline.forward(tokens, replay=theirs)
    assert back is not None and relative_error(back, logits) < EXACT
    free = {layer: torch.full_like(chosen, -1) for layer, chosen in theirs.items()}
    for experts in (free, {at: x[:, :9] for at, x in theirs.items()}, theirs):
        assert relative_error(run_replayed(chunk, tokens, experts), logits) < EXACT


def run_replayed(chunk: CausalModel, tokens: torch.Tensor, experts: dict[int, torch.Tensor]) -> torch.Tensor:
    with moe.replay_routing([chunk], experts):
        return run(chunk, tokens)


def test_replayed_routing_is_what_transformers_would_compute(one_rank: Parallelism) -> None:
    """Another choice, forced on both libraries."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    model, _ = reference("26B")
    tokens = tokens_of()
    _, theirs = routing_of_transformers(model, tokens)
    forced = {layer: (chosen + 3) % 8 for layer, chosen in theirs.items()}

    def reroute(at: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            probabilities, _, _ = output
            chosen = forced[at].flatten(0, 1)
            weights = probabilities.gather(1, chosen)
            weights = weights / weights.sum(-1, keepdim=True) * module.per_expert_scale[chosen]
            return probabilities, weights, chosen

        return hook

    routers = [module for module in model.modules() if isinstance(module, Gemma4TextRouter)]
    handles = [router.register_forward_hook(reroute(at)) for at, router in enumerate(routers)]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    found = run_replayed(build(config_of(model), state_of("26B")), tokens, forced)
    assert (found - expected).abs().max() < EXACT * largest("26B")


def test_replay_that_does_not_fit_is_refused(one_rank: Parallelism) -> None:
    model, _ = reference("26B")
    tokens = tokens_of()
    _, theirs = routing_of_transformers(model, tokens)
    chunk = build(config_of(model), state_of("26B"))
    wrong = {
        "no experts to replay for layer 3": {at: x for at, x in theirs.items() if at != 3},
        "for 2 rows of 40 tokens": {at: x[:1] for at, x in theirs.items()},
        "with 2 experts each": {at: x[..., :1] for at, x in theirs.items()},
        "name expert 8 of 8": {at: x.clamp(min=8) for at, x in theirs.items()},
    }
    for text, experts in wrong.items():
        with pytest.raises(UsageError, match=text):
            run_replayed(chunk, tokens, experts)
    assert relative_error(run_replayed(chunk, tokens, theirs), run(chunk, tokens)) < EXACT


# Stages ---------------------------------------------------------------------------------------------------------------


def stage_model(config: ModelConfig, state: State, start: int, end: int) -> CausalModel:
    """The layers from `start` to `end` as a stage of their own, in this process."""
    first, last = start == 0, end == config.num_layers
    with compat.runs_on(CPU):
        chunk = CausalModel(
            model=config,
            stage=Stage(0, 0, range(start, end), first, last),
            config=transformer_config(config, Parallelism(), dtype=torch.float32, device=CPU),
            transformer_layer_spec=block_spec(config, range(start, end)),
            vocab_size=250,
            max_sequence_length=config.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=first and last,
            position_embedding_type="none",
        )
    load_strict(chunk, {name: state[whole] for name, whole in names_in_stage(config, start, end).items()})
    return chunk


def names_in_stage(config: ModelConfig, start: int, end: int) -> dict[str, str]:
    """Names in a stage -> names in the whole model."""
    names = {}
    for name in state_names(config):
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        if layer is not None and start <= layer < end:
            names[name.replace(f"layers.{layer}.", f"layers.{layer - start}.", 1)] = name
    if start == 0:
        names |= {name: name for name in state_names(config) if name.startswith(("embedding.", "per_layer_"))}
    if end == config.num_layers:
        names |= {"decoder.final_layernorm.weight": "decoder.final_layernorm.weight"}
        names |= {"output_layer.weight": "embedding.word_embeddings.weight"}
    return names


@functools.cache
def state_names(config: ModelConfig) -> tuple[str, ...]:
    kind = next(kind for kind in KINDS if config_of(reference(kind)[0]) == config)
    return tuple(state_of(kind))


@pytest.mark.parametrize("cuts", [(3,), (4,), (5, 6), (2, 4, 7)], ids=str)
@pytest.mark.parametrize("kind", ["E2B", "E4B"])
def test_what_stages_send_carries_inputs_keys_and_values_and_their_gradients(
    one_rank: Parallelism, kind: str, cuts: tuple[int, ...]
) -> None:
    """Cuts between donors and those that attend to their keys included."""
    config, state, tokens = config_of(reference(kind)[0]), state_of(kind), tokens_of()
    whole = gradients(build(config, state), tokens)
    bounds = [0, *cuts, config.num_layers]
    stages = [stage_model(config, state, a, b) for a, b in itertools.pairwise(bounds)]
    value: torch.Tensor | None = None
    with compat.runs_on(CPU):
        for stage in stages:
            if value is not None:
                assert value.size(-1) == stage.input_width > config.hidden_size
                stage.set_input_tensor(value)
            value = stage.train()(tokens, torch.arange(40).expand(2, 40), None)
        assert value is not None
        loss_of(value, tokens).backward()
    assert (value - reference(kind)[1]).abs().max() < EXACT * largest(kind)
    found: State = {}
    for stage, (start, end) in zip(stages, itertools.pairwise(bounds), strict=True):
        for name, parameter in stage.named_parameters():
            key = names_in_stage(config, start, end)[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[key] = found[key] + gradient if key in found else gradient  # a tied head is there twice
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        assert relative_error(found[name], gradient) < EXACT, name


def test_only_what_is_needed_is_sent() -> None:
    carried = Carried(config_of(reference("E2B")[0]), tp=1, parts=1)
    assert [carried.entering(at) for at in (7, 8)] == [[("input", 7), ("kv", 2)], []]
    assert carried.entering(4)[-2:] == [("kv", 2), ("kv", 3)]
    assert carried.before(5, 3)[-2:] == [("kv", 2), ("kv", 3)]
    assert carried.width(carried.entering(4)) == 4 * 12 + 2 * 16 + 2 * 8
    split = Carried(carried.config, tp=2, parts=2)
    assert split.width([("kv", 2)]) == 2 * 2 * 16  # one head is on both ranks, for the whole sequence
    assert Carried(config_of(reference("31B")[0]), tp=1, parts=1).entering(2) == []


# Ranks ----------------------------------------------------------------------------------------------------------------

GRIDS = [Parallelism(2), Parallelism(1, 2), Parallelism(2, 2), Parallelism(1, 2, 2), Parallelism(4)]
EXPERT_GRIDS = [
    Parallelism(ep=2),
    Parallelism(2, 2, ep=2, etp=1),
    Parallelism(2, ep=2),
    Parallelism(1, 2, ep=2),
    Parallelism(4, ep=4, etp=1),
]
QUICK = [("26B", Parallelism(2, 2, ep=2, etp=1)), ("E2B", Parallelism(1, 2, 2))]


def cases() -> list[Any]:
    every = [*itertools.product(KINDS, GRIDS), *itertools.product(["26B"], EXPERT_GRIDS)]
    return [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in QUICK)]


class Saved(Protocol):
    def __call__(self, kind: str, dtype: torch.dtype = torch.float32, *, capped: bool = True) -> Path: ...


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Directory of a model of a kind, saved once."""
    folder = tmp_path_factory.mktemp("hf")

    def get(kind: str, dtype: torch.dtype = torch.float32, *, capped: bool = True) -> Path:
        path = folder / f"{kind}-{dtype}-{capped}"
        if not path.exists():
            reference(kind, dtype, capped)[0].save_pretrained(path)
        return path

    return get


def verified(source: Path, candidate: Path, grid: Parallelism, pool: RankPool, **options: Any) -> Any:
    convert(source, candidate, to="torch", spec="local", grid=grid)
    report = verify(source, candidate, pool=pool, device=DEVICE, **options)
    assert [level.passed for level in report.levels] == [True] * 3, report.levels[-1].summary
    return report.levels[-1]


@pytest.mark.parametrize(("kind", "grid"), cases(), ids=str)
def test_logits_before_the_cap_on_ranks(
    saved: Saved, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism
) -> None:
    level = verified(
        saved(kind, capped=False), tmp_path / "meg", grid, pool, tolerance=EXACT, tokens=tokens_of().tolist()
    )
    assert level.details["agreement"]["max_abs_logit"] >= 0.99 * largest(kind)


@pytest.fixture(scope="module")
def wide_pool() -> Iterator[RankPool]:
    """Ranks of their own: they compute in double precision, and do not stop to."""
    with RankPool(4, start_timeout=600.0) as ranks:
        yield ranks


@pytest.mark.slow  # ranks of their own; `verify --dtype float64` has fast tests
@pytest.mark.parametrize(("kind", "grid"), cases(), ids=str)
def test_logits_in_double_precision_on_ranks(
    saved: Saved, tmp_path: Path, wide_pool: RankPool, kind: str, grid: Parallelism
) -> None:
    from safetensors.torch import load_file

    with double_precision():
        source, (_, expected) = saved(kind, torch.float64), reference(kind, torch.float64)
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=grid)
    rows, output = tokens_of().tolist(), str(tmp_path / "logits.safetensors")
    opener = "tests.megatron.double_precision:opened"
    wide_pool.run(LogitsJob(str(tmp_path / "meg"), RunConfig(grid, dtype="float64"), rows, output, opener=opener))
    (found,) = load_file(output).values()
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < DOUBLE * largest(kind)


@pytest.mark.parametrize(("kind", "grid"), cases(), ids=str)
def test_logits_on_ranks(saved: Saved, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism) -> None:
    """Keys and values that cross stages included; sequences are longer than two windows."""
    level = verified(saved(kind), tmp_path / "meg", grid, pool, tolerance=EXACT)
    assert "ckptkit.megatron.gemma4.layer.Gemma4Layer" in level.details["own_modules"]
    assert all(len(row) > 2 * 12 for row in default_rows(250))


@pytest.mark.slow
def test_logits_on_eight_ranks(saved: Saved, tmp_path: Path) -> None:
    with RankPool(8, start_timeout=600.0) as ranks:
        verified(saved("26B"), tmp_path / "meg", Parallelism(2, 2, ep=2), ranks, tolerance=EXACT)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("26B", Parallelism(2, ep=2, etp=1)),
        ("E2B", Parallelism(2, 2)),
        pytest.param("31B", Parallelism(2), marks=pytest.mark.slow),
        pytest.param("E4B", Parallelism(4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sequence_parallelism(saved: Saved, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism) -> None:
    from safetensors.torch import load_file

    convert(saved(kind), tmp_path / "meg", to="torch", spec="local", grid=grid)
    output = tmp_path / "logits.safetensors"
    tokens = tokens_of(2, 41)  # an odd length, which needs padding
    run = RunConfig(grid, sequence_parallel=True, device=DEVICE)
    pool.run(LogitsJob(str(tmp_path / "meg"), run, tokens.tolist(), str(output)))
    (found,) = load_file(output).values()
    with torch.no_grad():
        expected = reference(kind)[0](tokens, use_cache=False).logits
    assert (found.view_as(expected) - expected).abs().max() < EXACT * largest(kind)


FAULTS = {
    "31B": {"layer_scalar": "output", "post_self_attn_layernorm.weight": "self_attention"},
    "26B": {
        "mlp.router.scale": "router",
        "mlp.router.per_expert_scale": "mlp",
        "mlp.post_moe_layernorm.weight": "mlp",
        "pre_shared_expert_layernorm.weight": "mlp",
    },
    "E2B": {"per_layer_input_gate.weight": "output", "self_attention.k_layernorm.weight": "self_attention"},
}
"""Tensors of layer 1 -> the part of the layer where a change of them shows first."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if name.endswith("per_expert_scale") else pytest.mark.slow)
        for kind, names in FAULTS.items()
        for name in names
    ],
)
def test_faults_are_located(saved: Saved, tmp_path: Path, pool: RankPool, kind: str, name: str) -> None:
    convert(saved(kind), tmp_path / "meg", to="torch", spec="local")
    (shard,) = tmp_path.glob("meg/release/*/model_optim_rng.pt")
    content = torch.load(shard, weights_only=False)
    whole = f"decoder.layers.1.{name}"
    content["model"][whole] *= 1 + torch.rand(content["model"][whole].shape)
    torch.save(content, shard)
    sides = Side(saved(kind), "hf"), Side(tmp_path / "meg", "megatron")
    report = verify_logits(*sides, tolerance=EXACT, greedy=0, pool=pool, device=DEVICE)
    assert not report.passed and report.location is not None
    assert report.location.place == f"layer 1 {FAULTS[kind][name]}"
    assert whole in str(report.location)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(saved: Saved, tmp_path: Path, pool: RankPool, kind: str) -> None:
    verified(saved(kind), tmp_path / "meg", Parallelism(2), pool, dtype="bfloat16", tokens=MANY_ROWS)
