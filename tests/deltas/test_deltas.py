"""`delta make` and `delta apply` on checkpoints: the very files of NEW come back, and nothing less."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from ckptkit import Parallelism, convert, hash_checkpoint
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.cli import app as cli
from ckptkit.deltas.apply import apply_delta
from ckptkit.deltas.make import make_delta
from ckptkit.errors import InputError, StorageError, UnsupportedError, UsageError
from ckptkit.formats.delta import codec
from ckptkit.formats.delta.codec import CHANGES, DIFFERENCES, WHOLE
from ckptkit.formats.delta.manifest import MANIFEST
from ckptkit.formats.delta.reading import ENTRY, open_delta
from ckptkit.formats.safetensors import read_header
from ckptkit.inspection.delta_summary import inspect_delta
from ckptkit.io import faults
from ckptkit.io.cores import moving_threads
from ckptkit.io.threads import read_all
from tests.deltas.conftest import a_step, edited
from tests.deltas.test_codec import changes, deflated
from tests.models import files_of, save_llama, save_model

BYTES = "delta.safetensors"
GRIDS = {"packed": Parallelism(), "torch": Parallelism(2, 2), "torch_dist": Parallelism(2, 2)}


def command(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], prog_name="ckptkit")


def test_the_files_of_new_come_back(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    result = apply_delta(old, delta, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(new)
    assert f"the result's hash is {hash_checkpoint(new, only='tensors').model}" in result.notes


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bytes_depend_on_the_tensors_alone(old: Path, new: Path, delta: Path, tmp_path: Path, threads: int) -> None:
    convert(old, tmp_path / "old", to="torch_dist", grid=Parallelism(2))
    convert(new, tmp_path / "new", to="torch", grid=Parallelism(2, 2))
    make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta", threads=threads)
    assert files_of(tmp_path / "delta") == files_of(delta)


@pytest.mark.parametrize(("asked", "started"), [(None, moving_threads()), (3, 3)])
def test_the_threads_are_those_that_the_help_names(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, started: int
) -> None:
    seen = []

    def noted(*arguments: Any, threads: int, **options: Any) -> Any:
        seen.append(threads)
        return read_all(*arguments, threads=threads, **options)

    monkeypatch.setattr("ckptkit.io.threads.read_all", noted)
    make_delta(old, new, tmp_path / "delta", threads=asked, dry_run=True)
    assert seen == [started]


@pytest.mark.parametrize("source", [None, "torch"])
@pytest.mark.parametrize("to", GRIDS)
def test_into_any_format_from_any(
    old: Path, new: Path, delta: Path, tmp_path: Path, to: str, source: str | None
) -> None:
    if source:
        convert(old, tmp_path / "old", to=source, grid=GRIDS[source])
        old = tmp_path / "old"
    convert(new, tmp_path / "expected", to=to, grid=GRIDS[to])
    apply_delta(old, delta, tmp_path / "out", to=to, grid=GRIDS[to], threads=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_experts_in_shares(tmp_path: Path) -> None:
    old = save_model(tmp_path / "old", "qwen3_moe", dtype="bfloat16")
    new = edited(old, tmp_path / "new", a_step)
    grid = Parallelism(2, ep=2)
    convert(new, tmp_path / "expected", to="torch", grid=grid)
    make_delta(old, tmp_path / "expected", tmp_path / "delta")
    apply_delta(old, tmp_path / "delta", tmp_path / "torch", to="torch", grid=grid)
    apply_delta(old, tmp_path / "delta", tmp_path / "hf")
    assert files_of(tmp_path / "torch") == files_of(tmp_path / "expected")
    assert files_of(tmp_path / "hf") == files_of(new)


def test_a_chain_of_steps_without_config(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    """A trainer's checkpoint has no sidecar: `--hf-reference` describes it, as everywhere."""
    later = edited(new, tmp_path / "later", a_step)
    convert(later, tmp_path / "trained", to="torch", grid=Parallelism(2))
    shutil.rmtree(tmp_path / "trained" / "ckptkit")
    said = SourceOptions(hf_reference=str(old))
    make_delta(new, tmp_path / "trained", tmp_path / "second", new_source=said)
    apply_delta(old, delta, tmp_path / "one")
    apply_delta(tmp_path / "one", tmp_path / "second", tmp_path / "two")
    assert files_of(tmp_path / "two") == files_of(later)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_other_types(tmp_path: Path, dtype: str) -> None:
    old = save_llama(tmp_path / "old", "tied", dtype=dtype)
    new = edited(old, tmp_path / "new", a_step)
    made = make_delta(old, new, tmp_path / "delta")
    assert made.bytes_total < made.bytes_new
    apply_delta(old, tmp_path / "delta", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(new)


def nothing(name: str, data: NDArray[np.uint8]) -> None:
    """No change."""


def everything(name: str, data: NDArray[np.uint8]) -> None:
    data[:] = np.random.default_rng(len(data)).integers(0, 256, len(data), np.uint8)


def test_no_change_and_nothing_but_change(old: Path, tmp_path: Path) -> None:
    same = make_delta(old, edited(old, tmp_path / "same", nothing), tmp_path / "none")
    assert (same.codings, same.changed) == ({"unchanged": 39}, 0)
    assert list(files_of(tmp_path / "none")) == [MANIFEST]
    apply_delta(old, tmp_path / "none", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(old)

    new = edited(old, tmp_path / "other", everything)
    whole = make_delta(old, new, tmp_path / "all")
    assert whole.codings == {"whole": 39}
    apply_delta(old, tmp_path / "all", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(new)
    assert [item.coding for item in open_delta(tmp_path / "all").manifest.changes] == ["whole"] * 39


def test_whole_tiles_among_others(monkeypatch: pytest.MonkeyPatch, old: Path, tmp_path: Path) -> None:
    """A tensor of which some tiles are new holds these tiles as they are: they are copied from NEW."""
    from ckptkit.formats.delta import tiles

    monkeypatch.setattr(tiles, "TILE", 4096)

    def edit(name: str, data: NDArray[np.uint8]) -> None:
        if "embed" in name:
            everything(name, data[8000:20000])
            data[30000] ^= 1

    new = edited(old, tmp_path / "new", edit)
    made = make_delta(old, new, tmp_path / "delta")
    assert made.codings["changed"] == 1
    told = inspect_delta(tmp_path / "delta").tiles
    assert told["whole"] >= 2 and told["changes"] >= 1 and told["same"] >= 1
    for to, grid in (("hf", Parallelism()), ("torch", Parallelism(2))):
        convert(new, tmp_path / f"expected-{to}", to=to, grid=grid)
        apply_delta(old, tmp_path / "delta", tmp_path / to, to=to, grid=grid)
        assert files_of(tmp_path / to) == files_of(tmp_path / f"expected-{to}")


def test_another_type_is_whole(old: Path, tmp_path: Path) -> None:
    convert(old, tmp_path / "wide", to="hf", dtype="float32")
    made = make_delta(old, tmp_path / "wide", tmp_path / "delta")
    assert made.codings == {"whole": 39}
    apply_delta(old, tmp_path / "delta", tmp_path / "out")
    assert hash_checkpoint(tmp_path / "out").model == hash_checkpoint(tmp_path / "wide").model


@pytest.mark.parametrize("back", [False, True])
def test_tensors_that_one_side_lacks_are_named(tmp_path: Path, back: bool) -> None:
    """The text part of a multimodal model, with its towers in the sidecar or without."""
    model = save_model(tmp_path / "hf", "gemma3", dtype="bfloat16")
    convert(model, tmp_path / "full", to="torch", grid=Parallelism(2))
    convert(model, tmp_path / "bare", to="torch", grid=Parallelism(2))
    (tmp_path / "bare" / "ckptkit" / "extras.safetensors").unlink()
    old, new = (tmp_path / "full", tmp_path / "bare") if back else (tmp_path / "bare", tmp_path / "full")
    made = make_delta(old, new, tmp_path / "delta")
    coding, side = ("removed", "OLD") if back else ("added", "NEW")
    assert made.codings.keys() == {"unchanged", coding}
    assert sum(note.startswith(f"only {side} has ") for note in made.notes) == made.codings[coding]
    apply_delta(old, tmp_path / "delta", tmp_path / "out", to="torch", grid=Parallelism(2))
    assert files_of(tmp_path / "out") == files_of(new)


def test_another_model_is_refused(old: Path, delta: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", num_hidden_layers=2, dtype="bfloat16")
    with pytest.raises(InputError, match="not the same model: 4 layers in OLD, 2 in NEW"):
        make_delta(old, other, tmp_path / "delta")
    qwen = save_model(tmp_path / "qwen", "qwen2", dtype="bfloat16")
    with pytest.raises(InputError, match="LlamaForCausalLM is in OLD, Qwen2ForCausalLM in NEW"):
        make_delta(old, qwen, tmp_path / "delta")
    with pytest.raises(InputError, match="the delta is of a LlamaForCausalLM"):
        apply_delta(qwen, delta, tmp_path / "out")
    with pytest.raises(InputError, match=r"not the base of the delta: it has no model\.layers\.2"):
        apply_delta(other, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_wrong_base_is_refused_before_anything_is_written(new: Path, delta: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not the base of the delta: \S+ has other bytes"):
        apply_delta(new, delta, tmp_path / "out")
    wide = save_llama(tmp_path / "wide")
    with pytest.raises(InputError, match=r"not the base of the delta: \S+ is F32\[.*, not BF16\["):
        apply_delta(wide, delta, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]


def test_a_side_whose_copies_differ_is_refused(old: Path, new: Path, tmp_path: Path) -> None:
    """Copies that should be equal are compared before the delta counts as made."""
    convert(new, tmp_path / "new", to="torch", grid=Parallelism(2))
    rank = tmp_path / "new" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    data, (norm,) = (
        rank.read_bytes(),
        {tensor.tobytes() for name, tensor in tensors_in(new).items() if name == "model.norm.weight"},
    )
    assert data.count(norm) == 1
    rank.write_bytes(data.replace(norm, bytes([norm[0] ^ 1]) + norm[1:]))
    with pytest.raises(InputError, match="these should be equal"):
        make_delta(old, tmp_path / "new", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def tensors_in(folder: Path) -> dict[str, NDArray[np.uint8]]:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        header, data = read_header(shard), np.fromfile(shard, np.uint8)
        for name, entry in header.entries.items():
            found[name] = data[len(header.raw) + entry.start : len(header.raw) + entry.stop]
    return found


# damage ---------------------------------------------------------------------------------------------------------------


def refused(old: Path, delta: Path, tmp_path: Path) -> str:
    """What applying a damaged delta says; the destination does not appear, and nothing stays beside it."""
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    with pytest.raises((InputError, UnsupportedError)) as caught:
        apply_delta(old, delta, place / "out")
    assert list(place.iterdir()) == [] and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(delta: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(delta, tmp_path / "delta"))


def test_every_flipped_byte_is_refused(old: Path, copy: Path, tmp_path: Path) -> None:
    """One byte of each file at a time: of the header, of tiles, of tables, of the manifest."""
    random = np.random.default_rng(0)
    for name in (BYTES, MANIFEST):
        sound = (copy / name).read_bytes()
        start = len(read_header(copy / BYTES).raw) if name == BYTES else 0
        tool = sound.index(b'"tool"') if name == MANIFEST else len(sound)
        places = [*random.integers(start, len(sound), 25), start, len(sound) - 3]
        for at in places:
            if sound[at : at + 1].isspace() or tool <= at < sound.find(b"\n", tool):
                continue  # which version made it changes nothing
            damaged = bytearray(sound)
            damaged[at] ^= 1 << int(random.integers(0, 5))
            (copy / name).write_bytes(damaged)
            assert refused(old, copy, tmp_path), (name, at)
        (copy / name).write_bytes(sound)
    apply_delta(old, copy, tmp_path / "out")


@pytest.mark.parametrize("name", [BYTES, MANIFEST])
@pytest.mark.parametrize("size", [0, 5, 1000, -2])
def test_truncated(old: Path, copy: Path, tmp_path: Path, name: str, size: int) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:size])
    said = refused(old, copy, tmp_path)
    assert "truncated" in said or "not valid JSON" in said or "empty file" in said


def test_missing_files(old: Path, copy: Path, tmp_path: Path) -> None:
    (copy / BYTES).unlink()
    assert "no such file" in refused(old, copy, tmp_path)
    (copy / MANIFEST).unlink()
    assert "not a delta: it has no delta.json" in refused(old, copy, tmp_path)
    shutil.rmtree(copy)
    assert "no such directory" in refused(old, copy, tmp_path)


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        fields = json.loads((folder / MANIFEST).read_text())
        change(fields)
        (folder / MANIFEST).write_text(json.dumps(fields))

    return make


def tensor(coding: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return manifest(lambda fields: change(next(item for item in fields["tensors"] if item["coding"] == coding)))


def table(change: Callable[[int, int, int], tuple[int, int, int]]) -> Callable[[Path], None]:
    """Changes the last entry of the table of the first changed tensor."""

    def make(folder: Path) -> None:
        opened = open_delta(folder)
        tiles = opened.tiles(next(item for item in opened.manifest.changes if item.coding == "changed"))
        data = bytearray((folder / BYTES).read_bytes())
        at = tiles.stored.offset + tiles.stored.rows * tiles.stored.width - ENTRY.size
        ENTRY.pack_into(data, at, *change(*ENTRY.unpack_from(data, at)))
        (folder / BYTES).write_bytes(data)

    return make


def link_out(folder: Path) -> None:
    shutil.copy(folder / BYTES, folder.parent / "elsewhere")
    (folder / BYTES).unlink()
    (folder / BYTES).symlink_to(folder.parent / "elsewhere")


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a newer schema": (manifest(lambda f: f.update(schema=2)), "schema 2 of deltas, this version reads 1"),
    "no tensors": (manifest(lambda f: f.pop("tensors")), "architecture, files or tensors are missing"),
    "files are a number": (manifest(lambda f: f.update(files=3)), "architecture, files or tensors are missing"),
    "a file elsewhere": (manifest(lambda f: f.update(files=["../x.safetensors"])), "other names than those of a delta"),
    "a file too few": (manifest(lambda f: f.update(files=[])), "is missing"),
    "a tensor twice": (manifest(lambda f: f["tensors"].append(f["tensors"][-1])), "one is there twice"),
    "not in order": (manifest(lambda f: f["tensors"].reverse()), "not in order"),
    "a tensor too few": (manifest(lambda f: f["tensors"].pop()), "the hash of OLD is not that of its tensors"),
    "another old": (manifest(lambda f: f.update(old="0" * 64)), "the hash of OLD is not that of its tensors"),
    "another new": (manifest(lambda f: f.update(new="0" * 64)), "the hash of NEW is not that of its tensors"),
    "no such coding": (tensor("whole", lambda t: t.update(coding="best")), "a coding that does not exist"),
    "no name": (tensor("whole", lambda t: t.pop("name")), "a tensor without a name"),
    "unchanged with two sides": (tensor("changed", lambda t: t.update(coding="unchanged")), "does not fit that"),
    "added with two sides": (tensor("changed", lambda t: t.update(coding="added")), "does not fit that"),
    "changed with one side": (tensor("changed", lambda t: t.pop("old")), "does not fit that"),
    "changed of two types": (tensor("changed", lambda t: t["old"].__setitem__(0, "F16")), "changes its type or shape"),
    "an unknown type": (tensor("changed", lambda t: t["new"].__setitem__(0, "F3")), "is no type, shape and hash"),
    "a negative size": (tensor("changed", lambda t: t["new"].__setitem__(1, [-1, 2])), "is no type, shape and hash"),
    "a huge shape": (tensor("changed", lambda t: t["new"].__setitem__(1, [1 << 62, 8])), "is no type, shape and hash"),
    "a short hash": (tensor("changed", lambda t: t["new"].__setitem__(2, "ab")), "is no type, shape and hash"),
    "a list of nothing": (tensor("changed", lambda t: t.update(new=[])), "is no type, shape and hash"),
    "an entry too short": (table(lambda coding, size, crc: (coding, size - 1, crc)), "bytes, and"),
    "an entry too long": (table(lambda coding, size, crc: (coding, size + 1, crc)), "bytes, and"),
    "an entry of 4 GB": (table(lambda coding, size, crc: (coding, (1 << 32) - 1, crc)), "is impossible"),
    "an entry of nothing": (table(lambda coding, size, crc: (CHANGES, 0, crc)), "is impossible"),
    "a whole tile": (table(lambda coding, size, crc: (WHOLE, size, crc)), "is impossible"),
    "no such tile": (table(lambda coding, size, crc: (9, size, crc)), "is impossible"),
    "another checksum": (table(lambda coding, size, crc: (coding, size, crc ^ 1)), "its checksum is another"),
    "a link out": (link_out, "a symbolic link out of the folder"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(old: Path, copy: Path, tmp_path: Path, case: str) -> None:
    change, message = DAMAGED[case]
    change(copy)
    assert message in refused(old, copy, tmp_path)
    assert command("inspect", copy).exit_code in ((0, 3) if "checksum" in case else (3, 4))


def test_tensors_that_the_manifest_does_not_describe(old: Path, copy: Path, tmp_path: Path) -> None:
    """Headers are sound by themselves, and hold something else than the manifest says."""

    def header(change: Callable[[dict[str, Any]], object]) -> None:
        raw = (copy / BYTES).read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        fields = json.loads(raw[8 : 8 + length])
        change(fields)
        text = json.dumps(fields).encode().ljust(length)
        (copy / BYTES).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    sound = (copy / BYTES).read_bytes()
    name = "model.layers.0.self_attn.q_proj.weight"
    header(lambda fields: fields.update({"a": fields.pop(name)}))
    assert "a is not named in delta.json" in refused(old, copy, tmp_path)
    (copy / BYTES).write_bytes(sound)
    header(lambda fields: fields[name].update(dtype="I8"))
    assert f"{name} is I8[" in refused(old, copy, tmp_path)
    (copy / BYTES).write_bytes(sound)
    header(lambda fields: fields["lm_head.weight"].update(dtype="F16"))
    assert "lm_head.weight is F16[250, 96], which is not what delta.json says" in refused(old, copy, tmp_path)


def test_a_delta_that_lies_about_its_result_is_not_put_in_place(old: Path, copy: Path, tmp_path: Path) -> None:
    """Everything agrees, up to the hash of one tensor of NEW: only the result shows it."""
    from ckptkit.formats.delta.manifest import Change, Manifest
    from ckptkit.io.hashes import TensorHash

    found = open_delta(copy).manifest
    victim = next(item for item in found.changes if item.coding == "changed")
    assert victim.old is not None and victim.new is not None
    wrong = TensorHash(victim.name, victim.new.dtype, victim.new.shape, "0" * 64)
    changes = tuple(Change(c.name, c.coding, c.old, wrong) if c is victim else c for c in found.changes)
    (copy / MANIFEST).write_bytes(Manifest(found.architecture, changes, found.files).to_json())
    said = refused(old, copy, tmp_path)
    assert f"the result is not what the delta was made from: {victim.name} differs" in said


@pytest.mark.parametrize(
    ("coding", "data", "message"),
    [
        (DIFFERENCES, deflated(bytes(10_000_000)), "does not decompress to"),
        (CHANGES, changes(1, 4, b"\xff\xff\xff\xff\1\0"), "it changes element 4294967295 of"),
    ],
)
def test_hostile_tiles_with_sound_checksums(
    monkeypatch: pytest.MonkeyPatch, old: Path, new: Path, tmp_path: Path, coding: int, data: bytes, message: str
) -> None:
    """A delta that is sound but for what a tile unpacks to: no wrong byte is put in place."""
    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", lambda before, after, size: codec.Coded(coding, data, 1))
        make_delta(old, new, tmp_path / "delta")
    assert message in refused(old, tmp_path / "delta", tmp_path)


def test_a_removed_weight_is_refused(old: Path, copy: Path, tmp_path: Path) -> None:
    from ckptkit.formats.delta.manifest import REMOVED, Change, Manifest

    found = open_delta(copy).manifest
    victim = next(item for item in found.changes if item.coding == "unchanged")
    changes = tuple(Change(c.name, REMOVED, c.old, None) if c is victim else c for c in found.changes)
    (copy / MANIFEST).write_bytes(Manifest(found.architecture, changes, found.files).to_json())
    assert f"{victim.name} is removed, and every LlamaForCausalLM has it" in refused(old, copy, tmp_path)


# runs that end in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.4, 1.2])
def test_a_full_disk_while_it_is_made(old: Path, new: Path, delta: Path, tmp_path: Path, share: float) -> None:
    """Both while tiles are coded, and while the files are written."""
    size = sum(map(len, files_of(delta).values()))
    with faults.inject(f"enospc:{int(size * share)}"), pytest.raises(StorageError, match="no space left"):
        make_delta(old, new, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    make_delta(old, new, tmp_path / "delta", resume=True)
    assert files_of(tmp_path / "delta") == files_of(delta)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_a_full_disk_while_it_is_applied(old: Path, new: Path, delta: Path, tmp_path: Path, share: float) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("the old model")
    size = sum(map(len, files_of(new).values()))
    with faults.inject(f"enospc:{int(size * share)}"), pytest.raises(StorageError, match="no space left"):
        apply_delta(old, delta, tmp_path / "out", overwrite=True)
    assert list(files_of(tmp_path / "out")) == ["precious"]
    apply_delta(old, delta, tmp_path / "out", overwrite=True, resume=True)
    assert files_of(tmp_path / "out") == files_of(new)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("what", "share"), [("make", 0.3), ("make", 1.2), ("apply", 0.5)])
def test_killed(old: Path, new: Path, delta: Path, tmp_path: Path, what: str, share: float) -> None:
    """A killed run leaves nothing at the destination, and beside it only what `--resume` goes on from."""
    arguments = ["make", str(old), str(new)] if what == "make" else ["apply", str(old), str(delta)]
    expected = files_of(delta) if what == "make" else files_of(new)
    words = [sys.executable, "-m", "ckptkit", "delta", *arguments, "-o", str(tmp_path / "out")]
    fault = f"kill:{int(sum(map(len, expected.values())) * share)}"
    killed = subprocess.run(words, env={**os.environ, "CKPTKIT_FAULT": fault}, capture_output=True)
    assert killed.returncode == 137
    assert {path.name for path in tmp_path.iterdir()} <= {".out.ckptkit-lock", ".out.ckptkit-partial"}
    again = command("delta", *arguments, "-o", tmp_path / "out", "--resume")
    assert again.exit_code == 0 and files_of(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_short_writes(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    with faults.inject("short:1000"):
        make_delta(old, new, tmp_path / "delta")
    assert files_of(tmp_path / "delta") == files_of(delta)


def test_places_that_cannot_be(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the destination exists"):
        make_delta(old, new, delta)
    with pytest.raises(UsageError, match="the destination lies inside the source"):
        apply_delta(old, delta, delta / "out")
    with pytest.raises(StorageError, match="the parent directory does not exist"):
        make_delta(old, new, tmp_path / "no" / "delta")


# as a command ---------------------------------------------------------------------------------------------------------


def test_as_commands(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    made = command("delta", "make", old, new, "-o", tmp_path / "delta", "--json", "--hash")
    assert made.exit_code == 0
    told = json.loads(made.stdout)
    assert told["codings"] == {"unchanged": 10, "changed": 28, "whole": 1}
    assert told["old"]["model"] == hash_checkpoint(old).model and told["new"]["model"] == hash_checkpoint(new).model
    assert told["bytes_total"] == sum(map(len, files_of(delta).values())) and told["hashes"].keys() == {BYTES, MANIFEST}
    assert sum(item["stored"] for item in told["tensors"]) == inspect_delta(delta).bytes
    text = command("delta", "make", old, new, "-o", tmp_path / "text")
    assert "10 unchanged, 28 changed, 1 whole" in text.stdout and "lm_head.weight" in text.stdout

    applied = command("delta", "apply", old, delta, "-o", tmp_path / "out", "--to", "torch", "--tp", "2", "--json")
    assert applied.exit_code == 0 and json.loads(applied.stdout)["target"]["grid"] == "TP2 x PP1"
    wrong = command("delta", "apply", new, delta, "-o", tmp_path / "wrong")
    assert wrong.exit_code == 3 and len(wrong.stderr.splitlines()) == 1


def test_inspect(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    told = json.loads(command("inspect", delta, "--json").stdout)
    assert (told["old"], told["new"]) == tuple(hash_checkpoint(side).model for side in (old, new))
    assert told["codings"] == {"unchanged": 10, "changed": 28, "whole": 1}
    assert told["tiles"] == {"changes": 24, "differences": 4}
    assert told["bytes"] == sum(item["stored"] for item in told["tensors"])
    text = command("inspect", delta).stdout
    assert "LlamaForCausalLM, delta" in text and told["new"] in text and "24 changes, 4 differences" in text
    refusal = command("convert", delta, tmp_path / "out", "--to", "hf")
    assert refusal.exit_code == 4 and "ckptkit delta apply" in refusal.stderr


def test_dry_runs_write_nothing(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    made = make_delta(old, new, tmp_path / "delta", dry_run=True)
    assert made.dry_run and made.bytes_total == sum(map(len, files_of(delta).values()))
    applied = apply_delta(old, delta, tmp_path / "out", dry_run=True)
    assert applied.dry_run and "neither OLD nor the delta was hashed" in applied.notes[-1]
    assert list(tmp_path.iterdir()) == []
    said = command("delta", "make", old, new, "-o", tmp_path / "delta", "--dry-run").stdout
    assert "Nothing was written" in said
