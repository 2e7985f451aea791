"""Packed throughput against padded, on one ragged batch: tokens per second and peak memory.

    python -m benchmarks.packed                            a 1.1B Llama in bf16 on the GPU
    python -m benchmarks.packed --size tiny --device cpu   a tiny one in fp32, to see that it runs

The lengths are drawn from a log-normal distribution (seed 0) and cut off at --longest, as answers in reinforcement
learning are: a few are long, most are short. Tokens count without padding. All ways run the same weights, and their
logits at the tokens that count are compared before anything is timed. Memory is the peak of what torch allocated on the
GPU above what was allocated before the pass; it is not measured on the CPU. A pass for which the GPU has too little is
reported as that.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.report import table

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = 32000
WARM_UP = 2
ALIKE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest difference of two ways' logits over the largest logit: they round in another order."""


@dataclass(frozen=True)
class Batch:
    """One ragged batch in both forms."""

    tokens: torch.Tensor
    mask: torch.Tensor
    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @classmethod
    def drawn(cls, sequences: int, longest: int, device: torch.device) -> Batch:
        """Sequences of random tokens and log-normal lengths, padded on the right."""
        random = torch.Generator().manual_seed(0)
        lengths = torch.exp(torch.randn(sequences, generator=random) + torch.tensor(longest / 8).log())
        lengths = lengths.round().clamp(1, longest).to(torch.int64)
        lengths[0] = longest
        mask = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
        tokens = torch.randint(0, VOCABULARY, mask.shape, generator=random) * mask
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packed = tokens[mask.bool()]
        tokens, mask, packed, bounds = (part.to(device) for part in (tokens, mask, packed, bounds))
        return cls(tokens, mask, packed, bounds, longest)


Way = Callable[[], torch.Tensor]


def main() -> int:
    """Measures and prints the table."""
    options = _options()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    ours, theirs = _models(options.size, dtype, device, options.longest)
    batch = Batch.drawn(options.sequences, options.longest, device)
    count = int(batch.mask.sum())
    ways = _ways(ours, theirs, batch)
    _compare(ways, dtype)
    share = count / batch.mask.numel()
    print(f"{_device(device)}, torch {torch.__version__}, {dtype}, Llama {options.size}")
    print(f"{options.sequences} sequences of up to {options.longest} tokens, {count} in all: {share:.0%} of the padded")
    print()
    rows = []
    for name, way in ways.items():
        for kind, run in (("forward", _forward(way)), ("forward and backward", _backward(way))):
            rows.append([name, kind, *_cells(run, device, options.repeat, count)])
    print(table(("input", "pass", "tokens/s", "seconds (median)", "peak memory, GiB"), rows))
    return 0


def _models(size: str, dtype: torch.dtype, device: torch.device, longest: int) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from ckptkit import convert_to_packed

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size],
        num_key_value_heads=SIZES[size]["num_attention_heads"] // 4,
        vocab_size=VOCABULARY,
        max_position_embeddings=longest,
    )
    model = LlamaForCausalLM._from_config(config, dtype=dtype).to(device).eval()
    model.set_attn_implementation("sdpa")
    return convert_to_packed(model), model


def _ways(ours: Any, theirs: Any, batch: Batch) -> dict[str, Way]:
    """What to run, each giving the logits of the tokens that count, (total_nnz, vocab_size)."""
    seen = batch.mask.bool()
    return {
        "transformers, padded (sdpa)": lambda: theirs(
            input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False
        ).logits[seen],
        "ckptkit, padded and packed on the way": lambda: ours(batch.tokens, attention_mask=batch.mask)[seen],
        "ckptkit, packed": lambda: ours(batch.input_ids, batch.cu_seqlens, batch.max_seqlen),
    }


def _compare(ways: dict[str, Way], dtype: torch.dtype) -> None:
    """Stops if the ways do not compute the same."""
    with torch.no_grad():
        expected, *others = [way().float() for way in ways.values()]
    for name, found in zip(list(ways)[1:], others, strict=True):
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= ALIKE[dtype]:
            raise SystemExit(f"{name}: logits differ by {difference:.1e} of the largest; nothing was timed")


def _forward(way: Way) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            way()

    return run


def _backward(way: Way) -> Callable[[], None]:
    return lambda: way().float().square().mean().backward()


def _cells(run: Callable[[], None], device: torch.device, repeat: int, count: int) -> list[str]:
    """Tokens per second, seconds, and memory."""
    enough = True
    try:
        seconds, memory = _measure(run, device, repeat)
    except torch.OutOfMemoryError:
        enough = False
    if not enough:  # not before the exception is gone, whose frames hold tensors
        gc.collect()
        torch.cuda.empty_cache()
        return ["-", "-", "out of memory"]
    peak = "not measured" if memory is None else f"{memory / 2**30:.2f}"
    return [f"{count / seconds:,.0f}", f"{seconds:.3f}", peak]


def _measure(run: Callable[[], None], device: torch.device, repeat: int) -> tuple[float, int | None]:
    """Median seconds of a pass, and the peak of its memory in bytes where that can be told."""
    for _ in range(WARM_UP):
        run()
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds), torch.cuda.max_memory_allocated() - before if cuda else None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
