"""Merged weights are those of PEFT; they are rounded once, and everything else stays the bytes that it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.adapters.commands import merge_adapters
from ckptkit.cli.adapter import weighted
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.inspection.differences import diff
from ckptkit.io.cache import Cache
from ckptkit.sharding.grid import Parallelism
from tests.lora import LINEARS, adapted, load, save_adapter, tensors_of
from tests.models import files_of, save_llama, save_model
from tests.precision import relative_error

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"use_rslora": True},
    "biased": {"bias": "all", "modules_to_save": ["lm_head", "norm"]},
    "untied": {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
    "qwen3_moe": {"target_modules": "all-linear"},
    "mixtral": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"]},
    "gpt_oss": {"target_modules": "all-linear"},
    "gpt_oss-oblong": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gemma3": {"target_modules": "all-linear"},
    "gemma4-moe": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gemma4_text-e2b": {"target_modules": "all-linear"},
}


def save_base(path: Path, kind: str, **options: Any) -> Path:
    if kind in ("llama", "biased", "untied"):
        return save_llama(path, "biased" if kind == "biased" else "gqa", **options)
    if kind == "gpt_oss-oblong":
        return save_model(path, "gpt_oss", intermediate_size=40, **options)
    return save_model(path, kind, **options)


def merged_by_peft(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    from peft import PeftModel

    PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(out)
    return tensors_of(out)


@pytest.mark.parametrize("kind", KINDS)
def test_against_peft_in_float32(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, **KINDS[kind])
    expected = merged_by_peft(base, adapter, tmp_path / "peft")
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    before, found = tensors_of(base), tensors_of(tmp_path / "merged")
    assert found.keys() == expected.keys() == before.keys()
    changed = 0
    for name, tensor in found.items():
        finite = tensor.isfinite()  # limits that are off are infinite
        assert torch.equal(finite, expected[name].isfinite()), name
        assert relative_error(tensor[finite], expected[name][finite]) < 1e-6, name
        changed += not torch.equal(tensor, before[name])
        assert torch.equal(tensor, before[name]) == torch.equal(expected[name], before[name]), name
    assert changed >= 4
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())


def save_old_adapter(path: Path, base: Path, width: int, version: str | None) -> Path:
    """Factors of packed experts as PEFT made them before 0.19: it took the last two axes for [in, out]."""
    shapes = {"gate_up_proj": (2 * width, 96), "down_proj": (96, width)}
    adapter = save_adapter(
        path, base, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
    torch.manual_seed(7)
    tensors = {}
    for layer in range(4):
        for depth, (into, out) in enumerate((shapes["down_proj"], shapes["gate_up_proj"])):
            stem = f"base_model.model.model.layers.{layer}.mlp.experts{'.base_layer' * depth}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4 * 4, into)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 4 * 4)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


@pytest.mark.parametrize("version", ["0.18.1", None])
def test_packed_experts_of_old_peft(tmp_path: Path, version: str | None) -> None:
    base = save_model(tmp_path / "base", "qwen3_moe", moe_intermediate_size=40)
    adapter = save_old_adapter(tmp_path / "adapter", base, 40, version)
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    before, found, factors = tensors_of(base), tensors_of(tmp_path / "merged"), tensors_of(adapter)
    for depth, parts in enumerate((["down_proj"], ["gate_proj", "up_proj"])):
        stem = f"base_model.model.model.layers.2.mlp.experts{'.base_layer' * depth}"
        a, b = (factors[f"{stem}.lora_{side}.weight"].double() for side in "AB")
        delta = torch.einsum("ore,eri->eio", b.reshape(len(b), 4, 4), a.reshape(4, 4, -1))
        names = ["model.layers.2.mlp.experts.3." + part + ".weight" for part in parts]
        expected = torch.cat([before[name].double() for name in names]) + 2 * delta[3]
        assert relative_error(torch.cat([found[name] for name in names]), expected) < 1e-6
    convert(adapter, tmp_path / "meg", to="torch_dist", grid=Parallelism(2, 1, ep=2), hf_reference=base)
    convert(tmp_path / "meg", tmp_path / "back", to="peft")
    assert files_of(tmp_path / "back") == files_of(adapter)


def test_square_experts_with_columns_for_outputs(tmp_path: Path) -> None:
    """PEFT since 0.19 asks transformers which axis is which, and only since transformers 5 it is told."""
    base = save_model(tmp_path / "base", "gpt_oss")
    adapter = save_adapter(tmp_path / "adapter", base, target_parameters=["experts.down_proj"])
    with pytest.raises(UnsupportedError, match=r"down_proj is square.*release of transformers"):
        merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    expected = merged_by_peft(base, adapter, tmp_path / "peft")  # by this release of transformers, A is of [in, out]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert relative_error(tensor, expected[name]) < 1e-6, name


@pytest.mark.parametrize("told", [True, False])
def test_square_experts_beside_others_that_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """Of releases of transformers that tell PEFT which axis is which, and of those that do not."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    base, both = save_model(tmp_path / "base", "gpt_oss"), ["experts.gate_up_proj", "experts.down_proj"]
    if not told:
        silent = property(lambda self: False, lambda self, value: None)
        monkeypatch.setattr(GptOssExperts, "is_transposed", silent, raising=False)
    adapter = save_adapter(tmp_path / "adapter", base, target_parameters=both)
    expected = merged_by_peft(base, adapter, tmp_path / "peft")
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert relative_error(tensor, expected[name]) < 1e-6, name
    factors = tensors_of(adapter)
    shapes = {tuple(tensor.shape) for name, tensor in factors.items() if "base_layer.lora_B" in name}
    assert shapes == {(192 if told else 96, 16)}, shapes
    convert(adapter, tmp_path / "meg", to="torch_dist", grid=Parallelism(2, 1, ep=2), hf_reference=base)
    convert(tmp_path / "meg", tmp_path / "back", to="peft")
    assert files_of(tmp_path / "back") == files_of(adapter)


def test_square_experts_need_the_version_of_peft(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen3_moe", moe_intermediate_size=48)
    unknown = save_old_adapter(tmp_path / "unknown", base, 48, None)
    merge_adapters(base, [(unknown, 1.0)], tmp_path / "by-unknown", to="hf")  # down_proj tells
    tensors = {key: value for key, value in tensors_of(unknown).items() if "base_layer" in key}
    save_file(tensors, unknown / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=r"gate_up_proj is square.*peft_version"):
        merge_adapters(base, [(unknown, 1.0)], tmp_path / "out", to="hf")
    old = save_old_adapter(tmp_path / "old", base, 48, "0.18.1")
    new = save_old_adapter(tmp_path / "new", base, 48, "0.19.0")
    for name, adapter in (("old", old), ("new", new)):
        if name == "new":  # of down_proj only the old shapes exist here
            tensors = {key: value for key, value in tensors_of(adapter).items() if "base_layer" in key}
            save_file(tensors, adapter / "adapter_model.safetensors")
        merge_adapters(base, [(adapter, 1.0)], tmp_path / f"by-{name}", to="hf")
    one, other, third = (tensors_of(tmp_path / f"by-{name}") for name in ("old", "new", "unknown"))
    assert all(torch.equal(one[name], third[name]) for name in one)
    gate = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert relative_error(one[gate], other[gate]) > 0.01


def test_logits_are_those_of_peft(tmp_path: Path) -> None:
    """In fp32: transformers with PEFT's adapter, and transformers with the merged weights."""
    base = save_llama(tmp_path / "base")
    model = adapted(base, target_modules=[*LINEARS, "lm_head"]).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_adapters(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", to="hf")
    ids = torch.arange(40).reshape(2, 20) * 6
    with torch.no_grad():
        expected, found = model(ids).logits, load(tmp_path / "merged").eval()(ids).logits
        assert relative_error(found, expected) < 1e-4
        assert relative_error(load(base).eval()(ids).logits, expected) > 0.01


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_bf16_is_rounded_once(tmp_path: Path, precision: str) -> None:
    """Within half an ulp of the float64 merge, and the error of float32 sums. PEFT's own distance stands beside it."""
    base = save_llama(tmp_path / "base", dtype="bfloat16")
    adapter = save_adapter(tmp_path / "adapter", base, dtype="bfloat16", r=16)
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf", precision=precision)
    before, found, factors = tensors_of(base), tensors_of(tmp_path / "merged"), tensors_of(adapter)
    by_peft, mine, theirs = merged_by_peft(base, adapter, tmp_path / "peft"), 0.0, 0.0
    for name, weight in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in factors:
            assert torch.equal(found[name], weight)
            continue
        a, b = (factors[f"{stem}.lora_{side}.weight"].double() for side in "AB")
        exact = weight.double() + 0.5 * (b @ a)
        assert found[name].dtype == torch.bfloat16
        half_ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
        sums = (16 + 2) * 2.0**-24 * (weight.double().abs() + 0.5 * (b.abs() @ a.abs()))
        slack = sums if precision == "float32" else 0 * sums
        assert bool(((found[name].double() - exact).abs() <= half_ulp * (1 + 1e-9) + slack).all()), name
        mine += float((found[name].double() - exact).abs().mean())
        theirs += float((by_peft[name].double() - exact).abs().mean())
    print(f"mean distance from the float64 merge: {mine:.3g}, of PEFT's merge {theirs:.3g}")


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path, threads: int, monkeypatch: Any) -> None:
    from ckptkit.io import computed

    base = save_llama(tmp_path / "base", dtype="bfloat16", hidden_size=192, num_attention_heads=12)
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "one", to="hf", threads=1, shard_size=60_000)
    monkeypatch.setattr(computed, "_tiles", Cache(0, len))  # every tile is made anew
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "many", to="hf", threads=threads, shard_size=60_000)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")
    for to, grid in (("torch", Parallelism(2, 2)), ("torch_dist", Parallelism(4))):
        merge_adapters(base, [(adapter, 1.0)], tmp_path / to, to=to, grid=grid, threads=threads)
        convert(tmp_path / to, tmp_path / f"{to}-back", to="hf", shard_size=60_000)
        assert tensors_equal(tmp_path / f"{to}-back", tmp_path / "one")


def tensors_equal(one: Path, other: Path) -> bool:
    left, right = tensors_of(one), tensors_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    one = save_adapter(tmp_path / "one", base, seed=1)
    two = save_adapter(tmp_path / "two", base, seed=2, r=2, target_modules=["q_proj"])
    result = merge_adapters(base, [(one, 0.25), (two, -2.0)], tmp_path / "merged", to="hf")
    assert any("4 linear layers have two times -2 in them" in note for note in result.notes)
    before, found = tensors_of(base), tensors_of(tmp_path / "merged")
    name = "model.layers.3.self_attn.q_proj"
    expected = before[f"{name}.weight"].double()
    for folder, factor in ((one, 0.25 * 2), (two, -2 * 4)):
        factors = tensors_of(folder)
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        expected = expected + factor * (b @ a)
    assert relative_error(found[f"{name}.weight"], expected) < 1e-6


def test_adapters_and_models_of_megatron(tmp_path: Path) -> None:
    """Both sides of any format; a checkpoint that holds both is merged with itself."""
    base = save_model(tmp_path / "base", "qwen3_moe", dtype="bfloat16")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "expected", to="hf")
    grid = Parallelism(2, 1, ep=2)
    convert(base, tmp_path / "meg", to="torch", grid=grid)
    for layout in ("fused", "canonical", "peft"):
        out = tmp_path / layout
        convert(adapter, out, to="torch", grid=grid, adapter_layout=layout, hf_reference=base)
        merge_adapters(tmp_path / "meg", [(out, 1.0)], tmp_path / "merged", to="hf", overwrite=True)
        assert files_of(tmp_path / "merged") == files_of(tmp_path / "expected")
    both = Path(shutil.copytree(tmp_path / "peft", tmp_path / "both"))
    put_beside(tmp_path / "meg", both)
    merge_adapters(both, [(both, 1.0)], tmp_path / "merged", to="hf", hf_reference=base, overwrite=True)
    assert tensors_equal(tmp_path / "merged", tmp_path / "expected")
    with pytest.raises(UnsupportedError, match=r"adapters of Megatron beside the weights.*adapter export"):
        convert(both, tmp_path / "out", to="hf")


def put_beside(model: Path, adapter: Path) -> None:
    """The weights of a model into the files of its adapter, under the names that ms-swift gives them."""
    for file in adapter.glob("release/*/*.pt"):
        content = torch.load(file, weights_only=False)
        own = torch.load(model / file.relative_to(adapter), weights_only=False)["model"]
        modules = {name.partition(".lora_")[0] for name in content["model"]}
        for name, tensor in own.items():
            module, _, last = name.rpartition(".")
            content["model"][f"{module}.base_layer.{last}" if module in modules else name] = tensor
        torch.save(content, file)


def test_another_type(tmp_path: Path) -> None:
    """--dtype: the sums are rounded to it at once, and parts of one Megatron tensor go together."""
    base = save_llama(tmp_path / "base", dtype="bfloat16")
    adapter = save_adapter(tmp_path / "adapter", base, dtype="float32", target_modules=["q_proj"])
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="torch", dtype="float32", grid=Parallelism(2))
    convert(tmp_path / "merged", tmp_path / "back", to="hf")
    before, found, factors = tensors_of(base), tensors_of(tmp_path / "back"), tensors_of(adapter)
    name = "model.layers.1.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    expected = before[f"{name}.weight"].double() + 2 * (b @ a)
    assert relative_error(found[f"{name}.weight"], expected) < 1e-6
    other = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(found[other], before[other].float())


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    base, tied = save_llama(tmp_path / "base"), save_llama(tmp_path / "tied", "tied")
    small = save_llama(tmp_path / "small", hidden_size=48, intermediate_size=96)
    adapter = save_adapter(tmp_path / "adapter", base)
    embedding = save_adapter(tmp_path / "embedding", tied, target_modules=["embed_tokens"])
    whole = save_adapter(tmp_path / "whole", base, modules_to_save=["lm_head"])
    for model, adapters, error, match in (
        (tied, [(embedding, 1.0)], UnsupportedError, "ties .*embed_tokens"),
        (base, [(base, 1.0)], UsageError, "no adapter in it"),
        (base, [], UsageError, "no adapter to merge"),
        (small, [(adapter, 1.0)], InputError, "of the wrong shape"),
        (base, [(whole, 0.5)], UsageError, "lm_head.*no part by weight"),
        (base, [(whole, 1.0), (whole, 1.0)], UsageError, "two adapters replace lm_head"),
    ):
        with pytest.raises(error, match=match):
            merge_adapters(model, adapters, tmp_path / "out", to="hf")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--precision float16"):
        merge_adapters(base, [(adapter, 1.0)], tmp_path / "out", to="hf", precision="float16")
    with pytest.raises(UsageError, match="the source is a model"):
        merge_adapters(base, [(adapter, 1.0)], tmp_path / "out", to="peft")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, match in (
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changes the weights of the base"),
        ({"peft_type": "IA3"}, "type IA3"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedError, match=match):
            merge_adapters(base, [(adapter, 1.0)], tmp_path / "out", to="hf")


def test_untouched_tensors_are_copies(tmp_path: Path) -> None:
    """Bits that are no numbers pass where there is no adapter."""
    base = save_llama(tmp_path / "base", dtype="bfloat16")
    tensors = tensors_of(base)
    tensors["model.norm.weight"].view(torch.int16)[:3] = torch.tensor([0x7FA1, -1, 0x7F80], dtype=torch.int16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["o_proj"], layers_to_transform=[2])
    result = merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    assert result.memory_needed > convert(base, tmp_path / "copy", to="hf").memory_needed
    found = diff(base, tmp_path / "merged")
    assert [item.name for item in found.tensors if item.differing] == ["model.layers.2.self_attn.o_proj.weight"]


def test_weights_on_the_command_line(tmp_path: Path) -> None:
    assert weighted("helpful:0.7") == ("helpful", 0.7) and weighted("helpful") == ("helpful", 1.0)
    (tmp_path / "a:1").mkdir()
    assert weighted("s3://models/helpful") == ("s3://models/helpful", 1.0)
    assert weighted("s3://models/helpful:0.7") == ("s3://models/helpful", 0.7)
    assert weighted(str(tmp_path / "a:1")) == (str(tmp_path / "a:1"), 1.0)
    with pytest.raises(UsageError, match="'much' is no weight"):
        weighted("helpful:much")
