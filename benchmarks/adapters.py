"""Merging and exporting an adapter: `ckptkit adapter` beside what people do today, and beside `cp`.

    python -m benchmarks.adapters Llama-3.2-1B --set num_hidden_layers=20 --workdir /tmp/adapters
    python -m benchmarks.adapters Qwen3-30B-A3B --layers 2 --workdir /tmp/adapters

The model has the dimensions of a released one and random weights in bf16; the adapter has random factors for all linear
layers, those of packed experts included. Every tool writes the merged model as safetensors files, each in a process of
its own: peft's `merge_and_unload` and `save_pretrained`; and mergekit, if it is installed, or in the environment of
--mergekit-python (its pins exclude ours). Then `ckptkit verify --adapter --level weights` looks at what ckptkit wrote.
It prints a Markdown table; --json FILE has all figures. With --keep, model and adapter stay for a later call, which
--tools splits the work with.

`export` among the --tools takes the adapter out of a distributed checkpoint that holds model and adapter, as a training
run leaves it. It counts the bytes that are read: by `read` and its like, Python's own not counted.
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
from benchmarks.big_models import CONFIGS, change, nbytes_of, write_checkpoint
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
EXPORT = "export"
TOOLS = ("cp", "ckptkit", *MERGES, EXPORT)
COUNT = "from benchmarks.adapters import export_and_count; import sys; export_and_count(*sys.argv[1:])"


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


def write_adapter(path: Path, config: dict[str, Any], rank: int) -> None:
    """Writes a random adapter in float32."""
    import numpy as np

    shapes, raw = adapter_shapes(config, rank)
    path.mkdir(parents=True)
    (path / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    header = build_header({name: Tensor.full(DTYPES["F32"], shape) for name, shape in shapes.items()}, {"format": "pt"})
    rng = np.random.default_rng(0)
    with (path / SAFETENSORS).open("wb") as file:
        file.write(header.raw)
        for shape in shapes.values():
            file.write((0.01 * rng.standard_normal(shape)).astype("<f4").tobytes())


def write_trained(path: Path, base: Path, adapter: Path) -> int:
    """Writes a distributed checkpoint with a model and its adapter. Returns its bytes.

    Both are converted by themselves; then torch.distributed.checkpoint writes all of their tensors into one.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path.mkdir()
    state: dict[str, Any] = {}
    described_by = ["--hf-reference", str(base), "--adapter-layout", "canonical"]
    for source, options in ((base, []), (adapter, described_by)):
        run([*CKPTKIT, "convert", str(source), str(path / source.name), "--to", "torch_dist", *options])
        folder = path / source.name / "release"
        described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        own = {key: _empty(about) for key, about in described.items() if isinstance(about, TensorStorageMetadata)}
        dcp.load(own, checkpoint_id=folder, no_dist=True)
        state.update(own)
    dcp.save(state, checkpoint_id=path / "both" / "release", no_dist=True)
    for name in ("common.pt", "metadata.json", "run_config.yaml"):
        (path / "both/release" / name).write_bytes((path / adapter.name / "release" / name).read_bytes())
    (path / "both/latest_checkpointed_iteration.txt").write_text("release")
    for source in (base, adapter):
        remove(path / source.name)
    return sum(file.stat().st_size for file in (path / "both").rglob("*") if file.is_file())


def _empty(about: Any) -> Any:
    import torch

    return torch.empty(about.size, dtype=about.properties.dtype)


def export_and_count(checkpoint: str, out: str, base: str) -> None:
    """Exports an adapter, and prints how many bytes were read meanwhile."""
    from ckptkit.adapters.commands import export_adapter
    from ckptkit.io import casts, reading  # noqa: F401  their code is no part of what is counted

    before = _bytes_read()
    export_adapter(checkpoint, out, hf_reference=base)
    print(_bytes_read() - before)


def _bytes_read() -> int:
    with open("/proc/self/io") as counts:
        return next(int(line.split()[1]) for line in counts if line.startswith("rchar"))


def tools(
    base: Path, adapter: Path, out: Path, trained: Path, options: argparse.Namespace
) -> Iterator[tuple[str, list[str]]]:
    """Name of a tool -> its command."""
    yield "cp", cp_command(base, out, sync=False)
    merge = [*CKPTKIT, "adapter", "merge", str(base), str(adapter), "-o", str(out), "--to", "hf"]
    yield "ckptkit", [*merge, "--threads", str(options.threads)]
    for name in MERGES:
        own = options.mergekit_python if name == "mergekit" else None
        if own is not None or find_spec(name) is not None:
            python = str(own or sys.executable)
            yield (
                name,
                [python, "-m", "benchmarks.alternatives", f"{name}-merge", str(base), str(out), str(adapter)],
            )
    yield EXPORT, [sys.executable, "-c", COUNT, str(trained / "both"), str(out), str(base)]


def main() -> None:
    """Writes model and adapter, runs every tool, and prints the table."""
    options = _options()
    released = json.loads(CONFIGS.read_text(encoding="utf-8"))
    config = {**released[options.name]["config"], **options.set}
    if options.layers is not None:
        config["num_hidden_layers"] = options.layers
    base, adapter, out, trained = (options.workdir / name for name in ("model", "adapter", "merged", "trained"))
    nbytes = nbytes_of(config)
    if not base.exists():
        write_checkpoint(base, config, "cpu")
    if not adapter.exists():
        write_adapter(adapter, config, options.rank)
    if EXPORT in options.tools and not trained.exists():
        write_trained(trained, base, adapter)
    factors = sum(4 * rows * columns for rows, columns in adapter_shapes(config, options.rank)[0].values())
    found: dict[str, Summary] = {}
    same = None
    for name, command in tools(base, adapter, out, trained, options):
        if name not in options.tools:
            continue
        runs = []
        for _ in range(options.repeat):
            remove(out)
            settle(base, cold=options.cold)
            runs.append(run(command))
        found[name] = Summary(runs)
        if name == "ckptkit":
            check = [*CKPTKIT, "verify", str(base), str(out), "--adapter", str(adapter), "--level", "weights"]
            same = json.loads(run([*check, "--json", "-"], codes=(0, 1)).output)["verdict"] == "same"
    for path in (out,) if options.keep else (out, base, adapter, trained):
        remove(path)
    title = f"{options.name}, {config['num_hidden_layers']} layers, {nbytes / 1e9:.2f} GB"
    print(f"{title}; adapter of rank {options.rank}, {factors / 1e6:.0f} MB", end="")
    print("" if same is None else f"; ckptkit's weights are {'right' if same else 'WRONG'}", end="\n\n")
    print("| tool | seconds | x cp | CPU seconds | anonymous memory, MB | resident, MB |\n|---|---|---|---|---|---|")
    for name, summary in found.items():
        times = f"{summary.median / found['cp'].median:.2f}" if "cp" in found else ""
        memory = f"{summary.anonymous / 1e6:.0f} | {summary.resident / 1e6:.0f}"
        print(f"| {name} | {summary.median:.2f} | {times} | {summary.cores:.2f} | {memory} |")
    if EXPORT in found:
        print(f"\n{EXPORT}: {int(found[EXPORT].runs[0].output) / 1e6:.1f} MB are read")
    if options.json is not None:
        figures = {
            "name": options.name,
            "bytes": nbytes,
            "adapter_bytes": factors,
            "rank": options.rank,
            "same": same,
            "python": platform.python_version(),
            "tools": {
                name: [{key: value for key, value in asdict(one).items() if key != "output"} for one in summary.runs]
                for name, summary in found.items()
            },
            "bytes_read": int(found[EXPORT].runs[0].output) if EXPORT in found else None,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _listed(text: str) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    if others := set(names) - set(TOOLS):
        raise argparse.ArgumentTypeError(f"{min(others)} is none of {', '.join(TOOLS)}")
    return names


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
    parser.add_argument("--tools", type=_listed, default=TOOLS, metavar="NAME,...", help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--mergekit-python", type=Path, metavar="PYTHON", help="one of an environment with mergekit")
    parser.add_argument("--keep", action="store_true", help="leave the model, the adapter and the checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    options.set = dict(options.set)
    return options


if __name__ == "__main__":
    main()
