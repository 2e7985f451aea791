"""Round trips and resharding: the main promise, on every grid that divides."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UsageError
from ckptkit.inspection.summary import inspect
from ckptkit.sharding.grid import Parallelism
from tests.models import LLAMAS, files_of, save_llama, save_model

GRIDS = [Parallelism(tp, pp, vpp) for tp, pp, vpp in product((1, 2, 3, 4), (1, 2, 3), (1, 2)) if pp > 1 or vpp == 1]


@pytest.fixture(scope="module")
def twelve_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model of 12 layers in several shards: divides over PP 1, 2, 3 with VPP 2."""
    path = tmp_path_factory.mktemp("hf") / "model"
    return save_llama(path, "tied", num_hidden_layers=12, num_key_value_heads=12, shard="800KB", dtype="bfloat16")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_trip_is_byte_exact(twelve_layers: Path, tmp_path: Path, grid: Parallelism) -> None:
    convert(twelve_layers, tmp_path / "meg", to="torch", grid=grid)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(twelve_layers)
    assert len(list(twelve_layers.glob("*.safetensors"))) > 1


def test_round_trip_with_more_ranks_than_kv_heads(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "hf", num_key_value_heads=2)
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(4, 2))
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize("kind", LLAMAS)
@pytest.mark.parametrize("spec", ["te", "local"])
def test_every_kind_round_trips(tmp_path: Path, kind: str, spec: str) -> None:
    source = save_llama(tmp_path / "hf", kind)
    convert(source, tmp_path / "packed", to="packed", spec=spec)
    convert(tmp_path / "packed", tmp_path / "meg", to="torch", grid=Parallelism(2, 2), spec=spec)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Parallelism(4, 2), Parallelism(1, 3)),
        (Parallelism(1, 3, 2), Parallelism(3, 2, 2)),
        (Parallelism(2, 1), Parallelism(4, 3, first_stage_layers=2, last_stage_layers=2)),
        (Parallelism(1, 2, embedding_in_split=True, loss_in_split=True), Parallelism(2, 2)),
    ],
    ids=str,
)
def test_resharding_equals_direct_conversion(
    twelve_layers: Path, tmp_path: Path, first: Parallelism, second: Parallelism
) -> None:
    convert(twelve_layers, tmp_path / "one", to="torch", grid=first)
    convert(tmp_path / "one", tmp_path / "two", to="torch", grid=second)
    convert(twelve_layers, tmp_path / "direct", to="torch", grid=second)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "direct")


def test_output_does_not_depend_on_threads(twelve_layers: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        convert(twelve_layers, tmp_path / str(threads), to="torch", grid=Parallelism(2, 2), threads=threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_redundant_tied_head_comes_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = save_llama(tmp_path / "hf", "tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, 2))
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)

    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight repeats model\.embed_tokens\.weight"):
        convert(source, tmp_path / "again", to="torch")
    assert not (tmp_path / "again").exists()


def test_old_inv_freq_buffers_travel_in_the_sidecar(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = save_llama(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    for index in range(4):
        tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    assert result.coverage["in the sidecar"] == 4
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


def test_unknown_missing_and_misshaped_tensors_are_errors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = save_llama(tmp_path / "hf")
    good = load_file(source / "model.safetensors")

    def rejects(tensors: dict[str, object], match: str) -> None:
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=match):
            convert(source, tmp_path / "meg", to="torch")
        assert not (tmp_path / "meg").exists()

    rejects({**good, "model.extra.weight": good["model.norm.weight"].clone()}, r"1 unknown.*model\.extra\.weight")
    rejects({k: v for k, v in good.items() if k != "model.norm.weight"}, r"1 missing: model\.norm\.weight")
    rejects({**good, "model.norm.weight": good["model.norm.weight"][:-1].clone()}, r"is \[95\], the config says \[96\]")


def test_bad_grids_are_usage_errors(twelve_layers: Path, tmp_path: Path) -> None:
    for grid, match in (
        (Parallelism(5), r"12 attention heads do not divide over --tp 5"),
        (Parallelism(1, 5), r"12 layers do not divide"),
        (Parallelism(1, 2, 4), r"6 layers on pipeline rank 0 do not divide over --vpp 4"),
    ):
        with pytest.raises(UsageError, match=match):
            convert(twelve_layers, tmp_path / "meg", to="torch", grid=grid)


def test_dtype_casts_floats_and_config(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    source = save_llama(tmp_path / "hf")
    result = convert(source, tmp_path / "bf16", to="hf", dtype="bfloat16")
    assert result.lossy == ["27 tensors are rounded (F32 -> BF16)"]
    assert json.loads((tmp_path / "bf16" / "config.json").read_bytes())["dtype"] == "bfloat16"
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "bf16" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    assert convert(tmp_path / "bf16", tmp_path / "f32", to="packed", dtype="float32").lossy == []


def test_dry_run_writes_nothing_and_is_exact(twelve_layers: Path, tmp_path: Path) -> None:
    planned = convert(twelve_layers, tmp_path / "out", to="torch", grid=Parallelism(2, 2), dry_run=True)
    assert not list(tmp_path.iterdir())
    done = convert(twelve_layers, tmp_path / "out", to="torch", grid=Parallelism(2, 2))
    sizes = {name: len(data) for name, data in files_of(tmp_path / "out").items()}
    assert {file["path"]: file["bytes"] for file in planned.files} == sizes
    assert planned.bytes_total == done.bytes_total == sum(sizes.values())


def test_pytorch_bin_input(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    source = save_llama(tmp_path / "hf", "tied")
    old = shutil.copytree(source, tmp_path / "old")
    tensors = load_file(source / "model.safetensors")
    (old / "model.safetensors").unlink()
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, old / "pytorch_model.bin")
    convert(old, tmp_path / "new", to="hf")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_inspect_counts_parameters(twelve_layers: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    expected = LlamaForCausalLM.from_pretrained(twelve_layers).num_parameters()
    convert(twelve_layers, tmp_path / "meg", to="torch", grid=Parallelism(3, 2))
    assert inspect(twelve_layers).parameters == inspect(tmp_path / "meg").parameters == expected
    assert inspect(tmp_path / "meg").grid == "TP3 x PP2"


def test_a_source_that_is_replaced_while_it_is_planned_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensors in another order make a file of the same size."""
    from safetensors.torch import load_file, save_file

    from ckptkit.conversion import convert as conversion

    source = save_llama(tmp_path / "hf")
    plan = conversion.make_plan

    def slow(*arguments: Any) -> Any:
        made = plan(*arguments)
        tensors = load_file(source / "model.safetensors")
        renamed = dict(zip(tensors, [tensors[name] for name in reversed(tensors)], strict=True))
        save_file(renamed, source / "other", {"format": "pt"})
        (source / "other").rename(source / "model.safetensors")
        return made

    monkeypatch.setattr(conversion, "make_plan", slow)
    with pytest.raises(InputError, match="source changed while converting"):
        convert(source, tmp_path / "meg", to="torch")
    assert not (tmp_path / "meg").exists()


@pytest.mark.parametrize(
    ("to", "asked", "match"),
    [
        ("hf", {"spec": "local"}, "--spec applies only to Megatron formats"),
        ("hf", {"experts": "grouped"}, "--experts applies only to"),
        ("hf", {"make_vocab_size_divisible_by": 64}, "--make-vocab-size-divisible-by applies only"),
        ("torch", {"shard_size": 10**6}, "--shard-size applies only to safetensors"),
        ("torch_dist", {"spec": "verl"}, "--spec verl exists only as per-rank files"),
        ("torch", {"make_vocab_size_divisible_by": -8}, "must be at least 1, got -8"),
        ("torch_dist", {"make_vocab_size_divisible_by": 0}, "must be at least 1, got 0"),
        ("packed", {"make_vocab_size_divisible_by": 0}, "must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    twelve_layers: Path, tmp_path: Path, to: str, asked: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        convert(twelve_layers, tmp_path / "out", to=to, **asked)
    assert not (tmp_path / "out").exists()


def test_a_distributed_checkpoint_has_no_writers_names(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "gemma3")
    convert(source, tmp_path / "meg", to="torch", spec="mbridge")
    with pytest.raises(UsageError, match="--spec mbridge exists only as per-rank files"):
        convert(source, tmp_path / "dist", to="torch_dist", spec="mbridge")


def test_stages_have_layers(twelve_layers: Path, tmp_path: Path) -> None:
    for options in ({"first_stage_layers": -2}, {"last_stage_layers": 0}):
        with pytest.raises(UsageError, match="stage must be at least 1"):
            Parallelism(1, 2, **options)
    for options in ({"first_stage_layers": 3}, {"last_stage_layers": 3}):
        with pytest.raises(UsageError, match="need --pp above 1"):
            convert(twelve_layers, tmp_path / "out", to="torch", grid=Parallelism(**options))


def test_types_that_cannot_share_a_tensor(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = save_llama(tmp_path / "hf", dtype="bfloat16")
    good = load_file(source / "model.safetensors")

    def with_fp32(name: str) -> Path:
        save_file({**good, name: good[name].float()}, source / "model.safetensors", {"format": "pt"})
        return source

    norm = "model.layers.1.input_layernorm.weight"
    convert(with_fp32(norm), tmp_path / "meg", to="torch")
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert load_file(tmp_path / "back/model.safetensors")[norm].dtype == torch.float32
    with pytest.raises(InputError, match=r"of several types: BF16, F32.*--dtype casts"):
        convert(source, tmp_path / "dist", to="torch_dist")
    convert(source, tmp_path / "dist", to="torch_dist", dtype="bfloat16")
    with pytest.raises(InputError, match=r"k_proj.*cast them to one type first"):
        convert(with_fp32("model.layers.1.self_attn.k_proj.weight"), tmp_path / "meg2", to="torch")


def older_sidecar(folder: Path) -> None:
    """Renames what a sidecar of schema 1 called otherwise."""
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 1}))
    for file in (folder / "headers").rglob("*.header"):
        file.rename(file.with_suffix(""))


@pytest.mark.parametrize("older", [False, True])
def test_no_header_copy_is_taken_for_a_safetensors_file(tmp_path: Path, older: bool) -> None:
    source = save_llama(tmp_path / "hf", shard="100KB")
    meg = tmp_path / "meg"
    convert(source, meg, to="torch")
    assert not list(meg.rglob("*.safetensors")) and list(meg.rglob("*.safetensors.header"))
    if older:
        older_sidecar(meg / "ckptkit")
    convert(meg, tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


def test_a_header_copy_with_an_older_name_is_refused(tmp_path: Path) -> None:
    convert(save_llama(tmp_path / "hf"), tmp_path / "meg", to="torch")
    file = tmp_path / "meg" / "ckptkit" / "headers" / "model.safetensors.header"
    file.rename(file.with_suffix(""))
    with pytest.raises(InputError, match=r"does not end in \.header"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf")
