"""The three standard streams, made safe: closed, full or too narrow for a character, they never decide an exit code."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

_NAMES = ("stdin", "stdout", "stderr")


def prepare() -> None:
    """Replaces closed streams by the null device, and lets no character fail.

    A closed descriptor must not stay free: the next file that is opened, an output file perhaps, would get its number,
    and what a library prints would land in it.
    """
    for number in range(len(_NAMES)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name in _NAMES:
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def silence(stream: Any) -> None:
    """Sends the rest of a stream, what is buffered included, to the null device: Python flushes it when it ends."""
    with suppress(AttributeError, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def encodes_everything(stream: Any) -> bool:
    """Whether every character can be written as it is."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
