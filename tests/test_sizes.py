"""Sizes: what users may write, and the one way that messages give them."""

from __future__ import annotations

import pytest

from ckptkit.errors import UsageError
from ckptkit.sizes import human_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("512", 512), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "1e9", "0.1B"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (99_960, "100 kB"), (269_030_016, "269 MB"), (10**18, "1000 PB")],
)
def test_human_sizes(size: int, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize("size", [1, 999, 1000, 123_456, 5_000_000_000, 3 * 10**12])
def test_what_messages_say_can_be_written(size: int) -> None:
    assert parse_size(human_size(size)) == pytest.approx(size, rel=0.005)
