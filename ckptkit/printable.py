"""Text that is safe to print: what comes out of a file may hold anything, and a terminal obeys some of it."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

LONGEST_WORD = 300
"""Characters of a name that are shown; names of tensors and files are shorter."""
LONGEST_TEXT = 4000
"""Characters of a message that are shown."""
LONGEST_IN_JSON = 4096
"""Characters of a word in JSON, where paths must stay whole: the longest path of Linux."""

_UNSAFE = {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"}
"""Unicode categories: control, format (writing direction among them), private, unassigned, surrogates, separators."""
_PLAIN = re.compile(r"[\x20-\x7e]*")


def printable(text: str, longest_word: int = LONGEST_WORD, longest: int = LONGEST_TEXT) -> str:
    r"""One line of visible characters: the others are written as escapes such as `\x1b`, and what is long is cut.

    Args:
        text: Any text.
        longest_word: Characters that a run without spaces keeps.
        longest: Characters that the whole keeps.
    """
    text = _shortened(text, longest + longest_word)
    if not _PLAIN.fullmatch(text):
        text = "".join(_escaped(character) for character in text)
    if len(text) > longest_word:
        text = " ".join(_shortened(word, longest_word) for word in text.split(" "))
    return _shortened(text, longest)


def printable_json(data: Any) -> Any:
    """JSON types with every string and key made printable; words keep the length of a path."""
    if isinstance(data, str):
        return printable(data, LONGEST_IN_JSON, 8 * LONGEST_IN_JSON)
    if isinstance(data, dict):
        return {printable_json(key): printable_json(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [printable_json(item) for item in data]
    return data


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSAFE:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _shortened(text: str, longest: int) -> str:
    """The beginning and the end of what is longer."""
    if len(text) <= longest:
        return text
    kept = longest - 20
    head = 3 * kept // 4
    return f"{text[:head]}...+{len(text) - kept}...{text[len(text) - (kept - head) :]}"
