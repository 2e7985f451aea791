"""One rank's model: what is built, what is loaded, and features that the Llama grids do not reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from tests.models import randomise
from tests.precision import relative_error
from tests.verification.stand_in import cut, llama_of

CPU = torch.device("cpu")
LAYER = LayerConfig(4, 2, 8, 48, Rope(1e4))
CONFIG = ModelConfig("llama", "LlamaForCausalLM", 32, 60, (LAYER, LAYER), False, 1e-5, 128)


def build(config: ModelConfig, grid: Parallelism) -> Any:
    from ckptkit.megatron.model import build_chunks

    (chunk,) = build_chunks(config, grid, 64, dtype=torch.float32, device=CPU)
    return chunk


def random_state(chunk: Any) -> dict[str, torch.Tensor]:
    from ckptkit.megatron.model import expected_tensors

    return {name: torch.randn_like(value) for name, value in expected_tensors(chunk).items()}


def test_tensors_are_named_as_megatron_saves_them(one_rank: Parallelism) -> None:
    config = replace(CONFIG, qkv_bias=True, mlp_bias=True, out_bias=True, qk_norm=True)
    layer = {
        "input_layernorm.weight": [32],
        "pre_mlp_layernorm.weight": [32],
        "self_attention.linear_qkv.weight": [64, 32],
        "self_attention.linear_qkv.bias": [64],
        "self_attention.linear_proj.weight": [32, 32],
        "self_attention.linear_proj.bias": [32],
        "self_attention.q_layernorm.weight": [8],
        "self_attention.k_layernorm.weight": [8],
        "mlp.linear_fc1.weight": [96, 32],
        "mlp.linear_fc1.bias": [96],
        "mlp.linear_fc2.weight": [32, 48],
        "mlp.linear_fc2.bias": [32],
    }
    whole = {f"decoder.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    whole |= {"embedding.word_embeddings.weight": [64, 32], "decoder.final_layernorm.weight": [32]}
    assert {k: list(v.shape) for k, v in random_state(build(replace(config, tied=True), one_rank)).items()} == whole
    whole |= {"output_layer.weight": [64, 32]}
    assert {k: list(v.shape) for k, v in random_state(build(config, one_rank)).items()} == whole


def test_biases_are_independent(one_rank: Parallelism) -> None:
    kinds = {"qkv_bias": "linear_qkv", "mlp_bias": "linear_fc1"}
    for flag, name in kinds.items():
        biases = [key for key in random_state(build(replace(CONFIG, **{flag: True}), one_rank)) if key.endswith("bias")]
        assert biases and all(name in key or (flag == "mlp_bias" and "linear_fc2" in key) for key in biases)
    with pytest.raises(UnsupportedError, match="output bias"):
        build(replace(CONFIG, out_bias=True), one_rank)


def test_post_norms_and_learned_activations_are_named_as_their_writers_save_them(one_rank: Parallelism) -> None:
    plain = random_state(build(replace(CONFIG, activation="gelu", gated=False), one_rank)).keys()
    changes = {"self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight"}
    state = random_state(build(replace(CONFIG, post_norms=True, activation="gelu", gated=False), one_rank))
    assert state.keys() - plain == {f"decoder.layers.{i}.{name}" for i in range(2) for name in changes}
    state = random_state(build(replace(CONFIG, activation="xielu", gated=False), one_rank))
    names = ("mlp.activation_func.alpha_p", "mlp.activation_func.alpha_n")
    assert state.keys() - plain == {f"decoder.layers.{i}.{name}" for i in range(2) for name in names}
    assert all(state[f"decoder.layers.1.{name}"].shape == (1,) for name in names)


def moe_config(**changes: Any) -> ModelConfig:
    experts = {"num_experts": 4, "experts_per_token": 2, "moe_ffn_hidden_size": 24}
    return replace(CONFIG, layers=(LAYER, replace(LAYER, moe=True)), **{**experts, **changes})


def test_experts_are_named_as_megatron_saves_them(one_rank: Parallelism) -> None:
    state = {name: list(value.shape) for name, value in random_state(build(moe_config(), one_rank)).items()}
    experts = {
        f"decoder.layers.1.mlp.experts.local_experts.{e}.{linear}.weight": shape
        for e in range(4)
        for linear, shape in (("linear_fc1", [48, 32]), ("linear_fc2", [32, 24]))
    }
    inside = {name: shape for name, shape in state.items() if name.startswith("decoder.layers.1.mlp.")}
    assert inside == {**experts, "decoder.layers.1.mlp.router.weight": [4, 32]}
    assert state["decoder.layers.0.mlp.linear_fc1.weight"] == [96, 32]
    with pytest.raises(UnsupportedError, match="norm after them"):
        build(moe_config(post_norms=True), one_rank)


def test_the_embedding_is_scaled_as_transformers_rounds_it(one_rank: Parallelism) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    from ckptkit.megatron.model import build_chunks

    config = replace(CONFIG, scaled_embedding=True)
    (chunk,) = build_chunks(config, one_rank, 64, dtype=torch.bfloat16, device=CPU)
    theirs = Gemma3TextScaledWordEmbedding(64, 32, 0, config.embedding_scale).to(torch.bfloat16)
    # Every number between 1 and 2: some of their products depend on whether the scale was rounded first.
    weight = (1 + torch.arange(64 * 32).remainder(128).view(64, 32) / 128).to(torch.bfloat16)
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        theirs.weight.copy_(weight)
        chunk.embedding.word_embeddings.weight.copy_(weight)
        found = chunk.embedding(tokens, tokens).transpose(0, 1)
        assert torch.equal(found, theirs(tokens))
        unrounded = (weight[:60].float() * config.embedding_scale).to(torch.bfloat16)
        assert not torch.equal(found[0], unrounded)


def test_logits_are_capped_in_the_loss_too(one_rank: Parallelism) -> None:
    from ckptkit.megatron.compat import runs_on
    from ckptkit.megatron.model import load_strict

    plain, capped = build(CONFIG, one_rank), build(replace(CONFIG, logit_softcap=2.0), one_rank)
    state = random_state(plain)
    tokens, positions = torch.tensor([[1, 2, 3, 4, 5]]), torch.arange(5)[None]
    for chunk in (plain, capped):
        load_strict(chunk, state)
    with torch.no_grad(), runs_on(CPU):
        expected = 2.0 * torch.tanh(plain(tokens, positions, None) / 2.0)
        found = capped(tokens, positions, None)
        loss = capped(tokens, positions, None, labels=tokens)
    assert torch.allclose(found, expected, atol=1e-4) and found.abs().max() > 1.9
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(expected[0], tokens[0], reduction="none"), atol=1e-4)


def test_every_layer_has_its_own_sizes(one_rank: Parallelism) -> None:
    other = LayerConfig(8, 1, 16, 24, Rope(5e5, "linear", 2.0), window=3)
    chunk = build(replace(CONFIG, layers=(LAYER, other), gated=False, activation="gelu"), one_rank)
    first, second = chunk.decoder.layers
    assert list(second.self_attention.linear_qkv.weight.shape) == [10 * 16, 32]
    assert list(second.self_attention.linear_proj.weight.shape) == [32, 128]
    assert list(second.mlp.linear_fc1.weight.shape) == [24, 32]
    assert (first.self_attention.core_attention.window, second.self_attention.core_attention.window) == (None, 3)
    assert second.self_attention.rotary.inv_freq.numel() == 8
    assert run(chunk, random_state(chunk), torch.tensor([[1, 2, 3, 4, 5]])).shape == (1, 5, 60)


def test_loading_is_strict(one_rank: Parallelism) -> None:
    from ckptkit.megatron.model import load_strict

    chunk = build(CONFIG, one_rank)
    state = random_state(chunk)
    load_strict(chunk, {**state, "decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(0)})
    load_strict(chunk, {name: value.double() for name, value in state.items()})
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    for damaged, text in (
        ({key: value for key, value in state.items() if key != name}, f"missing: {name}"),
        ({**state, "decoder.layers.2.mlp.linear_fc2.weight": state[name]}, r"unexpected: decoder\.layers\.2\."),
        ({**state, name: state[name].T}, rf"{name} is \[48, 32\], the model has \[32, 48\]"),
        ({}, "and 9 more"),
    ):
        with pytest.raises(InputError, match=f"here.*{text}"):
            load_strict(chunk, damaged, where="here")


def run(chunk: Any, state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    from ckptkit.megatron.model import load_strict
    from ckptkit.megatron.pipeline import Pipeline

    load_strict(chunk, state)
    logits = Pipeline([chunk], Parallelism(), CPU, 60, tokens_per_pass=8).forward(tokens)
    assert logits is not None
    return logits


def hf_model(name: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    values = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "attn_implementation": "eager",
        **changes,
    }
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**values))
    randomise(model)
    return model.eval()


def translate(model: Any, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The stand-in's single shard, and Qwen 3's norms."""
    tensors = model.state_dict()
    state = cut(tensors, config, split_layers(config.num_layers, Parallelism())[0], 0, 1, 64)
    for number in range(config.num_layers):
        for kind in "qk" if config.qk_norm else "":
            name = f"self_attention.{kind}_layernorm.weight"
            state[f"decoder.layers.{number}.{name}"] = tensors[f"model.layers.{number}.self_attn.{kind}_norm.weight"]
    return state


FEATURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "window": ("Mistral", {"sliding_window": 4}, {}),
    "qk norm": ("Qwen3", {}, {"qk_norm": True}),
    "q, k and v biases alone": ("Qwen2", {}, {"qkv_bias": True}),
    "gelu": ("Llama", {"hidden_act": "gelu"}, {}),
    "gelu_pytorch_tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}, {}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_against_transformers(one_rank: Parallelism, feature: str) -> None:
    name, changes, ours = FEATURES[feature]
    model = hf_model(name, **changes)
    raw = {"attention_bias": False, "mlp_bias": False, **model.config.to_dict()}
    config = replace(llama_of({**raw, "attention_bias": False}), **ours)
    window = changes.get("sliding_window")
    config = replace(config, layers=tuple(replace(layer, window=window) for layer in config.layers))
    tokens = torch.randint(0, 60, (3, 12))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    found = run(build(config, one_rank), translate(model, config), tokens)
    assert relative_error(found, expected) < 1e-5
    if window is not None:
        wider = replace(config, layers=tuple(replace(layer, window=window + 1) for layer in config.layers))
        wrong = run(build(wider, one_rank), translate(model, wider), tokens)
        assert relative_error(wrong[:, :4], expected[:, :4]) < 1e-5
        assert relative_error(wrong[:, 4:], expected[:, 4:]) > 1e-2


def test_packed_sequences_give_the_logits_of_each_alone(one_rank: Parallelism) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    from ckptkit.megatron.compat import runs_on

    chunk = build(CONFIG, one_rank)
    rows = [[5, 6, 7, 8], [9], [10, 11, 12]]
    state = random_state(chunk)
    alone = torch.cat([run(chunk, state, torch.tensor([row]))[0] for row in rows])
    bounds = torch.tensor([0, 4, 5, 8], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=4, max_seqlen_kv=4
    )
    tokens = torch.tensor([[token for row in rows for token in row]])
    with torch.no_grad(), runs_on(CPU):
        found = chunk(tokens, torch.arange(8)[None], None, packed_seq_params=packed)[0, :, :60]
        leaking = chunk(tokens, torch.arange(8)[None], None)[0, :, :60]
    assert relative_error(found, alone) < 1e-4
    assert relative_error(leaking, alone) > 1e-2


def test_the_current_device_is_given_back(tmp_path: Path) -> None:
    from ckptkit.megatron.compat import runs_on

    before = torch.cuda.current_device
    with pytest.raises(ZeroDivisionError), runs_on(CPU):
        assert torch.cuda.current_device() == CPU
        raise ZeroDivisionError
    assert torch.cuda.current_device is before
