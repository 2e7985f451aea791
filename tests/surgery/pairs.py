"""Tiny pairs of Llamas, 64 and 128 wide, everything randomised, and the split Llamas that are built of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptkit.surgery.build import SplitRecipe, build
from tests.models import LLAMAS, llama_config, randomise

KINDS = ("linear", "two-linear", "mlp")
NARROW, WIDE = 64, 128
FIRST: dict[str, Any] = {
    "hidden_size": NARROW,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": LLAMAS["llama3"]["rope_parameters"],
    "max_position_embeddings": 16384,
    "pad_token_id": 0,
}
LAST: dict[str, Any] = {
    **FIRST,
    "hidden_size": WIDE,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
}
NUM_FIRST, NUM_LAST = 2, 3


def save_half(path: Path, sizes: dict[str, Any], seed: int, *, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Saves one of a pair, and returns its directory."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config("gqa", **{**sizes, **changes}))
    randomise(model)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def save_pair(folder: Path, *, dtype: str = "bfloat16", **changes: Any) -> tuple[Path, Path]:
    """Saves a pair, and returns the directories of the narrow and of the wide model."""
    folder.mkdir(parents=True, exist_ok=True)
    return (
        save_half(folder / "first", FIRST, 1, dtype=dtype, **changes),
        save_half(folder / "last", LAST, 2, dtype=dtype, **changes),
    )


def recipe(pair: tuple[Path, Path], kind: str = "linear", **changes: Any) -> SplitRecipe:
    """The recipe of a split Llama of 2 + 3 layers."""
    values = {"num_first": NUM_FIRST, "num_last": NUM_LAST, "adapter": kind, **changes}
    return SplitRecipe(str(pair[0]), str(pair[1]), **values)


def build_split(out: Path, pair: tuple[Path, Path], kind: str = "linear", **changes: Any) -> Path:
    """Builds a split Llama, and returns its directory."""
    build(recipe(pair, kind, **changes), out)
    return out


def load_remote(path: Path, **options: Any) -> Any:
    """The model as a user loads it: with the code in its own directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options).eval()
