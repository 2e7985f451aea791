"""Proving that two checkpoints are one model. Importing this room costs nothing: `verify` is resolved on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptkit.verification.levels import verify

__all__ = ["verify"]


def __getattr__(name: str) -> Any:
    """Imports `verify` on first use (PEP 562)."""
    if name != "verify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckptkit.verification.levels import verify

    return verify
