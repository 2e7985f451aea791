"""Training a split Llama at its true dimensions in bf16: tokens/s and memory, packed against padded, and its 8B half.

    python -m benchmarks.split_training --device cuda

The split Llama has layers of Llama 3.1 8B, an adapter, and layers of Llama 3.1 70B (`--first-layers`, `--last-layers`);
beside it stands its first half alone, with a head of its own width. Weights are random and made on the device: no file
is read. A step runs megatron-core's schedule forwards and backwards over one ragged batch, with full recompute
(`--no-recompute`) and float32 gradients; an optimizer is no part of it. Lengths are drawn from a log-normal
distribution (seed 0) and cut off at --longest, as in `benchmarks.packed`. Both inputs go through in microbatches of at
most --capacity tokens; padded rows are padded to --longest. Tokens count without padding; the losses of both are
compared. Packed rows use flash attention on a GPU, plain rows ckptkit's exact attention. Memory is the peak of what
torch allocated, weights and gradients included. Every model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.big_models import change, released, shrink
from benchmarks.report import table

NAMES = ("Llama-3.1-8B", "Llama-3.1-70B")
CASES = (("split", "all"), ("split", "adapter"), ("first", "all"))
"""Model and what of it is trained."""
HEAD = ("model", "trained", "parameters", "input", "tokens/s", "seconds a step", "peak memory, GiB")
WARM_UP = 1
ALIKE = 0.02
"""Largest difference of the losses of packed and padded rows, over the loss: they round in another order."""


def main() -> int:
    """Measures every case in a process of its own, and prints the table."""
    options = _options()
    if options.case is not None:
        print(json.dumps(_measure(options, *options.case.split(","))), flush=True)
        return 0
    rows, about, same = [], "", True
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.split_training", *sys.argv[1:], "--case", ",".join(case)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"error: {', '.join(case)} ended with exit code {done.returncode}", file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        about = found["about"]
        losses = [part["loss"] for part in found["inputs"].values()]
        same = same and max(losses) - min(losses) <= ALIKE * max(losses)
        for name, part in found["inputs"].items():
            memory = "not measured" if part["memory"] is None else f"{part['memory'] / 2**30:.1f}"
            figures = [f"{part['rate']:,.0f}", f"{part['seconds']:.3f}", memory]
            rows.append([found["model"], case[1], f"{found['parameters'] / 1e9:.2f} B", name, *figures])
            print(f"... {rows[-1]}", file=sys.stderr, flush=True)
    print(f"{about}\n\n{table(HEAD, rows)}")
    if not same:
        print("error: the losses of packed and padded rows differ", file=sys.stderr)
    return 0 if same else 1


def _measure(options: argparse.Namespace, which: str, trained: str) -> dict[str, Any]:
    """One model, both inputs."""
    import torch
    import torch.distributed as dist

    from ckptkit.megatron.compat import import_megatron

    import_megatron()
    from ckptkit.families import family_of
    from ckptkit.megatron import parallel
    from ckptkit.megatron.model import build_chunks
    from ckptkit.megatron.pipeline import Pipeline
    from ckptkit.megatron.training import Training
    from ckptkit.sharding.grid import Parallelism

    raw = _config(options, which)
    config = replace(family_of(raw, which).parse(raw), max_position_embeddings=options.longest)
    grid, device = Parallelism(), parallel.device_of(options.device, 0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parallel.initialize(grid, 0, store=dist.HashStore(), device=device)
    chunks = build_chunks(
        config, grid, config.vocab_size, dtype=dtype, device=device, recompute=not options.no_recompute
    )
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        for name, parameter in chunks[0].named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02, generator=generator)
    count = sum(parameter.numel() for parameter in chunks[0].parameters())
    names = None if trained == "all" else [{name for name, _ in chunks[0].named_parameters() if "adapter" in name}]
    training = Training(Pipeline(chunks, grid, device, config.vocab_size), names)
    lengths = _lengths(options)
    inputs = {
        name: _timed(options, training, batches, sum(lengths), device)
        for name, batches in _inputs(options, lengths, config.vocab_size).items()
    }
    layers = f"{options.first_layers} layers of 8B"
    model = layers if which == "first" else f"{layers}, {options.last_layers} of 70B"
    padded = len(lengths) * options.longest
    about = (
        f"{_device(device)}, torch {torch.__version__}, {dtype}; {len(lengths)} sequences of up to {options.longest}"
        f" tokens, {sum(lengths):,} in all ({sum(lengths) / padded:.0%} of the padded), microbatches of at most"
        f" {options.capacity:,} tokens, {'no recompute' if options.no_recompute else 'full recompute'}"
    )
    parallel.finalize()
    return {"model": model, "parameters": count, "inputs": inputs, "about": about}


def _config(options: argparse.Namespace, which: str) -> dict[str, Any]:
    """config.json of a model."""
    from ckptkit.families.split_llama import compose

    first = shrink(released(NAMES[0]), options.first_layers, options.set)
    if which == "first":
        return first
    last = shrink(released(NAMES[1]), options.last_layers, options.set_last)
    return compose(first, last, options.first_layers, options.last_layers, options.adapter)


def _lengths(options: argparse.Namespace) -> list[int]:
    import torch

    random = torch.Generator().manual_seed(0)
    drawn = torch.exp(torch.randn(options.sequences, generator=random) + torch.tensor(options.longest / 8).log())
    lengths: list[int] = drawn.round().clamp(2, options.longest).long().tolist()
    return [options.longest, *lengths[1:]]


def _inputs(options: argparse.Namespace, lengths: list[int], vocabulary: int) -> dict[str, list[Any]]:
    """The microbatches of both inputs."""
    import torch

    from ckptkit.verification.training.batches import Sharing

    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, vocabulary, (length,), generator=random).tolist() for length in lengths]
    weights = [[*[1.0] * (length - 1), None] for length in lengths]
    padded = Sharing(1, 0, split=options.longest, together=max(1, options.capacity // options.longest))
    return {
        "packed": Sharing(1, 0, capacity=options.capacity).deal(rows, {}, weights=weights),
        "padded": padded.deal(rows, {}, weights=weights),
    }


def _timed(options: argparse.Namespace, training: Any, batches: list[Any], tokens: int, device: Any) -> dict[str, Any]:
    """Median of the steps, tokens per second, and the peak of the memory in bytes where that can be told."""
    import torch

    cuda, seconds, loss = device.type == "cuda", [], 0.0
    for step in range(WARM_UP + options.repeat):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss, _ = training.run(batches)
        if cuda:
            torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"rate": tokens / median(seconds), "seconds": median(seconds), "memory": peak, "loss": loss}


def _device(device: Any) -> str:
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "CPU"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.split_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--first-layers", type=int, default=32, metavar="N")
    parser.add_argument("--last-layers", type=int, default=8, metavar="M")
    parser.add_argument("--adapter", default="linear")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--longest", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--capacity", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-recompute", action="store_true")
    for name in ("--set", "--set-last"):
        parser.add_argument(
            name, type=change, action="append", default=[], metavar="KEY=JSON", help="another size, for a trial run"
        )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.set, options.set_last = dict(options.set), dict(options.set_last)
    return options


if __name__ == "__main__":
    sys.exit(main())
