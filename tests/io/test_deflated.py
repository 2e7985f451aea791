"""Bytes that are kept compressed."""

from __future__ import annotations

import hashlib
import random

from ckptkit.io.deflated import Deflated


def test_every_range_is_what_was_appended() -> None:
    rng = random.Random(0)
    whole = b"".join(rng.randbytes(3) * rng.randrange(1, 30000) for _ in range(100))
    kept, at = Deflated(), 0
    assert kept.content() == b""
    while at < len(whole):
        step = rng.choice([1, 700, 1 << 16, 3 << 20])
        kept.append(whole[at : at + step])
        at += step
    assert len(kept) == len(whole) > 3 << 20
    assert kept.content() is kept
    assert kept.digest == hashlib.sha256(whole).hexdigest()
    edges = [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, len(whole) >> 20 << 20, len(whole) - 1, len(whole)]
    for start in edges:
        for stop in [*edges, *(rng.randrange(len(whole)) for _ in range(5))]:
            if start <= stop:
                assert kept.read(start, stop) == whole[start:stop]


def test_few_bytes_stay_as_they_are() -> None:
    kept = Deflated()
    kept.append(b"few")
    kept.append(b" bytes")
    assert kept.content() == b"few bytes"
    assert kept.read(2, 6) == b"w by"
