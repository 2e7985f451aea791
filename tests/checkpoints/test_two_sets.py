"""Two sets of weights in one place are never chosen between in silence, whichever two they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.errors import CkptkitError, InputError, UnsupportedError, UsageError
from ckptkit.formats.torch_legacy import TRACKER
from ckptkit.inspection.differences import diff
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from fixtures.make_damaged import SOUND

WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"


def refused(path: Path, match: str, kind: type[CkptkitError] = UsageError, **options: Any) -> str:
    """What opening, inspecting and validating say of a place: the same."""
    said: list[str] = []
    for command in (open_checkpoint, inspect, validate):
        try:
            found: Any = command(path, **options)
            assert command is validate and not found.passed, command
            said += [problem for check in found.checks for problem in check.problems]
        except kind as error:
            said.append(str(error))
    assert len(set(said)) == 1, said
    assert "\n" not in said[0]
    with pytest.raises(kind, match=match):
        open_checkpoint(path, **options)
    return said[0]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOUND / "hf", tmp_path / "hf"))


def tensors_of(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def single(hf: Path, change: Callable[[dict[str, Any]], Any] = lambda state: None, name: str = WEIGHTS) -> None:
    """Puts the weights of a directory into one more file of it."""
    import torch
    from safetensors.torch import save_file

    state = {key: tensor.clone() for key, tensor in tensors_of(hf).items()}
    change(state)
    torch.save(state, hf / name) if name.endswith(".bin") else save_file(state, hf / name)


def shift(state: dict[str, Any]) -> None:
    state["model.norm.weight"] += 1


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "values": shift,
    "names": lambda state: state.pop("model.norm.weight"),
    "shapes": lambda state: state.update({"model.norm.weight": state["model.norm.weight"][:4].clone()}),
    "types": lambda state: state.update({"model.norm.weight": state["model.norm.weight"].double()}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [BIN, WEIGHTS])
def test_two_in_one_hugging_face_directory(hf: Path, change: str, name: str) -> None:
    """Shards with an index, and a single file: of pickles, or of safetensors."""
    single(hf, CHANGES[change], name)
    said = refused(hf, "two sets of weights, ", InputError)
    assert name in said and "model.safetensors.index.json" in said and "move the one that is not wanted" in said


@pytest.mark.parametrize("name", [BIN, WEIGHTS])
def test_the_same_weights_twice_are_no_choice(hf: Path, name: str) -> None:
    single(hf, name=name)
    assert diff(SOUND / "hf", hf).same
    assert any("holds the same weights as" in note and name in note for note in open_checkpoint(hf).notes)
    (hf / BIN).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert diff(SOUND / "hf", hf).same
    assert any(f"{BIN}, which" in note and "cannot be read" in note for note in open_checkpoint(hf).notes)


def test_an_adapter_beside_a_model(hf: Path) -> None:
    shutil.copy(next(hf.glob("*.safetensors")), hf / "adapter_model.safetensors")
    refused(hf, r"adapter_model\.safetensors: nothing says whether the adapters are merged", InputError)


def test_the_original_files_of_a_maker_are_no_choice(hf: Path) -> None:
    """Meta and Mistral publish their own format beside that of transformers: it is named, and stays behind."""
    (hf / "original").mkdir()
    for name in ("original/consolidated.00.pth", "consolidated.safetensors"):
        (hf / name).write_bytes(b"x")
        assert f"{name} is not part of the model and stays behind" in open_checkpoint(hf).notes


@pytest.mark.parametrize("inside", ["iter_0000100", "dist_ckpt"])
def test_a_hugging_face_directory_around_a_megatron_one(hf: Path, inside: str) -> None:
    shutil.copytree(SOUND / "torch_dist" / "release", hf / inside)
    refused(hf, rf"two sets of weights, in the folder itself and in {inside}/; give .*{inside} to take that")
    assert open_checkpoint(hf / inside).format == "torch_dist"


@pytest.mark.parametrize(("one", "other"), [("torch", "torch_dist"), ("torch_dist", "hf"), ("torch", "hf")])
def test_two_formats_in_one_folder(tmp_path: Path, one: str, other: str) -> None:
    folder = tmp_path / "model"
    for base in (one, other):
        shutil.copytree(SOUND / base / ("" if base == "hf" else "release"), folder, dirs_exist_ok=True)
    said = refused(folder, "two sets of weights in one folder, of the formats ")
    assert one in said and other in said


@pytest.fixture
def actor(tmp_path: Path) -> Path:
    """An `actor` folder of verl with Megatron's weights, and whole ones in `huggingface/`."""
    actor = tmp_path / "run" / "global_step_10" / "actor"
    shutil.copytree(SOUND / "hf", actor / "huggingface")
    shutil.copytree(SOUND / "torch_dist" / "release", actor / "dist_ckpt")
    return actor


def test_a_run_of_verl(actor: Path) -> None:
    for path in (actor, actor.parent, actor.parents[1]):
        said = refused(path, "two sets of weights, in dist_ckpt/ and in huggingface/")
        assert f"give {actor / 'dist_ckpt'} or {actor / 'huggingface'} to take that" in said
        assert f"--hf-reference {actor / 'huggingface'} to take {actor / 'dist_ckpt'}" in said
    assert open_checkpoint(actor / "huggingface").format == "hf"
    for checkpoint in (
        open_checkpoint(actor / "dist_ckpt"),
        open_checkpoint(actor, hf_reference=actor / "huggingface"),
    ):
        assert checkpoint.format == "torch_dist" and diff(SOUND / "hf", checkpoint.path).same
        assert "config.json" in checkpoint.sidecar.small
    for file in actor.glob("huggingface/*.safetensors*"):
        file.unlink()
    assert open_checkpoint(actor).format == "torch_dist"


def test_shards_of_ranks_beside_whole_weights(actor: Path) -> None:
    shutil.rmtree(actor / "dist_ckpt")
    shutil.copytree(SOUND / "torch" / "release", actor / "model")
    refused(actor, "two sets of weights, in model/ and in huggingface/")
    checkpoint = open_checkpoint(actor / "model")
    assert checkpoint.format == "torch" and "config and tokenizer are those of huggingface" in checkpoint.notes
    import torch

    shutil.rmtree(actor / "model")
    torch.save(tensors_of(actor / "huggingface"), actor / "model_world_size_1_rank_0.pt")
    refused(actor, "two sets of weights, in the folder itself and in huggingface/")
    assert open_checkpoint(actor, hf_reference=actor / "huggingface").format == "fsdp"
    assert open_checkpoint(actor / "huggingface").format == "hf"


def test_two_sets_of_shards_need_a_path(actor: Path) -> None:
    shutil.copytree(SOUND / "torch" / "release", actor / "model")
    referenced: dict[str, Any] = {"hf_reference": actor / "huggingface"}
    for options in ({}, referenced):
        refused(actor, "two sets of weights, in (model|dist_ckpt)/ and in (model|dist_ckpt)/", **options)
    for name in ("model", "dist_ckpt"):
        assert open_checkpoint(actor / name).path == actor / name


def test_a_critic_beside_the_actor_is_named(actor: Path) -> None:
    shutil.rmtree(actor / "huggingface")
    shutil.copytree(SOUND / "hf", actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors*"))
    assert not any("critic" in note for note in open_checkpoint(actor.parent).notes)
    (actor.parent / "critic").mkdir()
    assert any("critic/ is another model beside actor/" in note for note in open_checkpoint(actor.parent).notes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The root of a run whose iterations 100 and 200 were saved, and 100 is what the tracker file names."""
    for number in (100, 200):
        shutil.copytree(SOUND / "torch_dist" / "release", tmp_path / f"iter_{number:07d}")
    shutil.copytree(SOUND / "torch_dist" / "ckptkit", tmp_path / "ckptkit")
    (tmp_path / TRACKER).write_text("100")
    return tmp_path


def test_a_later_iteration_is_named(run: Path) -> None:
    note = f"{TRACKER} names iter_0000100; iter_0000200 is later, and is not read"
    assert note in open_checkpoint(run).notes
    assert (
        note not in open_checkpoint(run, iteration=100).notes and note not in open_checkpoint(run, iteration=200).notes
    )
    (run / TRACKER).unlink()
    shutil.copytree(run / "iter_0000100", run / "release")
    refused(run, r"several iterations \(release, iter_0000100, iter_0000200\).*or give the folder of one")


def test_a_save_that_never_finished(run: Path) -> None:
    for name in (".metadata", "metadata.json"):
        (run / "iter_0000200" / name).unlink()
        for path, options in ((run, {"iteration": 200}), (run / "iter_0000200", {})):
            what = "this save never finished; iter_0000100 is the last that did; give .*iter_0000100"
            said = refused(path, what, UnsupportedError, **options)
            assert "iter_0000200: " in said
    assert open_checkpoint(run).path.name == "iter_0000100"
    (run / "iter_0000100" / ".metadata").unlink()
    refused(run, r"no \.metadata", InputError)


@pytest.mark.parametrize("under", ["", "policy/weights/iter_0000000", "policy/weights/model"])
def test_roots_of_other_trainers(tmp_path: Path, under: str) -> None:
    """NeMo 2 (`weights` beside `context`) and NeMo-RL (`step_N/policy/weights`)."""
    root = tmp_path / "run"
    folder = root / "step_7" / under if under else root / "weights"
    shutil.copytree(SOUND / "torch_dist" / "release", folder)
    if not under:
        (root / "context").mkdir()
        (root / "context" / "model.yaml").write_text("{}")
    for path in (root, folder) if not under else (root, root / "step_7", root / "step_7" / "policy", folder):
        checkpoint = open_checkpoint(path, hf_reference=SOUND / "hf")
        assert checkpoint.path == folder
    assert validate(root, hf_reference=SOUND / "hf").passed
    if under:
        shutil.copytree(root / "step_7", root / "step_8")
        refused(root, r"several iterations \(step_7, step_8\)", hf_reference=SOUND / "hf")
        assert "step_8" in open_checkpoint(root, iteration=8, hf_reference=SOUND / "hf").path.parts


@pytest.mark.parametrize("tracker", [True, False])
def test_a_root_of_ms_swift(tmp_path: Path, tracker: bool) -> None:
    """config.json and tokenizer lie beside the iterations."""
    shutil.copytree(SOUND / "hf", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copytree(SOUND / "torch_dist" / "release", tmp_path / "iter_0000100")
    if tracker:
        (tmp_path / TRACKER).write_text("100")
    for path in (tmp_path, tmp_path / "iter_0000100"):
        checkpoint = open_checkpoint(path)
        assert "config and tokenizer are those of the folder itself" in checkpoint.notes
        assert checkpoint.sidecar.config == json.loads((SOUND / "hf" / "config.json").read_text())
        assert checkpoint.sidecar.small.keys() == {
            file.name for file in (SOUND / "hf").iterdir() if "safetensors" not in file.name
        }
    assert validate(tmp_path).passed
