"""Sliced and stacked models: copies of layers, and a config.json that says what the copied layers were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import Parallelism, convert, open_checkpoint, verify
from ckptkit.conversion.options import Options
from ckptkit.editing.commands import Output, slice_layers, stack_layers
from ckptkit.editing.layers import layer_list
from ckptkit.errors import UnsupportedError, UsageError
from tests.editing.models import tensors_of, tuned
from tests.lora import save_adapter
from tests.models import save_llama, save_model
from tests.surgery.pairs import build_split, save_pair

SLICES: dict[str, tuple[str, list[int]]] = {
    "gqa": ("3,0-1,1", [3, 0, 1, 1]),
    "tied": ("0,2-3", [0, 2, 3]),
    "qwen2-windowed": ("0,3,2", [0, 3, 2]),
    "qwen3_moe-mixed": ("1,0,1,3", [1, 0, 1, 3]),
    "qwen3_moe-stepped": ("1-3", [1, 2, 3]),
    "ministral": ("3,0", [3, 0]),
    "apertus": ("2,0", [2, 0]),
    "gemma3": ("2,1,3", [2, 1, 3]),
    "gemma4_text-moe": ("1,0,2-3", [1, 0, 2, 3]),
    "gemma4_text-e2b": ("2-7", [2, 3, 4, 5, 6, 7]),
    "gemma4": ("0-5,7", [0, 1, 2, 3, 4, 5, 7]),
}
"""Kind -> layers, as written and as numbers: windows, experts, buffers of layers, per-layer inputs, shared keys."""


def save(path: Path, kind: str, **options: Any) -> Path:
    return save_llama(path, kind, **options) if kind in ("gqa", "tied") else save_model(path, kind, **options)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wrapped = "text_config" in json.loads((folder / "config.json").read_text())
    return (AutoModelForImageTextToText if wrapped else AutoModelForCausalLM).from_pretrained(folder).eval()


def decoder_of(model: Any) -> Any:
    return getattr(model.model, "language_model", model.model)


_SLOW = ("gemma4", "gemma4_text-e2b", "qwen3_moe-stepped")
"""Kinds that add little to the others, and take long."""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in _SLOW)) for kind in SLICES])
def test_logits_are_those_of_transformers_with_its_layers_exchanged(tmp_path: Path, kind: str) -> None:
    base, (text, numbers) = save(tmp_path / "base", kind), SLICES[kind]
    slice_layers(base, Output(tmp_path / "sliced"), layers=text)
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "sliced")
    same = [after.config.layers[new].window == before.config.layers[old].window for new, old in enumerate(numbers)]
    assert all(same)
    model, sliced = loaded(base), loaded(tmp_path / "sliced")
    for new, old in enumerate(numbers):
        one, other = decoder_of(sliced).layers[new], decoder_of(model).layers[old]
        for (name, left), (_, right) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(left, right), name
    ids = torch.arange(40).reshape(2, 20) * 6
    with torch.no_grad():
        expected = logits_with_layers(model, numbers, ids)
        found = sliced(ids).logits
    if expected is not None:
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def logits_with_layers(model: Any, numbers: list[int], ids: torch.Tensor) -> torch.Tensor | None:
    """What transformers computes after its own layers were put into another order; None where they know their number.

    Their cache is off: a layer that is there twice would share its entry.
    """
    decoder = decoder_of(model)
    if any(hasattr(layer, "per_layer_input_gate") for layer in decoder.layers):
        return None
    config = decoder.config
    decoder.layers = torch.nn.ModuleList([decoder.layers[number] for number in numbers])
    config.num_hidden_layers = len(numbers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in numbers]
    return model(ids, use_cache=False).logits


def test_per_layer_inputs_follow(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gemma4_text-e2b")
    slice_layers(base, Output(tmp_path / "sliced"), layers="2-7")
    before, after = tensors_of(base), tensors_of(tmp_path / "sliced")
    name = "model.embed_tokens_per_layer.weight"
    assert torch.equal(after[name], before[name][:, 2 * 16 :])
    name = "model.per_layer_model_projection.weight"
    assert torch.equal(after[name], before[name][2 * 16 :])
    config = json.loads((tmp_path / "sliced/config.json").read_text())
    assert (config["num_hidden_layers"], config["num_kv_shared_layers"]) == (6, 4)
    with torch.no_grad():
        assert loaded(tmp_path / "sliced")(torch.arange(20)[None]).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layers", "grid"),
    [
        ("qwen2-windowed", "0,2-3", Parallelism(2)),
        ("gemma3_text", "1-3", Parallelism(2)),  # windows and full attention
        ("qwen3_moe-mixed", "1,0,3", Parallelism(ep=2)),  # a dense layer first, then those with experts
    ],
)
def test_a_slice_runs_in_megatron(tmp_path: Path, pool: Any, kind: str, layers: str, grid: Parallelism) -> None:
    """The sliced model's logits are the same in transformers and in Megatron."""
    base = save_model(tmp_path / "base", kind)
    slice_layers(base, Output(tmp_path / "hf"), layers=layers)
    slice_layers(base, Output(tmp_path / "meg", "torch", Options(grid=grid)), layers=layers)
    kinds = {(layer.window, layer.moe) for layer in open_checkpoint(tmp_path / "meg").config.layers}
    assert len(kinds) == 2, "layers of two kinds, or the slice shows nothing"
    report = verify(tmp_path / "hf", tmp_path / "meg", pool=pool)
    assert report.passed, report


def test_from_megatron_and_into_megatron(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    convert(base, tmp_path / "meg", to="torch_dist", grid=Parallelism(2, 2))
    slice_layers(tmp_path / "meg", Output(tmp_path / "one"), layers="3,1")
    slice_layers(base, Output(tmp_path / "two", "torch", Options(grid=Parallelism(2))), layers="3,1")
    convert(tmp_path / "two", tmp_path / "back", to="hf")
    one, two, before = (tensors_of(tmp_path / name) for name in ("one", "back", "base"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    name = "mlp.gate_proj.weight"
    assert torch.equal(one[f"model.layers.0.{name}"], before[f"model.layers.3.{name}"])


def test_a_stack(tmp_path: Path) -> None:
    one = save_llama(tmp_path / "a", dtype="bfloat16")
    two = tuned(one, tmp_path / "b", 1)
    convert(two, tmp_path / "meg", to="torch", grid=Parallelism(2, 2))
    result = stack_layers([f"{one}:0-2", f"{tmp_path / 'meg'}:1-3"], Output(tmp_path / "stack"))
    assert result.coverage == {"copied": 6 * 6 + 3}
    found, first, last = tensors_of(tmp_path / "stack"), tensors_of(one), tensors_of(two)
    for name, tensor in found.items():
        head, dot, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers."):
            source = first if "embed" in name else last
            assert torch.equal(tensor, source[name])
        else:
            number = int(head)
            source = first if number < 3 else last
            old = number if number < 3 else number - 2
            assert torch.equal(tensor, source[f"model.layers.{old}{dot}{rest}"])
    assert len(found) == 6 * 9 + 3
    stack_layers([str(one), f"{two}:0"], Output(tmp_path / "five"))
    assert json.loads((tmp_path / "five/config.json").read_text())["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    ("kind", "layers", "match"),
    [
        ("gemma4_text-moe", "0,2", "last layer has a window"),
        ("gemma4_text-e2b", "0-1,4-7", "layer 4 uses the keys and values of layer 2, which is not before it"),
        ("gemma4_text-e2b", "0-4,1,5-7", "config.json cannot describe these layers"),
        ("mistral", "0-4", "the model has 4 layers"),
        ("mistral", "0-99999999999", "^--layers 0-99999999999: the model has 4 layers; they are numbered 0 to 3$"),
    ],
)
def test_what_has_no_right_answer(tmp_path: Path, kind: str, layers: str, match: str) -> None:
    base = save_model(tmp_path / "base", kind)
    with pytest.raises((UnsupportedError, UsageError), match=match):
        slice_layers(base, Output(tmp_path / "out"), layers=layers)
    assert not (tmp_path / "out").exists()


def test_lists_that_count_layers(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, "layer_types": list("abcd")}))
    slice_layers(base, Output(tmp_path / "out"), layers="2,0")
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_types"] == ["c", "a"]
    (base / "config.json").write_text(json.dumps({**raw, "no_rope_layers": [1, 1, 0, 1]}))
    with pytest.raises(UnsupportedError, match="no_rope_layers has an entry for each layer"):
        slice_layers(base, Output(tmp_path / "no"), layers="2,0")


def test_what_cannot_be_stacked(tmp_path: Path) -> None:
    one, wide = save_llama(tmp_path / "a"), save_llama(tmp_path / "wide", hidden_size=192)
    half = save_llama(tmp_path / "half", dtype="bfloat16")
    narrow = save_llama(tmp_path / "narrow", intermediate_size=96)
    split = build_split(tmp_path / "split", save_pair(tmp_path / "pair"))
    with pytest.raises(UnsupportedError, match="hidden_size is 192"):
        stack_layers([str(one), str(wide)], Output(tmp_path / "out"))
    with pytest.raises(UnsupportedError, match=r"comes from layer 0 of .*narrow, which has 96"):
        stack_layers([str(one), str(narrow)], Output(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"float32 and bfloat16.*--dtype"):
        stack_layers([str(one), str(half)], Output(tmp_path / "out"))
    for layers in ("", "0-x"):
        with pytest.raises(UsageError, match=rf"a: '{layers}' is no list of layers"):
            stack_layers([f"{one}:{layers}"], Output(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"a: 0-99999999999: the model has 4 layers"):
        stack_layers([f"{one}:0-99999999999"], Output(tmp_path / "out"))
    with pytest.raises(UnsupportedError, match="two kinds of layers"):
        slice_layers(split, Output(tmp_path / "out"), layers="0")
    with pytest.raises(UsageError, match="no layer is left"):
        slice_layers(one, Output(tmp_path / "out"), drop="0-3")
    with pytest.raises(UsageError, match="either --layers or --drop"):
        slice_layers(one, Output(tmp_path / "out"))


def test_lists_of_layers() -> None:
    assert layer_list("0-2,5,4-3", 6, "--layers") == [0, 1, 2, 5, 4, 3]
    assert layer_list("7", 8, "--layers") == [7]
    for text in ("", "0,x", "0-", "9" * 40, "1," * 5000):
        with pytest.raises(UsageError, match=r"^--layers '.{0,64}' is no list of layers; numbers and ranges"):
            layer_list(text, 6, "--layers")
    with pytest.raises(UsageError, match="more than"):
        layer_list(",".join(["0-5999"] * 2), 6000, "--layers")


def test_adapters_are_not_left_out(tmp_path: Path) -> None:
    """A model has none beside its weights, and an adapter alone is no model."""
    model = save_llama(tmp_path / "hf", "gqa")
    adapter = save_adapter(tmp_path / "adapter", model)
    convert(model, tmp_path / "both", to="torch_dist", adapter=adapter)
    with pytest.raises(UnsupportedError, match="beside the weights"):
        slice_layers(tmp_path / "both", Output(tmp_path / "out"), layers="0")
    convert(adapter, tmp_path / "alone", to="torch_dist", hf_reference=model)
    with pytest.raises(UsageError, match="an adapter, and no model"):
        slice_layers(tmp_path / "alone", Output(tmp_path / "out"), layers="0", source={"hf_reference": str(model)})
    assert not (tmp_path / "out").exists()
