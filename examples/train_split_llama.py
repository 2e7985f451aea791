r"""Train a model in megatron-core on a grid, and convert what was trained back: split Llamas, or any model.

    torchrun --nproc-per-node 4 examples/train_split_llama.py MODEL OUT --tp 2 --pp 2 --sequence-parallel \
        --train-only '*adapter*' --steps 10

MODEL is a checkpoint of any format with a Hugging Face directory to describe it (itself, or --hf-reference). Every rank
loads its part strictly into megatron-core's modules, and trains on the same rows of token ids: --rows FILE (a JSON list
of lists), or pseudo-random ones, which a model can only learn by heart. At the end OUT/megatron holds the ranks' files,
and OUT/hf the model for transformers. Runs on CPU ranks (gloo) and on GPUs (NCCL).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckptkit
from ckptkit.verification.tokens import default_rows, read_rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--hf-reference", help="Hugging Face directory that describes the model (default: MODEL)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--first-stage-layers", type=int, help="layers of the first stage, where they do not divide")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--packed", type=int, metavar="TOKENS", help="join rows to packed rows of so many tokens")
    parser.add_argument("--train-only", metavar="PATTERN", help="train the parameters whose Hugging Face names match")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


class FloatAdamW:
    """AdamW over float32 copies of the weights: bfloat16 would not see small steps."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        self.parameters = parameters
        self.copies = [parameter.detach().clone().float() for parameter in parameters]
        self.adamw = torch.optim.AdamW(self.copies, lr=lr) if parameters else None

    def step(self) -> None:
        """One step by the gradients that megatron-core has reduced."""
        if self.adamw is None:  # a stage that holds nothing of what is trained
            return
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = parameter.main_grad.float()  # type: ignore[attr-defined]
        self.adamw.step()
        with torch.no_grad():
            for parameter, copy in zip(self.parameters, self.copies, strict=True):
                parameter.copy_(copy)


def steps(training: Any, batches: list[Any], number: int, lr: float) -> list[float]:
    """Takes steps; returns the loss before each of them and after the last one."""
    optimizer, losses = FloatAdamW(training.parameters(), lr), []
    for _ in range(number):
        start = time.monotonic()
        loss, tokens = training.run(batches)
        optimizer.step()
        losses.append(loss)
        if dist.get_rank() == 0:
            rate = tokens / (time.monotonic() - start)
            print(f"step {len(losses)}: loss {loss:.4f}, {rate:,.0f} tokens/s", flush=True)
    return [*losses, training.run(batches, backwards=False)[0]]


def main() -> None:
    """Loads, trains, saves, and converts."""
    asked = arguments()
    model = ckptkit.load_megatron(
        asked.model,
        ckptkit.Parallelism(asked.tp, asked.pp, first_stage_layers=asked.first_stage_layers),
        dtype=asked.dtype,
        recompute=asked.recompute,
        sequence_parallel=asked.sequence_parallel,
    )
    vocabulary = model.checkpoint.config.vocab_size
    rows = read_rows(asked.rows) if asked.rows is not None else default_rows(vocabulary, rows=4)
    batches = model.microbatches(rows, packed_capacity=asked.packed)
    losses = steps(model.training(asked.train_only), batches, asked.steps, asked.lr)
    model.save(asked.out / "megatron", iteration=asked.steps)
    if dist.get_rank() == 0:
        reference = asked.hf_reference or asked.model
        ckptkit.convert(asked.out / "megatron", asked.out / "hf", to="hf", **model.source(reference))
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; {asked.out / 'hf'}")
        if not losses[-1] < losses[0]:
            raise SystemExit("the loss did not fall")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
