"""Packages that a run needs, asked for before anything long begins."""

from __future__ import annotations

from ckptkit.errors import VerificationError
from ckptkit.requirements import missing_line, packages_for


def require(*purposes: str) -> None:
    """Checks that packages are there, without importing them.

    Args:
        purposes: What they are for.

    Raises:
        VerificationError: Some are not installed.
    """
    if missing := [package for package in packages_for(*purposes) if not package.present]:
        what, hint = missing_line(missing)
        raise VerificationError(f"this verification runs models, and {what}", hint=hint)
