"""The Llama table and its config translation, judged by the installed transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.checkpoints.recognition import recognise
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families import family_of
from ckptkit.families.llama import DEFAULTS, LLAMA, THETA, parse, unparse
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.megatron_args.reading import from_args, model_from_args
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from tests.models import LLAMAS, llama_config


def raw_config(kind: str, **changes: Any) -> dict[str, Any]:
    return {**llama_config(kind, **changes).to_dict(), "architectures": ["LlamaForCausalLM"]}


def test_against_transformers_class_defaults() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig()
    resolved = {"num_key_value_heads": config.num_attention_heads, "head_dim": 128}
    for key, default in DEFAULTS.items():
        assert getattr(config, key) == (resolved.get(key) if default is None else default), key
    assert config.rope_parameters["rope_theta"] == THETA


@pytest.mark.parametrize("kind", LLAMAS)
def test_table_against_transformers_names_and_shapes(kind: str) -> None:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(kind))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = parse(raw_config(kind))
    if config.tied:
        del state["lm_head.weight"]
    table = {name: shape for item in LLAMA.items(config) for name, shape in item.parts.items()}
    assert table == state


@pytest.mark.parametrize("kind", LLAMAS)
def test_config_survives_args_and_back(kind: str) -> None:
    config = parse(raw_config(kind))
    args = to_args(LLAMA, config, Parallelism(2, 2), 256, 128)
    assert from_args(LLAMA, args, config) == config
    rebuilt = model_from_args(LLAMA, args, config.vocab_size)
    assert parse(unparse(rebuilt, {})) == parse({**raw_config(kind), "dtype": rebuilt.dtype})


def test_args_override_only_what_they_contradict() -> None:
    raw = raw_config("llama3")
    raw["rope_parameters"] = {**raw["rope_parameters"], "low_freq_factor": 2.0}
    config = parse(raw)
    args = {**to_args(LLAMA, config, Parallelism(), 256, 128), "rotary_base": 10000, "norm_epsilon": 1e-3}
    changed = from_args(LLAMA, args, config)
    assert changed.norm_eps == 1e-3
    assert changed.layers[0].rope.theta == 10000
    assert changed.layers[0].rope.low_freq_factor == 2.0
    assert inexpressible(changed) and not inexpressible(parse(raw_config("llama3")))


def test_old_and_new_rope_spelling_mean_the_same() -> None:
    raw = raw_config("llama3")
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    scaling = dict(raw["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = {**scaling, "type": scaling.pop("rope_type")}
    assert parse(old) == parse(raw)
    assert unparse(parse(old), old) == old


@given(st.sampled_from(sorted(LLAMAS)), st.sampled_from(["norm_eps", "hidden_size", "vocab_size", "init_std"]))
def test_unparse_changes_only_what_differs(kind: str, name: str) -> None:
    from dataclasses import replace

    raw = raw_config(kind)
    assert unparse(parse(raw), raw) == raw
    config = replace(parse(raw), **{name: 3})
    assert parse(unparse(config, raw)) == config


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"num_attention_heads": 5, "head_dim": None}, "does not divide over 5 heads|not a multiple"),
        ({"num_key_value_heads": 5}, "12 attention heads are not a multiple of 5"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 rope lacks low_freq_factor"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        parse({**raw_config("gqa"), **change})


def test_unknown_architecture_and_quantised_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no family converts FalconForCausalLM"):
        family_of({"architectures": ["FalconForCausalLM"]}, tmp_path)
    with pytest.raises(UnsupportedError, match="quantised weights \\(gptq\\)"):
        family_of({**raw_config("gqa"), "quantization_config": {"quant_method": "gptq"}}, tmp_path)
    with pytest.raises(InputError, match="names no architectures"):
        family_of(json.loads("{}"), tmp_path)


def test_recognises_its_own_names_only() -> None:
    names = [item.key for item in LLAMA.items(parse(raw_config("biased")))]
    assert recognise(names) is LLAMA
    assert recognise([LLAMA.spelling("local").written(name) for name in names]) is LLAMA
    with pytest.raises(UnsupportedError, match="no family fits"):
        recognise([*names, "decoder.layers.0.mlp.router.weight"])
