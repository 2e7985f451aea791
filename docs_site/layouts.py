"""The drawings of docs/concepts.md: what the rows of a tiny Llama do, with the number of every row and column.

python -m docs_site.layouts     # writes them into the page again
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ckptkit.dtypes import DTYPES
from ckptkit.families.llama import LLAMA
from ckptkit.io.reading import read_tensor
from ckptkit.tables.spelling import TE
from ckptkit.tensors import Tensor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "concepts.md"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 10,
}
RANKS = 2
_LAYER = "decoder.layers.0."
DRAWN = {
    "qkv": (f"{_LAYER}self_attention.linear_qkv.weight", {"q": 8, "k": 4, "v": 4}),
    "gate-up": (f"{_LAYER}mlp.linear_fc1.weight", {"gate": 4, "up": 4}),
}
"""Drawing -> the Megatron tensor, and its Hugging Face tensors with the number of their rows."""
COLUMNS = f"{_LAYER}self_attention.linear_proj.weight"


def _item(key: str) -> Any:
    return next(item for item in LLAMA.items(LLAMA.parse(CONFIG)) if item.key == key)


def _numbered(shape: tuple[int, ...], start: int, axis: int) -> Tensor:
    """A tensor each of whose elements is the number of its row or column, from `start`."""
    numbers = np.arange(start, start + shape[axis], dtype=np.uint16)
    filled = np.broadcast_to(numbers[:, None] if axis == 0 else numbers, shape)
    return Tensor.from_bytes(np.ascontiguousarray(filled).tobytes(), DTYPES["U16"], shape)


def _numbers(tensor: Tensor, axis: int) -> list[int]:
    """The numbers in a tensor, along an axis."""
    read = np.frombuffer(read_tensor(tensor), np.uint16).reshape(tensor.shape)
    return [int(number) for number in (read[:, 0] if axis == 0 else read[0])]


def rows_of(name: str) -> list[tuple[str, int, int]]:
    """The rows of a fused tensor in order: the Hugging Face tensor, its row, and the rank that holds it."""
    key, heights = DRAWN[name]
    item = _item(key)
    labels = [(part, row) for part, height in heights.items() for row in range(height)]
    starts = np.cumsum([0, *heights.values()])[:-1]
    parts = [
        _numbered((height, CONFIG["hidden_size"]), int(start), 0)
        for height, start in zip(heights.values(), starts, strict=True)
    ]
    fused = item.pack(parts)
    split = item.split(TE)
    ranks = {number: rank for rank in range(RANKS) for number in _numbers(split.cut(fused, rank, RANKS), 0)}
    return [(*labels[number], ranks[number]) for number in _numbers(fused, 0)]


def columns_of() -> list[int]:
    """The rank of each column of an output projection."""
    item = _item(COLUMNS)
    shape = (CONFIG["hidden_size"], CONFIG["num_attention_heads"] * CONFIG["head_dim"])
    whole = item.pack([_numbered(shape, 0, 1)])
    split = item.split(TE)
    ranks = {number: rank for rank in range(RANKS) for number in _numbers(split.cut(whole, rank, RANKS), 1)}
    return [ranks[column] for column in range(shape[1])]


def drawing(name: str) -> str:
    """A drawing as a table."""
    if name == "columns":
        ranks = columns_of()
        head = "| column | " + " | ".join(map(str, range(len(ranks)))) + " |"
        return "\n".join([head, "|---" * (len(ranks) + 1) + "|", "| rank | " + " | ".join(map(str, ranks)) + " |"])
    lines = [f"| {row} | {part} row {of} | {rank} |" for row, (part, of, rank) in enumerate(rows_of(name))]
    return "\n".join(["| row | comes from | rank at TP2 |", "|---|---|---|", *lines])


def drawn(page: str) -> str:
    """A page with its drawings made again."""
    for name in (*DRAWN, "columns"):
        begin, end = f"<!-- drawing {name}: begin -->", f"<!-- drawing {name}: end -->"
        page = re.sub(f"{begin}.*?{end}", f"{begin}\n\n{drawing(name)}\n\n{end}", page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
