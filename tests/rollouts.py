"""Models and prompts of the recorded rollouts. vLLM's environment imports this module, too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.models import save_llama, save_model

PROMPTS = [[5, 4, 3, 2, 1], list(range(7, 40, 3)), [200] * 9, [249, 1, 248, 2], list(range(100, 130))]
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 3}
"""vLLM's attention on CPUs takes no narrower heads."""
RECORDED = {
    "dense-float32": ("llama", "float32"),
    "dense-float32-chat": ("llama", "float32"),
    "dense-bfloat16": ("llama", "bfloat16"),
    "moe-float32": ("qwen3_moe", "float32"),
    "moe-float32-routed": ("qwen3_moe", "float32"),
}
"""Name of a recording -> kind of the model, and the type that the engine ran it in."""


def save_recorded(path: Path, kind: str) -> Path:
    """Saves the model of a recording, the same everywhere, and returns its directory."""
    saved = save_llama(path, "gqa", **SIZES) if kind == "llama" else save_model(path, kind, **SIZES)
    save_tokenizer(saved)
    return saved


def words(ids: Sequence[int]) -> str:
    """The text whose ids these are."""
    return " ".join(f"t{token}" for token in ids)


def save_tokenizer(path: Path, vocabulary: int = 250) -> None:
    """Saves a tokenizer of one word per id, whose chat template adds nothing: a server asks for one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(path)


def sample(
    path: Path,
    *,
    dtype: str = "float32",
    temperature: float = 1.0,
    top_p: float = 1.0,
    tokens: int = 24,
    routing: bool = False,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """What an engine would record of a model: transformers samples, one record of the flat form for each prompt.

    Args:
        path: The model.
        dtype: Type that it runs in.
        temperature: Temperature of sampling, and of the recorded log-probabilities.
        top_p: Share of the probability that the sampled tokens are of; the log-probabilities are those of this part.
        tokens: Tokens to sample after each prompt.
        routing: Also record the experts, nested lists.
        device: Where it runs.
    """
    import torch

    from ckptkit.verification.reference import load_model

    model = load_model(path, getattr(torch, dtype)).to(device)
    draw = torch.Generator().manual_seed(1)
    options = {"output_router_logits": True} if routing else {}
    records = []
    for prompt in PROMPTS:
        ids, logprobs, found = list(prompt), [], None
        for _ in range(tokens):
            with torch.no_grad():
                found = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **options)
            scores = (found.logits[0, -1].cpu().double() / temperature).log_softmax(-1)
            ordered, order = scores.exp().sort(descending=True)
            out = order[ordered.cumsum(0) - ordered >= top_p]
            scores = scores.index_fill(0, out, -torch.inf).log_softmax(-1)
            token = int(torch.multinomial(scores.exp(), 1, generator=draw))
            ids.append(token)
            logprobs.append(float(scores[token]))
        record = {"prompt_token_ids": prompt, "token_ids": ids[len(prompt) :], "logprobs": logprobs}
        if routing:
            assert found is not None
            chosen = [logits.cpu().topk(model.config.num_experts_per_tok).indices for logits in found.router_logits]
            record["routed_experts"] = torch.stack(chosen, 1).tolist()
        records.append(record)
    return records


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Writes records as JSON lines."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path
