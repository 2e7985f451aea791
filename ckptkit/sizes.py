"""Sizes in bytes, as users write them and as messages give them: decimal units, as safetensors and transformers do."""

from __future__ import annotations

import math
import re

from ckptkit.errors import UsageError

DECIMAL = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
"""Units that messages use."""
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
"""Units that users may write as well."""
_UNITS = {"": 1} | {unit.upper(): factor for unit, factor in (DECIMAL | BINARY).items()}


def parse_size(text: str, where: str = "--shard-size") -> int:
    """Bytes of a size such as `5GB` (decimal, as transformers reads it), `512MiB` or `1000`.

    Args:
        text: The size.
        where: The option that it belongs to.

    Raises:
        UsageError: It is not a positive size.
    """
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * unit if match and unit else 0
    if not 1 <= size < math.inf:
        raise UsageError(f"{text!r} is not a size", where=where, hint="write it like 5GB or 512MiB")
    return int(size)


def human_size(size: int) -> str:
    """Bytes with three digits and a decimal unit: `269 MB`."""
    value = float(size)
    for unit in DECIMAL:
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{size} B" if unit == "B" else f"{three_digits(value)} {unit}"


def three_digits(value: float) -> str:
    """A number below 1000 with three digits: `1.00`, `26.9`, `269`."""
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"
