"""Links: what a user names may be one; what lies in a checkpoint leads nowhere else, whatever the command."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit.checkpoints.locating import Place, find_place
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError
from ckptkit.formats.links import check_links
from ckptkit.inspection.differences import diff
from ckptkit.inspection.hashing import files_in, hash_checkpoint
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from ckptkit.verification.levels import verify
from fixtures.make_damaged import SOUND
from tests.models import files_of

COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "convert": lambda path, out: convert(path, out, to="hf"),
    "plan": lambda path, out: convert(path, out, to="torch_dist", dry_run=True),
    "inspect": lambda path, out: inspect(path),
    "validate": lambda path, out: validate(path),
    "verify": lambda path, out: verify(SOUND / "hf", path, level="weights"),
    "verify it as the reference": lambda path, out: verify(path, SOUND / "hf", level="structure"),
    "hash": lambda path, out: hash_checkpoint(path),
    "hash files": lambda path, out: hash_checkpoint(path, only="files"),
    "diff": lambda path, out: diff(SOUND / "hf", path),
}

# What is replaced by a link, and in which checkpoint.
PLACES = [
    ("hf", "config.json"),
    ("hf", "model-00001-of-00002.safetensors"),
    ("hf", "model.safetensors.index.json"),
    ("torch", "latest_checkpointed_iteration.txt"),
    ("torch", "release"),
    ("torch", "release/mp_rank_00"),
    ("torch", "release/mp_rank_01/model_optim_rng.pt"),
    ("torch", "ckptkit"),
    ("torch", "ckptkit/manifest.json"),
    ("torch", "ckptkit/hf"),
    ("torch", "ckptkit/hf/config.json"),
    ("torch", "ckptkit/headers"),
    ("torch", "ckptkit/headers/model-00001-of-00002.safetensors"),
    ("torch_dist", "release/.metadata"),
    ("torch_dist", "release/metadata.json"),
    ("torch_dist", "release/common.pt"),
    ("torch_dist", "release/__0_0.distcp"),
]
ADDED = ["ckptkit/hf/tokenizer.json", "ckptkit/hf/templates", "release/notes.txt", "release/logs", "ckptkit/other"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("{}")
    return tmp_path / "outside"


def copy(base: str, path: Path) -> Path:
    return Path(shutil.copytree(SOUND / base, path, symlinks=True))


def refused_by_all(path: Path, name: str, tmp_path: Path, message: str = "a symbolic link out of the folder") -> None:
    for command, ask in COMMANDS.items():
        with pytest.raises(InputError, match=message) as caught:
            ask(path, tmp_path / "out")
        assert caught.value.where == str(path / name), command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("base", "name"), PLACES)
def test_a_link_in_place_of_what_it_leads_to(base: str, name: str, outside: Path, tmp_path: Path) -> None:
    path = copy(base, tmp_path / "checkpoint")
    (path / name).rename(outside / "moved")
    (path / name).symlink_to(outside / "moved")
    refused_by_all(path, name, tmp_path)


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("to", ["secret", ".", "nothing"])
def test_a_link_that_is_added(name: str, to: str, outside: Path, tmp_path: Path) -> None:
    path = copy("torch", tmp_path / "checkpoint")
    (path / name).symlink_to(outside / to)
    refused_by_all(path, name, tmp_path, "leads nowhere" if to == "nothing" else "out of the folder")


def test_a_link_behind_a_link(outside: Path, tmp_path: Path) -> None:
    """Each leads to a place inside; the second leads out."""
    path = copy("torch", tmp_path / "checkpoint")
    (path / "release" / "mp_rank_01").rename(path / "moved")
    (path / "release" / "mp_rank_01").symlink_to("../moved")
    open_checkpoint(path)
    (path / "moved" / "model_optim_rng.pt").rename(outside / "moved")
    (path / "moved" / "model_optim_rng.pt").symlink_to(outside / "moved")
    refused_by_all(path, "moved/model_optim_rng.pt", tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_an_index_through_a_linked_folder(outside: Path, tmp_path: Path, beside: bool) -> None:
    path = copy("hf", tmp_path / "checkpoint")
    index, first = path / "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    (path / first).rename(outside / first)
    index.write_text(index.read_text().replace(first, f"parts/{first}"))
    (path / "parts").symlink_to(outside)
    refused_by_all(path, "parts", tmp_path)
    (path / "parts").unlink()
    (path / ("real" if beside else "parts")).mkdir()
    (outside / first).rename(path / ("real" if beside else "parts") / first)
    if beside:
        (path / "parts").symlink_to("real")
    assert verify(SOUND / "hf", path, level="weights").passed


def test_one_iteration_beside_private_files(outside: Path, tmp_path: Path) -> None:
    """What is around an iteration is no checkpoint just because it is around it."""
    iteration = copy("torch", tmp_path / "checkpoint") / "release"
    (iteration / "mp_rank_00").rename(outside / "moved")
    (iteration / "mp_rank_00").symlink_to(outside / "moved")
    (iteration.parent / "ckptkit").rename(tmp_path / "sidecar")
    (iteration.parent / "latest_checkpointed_iteration.txt").unlink()
    iteration.rename(tmp_path / "iteration")
    refused_by_all(tmp_path / "iteration", "mp_rank_00", tmp_path)


class TestAllowed:
    """What people have on disk."""

    @pytest.mark.parametrize("base", ["hf", "torch", "torch_dist"])
    def test_the_checkpoint_itself(self, base: str, tmp_path: Path) -> None:
        path = copy(base, tmp_path / "elsewhere" / "checkpoint")
        (tmp_path / "folder").symlink_to(path.parent)
        (tmp_path / "link").symlink_to(tmp_path / "folder" / "checkpoint")
        convert(tmp_path / "link", tmp_path / "out", to="hf")
        assert files_of(tmp_path / "out") == files_of(SOUND / "hf")

    @pytest.mark.parametrize("base", ["hf", "torch", "torch_dist"])
    @pytest.mark.parametrize("below", ["", "sub"])
    def test_the_cache_of_the_hub(self, base: str, below: str, tmp_path: Path) -> None:
        """A snapshot is made of links to blobs; a checkpoint may be one of its folders."""
        cache = tmp_path / "hub" / "models--some--model"
        path = copy(base, cache / "snapshots" / "main" / below)
        to_blobs(path, cache / "blobs")
        convert(path, tmp_path / "out", to="hf")
        assert files_of(tmp_path / "out") == files_of(SOUND / "hf")
        assert validate(path).passed and hash_checkpoint(path).model == hash_checkpoint(SOUND / base).model

    def test_a_folder_of_links_into_the_cache_of_the_hub(self, tmp_path: Path) -> None:
        path = copy("hf", tmp_path / "local")
        to_blobs(path, tmp_path / "hub" / "models--some--model" / "blobs")
        assert verify(SOUND / "hf", path, level="weights").passed

    @pytest.mark.parametrize("blobs", ["models--some--model/other", "some--model/blobs", "models--some--model/blobs/x"])
    def test_what_only_looks_like_it(self, blobs: str, tmp_path: Path) -> None:
        path = copy("hf", tmp_path / "local")
        to_blobs(path, tmp_path / "hub" / blobs)
        with pytest.raises(InputError, match="out of the folder"):
            open_checkpoint(path)

    def test_an_iteration_that_shares_a_rank_with_another(self, tmp_path: Path) -> None:
        path = copy("torch", tmp_path / "checkpoint")
        (path / "iter_0000005").mkdir()
        for rank in ("mp_rank_00", "mp_rank_01"):
            (path / "iter_0000005" / rank).symlink_to(f"../release/{rank}")
        for called, number in ((path, 5), (path / "iter_0000005", None)):
            assert (
                verify(path, called, level="weights") if number is None else open_checkpoint(called, iteration=number)
            )
        hashed = set(files_in(find_place(path / "iter_0000005")))
        assert {f"iter_0000005/mp_rank_0{rank}/model_optim_rng.pt" for rank in (0, 1)} <= hashed

    def test_a_folder_that_is_a_link_stays_behind(self, tmp_path: Path) -> None:
        path = copy("hf", tmp_path / "checkpoint")
        (path / "checkpoint-5").mkdir()
        (path / "checkpoint-5" / "trainer_state.json").write_text("{}")
        (path / "latest").symlink_to("checkpoint-5")
        result = convert(path, tmp_path / "out", to="hf")
        assert "latest is not part of the model and stays behind" in result.notes
        assert files_of(tmp_path / "out").keys() - files_of(SOUND / "hf").keys() == {"checkpoint-5/trainer_state.json"}
        assert not (tmp_path / "out" / "latest").exists()


def to_blobs(path: Path, blobs: Path) -> None:
    """Moves every file into a folder under 64 hexadecimal digits, and links to it in its place."""
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(item for item in path.rglob("*") if item.is_file())):
        blob = blobs / f"{number:064x}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))


@pytest.mark.parametrize("target", [".", "..", "../b"])
def test_folders_that_lead_in_circles_end(tmp_path: Path, target: str) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / "top" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "top" / name / f"link{number}").symlink_to(target if name == "a" else f"../{other}")
    place = Place(tmp_path / "top", tmp_path / "top")
    if target == "../b":  # neither folder is in the other, and links to folders are not followed
        check_links(place.root, place.folder)
        assert not files_in(place)
        return
    with pytest.raises(InputError, match="the same folder as"):
        check_links(place.root, place.folder)
        files_in(place)
