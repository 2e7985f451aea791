"""Errors a user can meet: one exit code each, and one line that says what, where and what to do."""

from __future__ import annotations


class CkptkitError(Exception):
    """Base of every error that ckptkit raises on purpose.

    Attributes:
        what: The problem, in a few words.
        where: The file, tensor or option it concerns.
        hint: The next step for the user.
        told: Whether another process tells the user, so that this one need not.
    """

    exit_code = 70
    told = False

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.hint is None else f"{text}; {self.hint}"


class UsageError(CkptkitError):
    """The request cannot work as stated (a bad option, a grid that does not divide)."""

    exit_code = 2


class InputError(CkptkitError):
    """The input is damaged, incomplete or contradicts itself."""

    exit_code = 3


class UnsupportedError(CkptkitError):
    """The input is sound, but nothing here can convert it."""

    exit_code = 4


class StorageError(CkptkitError):
    """No space, no permission, or the disk answered with an error."""

    exit_code = 5


class VerificationError(CkptkitError):
    """A verification could not be made; this says nothing about the checkpoints."""

    exit_code = 6
