"""Does a model learn on a grid? `verify --trainability length` for several seeds, as a table.

    python -m benchmarks.trainability MODEL --seeds 3 --device cuda
    python -m benchmarks.trainability random --seeds 3 --device cuda --dtype bfloat16 --packed

MODEL is a checkpoint of any format, or `random`: a Llama of the dimensions of SmolLM2-135M, as transformers initialises
it (seed 0), which is written to a temporary folder. The ranks start once. The exit code is 0 if all runs learn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import table
from ckptkit import open_checkpoint
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.run_options import RunOptions
from ckptkit.verification.trainability.goal import PROMPTS
from ckptkit.verification.trainability.level import verify_trainability

RANDOM = "random"
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
RUN = ("device", "dtype", "tp", "pp", "ep", "dp", "cp", "packed", "sequence_parallel", "recompute", "lr")
"""Options that are those of `verify`."""
HEAD = ("model", "grid", "dtype", "seed", "steps", "error before", "error after", "wanted", "seconds", "answer")


def main() -> int:
    """Runs every seed and prints the table."""
    options = _options()
    with ExitStack() as stack:
        model = options.model
        if model == RANDOM:
            model = str(_random(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptkit-bench-")))))
        run: dict[str, Any] = {name: getattr(options, name) for name in RUN} | {"train_steps": options.steps}
        grid = RunOptions.of(**run).grid or open_checkpoint(model).grid
        pool = stack.enter_context(RankPool(RunOptions.of(**run).config(grid, 0).world_size))
        pool.start(options.device)
        rows, answers = [], []
        for seed in range(options.seeds):
            (level,) = verify_trainability(model, seed=seed, prompts=options.prompts, pool=pool, **run).levels
            answers.append({"seed": seed, "passed": level.passed, "summary": level.summary, **level.details})
            rows.append(_row(options, str(grid), level.passed, level.seconds, level.details))
            print(f"... seed {seed}: {level.summary}", file=sys.stderr, flush=True)
        print(_machine(answers[0]) + "\n\n" + table(HEAD, rows))
        if options.json:
            options.json.write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
    return 0 if all(answer["passed"] for answer in answers) else 1


def _random(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(folder / RANDOM)
    return folder / RANDOM


def _row(options: argparse.Namespace, grid: str, passed: bool, seconds: float, found: dict[str, Any]) -> list[str]:
    final = found["final_error"]
    ways = [name.replace("_", " ") for name in ("packed", "sequence_parallel", "recompute") if getattr(options, name)]
    ways += [f"{name.upper()}{size}" for name in ("dp", "cp") if (size := getattr(options, name)) > 1]
    return [
        Path(options.model).name,
        ", ".join([grid, *ways]),
        found["dtype"],
        str(found["seed"]),
        str(len(found["errors"])),
        f"{found['initial_error']:.2f}",
        "-" if final is None else f"{final:.2f}",
        f"{found['target_error']:.2f}",
        f"{seconds:.1f}",
        "learns" if passed else "does not learn",
    ]


def _machine(answer: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    return f"{', '.join(answer['candidate_ran']['devices'])}; {versions}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=f"a checkpoint, or {RANDOM}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts of a step, fewer for a CPU")
    parser.add_argument("--steps", type=int, help="limit of the steps (default: that of the level)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name in ("--tp", "--pp", "--ep"):
        parser.add_argument(name, type=int)
    for name in ("--dp", "--cp"):
        parser.add_argument(name, type=int, default=1)
    for name in ("--packed", "--sequence-parallel", "--recompute"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
