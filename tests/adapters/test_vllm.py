"""vLLM serves the adapters that ckptkit exports: log-probabilities of prompts are those of peft on transformers.

Runs where vLLM and peft are installed: `make test-vllm` makes an environment of its own for it.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytest.importorskip("peft", reason="needs peft: make test-vllm")

import torch
from safetensors.torch import save_file

from ckptkit.adapters.commands import export_adapter
from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.lora import LINEARS, load, save_adapter, tensors_of
from tests.models import save_llama

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytestmark = pytest.mark.slow

PROMPTS = [list(range(7, 40, 3)), [5, 4, 3, 2, 1], [200] * 9]
CLOSE = 1e-3
"""Largest difference of log-probabilities, which reach 40 here. What an adapter changes is larger than 1."""
QUIET: dict[str, Any] = {"r": 4, "lora_alpha": 2}
MAX_RANK = 16
Served = Callable[[Path | None], list[torch.Tensor]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads are not too narrow for vLLM's attention on CPUs."""
    return save_llama(tmp_path_factory.mktemp("vllm") / "base", head_dim=32)


@pytest.fixture(scope="module")
def engine(base: Path) -> Any:
    """One engine for all. Its kernels for CPUs fail on log-probabilities of prompts where the head could be adapted."""
    from vllm import LLM

    return LLM(
        str(base),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        enforce_eager=True,
        seed=0,
        enable_lora=True,
        max_lora_rank=MAX_RANK,
        max_loras=2,
        lora_target_modules=LINEARS,
    )


@pytest.fixture(scope="module")
def numbers() -> itertools.count[int]:
    """An adapter is known to an engine by a number of its own."""
    return itertools.count(1)


@pytest.fixture(scope="module")
def served(engine: Any, numbers: itertools.count[int]) -> Served:
    """The log-probability of each token of each prompt but its first, as vLLM computes them."""

    def get(adapter: Path | None) -> list[torch.Tensor]:
        from vllm import SamplingParams

        asked = {} if adapter is None else {"lora_request": request(adapter, next(numbers))}
        options = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = engine.generate(prompts, options, use_tqdm=False, **asked)
        return [
            torch.tensor(
                [place[token].logprob for place, token in zip(found.prompt_logprobs[1:], prompt[1:], strict=True)]
            )
            for found, prompt in zip(outputs, PROMPTS, strict=True)
        ]

    return get


def request(adapter: Path, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"{adapter.name}-{number}", number, str(adapter))


@torch.no_grad()
def by_peft(base: Path, adapter: Path | None) -> list[torch.Tensor]:
    """The same as peft computes them on transformers."""
    from peft import PeftModel

    model = load(base) if adapter is None else PeftModel.from_pretrained(load(base), adapter)
    model.eval()
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        logits = model(tokens).logits.log_softmax(-1)[0, :-1]
        found.append(logits.gather(1, tokens[0, 1:, None])[:, 0])
    return found


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(left, right, strict=True))


def from_megatron(base: Path, adapter: Path, out: Path, layout: str) -> Path:
    """The adapter as a training run in Megatron would leave it, without a sidecar, exported."""
    convert(adapter, out / "megatron", to="torch_dist", grid=Parallelism(2), adapter_layout=layout, hf_reference=base)
    shutil.rmtree(out / "megatron" / "ckptkit")
    export_adapter(out / "megatron", out / "exported", hf_reference=base)
    return out / "exported"


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("fused", {}),  # the factors of q, k and v share A, and have all stacked ranks
        ("canonical", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
        ("peft", {"use_rslora": True, "lora_alpha": 1}),
        (None, {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"down_proj": 1}}),
    ],
)
def test_served_as_peft_computes(
    tmp_path: Path, base: Path, served: Served, layout: str | None, config: dict[str, Any]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, **{**QUIET, **config})
    exported = from_megatron(base, adapter, tmp_path, layout) if layout else tmp_path / "same"
    if layout is None:
        convert(adapter, exported, to="peft", hf_reference=base)
    expected, found = by_peft(base, adapter), served(exported)
    print(f"\n{layout}: largest difference of prompt log-probabilities {distance(found, expected):.1e}")
    assert distance(found, expected) < CLOSE
    assert distance(by_peft(base, exported), expected) < CLOSE
    assert distance(found, by_peft(base, None)) > 1


def test_an_element_of_b_is_seen(tmp_path: Path, base: Path, served: Served) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, **QUIET)
    expected = by_peft(base, adapter)
    assert distance(served(adapter), expected) < CLOSE
    tensors = tensors_of(adapter)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 2] += 1
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    found = served(adapter)
    assert distance(found, expected) > 10 * CLOSE
    assert distance(found, by_peft(base, adapter)) < CLOSE
    assert distance(served(None), by_peft(base, None)) < CLOSE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": MAX_RANK + 8}, "greater than max_lora_rank"),
        ({"bias": "lora_only"}, "bias is not supported"),
        ({"use_dora": True}, "not yet support DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_what_vllm_refuses(
    tmp_path: Path, base: Path, engine: Any, numbers: itertools.count[int], config: dict[str, Any], message: str
) -> None:
    """docs/adapters.md says what to do with them."""
    adapter = save_adapter(tmp_path / "adapter", base, **{**QUIET, **config})
    with pytest.raises(Exception, match=message):
        engine.llm_engine.add_lora(request(adapter, next(numbers)))
