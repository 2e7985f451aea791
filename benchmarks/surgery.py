"""Averages, ties and passthrough of three models: `ckptkit surgery` beside `cp` of what it reads, and beside mergekit.

    python -m benchmarks.surgery --dir /tmp/surgery --mergekit-python ~/mergekit/bin/python
    python -m benchmarks.surgery Llama-3.2-1B --set num_hidden_layers=4 --dir /tmp/surgery --only ties

The models have the dimensions of a released one and random weights in bf16; without a name, three of 3 GB. Every tool
writes safetensors files, each in a process of its own. mergekit may be in an environment of its own, whose Python
--mergekit-python names; without it, mergekit-yaml is looked for on PATH. `cp` does not wait for the disk, ckptkit does.
It prints a Markdown table; --json FILE has all figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.big_models import CONFIGS, change, nbytes_of, write_checkpoint
from benchmarks.measure import Summary, cp_command, remove, run, settle

CKPTKIT = [sys.executable, "-m", "ckptkit", "surgery"]
NAMES = ("base", "a", "b")
OPERATIONS = ("average", "ties", "passthrough")
DEFAULT = ("Llama-3.2-1B", {"num_hidden_layers": 20})
"""A model of 3 GB."""


def recipes(folder: Path, layers: int) -> dict[str, dict[str, Any]]:
    """Operation -> the recipe that mergekit gets, and ckptkit's `merge`, too."""
    base, *others = (str(folder / name) for name in NAMES)
    tuned = [{"model": path, "parameters": {"weight": 0.5, "density": 0.5}} for path in others]
    spans = ([0, layers // 2], [layers // 2, layers])
    sources = [[{"model": path, "layer_range": span}] for path, span in zip((base, others[0]), spans, strict=True)]
    return {
        "average": {
            "merge_method": "linear",
            "models": [{"model": path, "parameters": {"weight": 1.0}} for path in (base, *others)],
        },
        "ties": {"merge_method": "ties", "base_model": base, "models": tuned},
        "passthrough": {"merge_method": "passthrough", "slices": [{"sources": one} for one in sources]},
    }


def commands(
    operation: str, folder: Path, out: Path, threads: int, mergekit: list[str] | None
) -> Iterator[tuple[str, list[str]]]:
    """Name of a tool -> its command."""
    recipe, models = folder / f"{operation}.yaml", [str(folder / name) for name in NAMES]
    how = ["-o", str(out), "--threads", str(threads)]
    if operation == "average":
        yield "ckptkit average", [*CKPTKIT, "average", *models, *how]
    yield "ckptkit merge", [*CKPTKIT, "merge", str(recipe), *how]
    if mergekit is not None:
        without = ["--no-copy-tokenizer", "--no-write-model-card", "--lazy-unpickle", "--quiet"]
        yield "mergekit", [*mergekit, str(recipe), str(out), *without]


def main() -> None:
    """Writes the models, runs every tool, and prints the table."""
    options = _options()
    released = json.loads(CONFIGS.read_text(encoding="utf-8"))
    name, sizes = DEFAULT if options.name is None else (options.name, {})
    config = {**released[name]["config"], **sizes, **options.set}
    folder, out = options.dir / "models", options.dir / "out"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, model in enumerate(NAMES):
        if not (folder / model).exists():
            write_checkpoint(folder / model, config, "cpu", seed)
    nbytes = 3 * nbytes_of(config)
    for operation, recipe in recipes(folder, config["num_hidden_layers"]).items():
        (folder / f"{operation}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = {("cp of three", "cp"): _measured(cp_command(folder, out, sync=False), folder, out, options)}
    found["cp of one", "cp"] = _measured(cp_command(folder / "base", out, sync=False), folder, out, options)
    for operation in options.only or OPERATIONS:
        for tool, command in commands(operation, folder, out, options.threads, options.mergekit):
            found[operation, tool] = _measured(command, folder, out, options)
            print(f"... {operation}, {tool}: {found[operation, tool].median:.1f} s", file=sys.stderr, flush=True)
    if not options.keep:
        remove(folder)
    print(f"3 x {name}, {config['num_hidden_layers']} layers, {nbytes / 3e9:.2f} GB each\n")
    print("| operation | tool | seconds | x cp of three | x cp of one | CPU seconds | peak memory, MB |")
    print("|---|---|---|---|---|---|---|")
    three, one_alone = found["cp of three", "cp"].median, found["cp of one", "cp"].median
    for (operation, tool), summary in found.items():
        times = f"{summary.median / three:.2f} | {summary.median / one_alone:.2f}"
        memory = summary.anonymous / 1e6
        print(f"| {operation} | {tool} | {summary.median:.2f} | {times} | {summary.cores:.2f} | {memory:.0f} |")
    if options.json is not None:
        figures = {
            "name": name,
            "bytes": nbytes,
            "python": platform.python_version(),
            "runs": {
                f"{operation}: {tool}": [
                    {key: value for key, value in asdict(one).items() if key != "output"} for one in summary.runs
                ]
                for (operation, tool), summary in found.items()
            },
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measured(command: list[str], folder: Path, out: Path, options: argparse.Namespace) -> Summary:
    runs = []
    for _ in range(options.repeat):
        remove(out)
        settle(folder, cold=options.cold)
        runs.append(run(command))
    remove(out)
    return Summary(runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="a key of fixtures/released_configs.json")
    parser.add_argument("--dir", "--workdir", type=Path, required=True, help="for the models and the output")
    parser.add_argument(
        "--set", type=change, action="append", default=[], metavar="KEY=JSON", help="another size of it"
    )
    parser.add_argument("--only", action="append", choices=OPERATIONS, help="this operation alone")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--keep", action="store_true", help="keep the models, and take those that are there")
    parser.add_argument("--cold", action="store_true", help="drop the models from the page cache before each run")
    parser.add_argument("--mergekit-python", metavar="PYTHON", help="the Python of mergekit's environment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    options.set = dict(options.set)
    script = shutil.which("mergekit-yaml")
    options.mergekit = None if script is None else [script]
    if options.mergekit_python is not None:
        options.mergekit = [options.mergekit_python, "-m", "mergekit.scripts.run_yaml"]
    return options


if __name__ == "__main__":
    main()
