"""`--quantise original`: the sidecar keeps the scales of a quantised source, and gives its codes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit.conversion.choosing import choices_of
from ckptkit.conversion.convert import convert
from ckptkit.editing.commands import Output, average
from ckptkit.errors import InputError, UsageError
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from ckptkit.sharding.grid import Parallelism
from tests.conversion.test_reading_quantised import KINDS, tensors_of
from tests.conversion.test_writing_quantised import GATE, GRID, change, with_odd_values
from tests.models import files_of, save_llama, save_model
from tests.quantised import quantise_fp8, quantise_int4, quantise_mxfp4

KEPT = Path("ckptkit/quantised")
SCALE = f"{GATE}.weight_scale_inv"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain") / "hf", "deepseek_v3", dtype="bfloat16", num_hidden_layers=2)


@pytest.fixture(scope="module")
def made(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 archive, and the distributed checkpoint that was made of it."""
    folder = tmp_path_factory.mktemp("made")
    quantise_fp8(plain, folder / "archive")
    convert(folder / "archive", folder / "meg", to="torch_dist", grid=GRID)
    return folder


def with_nan(tensors: dict[str, Any]) -> None:
    """Codes of NaN, of both signs and the codes beside them, whose scale is a usual one."""
    if f"{GATE}.weight" in tensors:
        tensors[f"{GATE}.weight"].view(torch.uint8)[0, :4] = torch.tensor([127, 255, 126, 254], dtype=torch.uint8)


@pytest.mark.parametrize("kind", [*KINDS, "nan", "odd values"])
def test_what_was_not_touched_comes_back_without_the_archive(plain: Path, tmp_path: Path, kind: str) -> None:
    archive, odd = tmp_path / "archive", {"nan": with_nan, "odd values": with_odd_values}
    KINDS.get(kind, quantise_fp8)(plain, archive)
    if kind in odd:
        change(archive, odd[kind])
    convert(archive, tmp_path / "meg", to="torch_dist", grid=GRID)
    expected = files_of(archive)
    shutil.rmtree(archive)
    assert (tmp_path / "meg" / KEPT / "codes.safetensors").exists() == (kind == "odd values")
    convert(tmp_path / "meg", tmp_path / "other", to="torch", grid=Parallelism(1, 2))
    for source in ("meg", "other"):
        result = convert(tmp_path / source, tmp_path / "back", to="hf", quantise="original", overwrite=True)
        assert files_of(tmp_path / "back") == expected
        assert result.likeness == {"same": result.target["quantised"]["tensors"], "old_scales": [], "new_scales": []}


def test_mxfp4(tmp_path: Path) -> None:
    quantise_mxfp4(save_model(tmp_path / "plain", "gpt_oss", dtype="bfloat16"), tmp_path / "archive")
    convert(tmp_path / "archive", tmp_path / "meg", to="torch_dist", grid=Parallelism(1, 2, ep=2))
    convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise="original")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "archive")
    kept, archive = tensors_of(tmp_path / "meg" / KEPT), tensors_of(tmp_path / "archive")
    assert kept.keys() == {name for name in archive if name.endswith("_scales")}


@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_int4])
def test_one_weight_that_was_trained(plain: Path, tmp_path: Path, quantise: Callable[[Path, Path], object]) -> None:
    archive, weight = tmp_path / "archive", f"{GATE}.weight"
    quantise(plain, archive)
    convert(archive, tmp_path / "meg", to="packed")

    def train(tensors: dict[str, Any]) -> None:
        name = "decoder.layers.1.mlp.experts.linear_fc1.weight3"
        if name in tensors:
            tensors[name][5, 7] = 0.12345

    change(tmp_path / "meg", train)
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise="original")
    old, new = tensors_of(archive), tensors_of(tmp_path / "back")
    differ = [name for name in old if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))]
    assert old.keys() == new.keys() and differ and all(name.startswith(GATE) for name in differ)
    assert result.likeness is not None and result.likeness["old_scales"] == []
    assert result.likeness["new_scales"] == [{"tensor": weight, "max_abs_difference": None, "relative_rms": None}]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(kept: Path) -> None:
        tensors = load_file(kept / "scales.safetensors")
        change(tensors)
        save_file(tensors, kept / "scales.safetensors", metadata={"format": "pt"})

    return damage


def no_quantisation(kept: Path) -> None:
    config = json.loads((kept / "config.json").read_bytes())
    del config["quantization_config"]
    (kept / "config.json").write_text(json.dumps(config))


def codes(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda kept: save_file({name: tensor}, kept / "codes.safetensors")


FIRST = "headers/model-00001-of-00002.safetensors.header"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (edit(lambda found: found.pop(SCALE)), rf"scales.safetensors: lacks {SCALE} \(1 missing\)"),
    "strange": (edit(lambda found: found.update(odd=found[SCALE].clone())), "holds odd, which the archive did not"),
    "of no codes": (
        edit(lambda found: found.update({"model.norm.weight": torch.zeros(96, dtype=torch.bfloat16)})),
        "holds model.norm.weight, which belongs to no codes",
    ),
    "transposed": (
        edit(lambda found: found.update({SCALE: found[SCALE].T.contiguous()})),
        rf"{SCALE} is F32\[3, 2\], in the archive F32\[2, 3\]",
    ),
    "another type": (
        edit(lambda found: found.update({SCALE: found[SCALE].bfloat16()})),
        rf"{SCALE} is BF16\[2, 3\], in the archive F32",
    ),
    "no folder": (lambda kept: (shutil.rmtree(kept), kept.write_text("")), "it is no folder"),
    "no scales": (lambda kept: (kept / "scales.safetensors").unlink(), r"lacks .* missing\)"),
    "no record": (lambda kept: (kept / "record.json").unlink(), "no such file"),
    "strange record": (lambda kept: (kept / "record.json").write_text('{"read_as": "F8_E4M3"}'), "record.json"),
    "no config": (lambda kept: (kept / "config.json").unlink(), "no such file"),
    "plain config": (no_quantisation, "says nothing of quantised weights"),
    "a header less": (lambda kept: (kept / FIRST).unlink(), "scales.safetensors: holds .*, which the archive did not"),
    "a header cut short": (lambda kept: (kept / FIRST).write_bytes(b"\x10"), "damaged header copy"),
    "a link": (lambda kept: (kept / "config.json").unlink() or (kept / "config.json").symlink_to("/etc/hosts"), "link"),
    "an index of others": (
        lambda kept: (kept / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
        "an index of other files",
    ),
    "codes of another": (codes("odd", torch.zeros(1)), "codes.safetensors: holds odd, which the archive did not"),
    "no codes": (codes("model.norm.weight", torch.zeros(96, dtype=torch.bfloat16)), "norm.weight, which is no codes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_kept_is_checked(made: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(made / "meg", tmp_path / "meg")
    act, text = DAMAGES[damage]
    act(tmp_path / "meg" / KEPT)
    for ask in (
        lambda: convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise="original"),
        lambda: convert(tmp_path / "meg", tmp_path / "back", to="hf"),
        lambda: inspect(tmp_path / "meg"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            ask()
        assert str(KEPT) in str(caught.value.where) and "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("to", ["hf", "torch"])
def test_a_scale_of_another_value(made: Path, tmp_path: Path, to: str) -> None:
    shutil.copytree(made / "meg", tmp_path / "meg")
    edit(lambda found: found[SCALE].mul_(2))(tmp_path / "meg" / KEPT)
    with pytest.raises(InputError, match="the scales, or the codes beside them, are not those"):
        convert(tmp_path / "meg", tmp_path / "back", to=to, quantise="original" if to == "hf" else None)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("damage", ["another code", "no codes"])
def test_codes_that_are_kept_have_a_checksum(plain: Path, tmp_path: Path, damage: str) -> None:
    """Under a scale of zero every code means zero, so no number tells that one is another."""
    archive, kept = tmp_path / "archive", tmp_path / "meg" / KEPT / "codes.safetensors"
    quantise_fp8(plain, archive)
    change(archive, with_odd_values)
    convert(archive, tmp_path / "meg", to="torch_dist")
    codes = load_file(kept)
    codes[f"{GATE}.weight"].view(torch.uint8)[5, 40] ^= 1
    kept.unlink()
    if damage == "another code":
        save_file(codes, kept, metadata={"format": "pt"})
    with pytest.raises(InputError, match="the scales, or the codes beside them, are not those"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise="original")
    assert not (tmp_path / "back").exists()


def test_validate_reads_the_checksum(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "meg", tmp_path / "meg")
    found = validate(tmp_path / "meg")
    assert found.passed and any("and the scales of a quantised original" in check.summary for check in found.checks)
    edit(lambda found: found[SCALE].mul_(2))(tmp_path / "meg" / KEPT)
    assert validate(tmp_path / "meg", checksums=False).passed
    (failed,) = [check for check in validate(tmp_path / "meg").checks if not check.passed]
    assert failed.name == "checksums" and "are not those that it was written with" in failed.problems[0]


def test_scales_of_another_model(made: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "plain", "deepseek_v3", dtype="bfloat16", num_hidden_layers=3)
    quantise_fp8(other, tmp_path / "archive")
    convert(tmp_path / "archive", tmp_path / "other", to="torch_dist")
    shutil.copytree(made / "meg", tmp_path / "meg")
    shutil.rmtree(tmp_path / "meg" / KEPT)
    shutil.copytree(tmp_path / "other" / KEPT, tmp_path / "meg" / KEPT)
    with pytest.raises(InputError, match="describes another model than the rest of the sidecar"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise="original")


def test_where_nothing_is_kept(plain: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "meg", tmp_path / "meg")
    shutil.rmtree(tmp_path / "meg" / KEPT)
    for source in (tmp_path / "meg", plain):
        with pytest.raises(InputError, match="nothing is kept of a quantised original"):
            convert(source, tmp_path / "back", to="hf", quantise="original")
    with pytest.raises(UsageError, match="--quantise applies only to Hugging Face outputs"):
        convert(made / "meg", tmp_path / "out", to="torch", quantise="original")


def test_a_model_with_another_head_keeps_none(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "plain", dtype="bfloat16")
    quantise_fp8(llama, tmp_path / "archive")
    result = convert(tmp_path / "archive", tmp_path / "value", to="torch", head="value")
    assert any("the model has other tensors by now" in note for note in result.notes)
    assert not (tmp_path / "value" / KEPT).exists()
    convert(tmp_path / "value", tmp_path / "back", to="hf")


def test_surgery_keeps_none_of_an_archive_and_says_so(made: Path, tmp_path: Path) -> None:
    result = average([made / "archive"] * 2, Output(tmp_path / "mean", to="torch_dist"), dry_run=True)
    assert any("are not kept: only convert keeps them" in note for note in result.notes)


def test_plans_read_nothing(made: Path, tmp_path: Path) -> None:
    """A plan of either way has the sizes that the conversion has."""
    for source, options in (
        (made / "archive", {"to": "torch", "grid": Parallelism(1, 2)}),
        (made / "meg", {"to": "hf", "quantise": "original"}),
    ):
        plan = convert(source, tmp_path / source.name, dry_run=True, **options)
        done = convert(source, tmp_path / source.name, **options)
        assert plan.files == done.files and plan.likeness is None
        assert ("--quantise original" in str(plan.notes)) == (source.name == "archive")
    assert all("--quantise original" in str(ask(made / "meg").notes) for ask in (inspect, choices_of))
    assert "--quantise original" in str(convert(made / "meg", tmp_path / "plain", to="hf", dry_run=True).notes)


def test_a_quantised_reference_is_the_original(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "meg", tmp_path / "meg")
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise="original", hf_reference=made / "archive")
    assert files_of(tmp_path / "back") == files_of(made / "archive")
