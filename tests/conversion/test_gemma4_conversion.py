"""Gemma 4 through every format: what the model does not use travels, or is dropped and measured; nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.conversion.execution import ConversionResult
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.inspection.summary import inspect
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.weights import check_structure, check_weights
from tests.families.test_gemma4 import hub_dialect
from tests.models import MODELS, files_of, save_model

EDIT = Callable[[dict[str, Any]], None]
UNUSED = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
VALUES = "values of layers whose values are their keys"
SHARED = "keys and values of layers that use those of another"
NORMS = "norms of the keys of layers that use those of another"


def edited(folder: Path, change: EDIT, name: str = "model.safetensors") -> Path:
    """Changes the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
    return folder


def trained(folder: Path, change: EDIT) -> Path:
    """Changes the tensors of the only rank of a Megatron checkpoint."""
    import torch

    (path,) = folder.glob("release/*/model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    change(content["model"])
    torch.save(content, path)
    return folder


def with_unused(parts: tuple[str, ...] = UNUSED, prefix: str = "model.") -> EDIT:
    """Puts what the hub's files hold for layers that use the keys and values of another."""
    import torch

    def change(tensors: dict[str, Any]) -> None:
        for number in range(4, 8):
            donor = f"{prefix}layers.{number - 2}.self_attn."  # layers 4 to 7 are of the types of 2, 3, 2 and 3
            for part in parts:
                like = tensors[donor + part]
                new = torch.rand(like.shape, generator=torch.Generator().manual_seed(number)).to(like.dtype)
                tensors[f"{prefix}layers.{number}.self_attn.{part}"] = new

    return change


def records(result: ConversionResult) -> dict[str, dict[str, Any]]:
    return {record["what"]: record for record in result.dropped}


@pytest.mark.parametrize(
    ("to", "grid"), [("torch", Parallelism(2, 2)), ("torch_dist", Parallelism(2, 2)), ("packed", Parallelism())]
)
@pytest.mark.parametrize("kind", ["gemma4_text-e2b", "gemma4"])
def test_unused_tensors_of_the_hub_come_back(tmp_path: Path, kind: str, to: str, grid: Parallelism) -> None:
    prefix = "model.language_model." if kind == "gemma4" else "model."
    source = edited(save_model(tmp_path / "hf", kind, dtype="bfloat16"), with_unused(prefix=prefix))
    convert(source, tmp_path / "meg", to=to, grid=grid)
    back = convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    assert not back.dropped
    parameters = inspect(source).parameters
    assert inspect(tmp_path / "meg").parameters == parameters
    convert(source, tmp_path / "again", to="hf")
    assert files_of(tmp_path / "again") == files_of(source)


def test_any_of_the_unused_tensors_may_be_there(tmp_path: Path) -> None:
    for number, parts in enumerate([UNUSED[:1], UNUSED[1:2], UNUSED[1:]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = edited(save_model(folder / "hf", "gemma4_text-e4b"), with_unused(parts))
        convert(source, folder / "meg", to="torch")
        back = convert(folder / "meg", folder / "back", to="hf")
        assert files_of(folder / "back") == files_of(source)
        assert sum(record["parts"] for record in back.dropped) == 4 * (3 - len(parts)) + 4 * len(
            [part for part in ("k_proj.bias", "v_proj.bias")]
        )


def test_unused_tensors_of_another_shape_are_an_error(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.4.self_attn.k_norm.weight"] = tensors["model.layers.3.self_attn.k_norm.weight"].clone()

    source = edited(save_model(tmp_path / "hf", "gemma4_text-e2b"), change)
    with pytest.raises(InputError, match=r"layers\.4\.self_attn\.k_norm\.weight is \[16\], the config says \[8\]"):
        convert(source, tmp_path / "meg", to="torch")

    def unknown(tensors: dict[str, Any]) -> None:
        tensors["model.layers.3.self_attn.v_proj.weight"] = tensors["model.layers.3.self_attn.k_proj.weight"].clone()

    source = edited(save_model(tmp_path / "keys", "gemma4_text-moe"), unknown)
    with pytest.raises(InputError, match=r"1 unknown to this family: model\.layers\.3\.self_attn\.v_proj\.weight"):
        convert(source, tmp_path / "meg", to="torch")


@pytest.mark.parametrize("kind", ["gemma4_text-moe", "gemma4_text-dense"])
def test_values_that_training_moved_are_dropped_and_measured(tmp_path: Path, kind: str) -> None:
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch")
    back = convert(tmp_path / "meg", tmp_path / "unmoved", to="hf")
    assert records(back)[VALUES] == {
        "what": VALUES,
        "parts": 2,
        "elements": 2 * 2 * 16 * 96,
        "max_abs_difference": 0.0,
        "where": None,
    }

    def train(tensors: dict[str, Any]) -> None:
        fused = tensors["decoder.layers.3.self_attention.linear_qkv.weight"]
        values = fused.view(2, -1, 16, 96)[:, -1]  # the last 16 rows of each of the two groups
        values[1, 5, 7] += 0.25
        values[0, 0, 0] -= 0.125

    moved = convert(trained(tmp_path / "meg", train), tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    record = records(moved)[VALUES]
    assert record["max_abs_difference"] == pytest.approx(0.25, rel=1e-5)
    assert record["where"] == "decoder.layers.3.self_attention.linear_qkv.weight"
    planned = convert(tmp_path / "meg", tmp_path / "planned", to="hf", dry_run=True)
    assert records(planned)[VALUES]["max_abs_difference"] is None and planned.coverage["unused parts dropped"] == 2
    resharded = convert(tmp_path / "meg", tmp_path / "resharded", to="torch", grid=Parallelism(2))
    assert not resharded.dropped  # nothing stays behind between Megatron checkpoints
    again = convert(tmp_path / "resharded", tmp_path / "again", to="hf")
    assert records(again)[VALUES]["max_abs_difference"] == record["max_abs_difference"]


def test_zeros_and_ones_that_training_moved_are_dropped_and_measured(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "gemma4_text-e2b", dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch")

    def train(tensors: dict[str, Any]) -> None:
        fused = tensors["decoder.layers.5.self_attention.linear_qkv.weight"]
        assert not fused[-32:].any() and tensors["decoder.layers.5.self_attention.k_layernorm.weight"].eq(1).all()
        fused[-20, 3] = -0.5
        tensors["decoder.layers.6.self_attention.k_layernorm.weight"][2] = 1.5

    back = convert(trained(tmp_path / "meg", train), tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    found = records(back)
    assert (found[SHARED]["max_abs_difference"], found[NORMS]["max_abs_difference"]) == (0.5, 0.5)
    assert found[NORMS]["where"] == "decoder.layers.6.self_attention.k_layernorm.weight"
    assert (found[SHARED]["parts"], found[NORMS]["parts"]) == (8, 4)

    def diverge(tensors: dict[str, Any]) -> None:
        tensors["decoder.layers.6.self_attention.k_layernorm.weight"][2] = float("nan")

    broken = convert(trained(tmp_path / "meg", diverge), tmp_path / "nan", to="hf")
    assert records(broken)[NORMS]["max_abs_difference"] == float("inf")


def test_the_command_line_tells_what_was_dropped(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ckptkit.cli.app import app

    convert(save_model(tmp_path / "hf", "gemma4_text-dense"), tmp_path / "meg", to="torch")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "meg"), str(tmp_path / "back"), "--to", "hf"])
    assert f"{VALUES}: 2 parts, moved at most by 0" in " ".join(done.stdout.split())
    told = CliRunner().invoke(
        app, ["convert", str(tmp_path / "meg"), str(tmp_path / "plan"), "--to", "hf", "--dry-run", "--json"]
    )
    assert json.loads(told.stdout)["dropped"][0]["max_abs_difference"] is None


def test_verify_compares_what_the_model_uses(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "hf", "gemma4_text-e2b")
    hub = edited(Path(shutil.copytree(plain, tmp_path / "hub")), with_unused())
    convert(plain, tmp_path / "meg", to="torch")
    reference, candidate = open_checkpoint(hub), open_checkpoint(tmp_path / "meg")
    assert check_structure(reference, candidate).passed
    assert check_weights(reference, candidate).passed

    def train(tensors: dict[str, Any]) -> None:
        tensors["decoder.layers.5.self_attention.linear_qkv.weight"][0] += 1

    trained(tmp_path / "meg", train)
    result = check_weights(reference, open_checkpoint(tmp_path / "meg"))
    assert not result.passed and "layers.5.self_attn.q_proj.weight" in result.details["problems"][0]


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Keys and shapes of a distributed checkpoint, as torch reads them."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(folder / "release").read_metadata().state_dict_metadata
    return {key: list(entry.size) for key, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def stored_objects(folder: Path) -> set[str]:
    """Keys of the objects of a distributed checkpoint, as torch reads them."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(folder / "release").read_metadata().state_dict_metadata
    return metadata.keys() - stored_shapes(folder).keys()


def test_attention_is_stacked_by_its_kind(tmp_path: Path) -> None:
    """Source: `sharded_state_dict` of `Gemma4SelfAttention` and `Gemma4DenseSelfAttention`, Megatron-Bridge 0.6.2."""
    types = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    convert(save_model(tmp_path / "moe", "gemma4_text-moe", layer_types=types), tmp_path / "m", to="torch_dist")
    found = stored_shapes(tmp_path / "m")
    block = "decoder.layers."
    assert found[f"{block}self_attention_sliding.linear_qkv.weight"] == [3, (12 + 2 * 4) * 8, 96]
    assert found[f"{block}self_attention_global.linear_qkv.weight"] == [1, (12 + 2 * 2) * 16, 96]
    assert found[f"{block}self_attention_sliding.linear_proj.post_layernorm.weight"] == [3, 96]
    assert found[f"{block}mlp.experts.experts.linear_fc1.weight"] == [4, 4, 96, 96]
    assert found[f"{block}layer_scalar"] == [4, 1]
    assert not any(".self_attention." in key for key in found)
    states = stored_objects(tmp_path / "m")
    assert f"{block}self_attention_sliding.linear_qkv._extra_state/shard_2_3" in states
    assert f"{block}self_attention_global.linear_qkv._extra_state/shard_0_1" in states
    assert f"{block}pre_mlp_layernorm._extra_state/shard_3_4" in states
    unlike = ("post_ffn_layernorm", "shared_expert_layernorm", "core_attention")
    assert not any(part in key for key in states for part in unlike)

    convert(save_model(tmp_path / "dense", "gemma4_text-dense", layer_types=types), tmp_path / "d", to="torch_dist")
    found = stored_shapes(tmp_path / "d")
    assert found[f"{block}self_attention_sliding.q_layernorm.weight"] == [3, 8]
    assert found[f"{block}input_layernorm.weight"] == [4, 96]
    states = stored_objects(tmp_path / "d")
    assert f"{block}self_attention_global.linear_proj._extra_state/shard_0_1" in states
    assert {key for key in states if "norm" in key} == {"decoder.final_layernorm._extra_state/shard_0_1"}
    assert not any("core_attention" in key for key in states)

    convert(save_model(tmp_path / "e2b", "gemma4_text-e2b"), tmp_path / "e", to="torch_dist")  # MLPs of two widths
    found = stored_shapes(tmp_path / "e")
    assert found[f"{block}0.self_attention_sliding.linear_qkv.weight"] == [(12 + 2) * 8, 96]
    assert found[f"{block}7.self_attention_global.linear_qkv.weight"] == [(12 + 2) * 16, 96]
    assert found[f"{block}7.mlp.linear_fc2.weight"] == [96, 288]
    assert found["per_layer_embedding.weight"] == [252, 128]
    assert "per_layer_model_proj._extra_state/shard_0_1" in stored_objects(tmp_path / "e")


def test_attention_of_another_kind_than_config_says_is_an_error(tmp_path: Path) -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    source = save_model(tmp_path / "hf", "gemma4_text-dense")
    convert(
        save_model(
            tmp_path / "other",
            "gemma4_text-dense",
            layer_types=["sliding_attention", *types[1:2], "sliding_attention", "full_attention"],
        ),
        tmp_path / "meg",
        to="torch_dist",
    )
    with pytest.raises(InputError, match=r"self_attention_sliding.*the config has 2 layers with this attention"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=source)


@pytest.mark.parametrize("to", ["torch", "packed"])
@pytest.mark.parametrize(
    ("kind", "spec"),
    [("gemma4_text-moe", "slime"), ("gemma4_text-dense", "slime_dense"), ("gemma4_text-dense", "slime_dense_fused")],
)
def test_names_of_slime_are_read(tmp_path: Path, kind: str, spec: str, to: str) -> None:
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to=to, spec=spec)
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=source)
    assert files_of(tmp_path / "back") == files_of(source)


def test_keys_without_slots_for_values_are_read(tmp_path: Path) -> None:
    """A writer that packs [query, key] where there is no value projection."""

    def bare(tensors: dict[str, Any]) -> None:
        for number in (1, 3):
            name = f"decoder.layers.{number}.self_attention.linear_qkv.weight"
            tensors[name] = tensors[name].view(2, -1, 16, 96)[:, :-1].reshape(-1, 96)

    source = save_model(tmp_path / "hf", "gemma4_text-moe")
    convert(source, tmp_path / "packed", to="packed")
    result = convert(edited(tmp_path / "packed", bare), tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    assert any("2 tensors have no slots for values" in note for note in result.notes) and not result.dropped
    convert(tmp_path / "packed", tmp_path / "meg", to="torch", grid=Parallelism(2))
    convert(source, tmp_path / "direct", to="torch", grid=Parallelism(2))
    assert files_of(tmp_path / "meg") == files_of(tmp_path / "direct")

    def less(tensors: dict[str, Any]) -> None:
        name = "decoder.layers.0.self_attention.linear_qkv.weight"  # this one has values of its own
        tensors[name] = tensors[name].view(4, -1, 8, 96)[:, :-1].reshape(-1, 96)

    with pytest.raises(InputError, match=r"layers\.0\.self_attention\.linear_qkv\.weight is \[128, 96\]"):
        convert(edited(tmp_path / "packed", less), tmp_path / "no", to="hf")


def test_a_layout_that_no_table_reads_is_refused_by_name(tmp_path: Path) -> None:
    import torch

    def older(tensors: dict[str, Any]) -> None:
        tensors["decoder.layers.0.pffl_weight"] = torch.ones(96)

    convert(save_model(tmp_path / "hf", "gemma4_text-moe"), tmp_path / "packed", to="packed")
    with pytest.raises(UnsupportedError, match="as Megatron-Bridge wrote it before July 2026"):
        convert(edited(tmp_path / "packed", older), tmp_path / "back", to="hf")


def chunks(folder: Path) -> dict[str, dict[str, Any]]:
    import torch

    return {
        path.parent.name: torch.load(path, weights_only=False)["model"]
        for path in sorted(folder.glob("release/*/model_optim_rng.pt"))
    }


def test_ranks_hold_equal_parts_whatever_the_number_of_groups(tmp_path: Path) -> None:
    """megatron-core gathers where TP is above the key/value heads; nothing is stored twice."""
    source = save_model(tmp_path / "hf", "gemma4_text-e2b")
    convert(source, tmp_path / "one", to="torch")
    convert(source, tmp_path / "four", to="torch", grid=Parallelism(4))
    (whole,) = chunks(tmp_path / "one").values()
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    for rank, part in enumerate(chunks(tmp_path / "four").values()):
        assert np.array_equal(part[name], whole[name].chunk(4)[rank])


def test_per_layer_inputs_live_where_the_embedding_does(tmp_path: Path) -> None:
    result = convert(
        save_model(tmp_path / "hf", "gemma4_text-e4b"), tmp_path / "meg", to="torch", grid=Parallelism(2, 2)
    )
    held = chunks(tmp_path / "meg")
    names = ("per_layer_embedding.weight", "per_layer_model_proj.weight", "per_layer_proj_norm.weight")
    for name in names:
        assert [name in chunk for chunk in held.values()] == [True, False, True, False]
    assert held["mp_rank_00_000"][names[0]].shape == (126, 128)  # not padded
    assert any("keeps them together" in note for note in result.notes)
    alone = convert(
        tmp_path / "hf", tmp_path / "fits", to="torch", grid=Parallelism(1, 2, last_stage_layers=6), dry_run=True
    )
    assert not any("keeps them together" in note for note in alone.notes)


def test_extra_states_are_those_of_the_modules(tmp_path: Path) -> None:
    convert(save_model(tmp_path / "moe", "gemma4_text-moe"), tmp_path / "m", to="torch")
    (chunk,) = chunks(tmp_path / "m").values()
    states = {name.removesuffix("._extra_state") for name in chunk if name.endswith("_extra_state")}
    assert {"decoder.layers.0.pre_mlp_layernorm", "decoder.layers.0.mlp.shared_experts.linear_fc1"} <= states
    assert not any(name.endswith(("post_ffn_layernorm", "post_moe_layernorm", "expert_layernorm")) for name in states)
    convert(save_model(tmp_path / "dense", "gemma4_text-dense"), tmp_path / "d", to="torch")
    (chunk,) = chunks(tmp_path / "d").values()
    assert not any("_extra_state" in name for name in chunk)


def test_text_part_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_model(tmp_path / "hf", "gemma4")
    result = convert(source, tmp_path / "text", to="hf", layout="text")
    assert any("left out (--layout text)" in text for text in result.lossy)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(info.values())
    assert json.loads((tmp_path / "text" / "config.json").read_text())["architectures"] == ["Gemma4ForCausalLM"]
    convert(source, tmp_path / "meg", to="torch", layout="text")
    assert not any(name.startswith("language_model.") for chunk in chunks(tmp_path / "meg").values() for name in chunk)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


def test_without_a_sidecar_args_are_enough(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for kind in ("gemma4_text-moe", "gemma4_text-e2b"):
        source = save_model(tmp_path / kind, kind)
        convert(source, tmp_path / f"{kind}-meg", to="torch_dist")
        shutil.rmtree(tmp_path / f"{kind}-meg" / "ckptkit")
        convert(tmp_path / f"{kind}-meg", tmp_path / f"{kind}-back", to="hf")
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in (kind, f"{kind}-back"))
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_casts_reach_the_slots(tmp_path: Path) -> None:
    convert(save_model(tmp_path / "hf", "gemma4_text-e4b"), tmp_path / "meg", to="torch", dtype="bfloat16")
    (chunk,) = chunks(tmp_path / "meg").values()
    assert {str(tensor.dtype) for tensor in chunk.values()} == {"torch.bfloat16"}
    assert chunk["decoder.layers.4.self_attention.k_layernorm.weight"].eq(1).all()
    assert not convert(tmp_path / "meg", tmp_path / "back", to="hf").dropped[0]["max_abs_difference"]


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.startswith("gemma4")])
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_the_older_dialect_of_config_json(tmp_path: Path, kind: str, to: str) -> None:
    """As transformers up to 5.14 writes it; byte for byte through both formats, all shapes."""
    source = save_model(tmp_path / "hf", kind, dtype="bfloat16")
    raw, old = json.loads((source / "config.json").read_text()), hub_dialect(kind)
    text, sizes = (config.get("text_config", config) for config in (raw, old))
    text.pop("per_layer_config")
    text.update({key: sizes[key] for key in ("global_head_dim", "num_global_key_value_heads")})
    (source / "config.json").write_text(json.dumps(raw, indent=2))
    convert(source, tmp_path / "meg", to=to, grid=Parallelism(2, 2, ep=2 if "moe" in kind else 1))
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_dropped_is_measured_in_the_type_that_is_written(tmp_path: Path, dtype: str) -> None:
    """Zeros and ones of layers without keys of their own are cast like everything else, and have not moved."""
    source = save_model(tmp_path / "hf", "gemma4_text-e4b", dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", dtype=dtype, hf_reference=source)
    assert all(record["max_abs_difference"] == 0.0 for record in result.dropped)
    convert(source, tmp_path / "direct", to="hf", dtype=dtype)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "direct")
