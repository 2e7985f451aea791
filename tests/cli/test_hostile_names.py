"""Whatever a file calls its tensors, its architecture or itself, nothing that a terminal obeys reaches the terminal."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ckptkit.cli.app import app
from fixtures.make_damaged import SOUND

EVIL = {
    "title and clear": "model.\x1b]0;OWNED\x07\x1b[2J.weight",
    "C1 control": "model.\x9b31m.weight",
    "direction": "model.\u202ethgiew\u2066.weight",
    "lines": "model\nerror: all is well\r.weight",
    "separators": "model\u2028.weight\u2029",
    "long": "model." + "a" * 100_000,
    "long and spaced": "model " * 20_000,
    "tags": "model.\U000e0041\U000e0042",
}
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
LONGEST_LINE = 6000


def plant_tensor(folder: Path, name: str) -> None:
    """Adds a tensor of that name to the first safetensors file."""
    file = min(folder.glob("*.safetensors"))
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    end = len(data) - 8 - size
    header[name] = {"dtype": "BF16", "shape": [1], "data_offsets": [end, end + 2]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :] + b"\0\0")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"][name] = file.name
        index.write_text(json.dumps(content))


def in_config(key: str) -> Callable[[Path, str], None]:
    def plant(folder: Path, name: str) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[key] = [name] if key == "architectures" else name
        (folder / "config.json").write_text(json.dumps(config))

    return plant


def in_index(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "model.safetensors"}}))


PLACES: dict[str, Callable[[Path, str], None]] = {
    "tensor": plant_tensor,
    "architecture": in_config("architectures"),
    "activation": in_config("hidden_act"),
    "number": in_config("rms_norm_eps"),
    "index": in_index,
}


def check_text(text: str, *, lines: bool = True) -> None:
    found = {character for character in text if unicodedata.category(character) in UNSAFE} - {"\n"}
    assert not found
    if lines:
        assert all(len(line) <= LONGEST_LINE for line in text.splitlines())


@pytest.mark.parametrize("kind", EVIL)
@pytest.mark.parametrize("place", PLACES)
def test_no_command_passes_it_on(tmp_path: Path, place: str, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SOUND / "hf", folder)
    PLACES[place](folder, EVIL[kind])
    for command in (
        ["inspect", str(folder)],
        ["validate", str(folder)],
        ["hash", str(folder), "--only", "tensors"],
        ["diff", str(SOUND / "hf"), str(folder), "--structure-only"],
        ["convert", str(folder), str(tmp_path / "out"), "--to", "packed", "--dry-run"],
        ["verify", str(SOUND / "hf"), str(folder), "--level", "structure"],
    ):
        result = CliRunner().invoke(app, command, prog_name="ckptkit")
        assert result.exit_code in (0, 1, 3, 4), result.stderr[-300:]
        check_text(result.stdout)
        check_text(result.stderr)
        if result.exit_code in (3, 4) and command[0] != "validate":
            assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        as_json = ["--json", "-"] if command[0] == "verify" else ["--json"]
        result = CliRunner().invoke(app, [*command, *as_json], prog_name="ckptkit")
        json.loads(result.stdout)
        check_text(result.stdout, lines=False)
        assert len(result.stdout) < 300_000


def test_reports_for_browsers_and_ci(tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b[2J\u202eb"
    shutil.copytree(SOUND / "hf", evil)
    reports = {name: tmp_path / f"r.{name}" for name in ("json", "junit", "html")}
    options = [part for name, file in reports.items() for part in (f"--{name}", str(file))]
    result = CliRunner().invoke(app, ["verify", str(SOUND / "hf"), str(evil), "--level", "weights", *options])
    assert result.exit_code == 0, result.output
    for file in reports.values():
        check_text(file.read_text(encoding="utf-8"), lines=False)
        assert r"a\x1b[2J\u202eb" in file.read_text(encoding="utf-8").replace("\\\\", "\\")
    assert r"a\x1b[2J\u202eb" in result.stdout
