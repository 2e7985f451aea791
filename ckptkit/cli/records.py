"""Shared options as dataclasses. A command with a parameter of such a type has all options of the class.

    @dataclass(frozen=True)
    class Execution:
        dry_run: DryRun = False
        threads: Threads = None

    @with_records
    def convert(src: str, execution: Execution) -> None: ...

declares `--dry-run` and `--threads`, and passes one `Execution` to `convert`. An annotation `Prefix` declares the
options of a class under other names. So a command can have them twice: `--ref-iteration` and `--cand-iteration`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo


@dataclass(frozen=True)
class Prefix:
    """Declares a record's options under other names.

    Attributes:
        name: The prefix: `ref` turns `--iteration` into `--ref-iteration`.
        panel: Heading of these options in the help.
    """

    name: str
    panel: str


@dataclass(frozen=True)
class _Record:
    """A record among the parameters of a function.

    Attributes:
        kind: Its class.
        names: Name of the option's parameter -> field of the class.
    """

    kind: type
    names: dict[str, str]


def with_records(function: Callable[..., None]) -> Callable[..., None]:
    """Wraps `function` for typer: each option becomes a parameter of its own. A call fills the records from them."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    records: dict[str, _Record] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind, prefix = _kind(hints[parameter.name])
        if isinstance(kind, type) and is_dataclass(kind):
            options = _options(kind, prefix)
            records[parameter.name] = _Record(kind, {option.name: field for option, field in options})
            parameters += [option for option, _ in options]
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=keyword, annotation=hints[parameter.name]))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, record in records.items():
            values[name] = record.kind(**{field: values.pop(option) for option, field in record.names.items()})
        function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _kind(hint: Any) -> tuple[Any, Prefix | None]:
    """The type in an annotation, and its `Prefix` if it has one."""
    if get_origin(hint) is not Annotated:
        return hint, None
    kind, *extras = get_args(hint)
    return kind, next((extra for extra in extras if isinstance(extra, Prefix)), None)


def _options(kind: Any, prefix: Prefix | None) -> list[tuple[inspect.Parameter, str]]:
    """A parameter for each field of a class, and the name of the field. A field without a default is required."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        hint, name = hints[field.name], field.name
        if prefix is not None:
            hint, name = _renamed(hint, prefix), f"{prefix.name}_{name}"
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        keyword = inspect.Parameter.KEYWORD_ONLY
        found.append((inspect.Parameter(name, keyword, default=default, annotation=hint), field.name))
    return found


def _renamed(hint: Any, prefix: Prefix) -> Any:
    """An option with a prefix before its names, under the prefix's heading.

    Typer keeps the first name of an annotated option in the field `default`.
    """
    kind, *extras = get_args(hint)
    info: OptionInfo
    (info,) = (extra for extra in extras if isinstance(extra, OptionInfo))
    other = copy(info)
    other.default, *others = (_prefixed(str(name), prefix) for name in (info.default, *(info.param_decls or ())))
    other.param_decls, other.rich_help_panel = tuple(others), prefix.panel
    return Annotated[kind, other]


def _prefixed(option: str, prefix: Prefix) -> str:
    return f"--{prefix.name}-{option.removeprefix('--')}"
