"""Merging an adapter: `ckptkit adapter merge` beside what people do today, and beside `cp`.

    python -m benchmarks.adapters Llama-3.2-1B --set num_hidden_layers=20 --workdir /tmp/adapters
    python -m benchmarks.adapters Qwen3-30B-A3B --layers 2 --workdir /tmp/adapters

The model has the dimensions of a released one and random weights in bf16; the adapter has random factors for all linear
layers, those of packed experts included. Every tool writes the merged model as safetensors files, each in a process of
its own: peft's `merge_and_unload` and `save_pretrained`; and mergekit, if it is installed. Then `ckptkit verify
--adapter --level weights` looks at what ckptkit wrote. It prints a Markdown table; --json FILE has all figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.alternatives import MERGES
from benchmarks.big_models import CONFIGS, change, write_checkpoint
from benchmarks.measure import Summary, cp_command, remove, run, settle
from ckptkit.checkpoints.lora.places import Names
from ckptkit.dtypes import DTYPES
from ckptkit.families import family_of
from ckptkit.formats.peft import CONFIG, SAFETENSORS, factor_name
from ckptkit.formats.safetensors import build_header
from ckptkit.tables.lora import A, B, linears
from ckptkit.tensors import Tensor

CKPTKIT = [sys.executable, "-m", "ckptkit"]
ALPHA = 2
"""Times the rank, which is the usual choice."""


def adapter_shapes(config: dict[str, Any], rank: int) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    """Names and shapes of the factors of an adapter for all linear layers, and its adapter_config.json."""
    family = family_of(config, CONFIGS)
    model = family.parse(config)
    spelling = next((one for one in family.hf_spellings if one.stacks), family.hf_spellings[0])
    names = Names(family, model, spelling)
    packed = [one for several in names.packed.values() for one in several]
    inside = {linear.module for one in packed for parts in one.experts for linear in parts}
    shapes: dict[str, tuple[int, int]] = {}
    words = set()
    for module, linear in linears(family, model).items():
        if module in inside or ".layers." not in module or linear.item.key.endswith(".router.weight"):
            continue
        name = names.written(module)
        words.add(name.rpartition(".")[2])
        shapes[factor_name(name, A)], shapes[factor_name(name, B)] = (rank, linear.shape[1]), (linear.shape[0], rank)
    for several in names.packed.values():
        for depth, one in zip(range(len(several) - 1, -1, -1), several, strict=True):
            (rows, columns), count = one.shape, len(one.experts)
            shapes[factor_name(one.wrapper, A, depth)] = (count * rank, columns)
            shapes[factor_name(one.wrapper, B, depth)] = (rows, rank * count)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": ALPHA * rank,
        "target_modules": sorted(words),
        "target_parameters": sorted(one.name for one in packed) or None,
        "peft_version": "0.19.0",
    }
    return shapes, raw


def write_adapter(path: Path, config: dict[str, Any], rank: int) -> int:
    """Writes a random adapter in float32. Returns the bytes of its factors."""
    import numpy as np

    shapes, raw = adapter_shapes(config, rank)
    path.mkdir(parents=True)
    (path / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    header = build_header({name: Tensor.full(DTYPES["F32"], shape) for name, shape in shapes.items()}, {"format": "pt"})
    rng, total = np.random.default_rng(0), 0
    with (path / SAFETENSORS).open("wb") as file:
        file.write(header.raw)
        for shape in shapes.values():
            factor = (0.01 * rng.standard_normal(shape)).astype("<f4")
            file.write(factor.tobytes())
            total += factor.nbytes
    return total


def tools(base: Path, adapter: Path, out: Path, threads: int) -> Iterator[tuple[str, list[str]]]:
    """Name of a tool -> its command."""
    yield "cp", cp_command(base, out, sync=False)
    merge = [*CKPTKIT, "adapter", "merge", str(base), str(adapter), "-o", str(out), "--to", "hf"]
    yield "ckptkit", [*merge, "--threads", str(threads)]
    for name in MERGES:
        if find_spec(name) is not None:
            yield (
                name,
                [sys.executable, "-m", "benchmarks.alternatives", f"{name}-merge", str(base), str(out), str(adapter)],
            )


def main() -> None:
    """Writes model and adapter, runs every tool, and prints the table."""
    options = _options()
    released = json.loads(CONFIGS.read_text(encoding="utf-8"))
    config = {**released[options.name]["config"], **options.set}
    if options.layers is not None:
        config["num_hidden_layers"] = options.layers
    base, adapter, out = (options.workdir / name for name in ("model", "adapter", "merged"))
    made, factors = write_checkpoint(base, config, "cpu"), write_adapter(adapter, config, options.rank)
    found: dict[str, Summary] = {}
    same = False
    for name, command in tools(base, adapter, out, options.threads):
        runs = []
        for _ in range(options.repeat):
            remove(out)
            settle(base, cold=options.cold)
            runs.append(run(command))
        found[name] = Summary(runs)
        if name == "ckptkit":
            check = [
                *CKPTKIT,
                "verify",
                str(base),
                str(out),
                "--adapter",
                str(adapter),
                "--level",
                "weights",
                "--json",
                "-",
            ]
            same = json.loads(run(check, codes=(0, 1)).output)["verdict"] == "same"
    for path in (base, adapter, out):
        remove(path)
    title = f"{options.name}, {config['num_hidden_layers']} layers, {made.nbytes / 1e9:.2f} GB"
    print(f"{title}; adapter of rank {options.rank}, {factors / 1e6:.0f} MB", end="; ")
    print(f"ckptkit's weights are {'right' if same else 'WRONG'}\n")
    print("| tool | seconds | x cp | CPU seconds | peak memory, MB |\n|---|---|---|---|---|")
    for name, summary in found.items():
        times = summary.median / found["cp"].median
        print(f"| {name} | {summary.median:.2f} | {times:.2f} | {summary.cores:.2f} | {summary.anonymous / 1e6:.0f} |")
    if options.json is not None:
        figures = {
            "name": options.name,
            "bytes": made.nbytes,
            "adapter_bytes": factors,
            "rank": options.rank,
            "same": same,
            "python": platform.python_version(),
            "tools": {
                name: [{key: value for key, value in asdict(one).items() if key != "output"} for one in summary.runs]
                for name, summary in found.items()
            },
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a key of fixtures/released_configs.json")
    parser.add_argument("--workdir", type=Path, required=True, help="for the model, the adapter and the merged model")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the released model has")
    parser.add_argument("--set", type=change, action="append", default=[], metavar="KEY=JSON", help="another size")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--cold", action="store_true", help="drop the model from the page cache before each run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    options.set = dict(options.set)
    return options


if __name__ == "__main__":
    main()
