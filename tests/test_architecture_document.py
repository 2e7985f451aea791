"""docs/architecture.md: the row that it quotes is Llama's, and its drawing of the interleaving is what the row does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ckptkit.dtypes import DTYPES
from ckptkit.families.llama import LLAMA
from ckptkit.tables.family import Family
from ckptkit.tables.spelling import TE
from ckptkit.tensors import Tensor
from tests.test_tensors import materialise

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAME = "decoder.layers.0.self_attention.linear_qkv.weight"
DRAWN = re.findall(r"^\| (\d+) \| ([qkv]) row (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
"""Rows of the drawing: row of the fused tensor, part, row of the part, query group, rank at TP2."""
RAW = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
}
HEIGHTS = {"q": 8, "k": 4, "v": 4}


def rows_of(family: Family) -> tuple[list[tuple[str, int]], list[list[tuple[str, int]]]]:
    """(part, row of the part) for each row of the fused tensor, whole and on each of two ranks."""
    item = next(item for item in family.items(family.parse(RAW)) if item.key == NAME)
    labels = [(part, row) for part, height in HEIGHTS.items() for row in range(height)]
    numbers = np.repeat(np.arange(len(labels), dtype=np.uint16)[:, None], 3, axis=1)
    ends = np.cumsum(list(HEIGHTS.values()))[:-1]
    parts = [Tensor.from_bytes(part.tobytes(), DTYPES["U16"], part.shape) for part in np.split(numbers, ends)]
    fused = item.pack(parts)
    split = item.split(TE)
    found = [
        [labels[n] for n in materialise(tensor)[:, 0]] for tensor in (fused, *(split.cut(fused, r, 2) for r in (0, 1)))
    ]
    return found[0], found[1:]


def test_the_drawing_is_what_the_row_does() -> None:
    whole, ranks = rows_of(LLAMA)
    assert [(part, int(of)) for _, part, of, _, _ in DRAWN] == whole
    assert [int(row) for row, *_ in DRAWN] == list(range(16))
    for rank in (0, 1):
        assert [(part, int(of)) for _, part, of, _, on in DRAWN if int(on) == rank] == ranks[rank]
    assert whole != sorted(whole, key=lambda label: "qkv".index(label[0]))  # the parts do take turns


def test_the_quoted_row_and_the_named_files_are_there() -> None:
    source = (ROOT / "ckptkit" / "families" / "llama.py").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"^    (layer\(.*\),)$", PAGE, re.MULTILINE)
    assert f"    {quoted}\n" in source
    named = set(re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*(?:\.py|/))`", PAGE)) - {"ckptkit/"}
    assert len(named) > 25
    assert [path for path in sorted(named) if not (ROOT / "ckptkit" / path).exists()] == []
