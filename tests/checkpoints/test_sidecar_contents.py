"""The sidecar is input: whatever it holds that is not the model's is refused, and by every command."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.inspection.hashing import hash_checkpoint
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from ckptkit.verification.levels import verify
from fixtures.make_damaged import SOUND, read_safetensors, write_safetensors
from tests.models import files_of, save_model

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"

Damage = Callable[[Path], object]


@pytest.fixture(params=["torch", "torch_dist", "packed"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    convert(SOUND / "hf", path, to=request.param)
    return path


def refused(path: Path, tmp_path: Path, match: str) -> None:
    """By convert, in whatever direction, inspect, validate, verify and hash alike."""
    asked: list[Callable[[], object]] = [
        lambda: convert(path, tmp_path / "out", to="hf"),
        lambda: convert(path, tmp_path / "out", to="torch_dist"),
        lambda: inspect(path),
        lambda: verify(SOUND / "hf", path, level="weights"),
        lambda: verify(path, SOUND / "hf", level="weights"),
        lambda: hash_checkpoint(path),
    ]
    for ask in asked:
        with pytest.raises(InputError, match=match) as caught:
            ask()
        assert "ckptkit" in str(caught.value.where) and "\n" not in str(caught.value)
    assert not validate(path).passed
    assert not (tmp_path / "out").exists()


def extras(name: str, shape: tuple[int, ...] = (8,)) -> Damage:
    size = 2 * shape[0]
    entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}
    return lambda folder: write_safetensors(folder / "extras.safetensors", {name: entry}, b"\0\x40" * shape[0])


def put(name: str, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return damage


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_bytes())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def headers(change: Callable[[dict[str, dict[str, Any]]], object]) -> Damage:
    """Changes headers (shard -> fields), with an index and a manifest that go with them."""

    def damage(folder: Path) -> None:
        files = {file.name.removesuffix(".header"): file for file in (folder / "headers").iterdir()}
        fields = {name: json.loads(file.read_bytes()[8:]) for name, file in files.items()}
        change(fields)
        digest = hashlib.sha256()
        shutil.rmtree(folder / "headers")
        (folder / "headers").mkdir()
        for name, content in sorted(fields.items()):
            text = json.dumps(content).encode()
            raw = struct.pack("<Q", len(text)) + text
            (folder / "headers" / f"{name}.header").write_bytes(raw)
            digest.update(name.encode() + b"\0" + raw)
        edit("manifest.json", lambda manifest: manifest.update(source_fingerprint=digest.hexdigest()))(folder)
        names = {key: name for name, content in fields.items() for key in content if key != "__metadata__"}
        edit(f"hf/{INDEX}", lambda index: index.update(weight_map=names))(folder)

    return damage


def last(fields: dict[str, Any]) -> str:
    """The tensor at the end of a file."""
    return max((name for name in fields if name != "__metadata__"), key=lambda name: fields[name]["data_offsets"])


def widen(fields: dict[str, dict[str, Any]]) -> None:
    entry = fields[SECOND][last(fields[SECOND])]
    entry["shape"] = [2, *entry["shape"]]
    entry["data_offsets"][1] += entry["data_offsets"][1] - entry["data_offsets"][0]


def add(fields: dict[str, dict[str, Any]], name: str) -> None:
    end = fields[SECOND][last(fields[SECOND])]["data_offsets"][1]
    fields[SECOND][name] = {"dtype": "BF16", "shape": [8], "data_offsets": [end, end + 16]}


KINDS: dict[str, tuple[Damage, str]] = {
    "an extra is the model's norm": (extras("model.norm.weight"), "model.norm.weight, which the checkpoint has itself"),
    "an extra is the model's head": (extras("lm_head.weight"), "lm_head.weight, which the checkpoint has itself"),
    "an extra is a layer's": (extras("model.layers.1.input_layernorm.weight"), "which the checkpoint has itself"),
    "an extra is unknown": (extras("model.surprise"), "model.surprise, which LlamaForCausalLM does not have"),
    "an extra is Megatron's": (extras("decoder.final_layernorm.weight"), "does not have"),
    "an extra of another family": (extras("vision_tower.weight"), "does not have"),
    "an extra of a layer too many": (extras(INV_FREQ.format(2)), "does not have"),
    "an extra that the headers do not know": (extras(INV_FREQ.format(1)), "is not in headers/"),
    "extras that are none": (put("extras.safetensors", b"x"), "truncated"),
    "a whole model": (put("hf/model.safetensors", b"x"), "weights among the small files"),
    "a shard of the same name": (put(f"hf/{FIRST}", b"x"), "weights among the small files"),
    "pickled weights": (put("hf/pytorch_model.bin", b"x"), "weights among the small files"),
    "an adapter": (put("hf/adapter_model.safetensors", b"x"), "weights among the small files"),
    "weights in a folder": (put("hf/original/consolidated.00.pth", b"x"), "weights among the small files"),
    "an index that is none": (put(f"hf/{INDEX}", b"garbage"), "not valid JSON"),
    "an index of other files": (put(f"hf/{INDEX}", b'{"weight_map": {"a": "b"}}'), "an index of other files"),
    "an index of nothing": (put(f"hf/{INDEX}", b"{}"), "an index of other files"),
    "an index of pickles": (put(f"hf/{BIN_INDEX}", b'{"weight_map": {"a": "b"}}'), "an index of other files"),
    "headers that lack a tensor": (headers(lambda f: f[SECOND].pop(last(f[SECOND]))), "1 missing"),
    "headers that have one more": (headers(lambda f: add(f, "model.surprise")), "1 unknown to this family"),
    "headers with another shape": (headers(widen), "1 of the wrong shape"),
    "headers that repeat a tensor": (headers(lambda f: add(f, last(f[FIRST]))), "another header copy describes"),
    "a header that is gone": (headers(lambda f: f.pop(SECOND)), "missing"),
    "a header with the name of a small file": (
        headers(lambda f: f.update({"config.json": f.pop(SECOND)})),
        "weights among the small files",
    ),
    "headers that the manifest does not know": (
        lambda folder: shutil.rmtree(folder / "headers"),
        r"headers/ is not what manifest.json was written with; pass --((ref|cand)-)?hf-reference",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"manifest.json: no such file"),
    "no config": (lambda folder: (folder / "hf" / "config.json").unlink(), r"config.json: no such file"),
    "an origin that is none": (edit("manifest.json", lambda m: m.update(origin="x")), "its origin is no repository"),
    "an origin of numbers": (edit("manifest.json", lambda m: m.update(origin={"a": 1})), "its origin is no repository"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_refused(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    damage, match = KINDS[kind]
    damage(checkpoint / "ckptkit")
    refused(checkpoint, tmp_path, match)


def test_a_config_that_contradicts_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    edit("hf/config.json", lambda config: config.update(rms_norm_eps=0.5))(checkpoint / "ckptkit")
    with pytest.raises(InputError, match="contradicts itself"):
        convert(checkpoint, tmp_path / "out", to="hf")
    assert not validate(checkpoint).passed
    assert not verify(SOUND / "hf", checkpoint, level="structure").passed


class TestSound:
    """What must not be refused."""

    def test_untouched(self, checkpoint: Path, tmp_path: Path) -> None:
        convert(checkpoint, tmp_path / "out", to="hf")
        assert files_of(tmp_path / "out") == files_of(SOUND / "hf")

    def test_rewritten_but_equal(self, checkpoint: Path, tmp_path: Path) -> None:
        """The forgery of these tests is refused for its content alone."""
        headers(lambda fields: None)(checkpoint / "ckptkit")
        convert(checkpoint, tmp_path / "out", to="hf")
        assert verify(SOUND / "hf", tmp_path / "out", level="weights").passed

    def test_extras_of_the_model(self, checkpoint: Path, tmp_path: Path) -> None:
        def add_buffers(fields: dict[str, dict[str, Any]]) -> None:
            add(fields, INV_FREQ.format(1))

        headers(add_buffers)(checkpoint / "ckptkit")
        extras(INV_FREQ.format(1))(checkpoint / "ckptkit")
        assert convert(checkpoint, tmp_path / "out", to="hf").bytes_total
        assert INV_FREQ.format(1) in read_safetensors(tmp_path / "out" / SECOND)[0]

    @pytest.mark.parametrize("name", ["ckptkit/headers", "ckptkit/hf"])
    def test_a_reference_stands_in_for_what_is_damaged(self, checkpoint: Path, tmp_path: Path, name: str) -> None:
        """The hint can be followed."""
        shutil.rmtree(checkpoint / name)
        convert(checkpoint, tmp_path / "out", to="hf", hf_reference=SOUND / "hf")
        assert files_of(tmp_path / "out") == files_of(SOUND / "hf")

    def test_a_newer_sidecar(self, checkpoint: Path, tmp_path: Path) -> None:
        edit("manifest.json", lambda manifest: manifest.update(schema=99))(checkpoint / "ckptkit")
        with pytest.raises(UnsupportedError, match="pass --hf-reference"):
            inspect(checkpoint)
        convert(checkpoint, tmp_path / "out", to="hf", hf_reference=SOUND / "hf")
        assert files_of(tmp_path / "out") == files_of(SOUND / "hf")
        extras(INV_FREQ.format(1))(checkpoint / "ckptkit")
        with pytest.raises(UnsupportedError, match="update ckptkit"):  # it may hold weights
            convert(checkpoint, tmp_path / "again", to="hf", hf_reference=SOUND / "hf")

    def test_a_reference_does_not_excuse_a_second_norm(self, checkpoint: Path, tmp_path: Path) -> None:
        extras("model.norm.weight")(checkpoint / "ckptkit")
        with pytest.raises(InputError, match="which the checkpoint has itself"):
            convert(checkpoint, tmp_path / "out", to="hf", hf_reference=SOUND / "hf")

    def test_an_index_that_spells_its_files_otherwise(self, checkpoint: Path, tmp_path: Path) -> None:
        def dotted(index: dict[str, Any]) -> None:
            index["weight_map"] = {key: f"./{name}" for key, name in index["weight_map"].items()}

        edit(f"hf/{INDEX}", dotted)(checkpoint / "ckptkit")
        assert validate(checkpoint).passed

    @pytest.mark.parametrize("to", ["hf", "torch"])
    def test_an_index_that_nobody_reads_stays_behind(self, tmp_path: Path, to: str) -> None:
        """Many models on the hub have one for each format."""
        source = Path(shutil.copytree(SOUND / "hf", tmp_path / "hf"))
        (source / BIN_INDEX).write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
        result = convert(source, tmp_path / "out", to=to)
        assert f"{BIN_INDEX} is not part of the model and stays behind" in result.notes
        assert not list((tmp_path / "out").rglob(BIN_INDEX))
        assert not convert(tmp_path / "out", tmp_path / "back", to="hf").notes

    def test_an_older_sidecar_that_has_it(self, checkpoint: Path, tmp_path: Path) -> None:
        folder = checkpoint / "ckptkit"
        for file in (folder / "headers").iterdir():
            file.rename(file.with_suffix(""))
        edit("manifest.json", lambda manifest: manifest.update(schema=1))(folder)
        put(f"hf/{BIN_INDEX}", b"{}")(folder)
        convert(checkpoint, tmp_path / "out", to="hf")
        assert files_of(tmp_path / "out") == files_of(SOUND / "hf")


class TestVerify:
    """`verify` speaks of what `convert --to hf` writes."""

    def test_buffers_that_would_be_made_anew(self, tmp_path: Path) -> None:
        """Without its sidecar a model gets the values of the class, and the original has others."""
        source = save_model(tmp_path / "hf", "apertus")
        fields, data = read_safetensors(source / "model.safetensors")
        name = next(name for name in sorted(fields) if name.endswith("act_fn.beta"))
        convert(source, tmp_path / "meg", to="torch")
        assert verify(source, tmp_path / "meg", level="weights").passed
        shutil.rmtree(tmp_path / "meg" / "ckptkit")
        assert verify(source, tmp_path / "meg", level="weights").passed
        start, stop = fields[name]["data_offsets"]
        write_safetensors(source / "model.safetensors", fields, data[:start] + bytes(stop - start) + data[stop:])
        convert(source, tmp_path / "other", to="torch")
        assert verify(source, tmp_path / "other", level="weights").passed
        shutil.rmtree(tmp_path / "other" / "ckptkit")
        report = verify(source, tmp_path / "other", level="weights")
        assert not report.passed and name in report.levels[-1].summary

    def test_a_tower_that_was_changed(self, tmp_path: Path) -> None:
        source = save_model(tmp_path / "hf", "gemma3")
        convert(source, tmp_path / "meg", to="torch")
        assert verify(source, tmp_path / "meg", level="weights").passed
        file = tmp_path / "meg" / "ckptkit" / "extras.safetensors"
        fields, data = read_safetensors(file)
        write_safetensors(file, fields, data[:-1] + bytes([data[-1] ^ 1]))
        report = verify(source, tmp_path / "meg", level="weights")
        assert not report.passed and last(fields) in report.levels[-1].summary

    def test_another_tokenizer_is_said(self, tmp_path: Path) -> None:
        source = Path(shutil.copytree(SOUND / "hf", tmp_path / "hf"))
        (source / "tokenizer.json").write_text("{}")
        convert(source, tmp_path / "meg", to="torch")
        assert verify(source, tmp_path / "meg", level="structure").levels[0].details["messages"] == []
        put("hf/tokenizer.json", b"{ }")(tmp_path / "meg" / "ckptkit")
        report = verify(source, tmp_path / "meg", level="structure")
        assert report.passed
        assert report.levels[0].details["messages"] == ["the two sides differ in tokenizer.json"]


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma4-moe"])
@pytest.mark.parametrize("fused", [False, True])
def test_names_of_every_writer(tmp_path: Path, kind: str, fused: bool) -> None:
    """Headers have the names of the source, extras canonical ones."""
    source = save_model(tmp_path / "hf", kind, fused=fused)
    convert(source, tmp_path / "meg", to="torch_dist")
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
