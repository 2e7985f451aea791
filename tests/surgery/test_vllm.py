"""Split Llamas in vLLM, found by the plugin alone: log-probabilities and greedy tokens are those of transformers.

Runs where vLLM is installed: `make test-vllm` makes an environment of its own for it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import torch
from safetensors.torch import load_file, save_file

from tests.surgery.pairs import FIRST, KINDS, LAST, build_split, load_remote, save_half

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytestmark = pytest.mark.slow

PROMPTS = [list(range(7, 40, 3)), [5, 4, 3, 2, 1], [200] * 9]
NEW_TOKENS = 6
SIZES = {"head_dim": 32}  # narrower heads are not for vLLM's attention on CPUs


@pytest.fixture(scope="module")
def splits32(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each half has an epsilon of its own: published code takes that of the narrow one for the final norm."""
    folder = tmp_path_factory.mktemp("vllm")
    pair = (
        save_half(folder / "first", FIRST, 1, dtype="float32", rms_norm_eps=0.3, **SIZES),
        save_half(folder / "last", LAST, 2, dtype="float32", **SIZES),
    )
    return {kind: build_split(folder / kind, pair, kind) for kind in KINDS}


def engine(path: Path) -> Any:
    from vllm import LLM

    return LLM(str(path), dtype="float32", skip_tokenizer_init=True, max_model_len=64, enforce_eager=True, seed=0)


@torch.no_grad()
def expected(model: Any, prompt: list[int]) -> tuple[list[float], list[int]]:
    """Log-probability of every prompt token but the first, and the greedy continuation."""
    tokens = torch.tensor([prompt])
    found = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0].tolist()
    for _ in range(NEW_TOKENS):  # `generate` would stop at the end of a text
        tokens = torch.cat((tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return found, tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_against_transformers(splits32: dict[str, Path], kind: str) -> None:
    from vllm import SamplingParams

    model = load_remote(splits32[kind])
    options = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    outputs = engine(splits32[kind]).generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], options)
    worst = 0.0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        logprobs, grown = expected(model, prompt)
        theirs = [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        worst = max(worst, *(abs(ours - other) for ours, other in zip(logprobs, theirs, strict=True)))
        assert list(output.outputs[0].token_ids) == grown
    print(f"\n{kind}: largest difference of prompt log-probabilities {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize(
    ("kind", "gone", "added"),
    [
        ("linear", "model.adapter.weight", None),
        ("two-linear", "model.layers_last.1.self_attn.k_proj.weight", None),
        ("mlp", None, "model.adapter.weight"),
    ],
)
def test_weights_are_loaded_strictly(
    tmp_path: Path, splits32: dict[str, Path], kind: str, gone: str | None, added: str | None
) -> None:
    """Published code builds two matrices whatever the file holds, and goes on with random ones."""
    shutil.copytree(splits32[kind], tmp_path / "split")
    tensors = load_file(splits32[kind] / "model.safetensors")
    if gone is not None:
        del tensors[gone]
    if added is not None:
        tensors[added] = torch.ones(128, 64)
    save_file(tensors, tmp_path / "split" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)) as error:
        engine(tmp_path / "split")
    assert "initialization failed" in str(error.value) or "adapter" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_a_checkpoint(splits32: dict[str, Path], kind: str) -> None:
    from transformers import AutoConfig

    from ckptkit.surgery.vllm_model import tensor_names

    config = AutoConfig.from_pretrained(splits32[kind], trust_remote_code=True)
    assert tensor_names(config) == load_file(splits32[kind] / "model.safetensors").keys()


def test_layers_have_numbers_of_their_own() -> None:
    from types import SimpleNamespace
    from unittest.mock import patch

    from ckptkit.surgery import vllm_model

    made: list[str] = []

    def layer(vllm_config: Any, prefix: str, config: Any) -> torch.nn.Module:
        made.append(prefix)
        return torch.nn.Identity()

    config: Any = None
    with patch.object(vllm_model, "LlamaDecoderLayer", layer):
        vllm_model._layers(config, SimpleNamespace(num_hidden_layers=2), "model", 0)
        vllm_model._layers(config, SimpleNamespace(num_hidden_layers=3), "model", 2)
    assert made == [f"model.layers.{number}" for number in range(5)]


def test_registering_twice_changes_nothing() -> None:
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from ckptkit.surgery.vllm_plugin import register

    for _ in range(2):
        register()
    assert "CustomSplitLLamaForCausalLM" in ModelRegistry.get_supported_archs()
    assert AutoConfig.for_model("split_llama").model_type == "split_llama"
