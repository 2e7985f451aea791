"""The model that a checkpoint brings along, judged by the two Llamas that it was built of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptkit.checkpoints.opening import open_checkpoint
from tests.precision import relative_error
from tests.surgery.pairs import FIRST as FIRST_SIZES
from tests.surgery.pairs import KINDS, NARROW, NUM_FIRST, NUM_LAST, WIDE, build_split, load_remote, save_half
from tests.surgery.pairs import LAST as LAST_SIZES

TOKENS = torch.randint(1, 250, (2, 17), generator=torch.Generator().manual_seed(0))


def halves(pair: tuple[Path, Path]) -> tuple[Any, Any]:
    """The two Llamas of a pair, cut to the layers that a split Llama takes."""
    from transformers import LlamaForCausalLM

    first, last = (LlamaForCausalLM.from_pretrained(path).eval() for path in pair)
    first.model.layers = first.model.layers[:NUM_FIRST]
    last.model.layers = last.model.layers[-NUM_LAST:]
    first.config.use_cache = last.config.use_cache = False  # the cache has a place for each layer of the whole model
    first.model.norm = torch.nn.Identity()
    return first, last


def adapted(path: Path, kind: str, hidden: torch.Tensor) -> torch.Tensor:
    """What the stored adapter makes of narrow states."""
    stored = load_file(path / "model.safetensors")
    if kind == "linear":
        return hidden @ stored["model.adapter.weight"].T
    inside = hidden @ stored["model.adapter_linear_1.weight"].T
    return (inside.relu() if kind == "mlp" else inside) @ stored["model.adapter_linear_2.weight"].T


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return relative_error(left, right) < tolerance


@pytest.fixture(scope="module")
def models(wide_splits: dict[str, Path]) -> dict[str, Any]:
    return {kind: load_remote(path) for kind, path in wide_splits.items()}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_the_composed_halves(
    wide_pair: tuple[Path, Path], wide_splits: dict[str, Path], models: dict[str, Any], kind: str
) -> None:
    first, last = halves(wide_pair)
    narrow = first.model(TOKENS).last_hidden_state
    expected = last(inputs_embeds=adapted(wide_splits[kind], kind, narrow)).logits
    assert close(models[kind](TOKENS).logits, expected)


@torch.no_grad()
def test_kinds_differ(models: dict[str, Any]) -> None:
    """The ReLU is there, and only where it belongs."""
    assert not close(models["mlp"](TOKENS).logits, models["two-linear"](TOKENS).logits, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_generation_is_uncached_generation(models: dict[str, Any], kind: str) -> None:
    model = models[kind]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    cached = model.generate(TOKENS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))
    assert cached.shape[1] == TOKENS.shape[1] + 12


@torch.no_grad()
def test_the_cache_is_dense(models: dict[str, Any]) -> None:
    """A slot for every layer and none besides: published code counts the wide layers as the whole wide model does."""
    output = models["mlp"](TOKENS, use_cache=True)
    lengths = [output.past_key_values.get_seq_length(layer) for layer in range(NUM_FIRST + NUM_LAST)]
    assert lengths == [TOKENS.shape[1]] * (NUM_FIRST + NUM_LAST)
    assert len(output.past_key_values) == NUM_FIRST + NUM_LAST
    step = models["mlp"](TOKENS[:, :1], past_key_values=output.past_key_values).logits
    assert close(step, models["mlp"](torch.cat((TOKENS, TOKENS[:, :1]), 1)).logits[:, -1:])


@torch.no_grad()
def test_static_cache(models: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    static = models["linear"].generate(TOKENS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, models["linear"].generate(TOKENS, use_cache=False, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_changes_nothing(wide_splits: dict[str, Path], attention: str) -> None:
    model = load_remote(wide_splits["mlp"], attn_implementation=attention)
    assert model.config.first_config._attn_implementation == model.config.last_config._attn_implementation == attention
    short = TOKENS[:1, :9]
    padded = torch.cat((torch.zeros(1, 8, dtype=torch.long), short), 1)
    mask = (torch.arange(17) >= 8).long()[None]
    positions = (torch.arange(17) - 8).clamp(min=0)[None]
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 8:]
    assert close(found, model(short).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(wide_splits: dict[str, Path], attention: str) -> None:
    model = load_remote(wide_splits["linear"], attn_implementation=attention)
    packed = TOKENS.reshape(1, -1)
    positions = torch.arange(17).repeat(2)[None]
    found = model(packed, position_ids=positions, use_cache=False).logits.reshape(2, 17, -1)
    assert close(found, model(TOKENS).logits)
    assert not close(model(packed, use_cache=False).logits.reshape(2, 17, -1), model(TOKENS).logits, 1e-3)


@torch.no_grad()
def test_attention_implementations_agree(wide_splits: dict[str, Path], models: dict[str, Any]) -> None:
    eager = load_remote(wide_splits["two-linear"], attn_implementation="eager")
    assert close(eager(TOKENS).logits, models["two-linear"](TOKENS).logits)
    eager.set_attn_implementation("sdpa")
    assert close(eager(TOKENS).logits, models["two-linear"](TOKENS).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(wide_splits: dict[str, Path], reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_remote(wide_splits["mlp"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.enable_input_require_grads()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(close(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


@torch.no_grad()
def test_hidden_states_and_embeddings(models: dict[str, Any]) -> None:
    model = models["linear"]
    states = model(TOKENS, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [NARROW] * (NUM_FIRST + 1) + [WIDE] * NUM_LAST
    assert model.get_input_embeddings().weight.shape[1] == NARROW
    assert model.get_output_embeddings().weight.shape[1] == WIDE
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_save_pretrained_round_trip(tmp_path: Path, wide_splits: dict[str, Path], models: dict[str, Any]) -> None:
    """What transformers writes loads there again, and is the same model to ckptkit."""
    for kind, model in models.items():
        saved = tmp_path / kind
        model.save_pretrained(saved)
        assert {"configuration_custom_split_llama.py", "modeling_custom_split_llama.py"} <= {
            file.name for file in saved.iterdir()
        }
        ours, theirs = open_checkpoint(wide_splits[kind]), open_checkpoint(saved)
        assert theirs.config == ours.config
        again = load_remote(saved)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        assert again.config.split_recipe == json.loads((wide_splits[kind] / "config.json").read_text())["split_recipe"]


def test_it_loads_alone(tmp_path: Path) -> None:
    """Published checkpoints need the directories of both models to be there."""
    folder = tmp_path / "models"
    folder.mkdir()
    pair = (save_half(folder / "first", FIRST_SIZES, 1), save_half(folder / "last", LAST_SIZES, 2))
    out = build_split(tmp_path / "split", pair)
    shutil.rmtree(folder)
    model = load_remote(out)
    assert model(TOKENS).logits.shape == (2, 17, 250)
    assert open_checkpoint(out).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_stock_transformers_refuses(wide_splits: dict[str, Path]) -> None:
    """Under the model type of the published files it would load a Llama with random layers."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(wide_splits["linear"], trust_remote_code=False)


def test_each_half_has_its_own_epsilon_and_rope(tmp_path: Path) -> None:
    """The final norm is the wide model's; published code takes the narrow model's epsilon for it."""
    rope = {"rope_type": "default", "rope_theta": 1234.0}
    pair = (
        save_half(tmp_path / "first", FIRST_SIZES, 1, dtype="float32", rms_norm_eps=1e-2, rope_parameters=rope),
        save_half(tmp_path / "last", LAST_SIZES, 2, dtype="float32", rms_norm_eps=1e-4),
    )
    from ckptkit.surgery.build import build
    from tests.surgery.pairs import recipe

    build(recipe(pair), tmp_path / "split", accept_differences=True)
    model = load_remote(tmp_path / "split")
    assert model.model.norm.variance_epsilon == model.model.layers_last[0].input_layernorm.variance_epsilon == 1e-4
    assert model.model.layers_first[1].input_layernorm.variance_epsilon == 1e-2
    first, last = halves(pair)
    with torch.no_grad():
        narrow = first.model(TOKENS).last_hidden_state
        expected = last(inputs_embeds=adapted(tmp_path / "split", "linear", narrow)).logits
        assert close(model(TOKENS).logits, expected)
    config = open_checkpoint(tmp_path / "split").config
    assert config.norm_eps == 1e-4 and [layer.norm_eps for layer in config.layers] == [1e-2, 1e-2, None, None, None]
    assert [layer.rope.theta for layer in config.layers] == [1234.0] * 2 + [500000.0] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "cubic"}, "adapter must be one of"),
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9, the halves say 5"),
        ({"mlp": True}, "mlp is True"),
    ],
)
def test_a_config_that_contradicts_itself(
    tmp_path: Path, wide_splits: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(wide_splits["linear"], tmp_path / "split")
    file = tmp_path / "split" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load_remote(tmp_path / "split")


def test_a_resized_vocabulary_is_saved_and_loaded(wide_pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_remote(build_split(tmp_path / "split", wide_pair))
    model.resize_token_embeddings(256)
    model.save_pretrained(tmp_path / "resized")
    again = load_remote(tmp_path / "resized")
    assert again.config.vocab_size == again.config.first_config.vocab_size == again.config.last_config.vocab_size == 256
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        assert close(again(ids).logits, model(ids).logits)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert open_checkpoint(tmp_path / "resized").config.vocab_size == 256
