"""GPT-OSS: where every element goes, which archives are told apart by names alone, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families import family_of
from ckptkit.megatron_args.flags import megatron_flags
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, raw_config, save_model

LAYERS, EXPERTS, GROUPS, WIDTH = 4, 4, 4, 8


def by_hand(hf: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer under Megatron's names, by slices of torch."""
    block, found = f"model.layers.{layer}.", {}
    for kind in ("weight", "bias"):
        q, k, v = (hf[f"{block}self_attn.{part}_proj.{kind}"].unflatten(0, (GROUPS, -1)) for part in ("q", "k", "v"))
        found[f"self_attention.linear_qkv.{kind}"] = torch.cat([q, k, v], dim=1).flatten(0, 1)
        found[f"self_attention.linear_proj.{kind}"] = hf[f"{block}self_attn.o_proj.{kind}"]
        found[f"mlp.router.{kind}"] = hf[f"{block}mlp.router.{kind}"]
    found["self_attention.core_attention.softmax_offset"] = hf[f"{block}self_attn.sinks"]
    found["self_attention.linear_qkv.layer_norm_weight"] = hf[f"{block}input_layernorm.weight"]
    found["pre_mlp_layernorm.weight"] = hf[f"{block}post_attention_layernorm.weight"]
    home = f"{block}mlp.experts."
    for expert in range(EXPERTS):
        gate_up, bias = hf[f"{home}gate_up_proj"][expert], hf[f"{home}gate_up_proj_bias"][expert]
        found[f"mlp.experts.linear_fc1.weight{expert}"] = torch.cat([gate_up[:, 0::2].t(), gate_up[:, 1::2].t()])
        found[f"mlp.experts.linear_fc1.bias{expert}"] = torch.cat([bias[0::2], bias[1::2]])
        found[f"mlp.experts.linear_fc2.weight{expert}"] = hf[f"{home}down_proj"][expert].t()
        found[f"mlp.experts.linear_fc2.bias{expert}"] = hf[f"{home}down_proj_bias"][expert]
    return {f"decoder.layers.{layer}.{name}": tensor for name, tensor in found.items()}


def packed(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_every_element_is_where_slices_of_torch_put_it(tmp_path: Path, dtype: str | None) -> None:
    source = save_model(tmp_path / "hf", "gpt_oss", dtype="bfloat16")
    convert(source, tmp_path / "packed", to="packed", dtype=dtype)
    hf, found = load_file(source / "model.safetensors"), packed(tmp_path / "packed")
    expected = {name: tensor for layer in range(LAYERS) for name, tensor in by_hand(hf, layer).items()}
    ends = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    assert found.keys() == expected.keys() | ends
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float() if dtype else tensor), name


def test_a_change_in_megatron_is_the_change_in_hugging_face(tmp_path: Path) -> None:
    """What training moved comes back where it belongs, and nothing else does."""
    source = save_model(tmp_path / "hf", "gpt_oss", dtype="bfloat16")
    convert(source, tmp_path / "packed", to="packed")
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    tensors, before = load_file(file), load_file(source / "model.safetensors")
    name = "decoder.layers.2.mlp.experts.linear_fc1.{}1"
    tensors[name.format("weight")][96 + 5, 7] += 1  # the up output 5 of input 7
    tensors[name.format("bias")][3] += 1  # the gate output 3
    save_file(tensors, file)
    convert(tmp_path / "packed", tmp_path / "back", to="hf")
    after = load_file(tmp_path / "back" / "model.safetensors")
    moved = {name: (after[name] != before[name]).nonzero().tolist() for name in before}
    home = "model.layers.2.mlp.experts.gate_up_proj"
    assert {name: where for name, where in moved.items() if where} == {home: [[1, 7, 11]], f"{home}_bias": [[1, 6]]}


def test_archives_are_told_apart_by_names(tmp_path: Path) -> None:
    """The matrices are square: as values of blocks they are the other way round, and nothing in a shape says so."""
    source = save_model(tmp_path / "hf", "gpt_oss", dtype="bfloat16")
    raw, hf = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    blocks = {
        f"{name}_blocks" if name.endswith(("gate_up_proj", "down_proj")) else name: (
            tensor.transpose(1, 2).contiguous() if name.endswith(("gate_up_proj", "down_proj")) else tensor
        )
        for name, tensor in hf.items()
    }
    square = [name for name in blocks if name.endswith("down_proj_blocks")]
    assert all(blocks[name].shape == hf[name.removesuffix("_blocks")].shape for name in square) and square
    other = tmp_path / "blocks"
    other.mkdir()
    save_file(blocks, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(raw))
    family = family_of(raw, "")
    names = {name: family.hf_spelling(set(found), family.parse(raw)).name for name, found in (("a", hf), ("b", blocks))}
    assert names == {"a": "hub", "b": "mxfp4"}
    for path, out in ((source, "one"), (other, "two")):
        convert(path, tmp_path / out, to="torch_dist", grid=Parallelism(2, ep=2))
    weights = [{n: d for n, d in files_of(tmp_path / out / "release").items()} for out in ("one", "two")]
    assert weights[0] == weights[1]
    convert(tmp_path / "two", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(other)


@pytest.mark.parametrize("fault", ["lost", "of another layer"])
def test_tensors_of_experts_are_missed_by_name(tmp_path: Path, fault: str) -> None:
    source = save_model(tmp_path / "hf", "gpt_oss")
    file, name = source / "model.safetensors", "model.layers.1.mlp.experts.gate_up_proj_bias"
    tensors = load_file(file)
    del tensors[name]
    if fault != "lost":
        tensors[name.replace(".1.", ".7.")] = torch.zeros(EXPERTS, 192)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj_bias"):
        open_checkpoint(source)


def test_an_expert_too_many_is_an_error_of_shapes(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "gpt_oss")
    file, name = source / "model.safetensors", "model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(file)
    tensors[name] = tensors[name].transpose(1, 2).contiguous()  # as if it had the rows of blocks
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} is \[4, 192, 96\], the config says \[4, 96, 192\]"):
        open_checkpoint(source)


REFUSED: list[tuple[type[Exception], dict[str, Any], str]] = [
    (UnsupportedError, {"swiglu_alpha": 1.5}, r"swiglu_alpha is 1\.5, and Megatron-Core has 1\.702"),
    (InputError, {"swiglu_limit": 0}, "swiglu_limit must be positive, not 0"),
    (InputError, {"swiglu_limit": None}, "swiglu_limit must be a number"),
    (InputError, {"num_experts_per_tok": 5}, "num_experts_per_tok 5 of num_local_experts 4"),
    (InputError, {"sliding_window": None}, "layer 0 is sliding_attention, but there is no sliding_window"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED)
def test_configs_that_are_refused(kind: type[Exception], changes: dict[str, Any], words: str) -> None:
    raw = {**raw_config("gpt_oss"), **changes}
    with pytest.raises(kind, match=words):
        family_of(raw, "").parse(raw)


def test_windows_begin_with_the_first_layer() -> None:
    raw = {"architectures": ["GptOssForCausalLM"], "num_hidden_layers": 5, "sliding_window": 8}
    config = family_of(raw, "").parse(raw)
    assert [layer.window for layer in config.layers] == [8, None, 8, None, 8]
    args = to_args(family_of(raw, ""), config, Parallelism(), 201088, 128)
    assert (args["window_size"], args["window_attn_skip_freq"]) == ((7, 0), [1, 0, 1, 0, 1])


def test_states_of_a_learnable_softmax(tmp_path: Path) -> None:
    """Transformer Engine's attention has one in both formats, megatron-core's own in neither."""
    from torch.distributed.checkpoint import FileSystemReader

    source = save_model(tmp_path / "hf", "gpt_oss", dtype="bfloat16")
    state, sinks = "core_attention._extra_state", "decoder.layers.self_attention.core_attention.softmax_offset"
    for spec in ("te", "local"):
        convert(source, tmp_path / f"{spec}-dist", to="torch_dist", spec=spec)
        keys = FileSystemReader(str(tmp_path / f"{spec}-dist" / "release")).read_metadata().state_dict_metadata
        assert sinks in keys and keys[sinks].size == (LAYERS, 12)  # type: ignore[union-attr]
        assert sum(state in key for key in keys) == (LAYERS if spec == "te" else 0)
        convert(source, tmp_path / spec, to="torch", spec=spec)
        content = torch.load(tmp_path / spec / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)
        assert sum(state in key for key in content["model"]) == (LAYERS if spec == "te" else 0)


def test_arguments() -> None:
    raw = raw_config("gpt_oss", rope_parameters={"rope_type": "default", "rope_theta": 150000.0})
    family = family_of(raw, "")
    config = family.parse(raw)
    assert inexpressible(config) == []
    words = megatron_flags(family, config, {}) or []
    for flag, value in {
        "--activation-func-clamp-value": "1.0",
        "--glu-linear-offset": "1.0",
        "--softmax-type": "learnable",
        "--window-size": "15,0",
        "--window-attn-skip-freq": "[1,0,1,0]",
    }.items():
        assert words[words.index(flag) + 1] == value
    assert "--quick-geglu" in words and "--swiglu" not in words and "--disable-bias-linear" not in words
    released = family.parse({})
    (note,) = inexpressible(released)
    assert "yarn" in note
