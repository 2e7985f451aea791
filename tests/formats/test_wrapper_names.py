"""What stands before and between the names of tensors is found by what the model knows, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.formats.wrapper_names import Wrapping, find_wrapping, fit_of_megatron
from ckptkit.tensors import Tensor

MODEL = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
STARTS = ("_orig_mod.", "module.", "model.", "base_model.model.", "_orig_mod.module.", "policy.llm.", "a.b.c.d.")
WORDS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def fit(names: set[str]) -> int:
    return len(names & set(MODEL))


@pytest.mark.parametrize("start", ["", *STARTS])
@pytest.mark.parametrize("tied", [False, True])
def test_a_start_before_all_names(start: str, tied: bool) -> None:
    names = MODEL[:3] if tied else MODEL
    wrapping = find_wrapping([start + name for name in names], fit)
    assert [wrapping.name(start + name) for name in names] == names
    assert bool(wrapping) == bool(start)
    assert not start or all(word in wrapping.note for word in start.rstrip(".").split("."))


@pytest.mark.parametrize("word", WORDS)
def test_words_of_wrappers_anywhere(word: str) -> None:
    names = [name.replace("layers.0.", f"layers.0.{word}.") for name in MODEL]
    wrapping = find_wrapping(names, fit)
    assert [wrapping.name(name) for name in names] == MODEL and word in wrapping.note
    names = [f"{word}.module.{name}" for name in names]
    wrapping = find_wrapping(names, fit)
    assert [wrapping.name(name) for name in names] == MODEL and "module." in wrapping.note and word in wrapping.note


def test_names_that_only_resemble_them_stay() -> None:
    names = ["x_orig_mod.weight", "module_orig_mod.bias", *MODEL]
    assert not find_wrapping(names, fit)
    assert not find_wrapping(["module." + name for name in MODEL[1:]] + MODEL[:1], fit), "not all names have the start"
    assert not find_wrapping(["model.a.weight", "model.b.weight"], fit), "the model knows none of them"
    assert not find_wrapping([], fit)


def test_two_names_that_become_one(tmp_path: Path) -> None:
    tensor = Tensor.full(DTYPES["F32"], (1,))
    names = ["_orig_mod.model.norm.weight", "model.norm.weight"]
    with pytest.raises(InputError, match=r"model\.norm\.weight is stored twice \(once as"):
        find_wrapping(names, fit).removed(dict.fromkeys(names, tensor), tmp_path)
    assert Wrapping().removed({"model.norm.weight": tensor}, tmp_path)


def test_names_of_megatron() -> None:
    names = ["embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight"]
    for start in ("module.", "model.", "module.module.", "_forward_module.module."):
        wrapping = find_wrapping([start + name for name in names], fit_of_megatron)
        assert [wrapping.name(start + name) for name in names] == names
    assert not find_wrapping(["language_model." + name for name in names], fit_of_megatron)
    layers = [f"module.decoder.layers.{number}.mlp.linear_fc1.weight" for number in range(2)]
    assert find_wrapping(layers, fit_of_megatron).name(layers[0]) == "decoder.layers.0.mlp.linear_fc1.weight"
