"""What the tests of Transformer Engine's modules convert, and what transformers computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import LLAMAS, save_llama, save_model

KINDS = ("gqa", "llama3", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral")
EXPERTS = ("qwen3_moe", "mixtral")


def save(path: Path, kind: str) -> Path:
    """A tiny Hugging Face model, everything randomised."""
    return (save_llama if kind in LLAMAS else save_model)(path, kind)


def save_expected(source: Path, file: Path) -> float:
    """Writes tokens and the logits of transformers in fp32.

    Returns:
        The RMS of what transformers' logits in bf16 differ from them by: the noise floor of bf16.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    found: dict[Any, torch.Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager").eval()
        with torch.no_grad():
            found[dtype] = model(tokens, use_cache=False).logits.float()
    save_file({"tokens": tokens, "logits": found[torch.float32].contiguous()}, file)
    difference = found[torch.bfloat16].double() - found[torch.float32].double()
    return difference.square().mean().sqrt().item()
