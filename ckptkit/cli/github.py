"""GitHub Actions: errors as annotations, and output that is no command to it.

Source: "Workflow commands for GitHub Actions". A line that begins with `::` is a command, wherever it comes from.
"""

from __future__ import annotations

import os
import re

MOST = 10
"""Annotations that GitHub shows for a step."""

_COMMAND = re.compile(r"^(?=[^\S\n]*(?:::|##\[))", re.MULTILINE)
_IN_DATA = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_IN_PROPERTY = _IN_DATA | str.maketrans({":": "%3A", ",": "%2C"})


def in_actions() -> bool:
    """Whether GitHub Actions runs this process."""
    return bool(os.environ.get("GITHUB_ACTIONS"))


def error_line(message: str, title: str) -> str:
    """The command that makes a message an annotation."""
    return f"::error title={title.translate(_IN_PROPERTY)}::{message.translate(_IN_DATA)}"


def inert(text: str) -> str:
    """A text whose lines are no commands: before what begins as one stands a backslash. Elsewhere, the text itself."""
    return _COMMAND.sub(r"\\", text) if in_actions() else text
