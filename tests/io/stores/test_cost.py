"""What writing to a store costs is what docs/scale.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ckptkit.io.stores.parts import MOST, PART_VARIABLE, SMALLEST, Sizes, count_of
from ckptkit.sharding.grid import Parallelism
from tests.io.stores.uploads import (
    SMALL,
    Calls,
    calls_fixture,  # noqa: F401  a fixture
    convert_to,
    server_fixture,  # noqa: F401  a fixture
    small_parts_fixture,  # noqa: F401  a fixture
)
from tests.stores import BUCKET, Server

PAGE = (Path(__file__).parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")


def requests(uploads: int, parts: int, held: int, summed: int) -> int:
    """The formula of the page: uploads, their parts, files in memory, and objects with sums."""
    constant = re.search(r"requests = P \+ 2 M \+ H \+ (\d+)", PAGE)
    assert constant is not None
    return parts + 2 * uploads + held + int(constant[1]) + summed + (summed > 0)


@pytest.mark.parametrize("how", [{"to": "hf"}, {"to": "torch", "grid": Parallelism(tp=2)}], ids=["hf", "torch"])
def test_the_requests_of_the_page(server: Server, calls: Calls, small_parts: None, how: dict[str, Any]) -> None:
    result = convert_to(f"s3://{BUCKET}/cost/{how['to']}", **how)
    large = [file["bytes"] for file in result.files if file["bytes"] >= SMALL.smallest]
    counts = [count_of(size, SMALL.part) for size in large]
    assert calls.made["CompleteMultipartUpload"] == len(large) and calls.made["UploadPart"] == sum(counts)
    ranks = [file["bytes"] for file in result.files if file["path"].endswith(".pt")]
    summed = sum(count_of(size, SMALL.part) // 8 for size in ranks)
    assert sum(calls.made.values()) == requests(len(large), sum(counts), len(result.files) - len(large), summed)


def test_the_example_of_the_page() -> None:
    shards, size = 4, 16e9 / 4
    parts = shards * count_of(int(size), Sizes().part)
    assert f"(`M` = {shards}, `P` = {parts}, `H` = 6)" in PAGE
    assert f"takes {requests(shards, parts, 6, 0)} requests" in PAGE.replace("\n", " ")


def test_the_sizes_of_the_page() -> None:
    sizes = Sizes()
    assert f"Parts have {sizes.part >> 20} MiB" in PAGE and f"(from {SMALLEST >> 20} MiB)" in PAGE
    assert f"{sizes.part * MOST >> 30} GiB" in PAGE and f"`{PART_VARIABLE}`" in PAGE
    assert f"take {sizes.memory >> 20} MiB" in PAGE.replace("\n", " ")
