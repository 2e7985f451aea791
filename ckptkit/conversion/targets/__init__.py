"""The formats that can be written, one module each. `FORMAT` in it names the options it takes, and lays out its files.

A module is imported only when its format is written. The command line needs the names alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ckptkit.errors import UsageError

if TYPE_CHECKING:
    from ckptkit.conversion.target import WritableFormat

_MODULES = {
    "hf": "huggingface",
    "packed": "packed",
    "torch": "torch_legacy",
    "torch_dist": "torch_dist",
}
"""Name of a format of models -> its module in this folder."""

_ADAPTERS = {"peft": "peft"}
"""The same for formats that hold adapters alone."""

NAMES = tuple(_MODULES)
ADAPTER_NAMES = tuple(_ADAPTERS)


def format_called(name: str) -> WritableFormat:
    """The format of this name.

    Raises:
        UsageError: There is none.
    """
    modules = {**_MODULES, **_ADAPTERS}
    if name not in modules:
        raise UsageError(f"--to {name}", hint=f"one of {', '.join(modules)}")
    found: WritableFormat = import_module(f"{__name__}.{modules[name]}").FORMAT
    return found
