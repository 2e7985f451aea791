"""Where the adapter of a split Llama had better start: two small Llamas, all initialisations, held-out loss.

Two byte-level Llamas of different width are trained from scratch on the Python source of an installed public package.
Every initialisation then makes an adapter between the first layers of the narrow one and the last layers of the wide
one, and the hybrid's loss on other files is measured: as built, and after a few steps that train nothing but the
adapter. It prints the tables of docs/split-llama.md:

    OMP_NUM_THREADS=1 python -m benchmarks.split_llama_init
    python -m benchmarks.split_llama_init --scale large --device cuda --corpus torch --jobs 3
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ckptkit.surgery.build import SplitRecipe, build
from ckptkit.surgery.initialisation import FITTED

CORPUS = "numpy"
"""The package whose source is the text."""
CASES = (
    *(("linear", init) for init in ("kaiming", "orthogonal", "identity-pad", "procrustes", "ridge", "lstsq")),
    ("mlp", "kaiming"),
    ("mlp", "lstsq"),
)
RATES = (1e-3, 3e-3)
"""Learning rates of the adapter; the better one counts, for every initialisation by itself."""


@dataclass(frozen=True)
class Budget:
    """How large everything is, and how long it is trained.

    Attributes:
        steps: Steps of each of the two models.
        adapter_steps: Steps of the adapter alone.
        batch: Sequences per step.
        length: Bytes of a sequence.
        rate: Learning rate of the two models.
        held_out: Sequences of the held-out loss.
        tokens: Tokens of the calibration.
        narrow: Width, layers and width of the MLP of one model.
        wide: Of the other.
        head_dim: Width of a head of both.
        taken: Layers that the hybrid has of the front of the narrow one, and of the end of the wide one.
        device: Where all of it runs.
    """

    steps: int = 100
    adapter_steps: int = 12
    batch: int = 16
    length: int = 128
    rate: float = 4e-3
    held_out: int = 64
    tokens: int = 16384
    narrow: tuple[int, int, int] = (64, 4, 160)
    wide: tuple[int, int, int] = (128, 6, 320)
    head_dim: int = 16
    taken: tuple[int, int] = (3, 3)
    device: str = "cpu"


SCALES = {
    "small": Budget(),
    "large": Budget(
        steps=1500,
        adapter_steps=200,
        batch=16,
        length=256,
        rate=1e-3,
        held_out=128,
        tokens=65536,
        narrow=(256, 8, 704),
        wide=(640, 12, 1760),
        head_dim=64,
        taken=(6, 6),
    ),
}


def corpus(package: str = CORPUS, length: int = Budget.length) -> tuple[torch.Tensor, torch.Tensor]:
    """The source of a package as bytes, in sequences: int64 [sequences, length] to train on, and of other files."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    parts = [[file for number, file in enumerate(files) if (number % 10 == 9) == held] for held in (False, True)]
    used, held = (b"".join(file.read_bytes() for file in part) for part in parts)
    return _sequences(used, length), _sequences(held, length)


def _sequences(data: bytes, length: int) -> torch.Tensor:
    whole = torch.frombuffer(bytearray(data[: len(data) // length * length]), dtype=torch.uint8)
    return whole.view(-1, length).long()


def draw(sequences: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Some of the sequences, int64 [count, length]."""
    return sequences[torch.randint(len(sequences), (count,), generator=generator)]


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next byte, in nats."""
    tokens = tokens.to(model.device)
    logits: torch.Tensor = model(tokens, use_cache=False).logits[:, :-1]
    loss: torch.Tensor = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    return loss


def train(model: Any, parameters: list[torch.nn.Parameter], sequences: torch.Tensor, how: dict[str, Any]) -> None:
    """AdamW with a warm-up and a cosine down to a tenth.

    Args:
        model: The model.
        parameters: What is trained of it.
        sequences: What it is trained on.
        how: `steps`, `batch`, `rate` and `seed`.
    """
    generator = torch.Generator().manual_seed(how["seed"])
    optimizer = torch.optim.AdamW(parameters, lr=how["rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm = max(1, how["steps"] // 10)

    def scale(step: int) -> float:
        warmed = min(1.0, (step + 1) / warm)
        return float(warmed * (0.55 + 0.45 * math.cos(math.pi * step / how["steps"])))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    for _ in range(how["steps"]):
        optimizer.zero_grad()
        loss_of(model, draw(sequences, how["batch"], generator)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def trained(folder: Path, size: str, seed: int, sequences: torch.Tensor, budget: Budget) -> Path:
    """Trains one of the two Llamas and saves it."""
    width, layers, mlp = getattr(budget, size)
    torch.manual_seed(1000 * seed + width)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // budget.head_dim,
        num_key_value_heads=2,
        head_dim=budget.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(budget.device)
    how = {"steps": budget.steps, "batch": budget.batch, "rate": budget.rate, "seed": seed}
    train(model, list(model.parameters()), sequences, how)
    model.save_pretrained(folder / size)
    return folder / size


def held_out_loss(model: Any, sequences: torch.Tensor, budget: Budget) -> float:
    """Mean loss on held-out files, the same sequences every time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return float(loss_of(model, draw(sequences, budget.held_out, generator)))


def hybrid(recipe: SplitRecipe, folder: Path, device: str) -> Any:
    """Builds a split Llama and loads it; nothing but its adapter takes gradients."""
    out = folder / f"{recipe.adapter}-{recipe.init}"
    build(recipe, out, overwrite=True)
    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    model.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter" in name)
    return model


def measure(
    seed: int, used: torch.Tensor, held: torch.Tensor, budget: Budget, cases: Sequence[tuple[str, str]] = CASES
) -> dict[str, list[float]]:
    """One pair of models: name of a case -> held-out loss at step 0, and after the adapter alone was trained."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = (trained(folder, "narrow", seed, used, budget), trained(folder, "wide", seed, used, budget))
        for path in pair:
            alone: Any = LlamaForCausalLM.from_pretrained(path)
            whole = held_out_loss(alone.to(budget.device), held, budget)
            results[path.name] = [whole, whole]
            print(f"seed {seed}: {path.name}: {whole:.3f}", file=sys.stderr, flush=True)
        calibration = folder / "calibration.json"
        generator = torch.Generator().manual_seed(seed)
        calibration.write_text(json.dumps(draw(used, budget.tokens // budget.length, generator).tolist()))
        for kind, init in cases:
            fitted = {"calibration": calibration, "tokens": 10**9, "length": budget.length, "device": budget.device}
            options = fitted if init in FITTED else {}
            first, last = map(str, pair)
            recipe = SplitRecipe(first, last, *budget.taken, kind, init, seed, options=options)
            model = hybrid(recipe, folder, budget.device)
            start = held_out_loss(model, held, budget)
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            ends = []
            for rate in RATES:
                model.load_state_dict(weights)
                parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
                how = {"steps": budget.adapter_steps, "batch": budget.batch, "rate": rate, "seed": seed}
                train(model, parameters, used, how)
                ends.append(held_out_loss(model, held, budget))
            results[f"{kind} {init}"] = [start, min(ends)]
            print(f"seed {seed}: {kind} {init}: {start:.3f} {ends}", file=sys.stderr, flush=True)
    return results


def table(runs: list[dict[str, list[float]]], budget: Budget) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = [f"| adapter | step 0 | after {budget.adapter_steps} adapter-only steps |", "|---|---|---|"]
    for name in runs[0]:
        columns = [[run[name][column] for run in runs] for column in (0, 1)]
        texts = [f"{mean(c):.3f} ± {stdev(c) if len(c) > 1 else 0.0:.3f}" for c in columns]
        lines.append(f"| {name} | {texts[0]} | {'' if name in ('narrow', 'wide') else texts[1]} |")
    return "\n".join(lines)


def run_seed(seed: int, package: str, budget: Budget) -> dict[str, list[float]]:
    """What `measure` finds, on the text of a package."""
    torch.set_float32_matmul_precision("high")  # TF32 where there is such; what is compared differs by far more
    return measure(seed, *corpus(package, budget.length), budget)


def main() -> None:
    """Measures and prints."""
    arguments = _arguments()
    scale = SCALES[arguments.scale]
    given = {name: getattr(arguments, name) for name in ("steps", "adapter_steps") if getattr(arguments, name)}
    budget = replace(scale, device=arguments.device, **given)
    started, runs = time.monotonic(), []
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(run_seed, seed, arguments.corpus, budget) for seed in range(arguments.seeds)]
        for seed, task in enumerate(tasks):
            runs.append(task.result())
            print(f"seed {seed}: {json.dumps(runs[-1])} ({time.monotonic() - started:.0f} s)", flush=True)
    versions = {package: metadata.version(package) for package in (arguments.corpus, "torch", "transformers")}
    where = torch.cuda.get_device_name() if budget.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(f"{where}, {versions}")
    used, held = corpus(arguments.corpus, budget.length)
    print(f"{used.numel()} bytes to train on, {held.numel()} held out, {budget}")
    print(table(runs, budget))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--corpus", default=CORPUS, help="an installed package")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at a time")
    parser.add_argument("--steps", type=int, help="steps of each of the two models")
    parser.add_argument("--adapter-steps", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
