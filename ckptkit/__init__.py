"""Model checkpoints between Hugging Face and Megatron layouts: converted byte for byte, and verified.

The names below are resolved on first use, so that `import ckptkit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptkit.conversion import convert, inspect
    from ckptkit.families import supported_architectures
    from ckptkit.opening import open_checkpoint
    from ckptkit.sharding.grid import Parallelism
    from ckptkit.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Parallelism",
    "__version__",
    "convert",
    "inspect",
    "open_checkpoint",
    "supported_architectures",
    "verify",
]

_HOMES = {
    "Parallelism": "ckptkit.sharding.grid",
    "convert": "ckptkit.conversion",
    "inspect": "ckptkit.conversion",
    "open_checkpoint": "ckptkit.opening",
    "supported_architectures": "ckptkit.families",
    "verify": "ckptkit.verification.verify",
}


def __getattr__(name: str) -> Any:
    """Imports the module that defines a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
