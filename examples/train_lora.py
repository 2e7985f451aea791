r"""Train a LoRA adapter in megatron-core on a grid, and take it out for peft.

    torchrun --nproc-per-node 2 examples/train_lora.py MODEL ADAPTER OUT --tp 2 --sequence-parallel --steps 10

ADAPTER is where training begins, a PEFT directory: `get_peft_model(model, LoraConfig(...)).save_pretrained(ADAPTER)`
makes a new one, whose B are zeros. Its factors run beside megatron-core's linears, and nothing else is trained. At the
end OUT/megatron holds the ranks' files, weights and factors, and OUT/adapter the adapter for peft. Runs on CPU ranks
(gloo) and on GPUs (NCCL).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.distributed as dist
from train_split_llama import steps  # beside this file

import ckptkit
from ckptkit.adapters.commands import export_adapter
from ckptkit.verification.tokens import default_rows, read_rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    """Loads, trains, saves, and takes the adapter out."""
    asked = arguments()
    model = ckptkit.load_megatron(
        asked.model,
        ckptkit.Parallelism(asked.tp, asked.pp),
        dtype=asked.dtype,
        sequence_parallel=asked.sequence_parallel,
        adapter=asked.adapter,
    )
    rows = read_rows(asked.rows) if asked.rows is not None else default_rows(model.checkpoint.config.vocab_size, 4)
    losses = steps(model.training(), model.microbatches(rows), asked.steps, asked.lr)
    model.save(asked.out / "megatron", iteration=asked.steps)
    if dist.get_rank() == 0:
        known = model.source(asked.model)
        reference, alpha = known.pop("hf_reference"), known.pop("lora_alpha")
        source, adapter = asked.out / "megatron", asked.out / "adapter"
        export_adapter(source, adapter, hf_reference=reference, lora_alpha=alpha, source=known)
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; {adapter}")
        if not losses[-1] < losses[0]:
            raise SystemExit("the loss did not fall")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
