"""Every family's table and config translation, judged by the installed transformers and by released models."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.recognition import recognise
from ckptkit.conversion.convert import convert
from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import (
    apertus,
    deepseek,
    families,
    family_called,
    family_of,
    gemma3,
    gemma4_config,
    glm,
    glm_lite,
    gpt_oss,
    mistral,
    qwen,
    qwen3_5,
    qwen3_next,
    value_family_of,
)
from ckptkit.families.llama import LLAMA
from ckptkit.families.wrapper import WRAPPER_DEFAULTS
from ckptkit.io.engine import read_tensor
from ckptkit.megatron_args.bridge_provider import provider_of
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.megatron_args.reading import from_args, model_from_args
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.bridge import GPT_PROVIDER
from ckptkit.tables.config_fields import Fields
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tables.spelling import template
from ckptkit.tensors import Tensor
from tests.models import MODELS, model_classes, model_config, raw_config, save_llama

RELEASED = json.loads((Path(__file__).parents[2] / "fixtures" / "released_configs.json").read_text())


def parsed(kind: str, **changes: Any) -> tuple[Family, ModelConfig]:
    raw = raw_config(kind, **changes)
    family = family_of(raw, kind)
    return family, family.parse(raw)


def table_of(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for item in family.items(config) for name, shape in item.parts.items()}


def written_of(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The table's names and shapes as a new model is written: with experts stacked where the family stacks them."""
    tensors = family.fuse(placeholders(table_of(family, config)), config, family.hf_spellings[0].name)
    return {name: tensor.shape for name, tensor in tensors.items()}


def saved(kind: str, *, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `save_pretrained` would write."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = model_classes(kind)[1](model_config(kind))
    state = model.state_dict() if fused else revert_weight_conversion(model, model.state_dict())
    tied = model.config.tie_word_embeddings
    return {
        name: tuple(tensor.shape) for name, tensor in state.items() if not (tied and name.endswith("lm_head.weight"))
    }


def placeholders(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors that lie in files of their own, so that each byte has a name."""
    return {name: Tensor.from_file(name, 0, DTYPES["BF16"], shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_table_against_transformers_names_and_shapes(kind: str) -> None:
    family, config = parsed(kind)
    state = saved(kind, fused=kind.startswith("qwen3_5_moe"))  # published files have experts stacked
    extras = {name: shape for name, shape in state.items() if family.is_extra(name, config)}
    table = written_of(family, config)
    assert table == {name: shape for name, shape in state.items() if name not in extras}
    assert not any(family.is_extra(name, config) for name in table)
    towers = {
        "gemma3": ("vision_tower.", "multi_modal_projector."),
        "gemma4": ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio."),
        "qwen3_5": ("visual.",),
        "qwen3_5_moe": ("visual.",),
        "apertus": ("mlp.act_fn.",),
    }.get(kind.split("-")[0], ())
    assert all(any(tower in name for tower in towers) for name in extras)
    assert all(any(tower in name for name in extras) for tower in towers)


@pytest.mark.parametrize("kind", MODELS)
def test_against_transformers_class_defaults(kind: str) -> None:
    defaults, rope = {
        "Qwen2": (qwen.QWEN2_DEFAULTS, qwen.ROPE),
        "Qwen3": (qwen.QWEN3_DEFAULTS, qwen.ROPE),
        "Qwen3Moe": (qwen.QWEN3_MOE_DEFAULTS, qwen.ROPE),
        "Mistral": (mistral.MISTRAL_DEFAULTS, mistral.MISTRAL_CONFIG.rope),
        "Ministral": (mistral.MINISTRAL_DEFAULTS, mistral.MINISTRAL_CONFIG.rope),
        "Mixtral": (mistral.MIXTRAL_DEFAULTS, mistral.MIXTRAL_CONFIG.rope),
        "Apertus": (apertus.DEFAULTS, apertus.ROPE),
        "DeepseekV3": (deepseek.DEFAULTS, deepseek.CONFIG.rope),
        "Glm4MoeLite": (glm_lite.DEFAULTS, glm_lite.CONFIG.rope),
        "Glm4Moe": (glm.DEFAULTS, glm.CONFIG.rope),
        "Qwen3Next": (qwen3_next.DEFAULTS, qwen3_next.CONFIG.rope),
        "Qwen3_5Text": (qwen3_5.DEFAULTS, qwen3_5.CONFIG.rope),
        "Qwen3_5MoeText": (qwen3_5.MOE_DEFAULTS, qwen3_5.MOE_CONFIG.rope),
        "Qwen3_5": ({"tie_word_embeddings": False}, None),
        "Qwen3_5Moe": ({"tie_word_embeddings": False}, None),
        "GptOss": (gpt_oss.DEFAULTS, gpt_oss.ROPE),
        "Gemma3Text": (gemma3.DEFAULTS, gemma3.CONFIG.rope),
        "Gemma3": (WRAPPER_DEFAULTS, None),
        "Gemma4Text": (gemma4_config.DEFAULTS, gemma4_config.CONFIG.rope),
        "Gemma4": (WRAPPER_DEFAULTS, None),
    }[MODELS[kind][0]]
    config_class = model_classes(kind)[0]
    fields = config_class.__dataclass_fields__
    missing = {key for key in defaults if key not in fields}
    # A class without head_dim takes hidden_size / heads; the share that rotates is in the default rope, compared below.
    assert missing <= {"head_dim", "partial_rotary_factor", "num_nextn_predict_layers"}
    for key in missing & {"num_nextn_predict_layers"}:  # the class calls it otherwise, and writes it so
        assert config_class().to_dict()[key] == defaults[key]
    assert {key: fields[key].default for key in defaults if key in fields} == {
        key: value for key, value in defaults.items() if key in fields
    }
    stated = config_class().to_dict().get("rope_parameters") or {}
    if rope is not None:
        assert Fields({"rope_parameters": stated.get("full_attention", stated)}, defaults).rope(Rope(1.0)) == rope


@pytest.mark.parametrize("kind", MODELS)
def test_empty_config_is_the_class_default(kind: str) -> None:
    """What a config.json leaves out, and what transformers writes of it, mean the same."""
    config_class, model_class = model_classes(kind)
    family = family_of({"architectures": [model_class.__name__]}, kind)
    assert family.parse({}) == replace(family.parse(config_class().to_dict()), dtype=None)


@pytest.mark.parametrize("kind", MODELS)
def test_fields_agree_with_transformers(kind: str) -> None:
    """The translated maths is that of the transformers config: windows, ropes, scales, routing."""
    _, config = parsed(kind)
    theirs = model_config(kind).get_text_config()
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    for number, layer in enumerate(config.layers):
        sliding = types[number] == "sliding_attention" if types else True
        assert (layer.delta is not None) == bool(types and types[number] == "linear_attention")
        assert layer.window == (window if sliding else None)
        rope = theirs.rope_parameters
        rope = rope[types[number]] if types and types[number] in rope else rope
        assert (layer.rope.theta, layer.rope.kind) == (rope["rope_theta"], rope["rope_type"])
        assert layer.rope.factor == rope.get("factor", 1.0)
    if config.router_scales:
        assert (config.num_experts, config.experts_per_token) == (theirs.num_experts, theirs.top_k_experts)
    elif config.num_experts:
        count = theirs.num_experts if config.shared_expert_gate else theirs.num_local_experts
        assert (config.num_experts, config.experts_per_token) == (count, theirs.num_experts_per_tok)
        assert config.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    if config.expert_bias:
        assert (config.router_groups, config.router_groups_chosen) == (theirs.n_group, theirs.topk_group)
        assert config.routed_scaling == theirs.routed_scaling_factor
        assert config.shared_expert_size == theirs.moe_intermediate_size * theirs.n_shared_experts
    if hasattr(theirs, "query_pre_attn_scalar"):
        scale = config.softmax_scale or config.layers[0].head_dim ** -0.5
        assert scale == theirs.query_pre_attn_scalar**-0.5
        assert config.logit_softcap == theirs.final_logit_softcapping
        assert config.embedding_scale == theirs.hidden_size**0.5


@pytest.mark.parametrize("kind", MODELS)
def test_config_survives_args_and_back(kind: str) -> None:
    family, config = parsed(kind)
    args = json.loads(json.dumps(to_args(family, config, Parallelism(2, 2), 256, 128)))
    told = replace(config, dtype="float32")
    assert from_args(family, args, told) == told
    rebuilt = model_from_args(family, args, config.vocab_size)
    assert rebuilt.layers[0].window == config.layers[0].window
    assert (rebuilt.qkv_bias, rebuilt.out_bias) == (config.qkv_bias, config.out_bias)
    assert [layer.moe for layer in rebuilt.layers] == [layer.moe for layer in config.layers]
    if not inexpressible(config):
        assert rebuilt == told
        assert family.parse(family.unparse(rebuilt, {})) == rebuilt
    assert family.parse(family.unparse(told, {})) == told


def changed_layers(config: ModelConfig) -> tuple[LayerConfig, ...]:
    """The layers the other way round; where their order is not free, with other rotary embeddings."""
    if config.layer_scalars or config.expert_bias:
        return tuple(replace(layer, rope=replace(layer.rope, theta=layer.rope.theta / 2)) for layer in config.layers)
    return config.layers[::-1]


@pytest.mark.parametrize("kind", MODELS)
def test_unparse_changes_only_what_differs(kind: str) -> None:
    raw = raw_config(kind)
    family, config = parsed(kind)
    assert family.unparse(config, raw) == raw
    changes: list[dict[str, Any]] = [{"norm_eps": 3e-3}, {"hidden_size": 192}, {"dtype": "bfloat16"}]
    changes += [{"tied": not config.tied}, {"layers": changed_layers(config)}]
    for change in changes:
        changed = replace(config, **change)
        kept = json.dumps(raw)
        assert family.parse(family.unparse(changed, raw)) == changed, change
        assert json.dumps(raw) == kept


def test_windows_from_hub_spellings() -> None:
    def windows(architecture: str, **raw: Any) -> list[int | None]:
        raw = {"num_hidden_layers": 4, **raw}
        return [layer.window for layer in family_of({"architectures": [architecture]}, "").parse(raw).layers]

    assert windows("MistralForCausalLM") == [4096] * 4
    assert windows("MistralForCausalLM", sliding_window=None) == [None] * 4
    assert windows("MixtralForCausalLM") == [None] * 4
    hub = {"sliding_window": 64, "max_window_layers": 3}
    assert windows("Qwen2ForCausalLM", use_sliding_window=False, **hub) == [None] * 4
    assert windows("Qwen2ForCausalLM", use_sliding_window=True, **hub) == [None, None, None, 64]
    assert windows("Qwen3MoeForCausalLM", use_sliding_window=True, **hub) == [64] * 4
    assert windows("Gemma3ForCausalLM", sliding_window_pattern=2, sliding_window=8) == [8, None, 8, None]
    assert windows("Gemma3ForCausalLM", num_hidden_layers=7) == [4096] * 5 + [None, 4096]


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
                "beta_fast": 16,
            }
        },
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "apertus"])
def test_rope_spellings_against_transformers(kind: str, raw: dict[str, Any]) -> None:
    config_class, model_class = model_classes(kind)
    base = {key: value for key, value in raw_config(kind).items() if key != "rope_parameters"}
    family = family_of({"architectures": [model_class.__name__]}, kind)
    ours = family.parse({**base, **raw}).layers[0].rope
    theirs = config_class.from_dict({**base, **json.loads(json.dumps(raw))}).to_dict()
    assert ours == family.parse(theirs).layers[0].rope
    assert ours.theta == theirs["rope_parameters"]["rope_theta"]
    for change in ({"theta": 123.0}, {"kind": "linear", "factor": 3.0}):
        layers = tuple(replace(layer, rope=replace(Rope(ours.theta), **change)) for layer in family.parse(base).layers)
        changed = replace(family.parse({**base, **raw}), layers=layers)
        assert family.parse(family.unparse(changed, {**base, **raw})) == changed


def test_gemma3_text_hub_config() -> None:
    from transformers import Gemma3TextConfig

    family = family_called("gemma3_text")
    hub = {
        "num_hidden_layers": 8,
        "rope_theta": 500000,
        "rope_local_base_freq": 20000.0,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 4,
    }
    config = family.parse(hub)
    assert config == family.parse({**Gemma3TextConfig.from_dict(dict(hub)).to_dict(), "dtype": None})
    assert [layer.rope.theta for layer in config.layers] == ([20000.0] * 3 + [500000.0]) * 2
    assert [layer.window for layer in config.layers] == ([512] * 3 + [None]) * 2
    assert family.unparse(config, hub) == hub
    scaled = tuple(replace(layer, rope=Rope(layer.rope.theta, "linear", 2.0)) for layer in config.layers)
    changed = replace(config, layers=scaled)
    back = family.unparse(changed, hub)
    assert family.parse(back) == changed and not back.keys() & {"rope_theta", "rope_local_base_freq", "rope_scaling"}


def test_gemma3_hub_config() -> None:
    """The wrapper's config.json as released: old rope names, and most sizes left to the class."""
    from transformers import Gemma3Config

    hub: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "torch_dtype": "bfloat16",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    }
    family = family_of(hub, "")
    config = family.parse(hub)
    assert config == family.parse(
        {**Gemma3Config.from_dict(json.loads(json.dumps(hub))).to_dict(), "dtype": "bfloat16"}
    )
    assert config.layers[0].rope == Rope(10000.0) and config.layers[5].rope == Rope(1e6, "linear", 8.0)
    assert config.tied and config.dtype == "bfloat16" and config.vocab_size == 262208
    assert sum(prod(shape) for shape in table_of(family, config).values()) == RELEASED["gemma-3-4b"]["elements"]
    assert family.unparse(config, hub) == hub
    back = family.unparse(replace(config, dtype="float32"), hub)
    assert back == {**hub, "torch_dtype": "float32"}

    assert family.text_only is not None
    text = family.text_only(hub)
    alone = family_of(text, "")
    assert alone.name == "gemma3_text" and text["eos_token_id"] == [1, 106]
    assert alone.parse(text) == replace(config, family="gemma3_text", architecture="Gemma3ForCausalLM")
    assert [item.key for item in alone.items(config)] == [item.key for item in family.items(config)]


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_size(name: str) -> None:
    """Tensors and elements as published; both counts include the two numbers of each xIELU."""
    released = RELEASED[name]
    family = family_of(released["config"], name)
    config = family.parse(released["config"])
    shapes = written_of(family, config)
    buffers = family.missing_buffers((), config, DTYPES["BF16"])
    assert len(shapes) + len(buffers) == released["tensors"]
    assert sum(prod(shape) for shape in shapes.values()) + len(buffers) == released["elements"]
    assert len({item.key for item in family.items(config)}) == len(list(family.items(config)))


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_say_what_megatron_lacks(name: str) -> None:
    released = RELEASED[name]["config"]
    notes = inexpressible(family_of(released, name).parse(released))
    expected = {"gemma3_text": 4, "gemma4_text": 10, "apertus": 1}.get(released["model_type"], 0)
    more = {"gemma-3-27b": 1, "gemma-4-26B-A4B": 3, "gemma-4-31B": 1, "gemma-4-E2B": 3, "gemma-4-E4B": 2}
    assert len(notes) == expected + more.get(name, 0), notes


MOE = ["qwen3_moe", "qwen3_moe-mixed", "mixtral"]


@pytest.mark.parametrize("kind", [*MOE, "gemma3", "gemma3-untied"])
def test_in_memory_names_and_back(kind: str) -> None:
    family, config = parsed(kind)
    tensors = placeholders(saved(kind, fused=True))
    canonical, spelling = family.unfuse(tensors, config)
    assert spelling == ("in_memory" if kind.startswith("gemma3") else "fused")
    assert {name: tensor.shape for name, tensor in canonical.items()} == saved(kind)
    back = family.fuse(canonical, config, spelling)
    assert back.keys() == tensors.keys()
    assert all(back[name].same_bytes_as(tensor) for name, tensor in tensors.items())
    hub, spelling = family.unfuse(canonical, config)
    assert (hub, spelling) == (canonical, "hub") and family.fuse(hub, config, "hub") == canonical


@pytest.mark.parametrize("kind", MOE)
def test_unfused_experts_are_those_of_transformers(kind: str) -> None:
    """Same values, expert by expert, as the file that transformers writes for the same model."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    family, config = parsed(kind)
    torch.manual_seed(0)
    model = model_classes(kind)[1](model_config(kind))
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    theirs = revert_weight_conversion(model, dict(state))
    ours, _ = family.unfuse(
        {name: Tensor.from_bytes(t.numpy().tobytes(), DTYPES["F32"], t.shape) for name, t in state.items()}, config
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        mine = np.frombuffer(read_tensor(ours[name]).tobytes(), np.float32).reshape(ours[name].shape)
        assert np.array_equal(mine, tensor.numpy()), name


def test_bad_stacks_are_named() -> None:
    family, config = parsed("qwen3_moe")
    tensors = placeholders(saved("qwen3_moe", fused=True))
    name = "model.layers.2.mlp.experts.gate_up_proj"
    with pytest.raises(InputError, match=f"1 missing: {name}"):
        family.unfuse({key: tensor for key, tensor in tensors.items() if key != name}, config)
    with pytest.raises(InputError, match=r"gate_up_proj is \[3, 96, 96\], the config says \[4, 96, 96\]"):
        family.unfuse({**tensors, name: tensors[name].rows(0, 3)}, config)
    canonical, _ = family.unfuse(tensors, config)
    part = "model.layers.2.mlp.experts.1.up_proj.weight"
    with pytest.raises(InputError, match=r"gate_up_proj: cannot join .*--dtype"):
        family.fuse({**canonical, part: canonical[part].astype(DTYPES["F32"])}, config, "fused")
    with pytest.raises(UsageError, match=r"no spelling 'zipped'.*hub, fused"):
        family.fuse(canonical, config, "zipped")


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(MODELS)),
    groups=st.sampled_from([1, 2, 3, 6]),
    share=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 6]),
    width=st.integers(1, 4),
    experts=st.integers(1, 12),
)
def test_layouts_pack_and_unpack(kind: str, groups: int, share: int, head_dim: int, width: int, experts: int) -> None:
    family, config = parsed(kind)
    sizes: dict[str, Any] = {"num_heads": groups * share, "num_kv_heads": groups, "head_dim": head_dim}
    layers = tuple(replace(layer, ffn_hidden_size=2 * width, **sizes) for layer in config.layers[:3])
    moe = {"num_experts": experts, "moe_ffn_hidden_size": width} if config.num_experts else {}
    config = replace(config, layers=layers, hidden_size=4 * width, vocab_size=7, **moe)
    for item in family.items(config):
        parts = placeholders(item.parts)
        packed = item.pack(list(parts.values()))
        assert packed.shape == item.shape
        back = item.unpack(packed)
        assert all(back[name].same_bytes_as(part) for name, part in parts.items())
        dead = item.dropped(packed)
        assert len(dead) == len(item.slots) and all(found.same_bytes_as(filled) for _, found, filled in dead)
        assert item.parameters == sum(part.numel for part in parts.values())
        assert item.parameters + sum(found.numel for _, found, _ in dead) == packed.numel
    tensors = placeholders(table_of(family, config))
    for spelling in family.hf_spellings:
        fused = family.fuse(tensors, config, spelling.name)
        again, found = family.unfuse(fused, config)
        # Spellings differ in experts, and in those of multi-token prediction, which this model has not.
        assert found == spelling.name or family.fuse(tensors, config, found).keys() == fused.keys()
        assert all(again[name].same_bytes_as(tensor) for name, tensor in tensors.items())


@given(
    groups=st.integers(1, 4),
    share=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    hidden=st.integers(1, 3),
    bias=st.booleans(),
)
def test_qkv_against_numpy(groups: int, share: int, head_dim: int, hidden: int, bias: bool) -> None:
    """Megatron-Core views the fused rows as [groups, q heads + 2, width] (`get_query_key_value_tensors`)."""
    family, config = parsed("qwen2")
    layer = replace(config.layers[0], num_heads=groups * share, num_kv_heads=groups, head_dim=head_dim)
    config = replace(config, layers=(layer,), hidden_size=hidden)
    ending = ".linear_qkv.bias" if bias else ".linear_qkv.weight"
    item = next(item for item in family.items(config) if item.key.endswith(ending))
    values = [np.random.default_rng(n).random(shape, np.float32) for n, shape in enumerate(item.parts.values())]
    packed = item.pack([Tensor.from_bytes(value.tobytes(), DTYPES["F32"], value.shape) for value in values])
    columns = () if bias else (hidden,)
    expected = np.concatenate([value.reshape(groups, -1, head_dim, *columns) for value in values], axis=1)
    assert read_tensor(packed).tobytes() == expected.tobytes()


def test_packing_mixed_dtypes_is_refused() -> None:
    family, config = parsed("mixtral")
    item = next(item for item in family.items(config) if item.expert == 1)
    first, second = placeholders(item.parts).values()
    with pytest.raises(InputError, match=r"experts\.1\.w1\.weight, .*experts\.1\.w3\.weight: cannot join"):
        item.pack([first, second.astype(DTYPES["F32"])])


def spellings() -> Iterator[tuple[str, str, str, bool]]:
    for kind in MODELS:
        family = family_called(family_of(raw_config(kind), kind).name)
        for spelling in family.spellings:
            if spelling.name.startswith("slime") and ("moe" in kind) != (spelling.name == "slime"):
                continue
            for experts in ("grouped", "sequential") if "moe" in kind or kind.startswith("mixtral") else ("grouped",):
                for text in {False, not family.prefix}:
                    yield kind, spelling.name, experts, not text and bool(family.prefix)


@pytest.mark.parametrize(("kind", "name", "experts", "text"), list(spellings()))
def test_spellings_are_recognised(kind: str, name: str, experts: str, text: bool) -> None:
    family, config = parsed(kind)
    spelling = family.spelling(name, experts, text=text)
    keys = [item.key for item in family.items(config)]
    written = [spelling.written(key) for key in keys]
    assert len(set(written)) == len(keys)
    found = family.spelling_of(written, config)
    assert [found.written(key) for key in keys] == written
    alike = config.layer_scalars and not config.num_experts and name == "local"  # dense Gemma 4 has but one
    assert (found.name, found.prefix) == ("te" if alike else name, spelling.prefix)
    mixed = any(not layer.moe for layer in config.layers) and bool(config.num_experts)
    several = len({layer.delta for layer in config.layers}) > 1 and name == "local"  # norms of one name before both
    if not (mixed or alike or several or (config.num_experts and name == "local")):
        assert [spelling.canonical(other) for other in written] == keys
    args = to_args(family, config, Parallelism(), 256, 128)
    names = {family.name, f"{family.name}_text"} if family.prefix else {family.name}
    if kind.startswith("qwen3_5_moe") and not spelling.prefix:
        names = {"qwen3_next"}  # the same model, which archives have in other tensors
    assert recognise(written, args).name in (names if kind != "mistral-nemo" else {"llama"})
    with pytest.raises(UnsupportedError, match="no family fits"):
        recognise([*written, f"{spelling.prefix}decoder.layers.0.mlp.shared_experts.gate_bias"])


def test_expert_names() -> None:
    family, config = parsed("qwen3_moe")
    item = next(item for item in family.items(config) if item.layer == 2 and item.expert == 3)
    assert item.key == "decoder.layers.2.mlp.experts.linear_fc1.weight3"
    assert item.row.split.expert and item.shape == (96, 96)
    local = item.name(0, 1)
    assert family.spelling("te").written(local) == "decoder.layers.0.mlp.experts.linear_fc1.weight1"
    assert family.spelling("local").written(local) == "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    assert family.spelling("te", "sequential").written(local) == family.spelling("local").written(local)
    assert template(family.spelling("local").written(local)) == (
        "decoder.layers.mlp.experts.local_experts.linear_fc1.weight"
    )
    with pytest.raises(UsageError, match=r"no spec 'slime'.*te, local"):
        family.spelling("slime")
    with pytest.raises(UsageError, match=r"no naming of experts 'packed'.*grouped or sequential"):
        family.spelling("te", "packed")


def test_gemma3_spellings() -> None:
    text, wrapper = family_called("gemma3_text"), family_called("gemma3")
    post = "decoder.layers.1.mlp.linear_fc2.post_layernorm.weight"
    assert text.spelling("te").written(post) == post
    assert wrapper.spelling("te").written(post) == f"language_model.{post}"
    assert wrapper.spelling("te", text=True).written(post) == post
    for family in (text, wrapper):
        mbridge = family.spelling("mbridge")
        assert mbridge.written(post) == "language_model.decoder.layers.1.post_feedforward_layernorm.weight"
        assert mbridge.tied_head and not family.spelling("te").tied_head
    assert wrapper.is_extra("vision_tower.vision_model.post_layernorm.weight", parsed("gemma3")[1])
    assert not wrapper.is_extra("audio_tower.weight", parsed("gemma3")[1])


@pytest.mark.parametrize(("dtype", "torch_name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_xielu_numbers_are_those_of_transformers(dtype: str, torch_name: str) -> None:
    import torch
    from transformers.activations import XIELUActivation

    family, config = parsed("apertus")
    theirs = XIELUActivation(dtype=getattr(torch, torch_name)).state_dict()
    present = {"model.layers.0.mlp.act_fn.beta"}
    made = family.missing_buffers(present, config, DTYPES[dtype])
    assert len(made) == 2 * config.num_layers - 1 and not present & made.keys()
    for name, tensor in made.items():
        bits = theirs[name.rsplit(".", 1)[1]].reshape(1).view(torch.uint8).numpy().tobytes()
        assert tensor.shape == () and read_tensor(tensor).tobytes() == bits
        assert family.is_extra(name, config)
    assert not family.is_extra("model.layers.4.mlp.act_fn.beta", config)
    assert not family.is_extra("model.layers.0.mlp.act_fn.gamma", config)
    plain = replace(config, activation="silu")
    assert not family.missing_buffers((), plain, DTYPES[dtype])
    assert not any("act_fn" in name for name in table_of(family, plain))
    with pytest.raises(UnsupportedError, match="no I64 form"):
        family.missing_buffers((), config, DTYPES["I64"])


def test_args_alone_tell_llama_mistral_and_ministral_apart() -> None:
    for kind, expected in (("mistral", "mistral"), ("ministral", "ministral"), ("mistral-nemo", "llama")):
        family, config = parsed(kind)
        names = [item.key for item in family.items(config)]
        assert recognise(names, to_args(family, config, Parallelism(), 256, 128)).name == expected
        assert recognise(names).name == "llama"


def test_moe_args_as_megatron_reads_them() -> None:
    family, config = parsed("qwen3_moe-mixed")
    args = to_args(family, config, Parallelism(), 256, 128)
    assert args["moe_layer_freq"] == [1, 0, 1, 1] and args["moe_router_pre_softmax"] is True
    assert (args["num_experts"], args["moe_router_topk"], args["moe_ffn_hidden_size"]) == (4, 2, 48)
    assert (
        args["moe_grouped_gemm"]
        and not to_args(family, config, Parallelism(), 256, 128, "sequential")["moe_grouped_gemm"]
    )
    every_other = from_args(family, {**args, "moe_layer_freq": 2}, config)
    assert [layer.moe for layer in every_other.layers] == [True, False, True, False]
    dense = from_args(family, {**args, "num_experts": None}, config)
    assert not dense.num_experts and not any(layer.moe for layer in dense.layers)


def test_window_args_as_megatron_reads_them() -> None:
    family, config = parsed("ministral")
    args = to_args(family, config, Parallelism(), 256, 128)
    assert args["window_size"] == (15, 0) and args["window_attn_skip_freq"] == [0, 1, 1, 1]
    assert [layer.window for layer in from_args(family, {**args, "window_attn_skip_freq": 2}, config).layers] == [
        16,
        None,
    ] * 2
    assert [layer.window for layer in from_args(family, {**args, "window_size": None}, config).layers] == [None] * 4
    assert [layer.window for layer in from_args(family, {**args, "window_size": (-1, 0)}, config).layers] == [None] * 4


@pytest.mark.parametrize(
    "change", [{"window_size": 5}, {"window_attn_skip_freq": [1]}, {"rotary_base": None}, {"num_query_groups": "x"}]
)
def test_args_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    family, config = parsed("ministral")
    args = to_args(family, config, Parallelism(), 256, 128)
    args = {**args, "window_size": (15, 0), **change}
    if change == {"num_query_groups": "x"}:
        assert from_args(family, args, config) != config  # a contradiction, which opening reports
        return
    with pytest.raises(InputError, match="args make no sense"):
        from_args(family, args, config)


def test_inexpressible_is_listed() -> None:
    _, gemma = parsed("gemma3_text-capped")
    text = "; ".join(inexpressible(gemma))
    for part in (
        "different rotary",
        "gated MLP with gelu_pytorch_tanh",
        "norms after",
        "multiplied by",
        "capped at 5.0",
    ):
        assert part in text
    assert "scores multiplied" not in text
    _, scaled = parsed("gemma3_text")
    assert any("scores multiplied by" in note for note in inexpressible(scaled))
    assert any("an MLP with xielu" in note for note in inexpressible(parsed("apertus")[1]))
    uneven = tuple(replace(layer, window=8 + number) for number, layer in enumerate(gemma.layers))
    assert any("different sizes" in note for note in inexpressible(replace(gemma, layers=uneven)))
    for kind in ("qwen2-windowed", "qwen3_moe-mixed", "mixtral", "ministral"):
        assert not inexpressible(parsed(kind)[1])


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("qwen2", {"max_window_layers": None}, "max_window_layers must be an integer"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must name 4 layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer 0 is sliding_attention, but there is no"),
        ("ministral", {"layer_types": ["full_attention", "linear_attention"] * 2}, "unknown layer_types linear_att"),
        ("ministral", {"sliding_window": None}, "layer 1 is sliding_attention, but there is no sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer"),
        ("qwen3_moe", {"num_local_experts": 0}, "num_experts must be a positive integer"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers must be a list"),
        ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok must be a positive integer"),
        ("apertus", {"rope_parameters": {"rope_type": "yarn", "factor": "two"}}, "rope factor must be a number"),
        ("apertus", {"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "a factor and betas above 0"),
        (
            "apertus",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 0}},
            "a factor and betas above 0",
        ),
        (
            "apertus",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": "no"}},
            "truncate must be true or",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive"),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        ("gemma3_text", {"rope_parameters": [1]}, "rope_parameters must be an object"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "full_attention must be an object"),
        ("gemma3", {"text_config": "tiny"}, "text_config must be an object"),
    ],
)
def test_bad_configs_are_named(kind: str, change: dict[str, Any], match: str) -> None:
    raw = raw_config(kind)
    with pytest.raises(InputError, match=match):
        family_of(raw, kind).parse({**raw, **change})


def test_bidirectional_gemma_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        family_called("gemma3_text").parse({"use_bidirectional_attention": True})


def test_both_names_of_the_number_of_experts() -> None:
    family, config = parsed("qwen3_moe")
    raw = {key: value for key, value in raw_config("qwen3_moe").items() if key != "num_local_experts"}
    hub = {**raw, "num_experts": 4}
    assert family.parse(hub) == config
    assert family.unparse(replace(config, num_experts=8), hub)["num_experts"] == 8
    assert family.unparse(replace(config, num_experts=8), raw_config("qwen3_moe"))["num_local_experts"] == 8


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The source of an installed package with a family, to be written by the test."""
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ckptkit.families]\nphony = phony_family:PHONY\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    families.cache_clear()
    yield tmp_path / "phony_family.py"
    sys.modules.pop("phony_family", None)
    families.cache_clear()


def test_a_family_of_another_package(other_package: Path) -> None:
    other_package.write_text(
        "from dataclasses import replace\n"
        "from ckptkit.families.llama import LLAMA\n"
        "PHONY = replace(LLAMA, name='phony', architectures=('PhonyForCausalLM',))\n"
    )
    assert family_of({"architectures": ["PhonyForCausalLM"]}, "").name == "phony"
    assert family_of({"architectures": ["LlamaForCausalLM"]}, "").name == "llama"
    # It is derived from Llama, whose value models stay Llama's.
    assert value_family_of(family_called("phony")) is None
    assert family_of({"architectures": ["LlamaForTokenClassification"]}, "").name == "llama_value"


PHONY = (
    "from dataclasses import replace\n"
    "from ckptkit.families.llama import CONFIG, LLAMA\n"
    "from ckptkit.tables.config_json import translation\n"
    "config_json = replace(CONFIG, family='phony', architecture='PhonyForCausalLM')\n"
    "PHONY = replace(\n"
    "    LLAMA, name='phony', architectures=('PhonyForCausalLM',), parse=config_json.decoder,\n"
    "    unparse=translation(config_json, config_json.decoder, config_json.values),\n"
    "    value_architectures=('PhonyForTokenClassification', 'PhonyForSequenceClassification'),\n"
    ")\n"
)


def phony_model(path: Path) -> Path:
    """A model of the family of the other package: Llama's tensors under another class."""
    save_llama(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["PhonyForCausalLM"]}))
    return path


def test_a_family_of_another_package_has_value_models(other_package: Path, tmp_path: Path) -> None:
    other_package.write_text(PHONY)
    source = phony_model(tmp_path / "hf")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2), head="value", head_init="zeros")
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    for path, family in (("meg", "phony_value"), ("back", "phony_value"), ("hf", "phony")):
        assert open_checkpoint(tmp_path / path).family.name == family
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert raw["architectures"] == ["PhonyForTokenClassification"]
    back = open_checkpoint(tmp_path / "back")
    assert back.tensors["output_layer.weight"].shape == (1, back.config.hidden_size)


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        (
            "'LlamaForTokenClassification', 'PhonyForSequenceClassification'",
            "both have the value model",
        ),
        ("'QwenForCausalLM', 'Qwen2ForCausalLM'", "are called Qwen2ForCausalLM"),
    ],
)
def test_value_models_of_two_families_are_an_error(other_package: Path, classes: str, match: str) -> None:
    source = PHONY.replace("'PhonyForTokenClassification', 'PhonyForSequenceClassification'", classes)
    other_package.write_text(source)
    with pytest.raises(UnsupportedError, match=match):
        families()


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        ("BridgeProvider()", None),
        ("BridgeProvider('phony.Provider')", None),
        ("None", "none of Megatron-Bridge 0.6.2's providers is known here for PhonyForCausalLM"),
        ("BridgeProvider(ropes=('linear',))", "has no default rope"),
        ("BridgeProvider(activation='gelu_pytorch_tanh')", "has no PhonyForCausalLM with silu"),
    ],
)
def test_megatron_bridge_knows_a_family_of_another_package(
    other_package: Path, tmp_path: Path, provider: str, reason: str | None
) -> None:
    other_package.write_text(
        "from dataclasses import replace\n"
        "from ckptkit.families.llama import LLAMA\n"
        "from ckptkit.tables.bridge import BridgeProvider\n"
        "def parse(raw):\n"
        "    return replace(LLAMA.parse(raw), family='phony', architecture='PhonyForCausalLM')\n"
        "PHONY = replace(LLAMA, name='phony', architectures=('PhonyForCausalLM',), parse=parse,\n"
        f"                marks=('decoder.layers.self_attention.linear_proj.weight',), bridge={provider})\n"
    )
    source = save_llama(tmp_path / "hf")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "architectures": ["PhonyForCausalLM"]}))
    result = convert(source, tmp_path / "megatron", to="torch_dist")
    file = tmp_path / "megatron" / "release" / "run_config.yaml"
    if reason is not None:
        assert not file.exists() and any(reason in note for note in result.notes)
        return
    target = "phony.Provider" if "phony" in provider else GPT_PROVIDER
    assert yaml.safe_load(file.read_text())["model"]["_target_"] == target
    shutil.rmtree(tmp_path / "megatron" / "ckptkit")
    (tmp_path / "megatron" / "release" / "common.pt").unlink()
    opened = open_checkpoint(tmp_path / "megatron")
    assert (opened.family.name, opened.config.layers[0].num_kv_heads) == ("phony", 4)


def test_megatron_bridge_gets_no_provider_that_lacks_a_feature(other_package: Path) -> None:
    """A plain provider would build a model without the norms after attention and MLP."""
    config = LLAMA.parse({"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})
    other_package.write_text(
        "from dataclasses import replace\n"
        "from ckptkit.families.llama import LLAMA\n"
        "PHONY = replace(LLAMA, name='phony', architectures=('PhonyForCausalLM',))\n"
    )
    phony = family_called("phony")
    assert provider_of(phony, config, Parallelism(), 128, local=False, grouped=True).target == GPT_PROVIDER
    for change, match in (
        ({"post_norms": True}, "with norms after attention and MLP"),
        ({"scaled_embedding": True}, "with embeddings multiplied by"),
        ({"softmax_scale": 0.5}, "with attention scores multiplied by 0.5"),
        ({"value_head": True}, "has no value heads"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            provider_of(phony, replace(config, **change), Parallelism(), 128, local=False, grouped=True)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("from ckptkit.families.llama import LLAMA as PHONY", "is there already: LlamaForCausalLM, llama"),
        ("PHONY = 1", "phony_family:PHONY. is no Family"),
        ("import absent_package", "does not load: No module named 'absent_package'"),
    ],
)
def test_a_broken_family_of_another_package_is_named(other_package: Path, source: str, match: str) -> None:
    other_package.write_text(source)
    with pytest.raises(UnsupportedError, match=match):
        families()


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "glm4_moe_lite"])
@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("scoring_func", "softmax", UnsupportedError),
        ("topk_method", "greedy", UnsupportedError),
        ("moe_layer_freq", 2, UnsupportedError),
        ("first_k_dense_replace", "1", InputError),
        ("first_k_dense_replace", True, InputError),
    ],
)
def test_other_routers_and_wrong_types_are_refused(kind: str, key: str, value: object, error: type[Exception]) -> None:
    family, config = parsed(kind)
    raw = family.unparse(config, {})
    assert family.parse(raw) == config
    with pytest.raises(error, match=key):
        family.parse({**raw, key: value})


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "glm4_moe_lite"])
def test_layers_of_prediction_are_counted_without_a_base(kind: str) -> None:
    family, config = parsed(kind)
    assert family.unparse(replace(config, mtp_layers=1), {})["num_nextn_predict_layers"] == 1
