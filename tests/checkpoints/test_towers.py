"""What a multimodal model has outside of its text model: carried through, found again, and looked at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import convert, verify
from ckptkit.errors import InputError
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_model

KINDS = ["gemma3", "gemma4", "gemma4-moe"]
GRID = Parallelism(2, 2)


def towers_of(path: Path) -> dict[str, torch.Tensor]:
    state = load_file(path / "model.safetensors")
    towers = {name: value for name, value in state.items() if "language_model" not in name and "lm_head" not in name}
    assert len(towers) > 10
    return towers


def alone(path: Path) -> Path:
    """A Megatron checkpoint as a trainer leaves it: without the sidecar."""
    shutil.rmtree(path / "ckptkit")
    return path


def without_weights(path: Path, out: Path) -> Path:
    """A reference of config and tokenizer alone."""
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    return out


def edit_ranks(path: Path, change: Callable[[Path, dict[str, Any]], None]) -> None:
    for file in sorted(path.glob("release/*/model_optim_rng.pt")):
        content = torch.load(file, weights_only=False)
        change(file, content["model"])
        torch.save(content, file)


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_supplies_them(tmp_path: Path, kind: str, to: str) -> None:
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to=to, grid=GRID)
    back = convert(alone(tmp_path / "meg"), tmp_path / "back", to="hf", hf_reference=source)
    assert files_of(tmp_path / "back") == files_of(source)
    (note,) = (note for note in back.notes if "come from the reference" in note)
    assert note.startswith(f"{len(towers_of(source))} of the tensors")


@pytest.mark.parametrize("kind", KINDS)
def test_without_them_nothing_is_written(tmp_path: Path, kind: str) -> None:
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", grid=GRID)
    bare = without_weights(source, tmp_path / "bare")
    alone(tmp_path / "meg")
    with pytest.raises(InputError, match="outside of the text model, which the source lacks; --hf-reference"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=bare)
    assert not (tmp_path / "back").exists()
    convert(tmp_path / "meg", tmp_path / "text", to="hf", hf_reference=bare, layout="text")
    assert not any("tower" in name for name in load_file(tmp_path / "text" / "model.safetensors"))
    # A Hugging Face directory is converted as it is.
    state = load_file(source / "model.safetensors")
    for name in towers_of(source):
        del state[name]
    save_file(state, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "again", to="hf")
    convert(source, tmp_path / "packed", to="packed")
    convert(tmp_path / "packed", tmp_path / "unpacked", to="hf")
    assert files_of(tmp_path / "unpacked") == files_of(tmp_path / "again") == files_of(source)


@pytest.mark.parametrize("to", ["hf", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_verify_looks_at_them(tmp_path: Path, kind: str, to: str) -> None:
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "other", to=to)
    assert verify(source, tmp_path / "other", level="weights").passed
    name = next(name for name in sorted(towers_of(source)) if name.endswith(".weight"))

    def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        state = load_file(source / "model.safetensors")
        edit(state)
        save_file(state, source / "model.safetensors", {"format": "pt"})

    change(lambda state: state[name].view(-1)[0].add_(1))
    moved = verify(source, tmp_path / "other", level="weights")
    assert [level.passed for level in moved.levels] == [True, False] and name in moved.levels[1].summary
    change(lambda state: state.pop(name))
    fewer = verify(source, tmp_path / "other", level="weights")
    assert not fewer.passed and fewer.levels[0].summary == f"{name} is missing in the reference"


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("kind", ["gemma4", "gemma4-moe"])
def test_those_in_the_ranks_files_count(tmp_path: Path, kind: str, with_reference: bool) -> None:
    """Megatron-Bridge's models with towers store them on every rank of the first stage, as trained."""
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", grid=GRID)
    trained = {name: value + 1 for name, value in towers_of(source).items()}
    moved = next(name for name in sorted(trained) if name.endswith(".weight")).removeprefix("model.")

    def add(file: Path, chunk: dict[str, Any]) -> None:
        if file.parent.name.endswith("_000"):
            chunk.update({name.removeprefix("model."): value.clone() for name, value in trained.items()})

    edit_ranks(tmp_path / "meg", add)
    if with_reference:
        alone(tmp_path / "meg")
    back = convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=source if with_reference else None)
    assert not any("come from the reference" in note for note in back.notes)
    said = [note for note in back.notes if "in ckptkit/extras.safetensors: the checkpoint's count" in note]
    assert len(said) == (not with_reference)
    state, before = load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors")
    assert list(state) == list(before)
    assert all(torch.equal(value, trained.get(name, before[name])) for name, value in state.items())

    def part(file: Path, chunk: dict[str, Any]) -> None:
        if file.parent.name == "mp_rank_01_000":
            chunk[moved].add_(1)

    edit_ranks(tmp_path / "meg", part)
    with pytest.raises(InputError, match="on ranks that share it"):
        convert(tmp_path / "meg", tmp_path / "other", to="hf", hf_reference=source if with_reference else None)
