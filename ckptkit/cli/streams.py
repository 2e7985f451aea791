"""Makes the three standard streams safe: a closed, full or ASCII-only stream does not change the exit code.

(A result that cannot be written is the exception: see `output.py`.)
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

_NAMES = ("stdin", "stdout", "stderr")


def prepare() -> None:
    """Replaces closed streams by the null device, and escapes characters that a stream cannot encode.

    A closed descriptor must not stay free. The next opened file, perhaps an output file, would get its number, and text
    that a library prints would land in that file.
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
    """Sends the rest of a stream, its buffer included, to the null device. Python flushes streams when it ends."""
    with suppress(AttributeError, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def encodes_everything(stream: Any) -> bool:
    """Whether every character can be written as it is."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
