"""Values of command-line options that need reading."""

from __future__ import annotations

import math
import re

from ckptkit.errors import UsageError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` (decimal, as transformers reads it), `512MiB` or `1000`.

    Raises:
        UsageError: It is not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * unit if match and unit else 0
    if not 1 <= size < math.inf:
        raise UsageError(f"{text!r} is not a size", where="--shard-size", hint="write it like 5GB or 512MiB")
    return int(size)
