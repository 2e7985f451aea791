"""docs/schemas/: the files are made of the classes, and what commands print fits them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit import convert
from ckptkit.cli import app as cli
from ckptkit.cli.output import KINDS
from docs_site.schemas import FOLDER, schemas, text_of
from fixtures.make_damaged import SOUND

HF = str(SOUND / "hf")
TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


def misfits(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Where a value does not fit a schema of the few words that ours have."""
    if "const" in schema:
        return [] if value == schema["const"] else [f"{place}: {value!r}"]
    if "anyOf" in schema:
        each = [misfits(value, one, place) for one in schema["anyOf"]]
        return [] if not all(each) else each[0]
    kind = schema.get("type")
    if kind is None:
        return []
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number")):
        return [f"{place}: {value!r} is no {kind}"]
    if kind == "array":
        return [line for item in value for line in misfits(item, schema["items"], f"{place}[]")]
    if kind != "object":
        return []
    lines = [f"{place}: no {name}" for name in schema.get("required", []) if name not in value]
    for name, item in value.items():
        known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        lines += [f"{place}: {name} is not described"] if known is None else misfits(item, known, f"{place}.{name}")
    return lines


def printed(*arguments: str) -> Any:
    return json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"], prog_name="ckptkit").stdout)


def run_with_an_iteration(folder: Path) -> Path:
    convert(HF, folder / "run", to="torch")
    (folder / "run" / "release").rename(folder / "run" / "iter_0000007")
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text("7", encoding="utf-8")
    return folder / "run"


def published(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}-1.json").read_text(encoding="utf-8"))
    return content


def test_the_files_are_made_of_the_classes() -> None:
    made = {name: text_of(schema) for name, schema in schemas().items()}
    there = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.json")}
    assert {name: there.get(name) for name in made} == made, (
        "python -m docs_site.schemas; a lost field is a new version"
    )


def test_the_page_names_every_file() -> None:
    page = (FOLDER.parent / "json.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(schemas/([\w-]+\.json)\)", page)) == {file.name for file in FOLDER.glob("*.json")}
    assert all(f"`{kind}`" in page for kind in KINDS.values())


def test_what_commands_print_fits(tmp_path: Path) -> None:
    out, delta = str(tmp_path / "out"), str(tmp_path / "step.delta")
    results = {
        "convert-choices": printed("convert", HF),
        "convert": printed("convert", HF, out, "--to", "torch", "--tp", "2", "--hash"),
        "inspect": printed("inspect", out),
        "diff": printed("diff", HF, out),
        "validate": printed("validate", out, "--values"),
        "hash": printed("hash", out),
        "delta-make": printed("delta", "make", HF, out, "-o", delta),
        "inspect-delta": printed("inspect", delta),
        "watch": printed(
            "watch", str(run_with_an_iteration(tmp_path)), "--to", "hf", "-o", str(tmp_path / "o"), "--once"
        ),
        "families": printed("families"),
        "error": printed("inspect", str(tmp_path / "gone")),
    }
    for name, result in results.items():
        assert misfits(result, published(name), name) == []
    assert published("doctor")["properties"]["schema"] == {"const": 1}


@pytest.mark.parametrize(
    "change", [{"parameters": "many"}, {"bytes": True}, {"schema": 2}, {"unheard": 1}, {"roles": [1]}, {"path": None}]
)
def test_a_misfit_is_noticed(change: dict[str, Any]) -> None:
    result = printed("inspect", HF)
    assert misfits(result, published("inspect")) == []
    assert misfits({**result, **change}, published("inspect"))
    assert misfits({name: result[name] for name in list(result)[1:]}, published("inspect"))
