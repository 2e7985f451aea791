"""docs/schemas/: JSON schemas of what commands print with --json, made of the classes of the results.

    python -m docs_site.schemas     # writes them again

A schema has the number of its version in its name. A field that goes away or changes its meaning makes a new version,
whose file stands beside the old one; a new field does not, so readers should ignore what they do not know.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ckptkit.conversion import choosing, execution
from ckptkit.conversion.architectures import Architecture
from ckptkit.deltas import make
from ckptkit.inspection import delta_summary, differences, hashing, summary, validation
from ckptkit.runs import watch
from ckptkit.runs.record import Entry
from ckptkit.verification.environment import summary as environment

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "schemas"
RESULTS: dict[str, tuple[type, int, dict[str, type]]] = {
    "convert": (execution.ConversionResult, execution.SCHEMA, {}),
    "convert-choices": (choosing.Choices, choosing.SCHEMA, {}),
    "inspect": (summary.Inspection, summary.SCHEMA, {}),
    "inspect-delta": (delta_summary.DeltaInspection, delta_summary.SCHEMA, {}),
    "diff": (differences.Differences, differences.SCHEMA, {"same": bool}),
    "validate": (validation.Validation, validation.SCHEMA, {"passed": bool}),
    "hash": (hashing.Hashes, hashing.SCHEMA, {}),
    "delta-make": (make.MadeDelta, make.SCHEMA, {}),
    "watch": (watch.Watched, watch.SCHEMA, {}),
    "doctor": (environment.Environment, environment.SCHEMA, {}),
}
"""Name -> the class of the result, the version of its JSON, and fields that the JSON has beside those of the class.

`convert` is also that of `delta apply`, `surgery`, `adapter` and `split-llama`.
"""
ERROR = {"kind": str, "exit_code": int, "message": str, "what": str, "where": str | None, "hint": str | None}
"""Fields of an error."""
_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", Path: "string"}


def schema_of(kind: Any) -> dict[str, Any]:
    """The schema of a type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [schema_of(argument) for argument in arguments]}
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return _object({field.name: hints[field.name] for field in fields(kind)})
    if origin in (list, tuple):
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is not None and issubclass(origin, typing.Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    return {}


def _object(members: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: schema_of(kind) for name, kind in members.items()},
        "required": list(members),
    }


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> schema."""
    found: dict[str, dict[str, Any]] = {}
    for name, (kind, version, more) in RESULTS.items():
        schema = schema_of(kind)
        schema["properties"] = {**schema["properties"], "schema": {"const": version}}
        schema["properties"] |= {extra: schema_of(kind) for extra, kind in more.items()}
        schema["required"] = ["schema", *(one for one in schema["required"] if one != "schema"), *more]
        if name == "watch":  # a list, with the numbers in it
            schema["properties"]["iterations"] = {"type": "array", "items": schema_of(Entry)}
            schema["properties"]["iterations"]["items"]["properties"]["iteration"] = schema_of(int)
        if name == "validate":  # a property of each check
            check = schema["properties"]["checks"]["items"]
            check["properties"]["passed"] = schema_of(bool)
            check["required"].append("passed")
        found[f"{name}-{version}.json"] = _titled(schema, f"ckptkit {name.replace('-', ' ')} --json, version {version}")
    found["families-1.json"] = _titled(
        {"type": "array", "items": schema_of(Architecture)}, "ckptkit families --json, version 1"
    )
    found["error-1.json"] = _titled(_nested("error", ERROR), "an error of any command with --json, version 1")
    return found


def _nested(name: str, members: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: _object(members)}, "required": [name]}


def _titled(schema: dict[str, Any], title: str) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def text_of(schema: dict[str, Any]) -> str:
    """The content of a file."""
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, content in schemas().items():
        (FOLDER / file).write_text(text_of(content), encoding="utf-8")
