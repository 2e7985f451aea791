"""adapter_config.json is read as PEFT reads it: ranks, scales and targets of modules."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.peft import factor_name, is_peft, parse_name
from ckptkit.formats.peft_config import AdapterConfig, alpha_for

MODULES = [
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1, 11) for name in "qkvo"),
    *(f"model.layers.{i}.mlp.experts.{e}.down_proj" for i in (0, 1) for e in (0, 7)),
    "model.layers.1.mlp.gate",
    "model.embed_tokens",
    "lm_head",
]
BASE = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj", "model.layers.1.self_attn.k_proj"]},
    "expression": {"target_modules": r".*\.layers\.(0|11)\..*(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by expression": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 11},
    "layers by pattern": {"target_modules": ["down_proj"], "layers_to_transform": [7], "layers_pattern": "experts"},
    "patterns": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 4, "layers.1.self_attn.k_proj": 2, r"layers\.\d+\.mlp\..*": 3, "^lm_head": 5},
        "alpha_pattern": {"model.layers.11.self_attn.q_proj": 1, "self_attn.*": 3.5},
    },
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 5}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_against_peft(name: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    values = CONFIGS[name]
    config, theirs = AdapterConfig.parse({**BASE, **values}, "file"), LoraConfig(r=8, lora_alpha=16, **values)
    for module in MODULES:
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha)
        assert config.rank_of(module) == rank
        assert config.scale_of(module, rank) == (alpha / rank**0.5 if theirs.use_rslora else alpha / rank)
        if name != "all-linear":  # PEFT replaces it by names, from the model
            found = check_target_module_exists(theirs, module)
            assert config.targets(module) == (bool(found) and type(found).__name__ != "_ExcludedModule"), module
    if name == "all-linear":
        assert config.targets("model.layers.0.self_attn.q_proj") and not config.targets("lm_head")


def test_exceptions_come_first() -> None:
    config = AdapterConfig.parse({**BASE, **CONFIGS["patterns"]}, "file")
    name = "model.layers.1.self_attn.q_proj"
    new = config.stating({name: (12, 0.75), "model.layers.0.self_attn.q_proj": (4, 3.5 / 4)})
    assert (new.rank_of(name), new.scale_of(name, 12)) == (12, 0.75)
    assert new.rank_of("model.layers.0.self_attn.q_proj") == 4 and next(iter(new.ranks)) == name
    assert AdapterConfig.parse(new.raw, "file") == new
    assert config.stating({"lm_head": (5, 16 / 5)}) is config
    assert new.targeting(["lm_head"]).raw["target_modules"] == ["q_proj", "lm_head"]
    with pytest.raises(UnsupportedError, match="does not include lm_head"):
        AdapterConfig.parse({**BASE, "target_modules": "x.*"}, "file").targeting(["lm_head"])


@pytest.mark.parametrize("rank", [1, 3, 4, 7, 12, 96])
def test_alphas_give_the_scale(rank: int) -> None:
    for scale in (2.0, 1 / 3, 5.656854249492381, 1e-3):
        assert alpha_for(scale, rank) / rank == scale


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lora_alpha": None}, InputError, "no lora_alpha"),
        ({"lora_alpha": 0}, InputError, "lora_alpha must be a number besides 0"),
        ({"lora_alpha": "8"}, InputError, "lora_alpha"),
        ({"lora_alpha": True}, InputError, "lora_alpha"),
        ({"r": 0}, InputError, "r must be a rank"),
        ({"r": 10**9}, InputError, "r must be a rank"),
        ({"rank_pattern": {"q": -1}}, InputError, r"rank_pattern\[q\]"),
        ({"alpha_pattern": ["q"]}, InputError, "alpha_pattern must be an object"),
        ({"target_modules": [1]}, InputError, "target_modules must be a list"),
        ({"target_modules": ["x"], "layers_to_transform": ["1"]}, InputError, "layers_to_transform"),
        ({"target_modules": "("}, InputError, "no regular expression"),
        ({"target_modules": "(a+)+b"}, UnsupportedError, "could take very long"),
        ({"target_modules": r"(a)\1"}, UnsupportedError, "could take very long"),
        ({"target_modules": ".*" * 12 + "z"}, UnsupportedError, "could take very long"),
        ({"rank_pattern": {".*" * 12 + "z": 4}}, UnsupportedError, "could take very long"),
        ({"peft_type": "IA3"}, UnsupportedError, "type IA3"),
        ({"lora_bias": True}, UnsupportedError, "biases of lora_B"),
        ({"fan_in_fan_out": True}, UnsupportedError, "transposed"),
        ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, UnsupportedError, "repeated layers"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "changes the weights of the base"),
        ({"init_lora_weights": "olora"}, UnsupportedError, "changes the weights of the base"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[CkptkitError], match: str) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        config = AdapterConfig.parse({**BASE, "target_modules": ["q_proj"], **change}, "adapter_config.json")
        config.targets("q_proj.layers.1.x" * 20)
        config.rank_of("model.layers.1.self_attn.q_proj" * 20)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 5


def test_names() -> None:
    about = parse_name(factor_name("model.layers.0.mlp.experts", "B", 1), "file")
    assert (about.kind, about.module, about.side, about.depth) == ("factor", "model.layers.0.mlp.experts", "B", 1)
    assert parse_name("base_model.model.a.q_proj.base_layer.bias", "file").module == "a.q_proj.bias"
    assert parse_name("base_model.model.e.lora_embedding_A", "file").kind == "embedding"
    for name, match in (("model.q.lora_A.weight", "does not begin"), ("base_model.model.q.lora_A.x.weight", "no name")):
        with pytest.raises(InputError, match=match):
            parse_name(name, "file")


def test_recognised_by_its_two_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(BASE))
    assert not is_peft(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert is_peft(tmp_path)
