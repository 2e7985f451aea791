"""A split Llama as a family: every format and many grids give the same files back; each rank has what is its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.recognition import recognise
from ckptkit.cli import app as cli
from ckptkit.conversion.architectures import supported_architectures
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_called
from ckptkit.families.split_llama import CODE, SPLIT_LLAMA, parse, unparse
from ckptkit.inspection.summary import inspect
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.megatron_args.reading import from_args
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import Adapter
from ckptkit.verification import verify
from tests.models import files_of
from tests.surgery.pairs import FIRST as FIRST_SIZES
from tests.surgery.pairs import KINDS, NARROW, NUM_FIRST, WIDE, build_split, save_half
from tests.surgery.pairs import LAST as LAST_SIZES

GRIDS = [
    Parallelism(2),
    Parallelism(4),
    Parallelism(1, 5),
    Parallelism(2, 2, first_stage_layers=2),
    Parallelism(2, 2, first_stage_layers=2, adapter_first=True),
    Parallelism(2, 2, first_stage_layers=1),
    Parallelism(1, 2, last_stage_layers=1),
    Parallelism(1, 3, first_stage_layers=1, last_stage_layers=2, adapter_first=True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_trip(tmp_path: Path, splits: dict[str, Path], kind: str, grid: Parallelism) -> None:
    source, spec = splits[kind], ("te", "local")[grid.pp % 2]
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec=spec)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    found = open_checkpoint(tmp_path / "meg")
    assert (found.grid, found.config) == (grid, open_checkpoint(source).config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_in_any_order(tmp_path: Path, splits: dict[str, Path], kind: str) -> None:
    source, grid = splits[kind], Parallelism(2, 2, first_stage_layers=2, adapter_first=True)
    convert(source, tmp_path / "packed", to="packed")
    convert(tmp_path / "packed", tmp_path / "dist", to="torch_dist", grid=grid)
    convert(tmp_path / "dist", tmp_path / "legacy", to="torch", grid=grid)
    convert(source, tmp_path / "direct", to="torch", grid=grid)
    assert files_of(tmp_path / "legacy") == files_of(tmp_path / "direct")
    convert(tmp_path / "legacy", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    assert inspect(tmp_path / "dist").parameters == inspect(source).parameters
    convert(source, tmp_path / "other", to="torch_dist", grid=Parallelism(1, 5))
    convert(tmp_path / "other", tmp_path / "again", to="torch_dist", grid=grid)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "dist")


def test_virtual_stages(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The cut falls inside a chunk, between chunks of different ranks, and between two of one rank's neighbours."""
    for num_first, num_last in ((1, 3), (2, 2), (3, 5)):
        source = build_split(tmp_path / f"{num_first}", pair, "mlp", num_first=num_first, num_last=num_last)
        for adapter_first in (False, True):
            grid = Parallelism(2, 2, 2, adapter_first=adapter_first)
            name = f"{num_first}-{adapter_first}"
            convert(source, tmp_path / f"meg{name}", to="torch", grid=grid)
            convert(tmp_path / f"meg{name}", tmp_path / f"back{name}", to="hf")
            assert files_of(tmp_path / f"back{name}") == files_of(source)


def holders(path: Path) -> dict[tuple[int, int], set[str]]:
    """(pp rank, chunk) -> what it holds of the adapter, at TP1."""
    found = {}
    for file in sorted(path.rglob("model_optim_rng.pt")):
        content = torch.load(file, weights_only=False)
        pp_rank = int(file.parent.name.split("_")[3]) if file.parent.name.count("_") > 2 else 0
        for key in (key for key in content if key.startswith("model")):
            names = {name for name in content[key] if ".adapter." in name and not name.endswith("_extra_state")}
            found[pp_rank, int(key[5:] or 0)] = names
    return found


def test_the_adapter_lives_where_the_cut_is(tmp_path: Path, splits: dict[str, Path]) -> None:
    both = {f"decoder.adapter.linear_{number}.weight" for number in (1, 2)}
    cases = [
        (Parallelism(1, 2, first_stage_layers=2), 1),
        (Parallelism(1, 2, first_stage_layers=2, adapter_first=True), 0),
        (Parallelism(1, 2, first_stage_layers=3), 0),
        (Parallelism(1, 2, first_stage_layers=1, adapter_first=True), 1),
        (Parallelism(1, 5), 2),
        (Parallelism(1, 5, adapter_first=True), 1),
    ]
    for number, (grid, home) in enumerate(cases):
        convert(splits["mlp"], tmp_path / str(number), to="torch", grid=grid)
        assert {rank for (rank, _), names in holders(tmp_path / str(number)).items() if names == both} == {home}
        assert sum(map(bool, holders(tmp_path / str(number)).values())) == 1


def test_the_command_line_places_the_adapter(tmp_path: Path, splits: dict[str, Path]) -> None:
    grid = ["--pp", "2", "--decoder-first-pipeline-num-layers", "2"]
    for name, more, home in (("after", [], 1), ("before", ["--adapter-first"], 0)):
        arguments = ["convert", str(splits["linear"]), str(tmp_path / name), "--to", "torch", *grid, *more]
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
        assert [rank for (rank, _), names in holders(tmp_path / name).items() if names] == [home]


def test_verified_byte_by_byte(tmp_path: Path, splits: dict[str, Path]) -> None:
    convert(splits["mlp"], tmp_path / "meg", to="torch", grid=Parallelism(2, 5))
    assert verify(splits["mlp"], tmp_path / "meg", level="weights").passed
    other = edited(splits["mlp"], tmp_path / "other", lambda t: t["model.adapter_linear_2.weight"].neg_())
    assert not verify(other, tmp_path / "meg", level="weights").passed


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_hold_whole_head_groups(splits: dict[str, Path], tp: int) -> None:
    """Published code concatenates q, k and v and then chunks: the first of two ranks gets nothing but queries."""
    source, stored = open_checkpoint(splits["mlp"]), load_file(splits["mlp"] / "model.safetensors")
    for rank in range(tp):
        shard = source.shard(tp_rank=rank, tp=tp)
        for layer in range(source.config.num_layers):
            place = f"model.layers_first.{layer}" if layer < NUM_FIRST else f"model.layers_last.{layer - NUM_FIRST}"
            sizes = source.config.layers[layer]
            query, key, value = (stored[f"{place}.self_attn.{name}_proj.weight"] for name in "qkv")
            groups = [
                torch.cat((q, k, v))
                for q, k, v in zip(
                    query.chunk(sizes.num_kv_heads),
                    key.chunk(sizes.num_kv_heads),
                    value.chunk(sizes.num_kv_heads),
                    strict=True,
                )
            ]
            qkv = torch.cat(groups).chunk(tp)[rank]
            assert torch.equal(shard[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"], qkv)
            gate, up = (stored[f"{place}.mlp.{name}_proj.weight"].chunk(tp)[rank] for name in ("gate", "up"))
            assert torch.equal(shard[f"decoder.layers.{layer}.mlp.linear_fc1.weight"], torch.cat((gate, up)))
            down = stored[f"{place}.mlp.down_proj.weight"].chunk(tp, 1)[rank]
            assert torch.equal(shard[f"decoder.layers.{layer}.mlp.linear_fc2.weight"], down)
        embedding, head = stored["model.embed_tokens.weight"], stored["lm_head.weight"]
        rows = shard["embedding.word_embeddings.weight"]
        assert rows.shape == (128, NARROW)
        real = embedding[rank * 128 : (rank + 1) * 128]
        assert torch.equal(rows[: len(real)], real) and not rows[len(real) :].any()
        real = head[rank * 128 : (rank + 1) * 128]
        assert torch.equal(shard["output_layer.weight"][: len(real)], real)
        one, two = (stored[f"model.adapter_linear_{number}.weight"] for number in (1, 2))
        assert torch.equal(shard["decoder.adapter.linear_1.weight"], one.chunk(tp)[rank])
        assert torch.equal(shard["decoder.adapter.linear_2.weight"], two.chunk(tp, 1)[rank])


def test_a_diverging_adapter_is_found(tmp_path: Path, splits: dict[str, Path]) -> None:
    """Column and row shards join to exactly the matrices; a rank with a shard too wide is an error."""
    convert(splits["mlp"], tmp_path / "meg", to="torch", grid=Parallelism(2))
    file = tmp_path / "meg" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["decoder.adapter.linear_2.weight"] = content["model"]["decoder.adapter.linear_2.weight"][:, :-1]
    torch.save(content, file)
    with pytest.raises(InputError, match=r"decoder\.adapter\.linear_2\.weight is \[128, 127\], .* \[128, 128\]"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf")
    del content["model"]["decoder.adapter.linear_1.weight"]
    torch.save(content, file)
    with pytest.raises(InputError, match=r"missing: decoder\.adapter\.linear_1\.weight"):
        open_checkpoint(tmp_path / "meg")


def edited(source: Path, target: Path, change: Any) -> Path:
    """A copy of a split Llama whose tensors went through `change`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_and_unknown_tensors_are_errors(tmp_path: Path, splits: dict[str, Path]) -> None:
    """Published code warns of missing tensors and goes on with random ones."""
    cases = [
        ("linear", lambda t: t.pop("model.adapter.weight"), r"1 missing: model\.adapter\.weight"),
        ("mlp", lambda t: t.pop("model.adapter_linear_2.weight"), r"1 missing: model\.adapter_linear_2\.weight"),
        ("mlp", lambda t: t.pop("model.layers_last.2.mlp.up_proj.weight"), r"1 missing: model\.layers_last\.2"),
        ("linear", lambda t: t.update({"model.layers.0.x": torch.ones(1)}), r"unknown to this family: model\.layers"),
        (
            "linear",
            lambda t: t.update({"model.adapter.weight": torch.ones(WIDE, WIDE)}),
            r"the config says \[128, 64\]",
        ),
    ]
    for number, (kind, change, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            open_checkpoint(edited(splits[kind], tmp_path / str(number), change))


def test_config_translation(splits: dict[str, Path]) -> None:
    for kind, path in splits.items():
        raw = json.loads((path / "config.json").read_text())
        config = parse(raw)
        assert config.adapter == Adapter(kind, NUM_FIRST, NARROW)
        assert [layer.hidden_size for layer in config.layers] == [NARROW, NARROW, None, None, None]
        assert unparse(config, raw) == raw
        assert parse(unparse(config, {})) == config
        changed = replace(config, dtype="float32", max_position_embeddings=512, init_std=0.5)
        assert parse(unparse(changed, raw)) == changed
        shorter = replace(config, layers=config.layers[1:], adapter=Adapter(kind, NUM_FIRST - 1, NARROW))
        assert parse(unparse(shorter, raw)) == shorter
        args = to_args(SPLIT_LLAMA, config, Parallelism(2, 2), 256, 128)
        assert from_args(SPLIT_LLAMA, args, config) == config
        assert from_args(SPLIT_LLAMA, {**args, "adapter_after": 1}, config) != config
        assert any("widths 64 and 128" in text for text in inexpressible(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "cubic"}, "adapter must be one of linear, two-linear, mlp"),
        ({"mlp": True}, "adapter is linear, but mlp is True"),
        ({"num_layers_8": 3}, "num_layers_8 is 3, the halves have 2 layers"),
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6"),
        ({"vocab_size": 300}, "vocab_size is 300"),
        ({"last_config": None}, "lacks first_config and last_config"),
        ({"first_config": 7}, "first_config must be an object"),
    ],
)
def test_contradictory_configs(splits: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    raw = json.loads((splits["linear"] / "config.json").read_text())
    with pytest.raises(InputError, match=message):
        parse({**raw, **changes})


def test_halves_that_do_not_fit(splits: dict[str, Path]) -> None:
    raw = json.loads((splits["linear"] / "config.json").read_text())
    raw["last_config"]["hidden_act"] = "gelu"
    with pytest.raises(UnsupportedError, match="activation silu and gelu"):
        parse(raw)


def test_without_a_sidecar(tmp_path: Path, splits: dict[str, Path]) -> None:
    """Names tell the family, but args do not tell both halves: the reference does."""
    convert(splits["two-linear"], tmp_path / "meg", to="torch", grid=Parallelism(2))
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    with pytest.raises(InputError, match="pass --hf-reference"):
        open_checkpoint(tmp_path / "meg")
    convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=splits["two-linear"])
    assert files_of(tmp_path / "back") == files_of(splits["two-linear"])


def test_args_that_contradict_the_adapter(tmp_path: Path, splits: dict[str, Path]) -> None:
    convert(splits["mlp"], tmp_path / "meg", to="packed")
    file = tmp_path / "meg" / "megatron_args.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "adapter_kind": "two-linear"}))
    with pytest.raises(InputError, match="args say adapter"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf")


def test_strict_config_refuses(tmp_path: Path, splits: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match="an adapter between them"):
        convert(splits["mlp"], tmp_path / "meg", to="packed", strict_config=True)


def test_registered_and_recognised(splits: dict[str, Path]) -> None:
    architectures = {entry.architecture: entry.family for entry in supported_architectures()}
    assert architectures["CustomSplitLLamaForCausalLM"] == "split_llama"
    for path in splits.values():
        assert recognise(open_checkpoint(path).items).name == "split_llama"
    llama = family_called("llama")
    assert not llama.fits(open_checkpoint(splits["linear"]).items)
    assert not family_called("split_llama").fits(["embedding.word_embeddings.weight"])


def test_a_cast_reaches_every_config(tmp_path: Path, splits: dict[str, Path]) -> None:
    convert(splits["mlp"], tmp_path / "f32", to="hf", dtype="float32")
    raw = json.loads((tmp_path / "f32" / "config.json").read_text())
    assert {raw["dtype"], raw["first_config"]["dtype"], raw["last_config"]["dtype"]} == {"float32"}


# The published layout


def legacy(source: Path, target: Path) -> Path:
    result = convert(source, target, to="hf", layout="legacy")
    assert any("legacy" in text for text in result.lossy)
    return target


def rewrite(path: Path, **changes: Any) -> Path:
    """Changes config.json; a value of None removes a key."""
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return path


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_legacy_layout_is_written_and_read(tmp_path: Path, splits: dict[str, Path], kind: str) -> None:
    written = legacy(splits[kind], tmp_path / "legacy")
    raw = json.loads((written / "config.json").read_text())
    assert raw["model_type"] == "llama" and "auto_map" not in raw and "first_config" not in raw
    assert (raw["num_layers_8"], raw["num_layers_70"], raw["mlp"]) == (2, 3, kind == "mlp")
    assert raw["hidden_size"] == NARROW and Path(raw["path70b"]).name == "last"
    assert not {file.name for file in CODE} & {file.name for file in written.iterdir()}
    convert(written, tmp_path / "back", to="hf")
    ours, back = open_checkpoint(splits[kind]), open_checkpoint(tmp_path / "back")
    assert back.config == ours.config and back.sidecar.config["auto_map"] == ours.sidecar.config["auto_map"]
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (splits[kind] / weights).read_bytes()
    assert {file.name for file in CODE} <= {file.name for file in (tmp_path / "back").iterdir()}
    convert(written, tmp_path / "meg", to="torch", grid=Parallelism(2))
    convert(tmp_path / "meg", tmp_path / "again", to="hf")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "back")


def test_legacy_without_the_two_models(tmp_path: Path, splits: dict[str, Path]) -> None:
    """Then sizes follow from the tensors, and the rest from the top level."""
    written = rewrite(legacy(splits["mlp"], tmp_path / "legacy"), path8b="gone/8b", path70b="gone/70b")
    found = open_checkpoint(written)
    assert found.config == open_checkpoint(splits["mlp"]).config
    assert any("path8b is not there" in note for note in found.notes)
    rewrite(written, rope_parameters=None)
    with pytest.raises(InputError, match=r"does not say rope_theta .*path8b \('gone/8b'\) is not there"):
        open_checkpoint(written)
    rewrite(written, head_dim=None, num_attention_heads=None, rms_norm_eps=None)
    with pytest.raises(InputError, match=r"head_dim .* rms_norm_eps"):
        open_checkpoint(written)


def test_legacy_paths_may_be_relative_to_the_checkpoint(tmp_path: Path, splits: dict[str, Path]) -> None:
    written = rewrite(legacy(splits["linear"], tmp_path / "legacy"), path8b="8b", path70b="70b", rms_norm_eps=None)
    raw = json.loads((splits["linear"] / "config.json").read_text())
    for name, key in (("8b", "first_config"), ("70b", "last_config")):
        (written / name).mkdir()
        (written / name / "config.json").write_text(json.dumps({**raw[key], "rms_norm_eps": 0.25}))
    assert open_checkpoint(written).config.norm_eps == 0.25


def test_legacy_tensors_decide_about_the_adapter(tmp_path: Path, splits: dict[str, Path]) -> None:
    mlp = rewrite(legacy(splits["mlp"], tmp_path / "mlp"), mlp=False)
    assert open_checkpoint(mlp).config.adapter == Adapter("two-linear", NUM_FIRST, NARROW)
    linear = rewrite(legacy(splits["linear"], tmp_path / "linear"), mlp=True)
    assert open_checkpoint(linear).config.adapter == Adapter("linear", NUM_FIRST, NARROW)


def test_legacy_directories_that_contradict_themselves(tmp_path: Path, splits: dict[str, Path]) -> None:
    written = legacy(splits["linear"], tmp_path / "legacy")
    rewrite(written, num_layers_70=4)
    with pytest.raises(InputError, match="num_layers_70 is 4, the tensors hold 3 layers"):
        open_checkpoint(written)
    rewrite(written, num_layers_70=3)
    both = {"model.adapter_linear_1.weight": torch.ones(WIDE, NARROW)}
    with pytest.raises(InputError, match="neither an adapter of one matrix nor one of two"):
        open_checkpoint(edited(written, tmp_path / "both", lambda tensors: tensors.update(both)))

    def without_last(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers_last" in name]:
            del tensors[name]

    with pytest.raises(InputError, match=r"no tensors of model\.layers_last"):
        open_checkpoint(edited(written, tmp_path / "none", without_last))
    wrong = save_half(tmp_path / "wrong", {**LAST_SIZES, "intermediate_size": 96}, 3)
    rewrite(written, path70b=str(wrong))
    with pytest.raises(InputError, match=r"of the wrong shape: model\.layers_last"):
        open_checkpoint(written)


def test_layouts_that_do_not_exist(tmp_path: Path, splits: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match="without a ReLU have no legacy layout"):
        convert(splits["two-linear"], tmp_path / "legacy", to="hf", layout="legacy")
    with pytest.raises(UsageError, match="--to packed has none"):
        convert(splits["mlp"], tmp_path / "legacy", to="packed", layout="legacy")
    llama = save_half(tmp_path / "llama", FIRST_SIZES, 1)
    with pytest.raises(UsageError, match="LlamaForCausalLM has none"):
        convert(llama, tmp_path / "legacy", to="hf", layout="legacy")
