"""Qwen3-Next and Qwen3.5: where every element goes, what is cut how, what comes back exactly, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_of
from ckptkit.io.as_torch import load
from ckptkit.io.zero_centered import LESS_ONE
from ckptkit.megatron_args.flags import megatron_flags
from ckptkit.sharding.grid import Parallelism
from ckptkit.tensors import Tensor
from tests.checkpoints.args_files import set_args
from tests.lora import load as load_model
from tests.lora import save_adapter
from tests.models import add_prediction, files_of, raw_config, save_model

LAYERS, EXPERTS, GROUPS, KEYS, VALUES, KEY_DIM, VALUE_DIM = 4, 4, 4, 4, 8, 16, 12
"""Sizes of the tiny models."""
TP = [1, 2, 4]


def gated_qkv(hf: dict[str, torch.Tensor], block: str) -> torch.Tensor:
    """Per key/value head the queries that share it, their gates, the key and the value, by slices of torch."""
    q, gate = hf[f"{block}self_attn.q_proj.weight"].unflatten(0, (GROUPS, -1, 2, 16)).unbind(2)
    k, v = (hf[f"{block}self_attn.{part}_proj.weight"].unflatten(0, (GROUPS, -1)) for part in "kv")
    return torch.cat([q.flatten(1, 2), gate.flatten(1, 2), k, v], dim=1).flatten(0, 1)


def parts_of(hf: dict[str, torch.Tensor], block: str) -> dict[str, torch.Tensor]:
    """Queries, keys, values, gates, betas and decays of a DeltaNet, each for all heads, by slices of torch."""
    home, names = f"{block}linear_attn.", ("query", "key", "value", "z", "beta", "alpha")
    if f"{home}in_proj_z.weight" in hf:
        sizes = [KEYS * KEY_DIM, KEYS * KEY_DIM, VALUES * VALUE_DIM]
        three = hf[f"{home}in_proj_qkv.weight"].split(sizes)
        return dict(zip(names, [*three, *(hf[f"{home}in_proj_{one}.weight"] for one in "zba")], strict=True))
    each = VALUES // KEYS
    qkvz = hf[f"{home}in_proj_qkvz.weight"].unflatten(0, (KEYS, -1))
    ba = hf[f"{home}in_proj_ba.weight"].unflatten(0, (KEYS, -1))
    parts = [*qkvz.split([KEY_DIM, KEY_DIM, each * VALUE_DIM, each * VALUE_DIM], dim=1), *ba.split(each, dim=1)]
    return {name: part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def conv_of(hf: dict[str, torch.Tensor], block: str) -> list[torch.Tensor]:
    sizes = [KEYS * KEY_DIM, KEYS * KEY_DIM, VALUES * VALUE_DIM]
    return list(hf[f"{block}linear_attn.conv1d.weight"].split(sizes))


def of_rank(folder: Path, tp: int) -> dict[str, torch.Tensor]:
    """What a tensor parallel rank's file holds."""
    content = torch.load(folder / "release" / f"mp_rank_{tp:02}" / "model_optim_rng.pt", weights_only=False)
    model: dict[str, torch.Tensor] = content["model"]
    return model


@pytest.mark.parametrize("size", TP)
@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe_text"])
def test_every_rank_has_its_share_of_every_part(tmp_path: Path, kind: str, size: int) -> None:
    source = save_model(tmp_path / "hf", kind, dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(size))
    hf, flat = load_file(source / "model.safetensors"), 0
    for rank in range(size):
        held = of_rank(tmp_path / "meg", rank)
        for layer in range(LAYERS):
            block, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}.self_attention."
            if layer % 2:
                whole = gated_qkv(hf, block)
                assert torch.equal(held[f"{ours}linear_qkv.weight"], whole.chunk(size)[rank])
                continue
            parts = list(parts_of(hf, block).values())
            for name, blocks in (("in_proj", parts), ("conv1d", conv_of(hf, block))):
                mine = torch.cat([part.chunk(size)[rank] for part in blocks])
                assert torch.equal(held[f"{ours}{name}.weight"], mine), (rank, layer, name)
                flat += not torch.equal(torch.cat(blocks).chunk(size)[rank], mine)
            norm = hf[f"{block}linear_attn.norm.weight"]
            assert torch.equal(held[f"{ours}out_norm.weight"], norm - 1)
            for name in ("A_log", "dt_bias"):
                assert torch.equal(held[ours + name], hf[f"{block}linear_attn.{name}"].chunk(size)[rank])
            assert torch.equal(
                held[f"{ours}out_proj.weight"], hf[f"{block}linear_attn.out_proj.weight"].chunk(size, dim=1)[rank]
            )
    assert flat == (0 if size == 1 else 4 * size)  # cut as one block, no rank would have the right rows


def test_parts_of_a_distributed_checkpoint(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    source = save_model(tmp_path / "hf", "qwen3_next")
    convert(source, tmp_path / "dist", to="torch_dist", grid=Parallelism(2))
    metadata = FileSystemReader(str(tmp_path / "dist" / "release")).read_metadata().state_dict_metadata
    hf = load_file(source / "model.safetensors")
    home = "decoder.layers.2.self_attention."
    for name, part in parts_of(hf, "model.layers.2.").items():
        stored = metadata[f"{home}in_proj.weight.{name}"]
        assert stored.size == part.shape and len(stored.chunks) == 2  # type: ignore[union-attr]
    assert f"{home}in_proj.weight" not in metadata and f"{home}conv1d.weight" not in metadata
    assert {f"{home}conv1d.weight.{name}" for name in ("query", "key", "value")} <= metadata.keys()
    states = {key.split("/")[0] for key in metadata if "_extra_state" in key and "layers.2.self" in key}
    assert states == {f"{home}{module}._extra_state" for module in ("in_proj", "out_norm", "out_proj")}


@pytest.mark.parametrize("fault", ["lost", "whole and in parts"])
def test_parts_that_do_not_make_a_tensor(tmp_path: Path, fault: str) -> None:
    from ckptkit.checkpoints.parts import join_parts

    stem = "decoder.layers.0.self_attention.conv1d.weight"
    names = [f"{stem}.{part}" for part in ("query", "key", "value")]
    names = names[:-1] if fault == "lost" else [*names, stem]
    tensors = {name: Tensor.full(DTYPES["BF16"], (4, 1, 4)) for name in names}
    words = "lacks its parts value" if fault == "lost" else "is stored both whole and in parts"
    with pytest.raises(InputError, match=words):
        join_parts(tensors, tmp_path)
    odd = {f"{stem}.{part}": Tensor.full(DTYPES["BF16"], (4, 1, 4 + (part == "key"))) for part in ("query", "key")}
    odd[f"{stem}.value"] = odd[f"{stem}.query"]
    with pytest.raises(InputError, match="do not fit together"):
        join_parts(odd, tmp_path)


def vector(values: torch.Tensor) -> Tensor:
    kind = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}[values.dtype]
    return Tensor.from_bytes(values.view(torch.uint8).numpy().tobytes(), DTYPES[kind], tuple(values.shape))


FLOATS = st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=40)
KINDS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@given(FLOATS, KINDS)
@settings(deadline=None)
def test_one_less_and_back(values: list[float], dtype: torch.dtype) -> None:
    """Numbers less one are those of torch; what they are of comes back bit for bit while they are not changed."""
    given_ = torch.tensor(values, dtype=torch.float64).to(dtype)
    less = LESS_ONE.to_megatron(vector(given_))
    assert torch.equal(load(less), given_ - 1)
    assert torch.equal(load(LESS_ONE.to_hf(less)), given_)
    stored = vector(given_ - 1)
    assert torch.equal(load(LESS_ONE.to_hf(stored)), (given_ - 1) + 1)
    kept = LESS_ONE.kept(stored, vector(given_))
    assert LESS_ONE.moved(kept) == LESS_ONE.moved(stored) == 0
    assert torch.equal(load(kept), given_ - 1) and torch.equal(load(LESS_ONE.to_hf(kept)), given_)
    again = LESS_ONE.to_megatron(LESS_ONE.to_hf(kept))
    assert torch.equal(load(again), given_ - 1)
    moved = given_ - 1
    moved[0] += 0.5
    mixed = LESS_ONE.kept(vector(moved), vector(given_))
    assert LESS_ONE.moved(mixed) == 1
    changed = load(LESS_ONE.to_hf(mixed))
    assert changed[0] == (moved + 1)[0] and torch.equal(changed[1:], given_[1:])


@pytest.mark.parametrize("to", ["packed", "torch", "torch_dist"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_norms_come_back_exactly_through_the_sidecar(tmp_path: Path, to: str, dtype: str | None) -> None:
    source = save_model(tmp_path / "hf", "qwen3_next", dtype="bfloat16")
    hf = load_file(source / "model.safetensors")
    name = "model.layers.0.linear_attn.norm.weight"
    assert not torch.equal(hf[name] - 1 + 1, hf[name])  # by their numbers alone they would not
    convert(source, tmp_path / "meg", to=to, dtype=dtype)
    convert(tmp_path / "meg", tmp_path / "other", to="torch", grid=Parallelism(2))
    convert(tmp_path / "other", tmp_path / "back", to="hf", dtype=None if dtype is None else "bfloat16")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[name], hf[name])
    (tmp_path / "other" / "ckptkit" / "originals.safetensors").unlink()
    without = convert(tmp_path / "other", tmp_path / "without", to="hf")
    assert any("2 norms are stored less one, and there are no originals" in note for note in without.notes)
    found = load_file(tmp_path / "without" / "model.safetensors")[name]
    wide = hf[name] if dtype is None else hf[name].float()
    assert torch.equal(found, wide - 1 + 1)


@pytest.mark.parametrize("to", ["packed", "torch_dist"])
def test_originals_that_megatrons_numbers_are_not_of(tmp_path: Path, to: str) -> None:
    """Those of another model are said not to count, and so are those of norms that were trained."""
    source = save_model(tmp_path / "hf", "qwen3_next", dtype="bfloat16")
    assert not any("originals" in note for note in convert(source, tmp_path / "meg", to=to).notes)
    file = tmp_path / "meg" / "ckptkit" / "originals.safetensors"
    own, name = load_file(file), "model.layers.0.linear_attn.norm.weight"
    assert not any("originals" in note for note in convert(tmp_path / "meg", tmp_path / "same", to="hf").notes)
    save_file({one: tensor + 0.5 for one, tensor in own.items()}, file)
    others = convert(tmp_path / "meg", tmp_path / "others", to="hf")
    assert any("24 of 24 numbers of 2 of 2 norms are not those" in note for note in others.notes), others.notes
    assert torch.equal(load_file(tmp_path / "others" / "model.safetensors")[name], own[name] - 1 + 1)
    own[name][3] += 0.5  # as if this one had been trained
    save_file(own, file)
    again = convert(tmp_path / "meg", tmp_path / "ranks", to="torch", grid=Parallelism(2))
    assert any("1 of 12 numbers of 1 of 2 norms" in note for note in again.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.1.linear_attn.norm.weight": torch.zeros(VALUE_DIM)}, "which Megatron has as it is, or not"),
        ({"model.layers.0.linear_attn.norm.weight": torch.zeros(5)}, r"F32\[5\], the config says \[12\]"),
        ({"model.layers.0.linear_attn.norm.weight": torch.zeros(VALUE_DIM, dtype=torch.int32)}, r"I32\[12\]"),
    ],
)
def test_originals_of_another_model_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source = save_model(tmp_path / "hf", "qwen3_next")
    convert(source, tmp_path / "meg", to="packed")
    save_file(change, tmp_path / "meg" / "ckptkit" / "originals.safetensors")
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path / "meg")


def test_decays_keep_their_type(tmp_path: Path) -> None:
    """Some archives have A_log in float32; only --dtype casts it, and says so."""
    source = save_model(tmp_path / "hf", "qwen3_5_moe_text", dtype="bfloat16")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors |= {
        name: tensor.float() for name, tensor in tensors.items() if name.endswith(("A_log", "attn.norm.weight"))
    }
    save_file(tensors, file, metadata={"format": "pt"})
    convert(source, tmp_path / "meg", to="torch_dist", grid=Parallelism(2))
    convert(tmp_path / "meg", tmp_path / "ranks", to="torch", grid=Parallelism(4))
    held = of_rank(tmp_path / "ranks", 0)
    assert held["decoder.layers.0.self_attention.A_log"].dtype == torch.float32
    assert held["decoder.layers.0.self_attention.dt_bias"].dtype == torch.bfloat16
    convert(tmp_path / "ranks", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    cast = convert(source, tmp_path / "cast", to="torch", dtype="bfloat16")
    assert any("F32 -> BF16" in loss for loss in cast.lossy)


@pytest.mark.parametrize("kind", ["qwen3_5_moe_text", "qwen3_5_moe"])
@pytest.mark.parametrize("archive", ["per expert", "stacked", "stacked but for prediction"])
def test_archives_of_one_architecture_are_told_apart_by_names(tmp_path: Path, kind: str, archive: str) -> None:
    source = add_prediction(save_model(tmp_path / "hf", kind, dtype="bfloat16", fused=archive != "per expert"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    if archive == "stacked but for prediction":
        home = "mtp.layers.0.mlp.experts."
        gate_up, down = tensors.pop(f"{home}gate_up_proj"), tensors.pop(f"{home}down_proj")
        for expert in range(EXPERTS):
            gate, up = gate_up[expert].chunk(2)
            for name, part in (("gate", gate), ("up", up), ("down", down[expert])):
                tensors[f"{home}{expert}.{name}_proj.weight"] = part.clone()
        save_file(tensors, file, metadata={"format": "pt"})
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, 2, ep=2))
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    convert(source, tmp_path / "dist", to="torch_dist")
    convert(tmp_path / "dist", tmp_path / "again", to="hf")
    assert files_of(tmp_path / "again") == files_of(source)


def test_a_text_model_with_the_names_of_a_multimodal_one(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "qwen3_5_moe_text", dtype="bfloat16", fused=True)
    convert(source, tmp_path / "plain", to="packed")
    file = source / "model.safetensors"
    tensors = {name.replace("model.", "model.language_model.", 1): one for name, one in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    convert(source, tmp_path / "meg", to="packed")
    ours, others = (load_file(next((tmp_path / one).glob("*.safetensors"))) for one in ("plain", "meg"))
    assert ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


def test_the_text_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """Alone it loads into the class of transformers; its layer of multi-token prediction comes along."""
    from transformers import Qwen3_5MoeForCausalLM

    source = add_prediction(save_model(tmp_path / "hf", "qwen3_5_moe", fused=True))
    convert(source, tmp_path / "text", to="hf", layout="text")
    names = load_file(tmp_path / "text" / "model.safetensors").keys()
    assert "mtp.fc.weight" in names and not any("visual" in name or "language_model" in name for name in names)
    _, info = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_top_level_says_whether_the_head_is_tied(tied: bool) -> None:
    raw = raw_config("qwen3_5")
    raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"] = tied, not tied
    family = family_of(raw, "")
    config = family.parse(raw)
    assert config.tied == tied == family.parse(family.unparse(config, raw)).tied
    del raw["tie_word_embeddings"]
    assert not family.parse(raw).tied


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("qwen3_next", {"linear_num_value_heads": 6}, InputError, "6 is no multiple of linear_num_key_heads 4"),
    ("qwen3_next", {"layer_types": ["sliding_attention"] * 4}, InputError, "unknown layer_types sliding_attention"),
    ("qwen3_next", {"layer_types": None, "full_attention_interval": 0}, InputError, "full_attention_interval must be"),
    ("qwen3_next", {"num_experts_per_tok": 5}, InputError, "num_experts_per_tok 5 of num_experts 4"),
    ("qwen3_next", {"linear_conv_kernel_dim": 0}, InputError, "linear_conv_kernel_dim must be a positive integer"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, InputError, "num_experts_per_tok 5 of num_experts 4"),
    ("mixtral", {"num_experts_per_tok": 5}, InputError, "num_experts_per_tok 5 of num_local_experts 4"),
    ("qwen3_next", {"full_attention_interval": 4}, InputError, "layer 1 is full_attention by layer_types, and linear"),
    (
        "qwen3_5_text",
        {"full_attention_interval": 1},
        InputError,
        "layer 0 is linear_attention by layer_types, and",
    ),
    ("qwen3_5_text", {"attn_output_gate": False}, UnsupportedError, "attn_output_gate is False.* True for granted"),
    ("qwen3_5_text", {"attn_output_gate": 0}, UnsupportedError, "attn_output_gate is 0"),
    ("qwen3_next", {"attn_output_gate": False}, UnsupportedError, "attn_output_gate is False"),
    ("qwen3_5_moe_text", {"output_gate_type": "sigmoid"}, UnsupportedError, "output_gate_type is 'sigmoid'"),
    ("qwen3_5_text", {"linear_use_gate": False}, UnsupportedError, "linear_use_gate is False"),
    ("qwen3_next", {"linear_allow_neg_eigval": True}, UnsupportedError, "linear_allow_neg_eigval is True"),
    ("qwen3_next", {"use_sliding_window": True}, UnsupportedError, "use_sliding_window is True"),
    ("qwen3_5_text", {"mtp_use_dedicated_embeddings": True}, UnsupportedError, "mtp_use_dedicated_embeddings is True"),
    ("qwen3_5_moe_text", {"norm_topk_prob": False}, UnsupportedError, "norm_topk_prob is False"),
    ("qwen3_5_moe_text", {"mlp_only_layers": [1]}, UnsupportedError, r"mlp_only_layers is \[1\]"),
    ("qwen3_5_moe_text", {"decoder_sparse_step": 2}, UnsupportedError, "decoder_sparse_step is 2"),
]
PUBLISHED = {
    "attn_output_gate": True,
    "full_attention_interval": 2,
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "output_gate_type": "swish",
    "use_sliding_window": False,
}
"""Keys of published files beside those of the class; the layers of the tiny models have every second attention."""


@pytest.mark.parametrize(("kind", "change", "error", "words"), REFUSED)
def test_configs_that_are_refused(kind: str, change: dict[str, Any], error: type[Exception], words: str) -> None:
    raw = {**raw_config(kind), **change}
    with pytest.raises(error, match=words):
        family_of(raw, "").parse(raw)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"])
def test_configs_as_published(kind: str) -> None:
    raw = raw_config(kind)
    raw.get("text_config", raw).update(PUBLISHED)
    family = family_of(raw, "")
    config = family.parse(raw)
    assert config == family.parse(raw_config(kind)) and family.unparse(config, raw) == raw


@pytest.mark.parametrize("kept", [True, False])
def test_an_interval_that_other_layers_leave_behind_is_not_written(kept: bool) -> None:
    raw = raw_config("qwen3_next", full_attention_interval=2)
    family = family_of(raw, "")
    config = family.parse(raw)
    config = replace(config, layers=config.layers[:2] if kept else config.layers[1:3])
    after = family.unparse(config, raw)
    assert ("full_attention_interval" in after) == kept and family.parse(after) == config


def test_grids_that_heads_do_not_divide_over(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "qwen3_5_text", linear_num_key_heads=3, linear_num_value_heads=6)
    with pytest.raises(UsageError, match="3 key heads and 6 value heads of a DeltaNet do not divide over --tp 2"):
        convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))


def test_what_megatron_core_cannot_build(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "qwen3_5_text")
    with pytest.raises(UsageError, match="a DeltaNet is not in it"):
        convert(source, tmp_path / "meg", to="torch", megatron_model="hybrid")
    result = convert(source, tmp_path / "local", to="torch", spec="local")
    assert result.target["megatron_flags"] is None and any("DeltaNet" in note for note in result.notes)
    add_prediction(
        save_model(tmp_path / "last", "qwen3_5_text", layer_types=["full_attention"] * 3 + ["linear_attention"])
    )
    with pytest.raises(UnsupportedError, match="multi-token prediction behind a DeltaNet"):
        open_checkpoint(tmp_path / "last")


def test_more_than_one_layer_of_multi_token_prediction(tmp_path: Path) -> None:
    source = add_prediction(save_model(tmp_path / "hf", "qwen3_5_text"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["mtp.layers.1.input_layernorm.weight"] = tensors["mtp.norm.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="2 layers of multi-token prediction, of which"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("types", "said"),
    [("LLFL", "3"), ("LLFF", "[1,1,0,0]"), ("LFLF", "2"), ("LLLF", "4"), ("LLLL", "[1,1,1,1]"), ("FLLL", "[0,1,1,1]")],
)
def test_arguments(types: str, said: str) -> None:
    kinds = {"L": "linear_attention", "F": "full_attention"}
    raw = raw_config("qwen3_next", layer_types=[kinds[one] for one in types])
    family = family_of(raw, "")
    words = megatron_flags(family, family.parse(raw), {}) or []
    expected = {
        "--experimental-attention-variant": "gated_delta_net",
        "--linear-attention-freq": said,
        "--linear-key-head-dim": "16",
        "--linear-value-head-dim": "12",
        "--linear-num-key-heads": "4",
        "--linear-num-value-heads": "8",
    }
    assert {flag: words[words.index(flag) + 1] for flag in expected} == expected
    assert {"--attention-output-gate", "--moe-shared-expert-gate", "--apply-layernorm-1p", "--qk-layernorm"} <= set(
        words
    )


def test_by_args_alone(tmp_path: Path) -> None:
    """Without anything else it is taken for a Qwen3-Next, which has the same tensors in Megatron."""
    source = save_model(tmp_path / "hf", "qwen3_next", dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert raw["architectures"] == ["Qwen3NextForCausalLM"] and raw["linear_num_value_heads"] == VALUES
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    different = [name for name in before if not torch.equal(before[name], after[name][: len(before[name])])]
    assert all(name.endswith("linear_attn.norm.weight") for name in different)


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        ("linear_attn.conv1d", "modules of transformers"),
        ("in_proj_ba", "in two layers"),
        ("in_proj_qkvz", "in two layers"),
    ],
)
def test_layouts_of_other_trainers_are_refused_by_name(tmp_path: Path, piece: str, words: str) -> None:
    source = save_model(tmp_path / "hf", "qwen3_next")
    convert(source, tmp_path / "meg", to="torch")
    path = tmp_path / "meg" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    model = content["model"]
    model[f"decoder.layers.0.self_attention.{piece}.weight"] = model.pop(
        "decoder.layers.0.self_attention.in_proj.weight"
    )
    torch.save(content, path)
    with pytest.raises(UnsupportedError, match=words):
        open_checkpoint(tmp_path / "meg")


def test_run_config_of_megatron_bridge(tmp_path: Path) -> None:
    import yaml

    source = save_model(tmp_path / "hf", "qwen3_next", dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch_dist", grid=Parallelism(2, ep=2))
    (path,) = (tmp_path / "meg").rglob("run_config.yaml")
    model = yaml.safe_load(path.read_text())["model"]
    assert model["_target_"].endswith(".GPTModelProvider")
    expected = {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": 2,
        "linear_num_value_heads": VALUES,
        "attention_output_gate": True,
        "moe_shared_expert_gate": True,
        "layernorm_zero_centered_gamma": True,
        "hetereogenous_dist_checkpoint": True,
    }
    assert {name: model[name] for name in expected} == expected
    assert "experimental_attention_variant_spec" in model["transformer_layer_spec"]["_target_"]
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    assert open_checkpoint(tmp_path / "meg").config.layers[0].delta is not None
    local = convert(source, tmp_path / "local", to="torch_dist", spec="local")
    assert any("without Transformer Engine" in note for note in local.notes)


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text"])
def test_an_adapter_means_what_it_means_in_peft(tmp_path: Path, kind: str, to: str) -> None:
    """Rank by rank, B A is what PEFT adds to that rank's rows of the projection of a DeltaNet."""
    from peft import PeftModel

    base = save_model(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=r".*(in_proj_\w+|q_proj|k_proj|out_proj)")
    PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    written = convert(adapter, tmp_path / "lora", to=to, grid=Parallelism(2), hf_reference=base, adapter_layout="fused")
    assert written.coverage
    record = json.loads((tmp_path / "lora" / "ckptkit" / "adapter.json").read_text())
    if to == "torch_dist":  # whose ranks' rows are in the order of the ranks
        shutil.rmtree(tmp_path / "lora" / "ckptkit")
        convert(
            tmp_path / "lora",
            tmp_path / "ranks",
            to="torch",
            grid=Parallelism(2),
            hf_reference=base,
            lora_alpha=record["alpha"],
        )
    folder = tmp_path / ("lora" if to == "torch" else "ranks")
    for name in ("base", "merged"):
        convert(tmp_path / name, tmp_path / f"{name}-torch", to="torch", grid=Parallelism(2))
    factors = [of_rank(folder, rank) for rank in range(2)]
    for module in ("layers.0.self_attention.in_proj", "layers.1.self_attention.linear_qkv"):
        first, second = (f"decoder.{module}.adapter.linear_{way}.weight" for way in ("in", "out"))
        a = torch.cat([held[first] for held in factors]).double()
        for rank in range(2):
            before, after = (
                of_rank(tmp_path / f"{name}-torch", rank)[f"decoder.{module}.weight"].double()
                for name in ("base", "merged")
            )
            added = record["alpha"] / record["rank"] * factors[rank][second].double() @ a
            assert (added - (after - before)).abs().max() < 1e-5 * (after - before).abs().max(), (module, rank)


def test_an_adapter_of_the_gate_of_a_shared_expert_has_no_place(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen3_next")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["shared_expert_gate"], exclude_modules=None)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.shared_expert_gate has factors.*gate_weight is a bare"):
        convert(adapter, tmp_path / "lora", to="torch", hf_reference=base)


@pytest.mark.parametrize("release", ["0.16", "0.19"])
@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5"])
def test_multi_token_prediction_on_the_last_stage(tmp_path: Path, kind: str, release: str) -> None:
    """It has a copy of the embedding there, beside the one that serves as head if the two are tied."""
    source = add_prediction(save_model(tmp_path / "hf", kind, dtype="bfloat16"))
    result = convert(source, tmp_path / "meg", to="torch", grid=Parallelism(1, 2), megatron_core=release)
    assert any("1 layer of multi-token prediction" in note for note in result.notes)
    folder = tmp_path / "meg" / "release"
    first, last = (
        torch.load(folder / f"mp_rank_00_{stage:03}" / "model_optim_rng.pt", weights_only=False)["model"]
        for stage in range(2)
    )
    prefix, inner = "language_model." * (kind == "qwen3_5"), {"0.16": "transformer_layer", "0.19": "mtp_model_layer"}
    assert f"{prefix}mtp.layers.0.{inner[release]}.self_attention.linear_qkv.weight" in last
    embedding = f"{prefix}embedding.word_embeddings.weight"
    assert torch.equal(first[embedding], last[embedding])
    head = last[f"{prefix}output_layer.weight"]
    assert torch.equal(head, first[embedding]) == (kind == "qwen3_5")
    hf = load_file(source / "model.safetensors")
    assert torch.equal(last[f"{prefix}mtp.layers.0.eh_proj.weight"], hf["mtp.fc.weight"])
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize("alone", [False, True])
def test_a_width_that_no_layer_has_is_no_contradiction(tmp_path: Path, alone: bool) -> None:
    """Megatron-LM records the width of a dense MLP for a model without one, of its own making if it is not told any."""
    source = save_model(tmp_path / "hf", "qwen3_5_moe_text", dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    set_args(tmp_path / "meg", ffn_hidden_size=256)
    if alone:
        shutil.rmtree(tmp_path / "meg" / "ckptkit")
    found = open_checkpoint(tmp_path / "meg", hf_reference=source if alone else None)
    assert {layer.ffn_hidden_size for layer in found.config.layers} == {48} and not found.disagreements
