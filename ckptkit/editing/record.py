"""The record of an operation: a file beside the model, an entry of the manifest, and a model card."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.editing.inputs import Input
from ckptkit.formats.hub import is_reference
from ckptkit.io.plan import source_files
from ckptkit.printable import printable
from ckptkit.version import __version__

RECORD, CARD = "ckptkit_surgery.json", "README.md"
"""Names of the record and of the model card beside the model."""


def recorded(
    model: Checkpoint,
    operation: str,
    what: Mapping[str, Any],
    inputs: Sequence[Input],
    *,
    hash_inputs: bool,
    further: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """A model with the record of the operation that made it.

    Args:
        model: The model.
        operation: Name of the operation.
        what: What the user asked for, as JSON values.
        inputs: The models that it was made of.
        hash_inputs: Whether the record holds the SHA-256 of every file with weights, which are read for it.
        further: More small files: name -> content.
    """
    import numpy as np

    record = {
        "operation": operation,
        **what,
        "inputs": [_input(one, hash_inputs) for one in inputs],
        "versions": {"ckptkit": __version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    text = json.dumps(record, indent=2).encode() + b"\n"
    made = {**(further or {}), RECORD: text, CARD: _card(operation, what, inputs, record).encode()}
    return replace(model, sidecar=replace(model.sidecar, made=made, operation=record))


def _input(one: Input, hash_inputs: bool) -> dict[str, Any]:
    from ckptkit.io.reading import hash_file

    model = one.model
    tensors = [*model.tensors.values(), *model.sidecar.extras.values()]
    files = []
    for path in sorted(map(Path, source_files(tensors))):
        inside = path.relative_to(model.path) if path.is_relative_to(model.path) else path
        entry: dict[str, Any] = {"file": inside.as_posix(), "bytes": path.stat().st_size}
        if hash_inputs:
            entry["sha256"] = hash_file(path)
        files.append(entry)
    return {
        "name": one.name,
        "format": model.format,
        "architecture": model.config.architecture,
        "layers": model.config.num_layers,
        **({"grid": str(model.grid)} if model.grid.world_size > 1 else {}),
        **({"origin": model.sidecar.origin} if model.sidecar.origin else {}),
        "files": files,
    }


def _card(operation: str, what: Mapping[str, Any], inputs: Sequence[Input], record: Mapping[str, Any]) -> str:
    """A model card: what hubs index at its head, then the recipe and the inputs."""
    references = list(dict.fromkeys(one.name.partition("@")[0] for one in inputs if is_reference(one.name)))
    head = {
        **({"base_model": references} if references else {}),
        "library_name": "transformers",
        "tags": ["ckptkit", "merge" if operation in ("average", "merge", "stack") else operation],
    }
    lines = ["---", *_front_matter(head), "---", "", f"# A model made by `ckptkit surgery {operation}`", ""]
    lines += ["Made of:", ""]
    for one, entry in zip(inputs, record["inputs"], strict=True):
        size = sum(file["bytes"] for file in entry["files"])
        lines.append(
            f"- {_quoted(one.name)} ({entry['architecture']}, {entry['layers']} layers, {size:,} bytes of weights)"
        )
    recipe = what.get("recipe")
    kind, text = ("yaml", recipe) if isinstance(recipe, str) else ("json", json.dumps(dict(what), indent=2))
    fence = _fence(text, 3)
    lines += ["", "Recipe:", "", f"{fence}{kind}", *text.rstrip("\n").splitlines(), fence]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += ["", f"Versions: {versions}. `{RECORD}` has the whole record.", ""]
    return "\n".join(lines)


def _fence(text: str, least: int) -> str:
    """Backticks, more than there are side by side in a text: what is inside of them ends where they end."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _quoted(name: str) -> str:
    """A name as code in one line of Markdown."""
    name, mark = printable(name), _fence(name, 1)
    return f"{mark}{name}{mark}" if mark == "`" else f"{mark} {name} {mark}"


def _front_matter(head: Mapping[str, Any]) -> list[str]:
    """YAML of plain values and lists of plain values; JSON strings are YAML strings."""
    lines = []
    for key, value in head.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {value}")
    return lines
