"""docs/report-schema.md names every field of the JSON report, and no other."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.reports.report import SCHEMA, LogitsReport, VerificationReport
from ckptkit.verification.reports.results import TensorDifference
from ckptkit.verification.rollouts import level as rollouts
from ckptkit.verification.rollouts.replay import FreeRouting
from ckptkit.verification.trainability import level as trainability
from tests.verification.reports.samples import report

DOCUMENT = Path(__file__).parents[3] / "docs" / "report-schema.md"
MADE_BY_HAND = {
    "structure": {"tensors", "problems[]", "messages[]"},
    "weights": {
        *("tensors", "bytes", "casts[]", "problems[]", "messages[]"),
        *(f"noise[].{name}" for name in ("tensor", "relative_rms", "largest_of_explained")),
        *(f"differences[].{field.name}" for field in dataclasses.fields(TensorDifference) if field.name != "ranks"),
        "differences[].ranks[]",
    },
}
"""Fields of the details that are no dataclass; a real report is held against them below."""


def fields_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all leaves of a type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for argument in (item for item in arguments if item is not type(None)):
            yield from fields_of(argument, prefix)
    elif dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            yield from fields_of(hint, f"{prefix}.{name}" if prefix else name)
    elif origin in (list, tuple):
        yield from fields_of(arguments[0], f"{prefix}[]")
    elif origin is dict and prefix.split(".")[-1] != "details":
        yield from fields_of(arguments[1], f"{prefix}.*")
    else:
        yield prefix


def paths_of(value: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all leaves of a JSON document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths_of(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for item in value:
            yield from paths_of(item, f"{prefix}[]")
    else:
        yield prefix


def documented(section: str) -> set[str]:
    """Fields in the tables of a section."""
    text = DOCUMENT.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.S | re.M))
    return set(re.findall(r"^\| `([^`]+)` \|", sections[section], re.M))


def test_the_report_is_documented() -> None:
    expected = {*fields_of(VerificationReport), "verdict"}
    assert {"levels[].checks[].name", "sides.*.ranks[].chunks[].layers[]", "schema"} <= expected
    assert documented("The report") == expected


def test_the_details_are_documented() -> None:
    beside = {"passed", "summary", "checks[].name", "checks[].passed", "checks[].summary"}
    assert documented("`details` of `logits`") == set(fields_of(LogitsReport)) - beside
    for level, expected in MADE_BY_HAND.items():
        assert documented(f"`details` of `{level}`") == expected


def test_the_details_of_rollouts_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "FreeRouting", FreeRouting, raising=False)  # imported for its name alone
    assert documented("`details` of `rollouts`") == set(fields_of(rollouts.RolloutsReport))


def test_the_details_of_trainability_are_documented() -> None:
    assert documented("`details` of `trainability`") == set(fields_of(trainability.TrainabilityReport))


def test_a_field_that_is_not_documented_is_noticed() -> None:
    @dataclasses.dataclass(frozen=True)
    class More(LogitsReport):
        novelty: list[int] = dataclasses.field(default_factory=list)

    fields = set(fields_of(typing.cast(Any, More)))
    assert "novelty[]" in fields - documented("`details` of `logits`")


def test_the_version_is_documented() -> None:
    assert f"`schema` is {SCHEMA}." in DOCUMENT.read_text(encoding="utf-8")


def matches(path: str, patterns: set[str]) -> bool:
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", r"[^\[\]]+"), path) for pattern in patterns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_have_what_is_documented(llama: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, 2), dtype=None)
    cheap = verify(source, tmp_path / "meg", level="weights")
    made = dataclasses.replace(report(False, dtype), levels=[*cheap.levels, *report(False, dtype).levels[1:]])
    document = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    for level in document["levels"]:
        fields = documented(f"`details` of `{level['name']}`")
        details = level.pop("details")
        absent = {path for path, value in details.items() if value is None}
        assert all(any(field.startswith(f"{path}.") for field in fields) for path in absent)
        assert all(matches(path, fields) for path in paths_of(details) if path not in absent), level["name"]
        missing = {field for field in fields if not any(matches(path, {field}) for path in paths_of(details))}
        # Lists of what went wrong are empty in what went well; below fp32 there is more.
        assert missing <= {
            "problems[]",
            "casts[]",
            "messages[]",
            *(f for f in fields if f.startswith(("differences[].", "noise[]."))),
            "reference_rounded[]",
            "noise",
            *(f for f in fields if f.startswith("noise.")),
        }
    fields = documented("The report") - {"levels[].details"}
    assert all(matches(path, fields) for path in paths_of(document))
