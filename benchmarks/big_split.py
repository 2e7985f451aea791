"""A split Llama at its true dimensions with random weights: built, fitted, converted, and verified in bf16.

    python -m benchmarks.big_split --workdir /dev/shm/big --device cuda --tp 2

FIRST has all layers of Llama 3.1 8B, LAST the dimensions of Llama 3.1 70B and as many layers as are taken of it, and
one more when an adapter is fitted, so that something comes before them. `ckptkit split-llama build` is measured twice,
in turns with `cp -r --reflink=never` of what it wrote: the first run of each meets memory that the machine has not used
yet, so the second one counts. Then `ckptkit split-llama fit` (with --fit), `convert`, and `verify --dtype bfloat16`. On
stdout come rows of Markdown, and with --json FILE all figures.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.big_models import (
    CKPTKIT,
    HEAD,
    SIZES,
    Made,
    change,
    converted_and_verified,
    nbytes_of,
    no_room,
    released,
    say,
    shrink,
    write_checkpoint,
)
from benchmarks.measure import CommandError, Run, cp_command, is_memory, remove, run
from benchmarks.report import table

NAMES = ("Llama-3.1-8B", "Llama-3.1-70B")
TURNS = 2


def main() -> int:
    """Runs what the options ask for; the exit code is 0 if the models are the same."""
    options = _options()
    paths = {name: options.workdir / name for name in ("first", "last", "split", "copy", "fitted", "megatron")}
    for path in paths.values():
        if path.exists():
            print(f"error: {path} exists; remove it, or choose another --workdir", file=sys.stderr)
            return 2
    try:
        result = _measure(options, paths)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for path in paths.values():
            shutil.rmtree(path, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["verified"]["report"]["verdict"] == "same" else 1


def _measure(options: argparse.Namespace, paths: dict[str, Path]) -> dict[str, Any]:
    last_layers = options.last_layers + bool(options.fit)
    sources = {
        "first": shrink(released(NAMES[0]), options.first_layers, options.set),
        "last": shrink(released(NAMES[1]), last_layers, options.set_last),
    }
    needed = sum(map(nbytes_of, sources.values()))
    if (refusal := no_room(options.workdir, options.workdir, needed)) is not None:
        raise CommandError(refusal)
    made = {name: write_checkpoint(paths[name], config, options.device) for name, config in sources.items()}
    for name, what in made.items():
        say(f"made {name}: {what.nbytes / 1e9:.1f} GB in {what.seconds:.1f} s")
    builds, copies = _build(options, paths)
    nbytes = nbytes_of(json.loads((paths["split"] / "config.json").read_text()))
    rows: list[tuple[str, int, Run, Run | None]] = [("split-llama build", nbytes, builds[-1], copies[-1])]
    head = ("command", "GB out", "seconds", "cp, s", "x cp", "anonymous MiB")
    print(table(head, [_row(*row) for row in rows]), flush=True)
    if options.fit:
        rows.append((f"split-llama fit, {options.fit} of {options.tokens} tokens", nbytes, _fit(options, paths), None))
        print(table(head, [_row(*rows[-1])]), flush=True)
        remove(paths["fitted"])
    for name in ("first", "last"):
        remove(paths[name])
    made_of = Made(nbytes, nbytes // 2, builds[-1].clock)
    options.name = f"split Llama ({options.first_layers} of 8B, {options.last_layers} of 70B)"
    layers = options.first_layers + options.last_layers
    verified = converted_and_verified(options, paths["split"], paths["megatron"], made_of, layers)
    print(f"{HEAD}\n{verified.row()}", flush=True)
    commands = {name: asdict(found) for name, _, found, _ in rows} | {"cp": asdict(copies[-1])}
    return {"made": {name: asdict(what) for name, what in made.items()}, **commands, "verified": asdict(verified)}


def _build(options: argparse.Namespace, paths: dict[str, Path]) -> tuple[list[Run], list[Run]]:
    """The hybrid and its copy, in turns; the last hybrid stays."""
    builds, copies = [], []
    take = ["--num-layers-8", str(options.first_layers), "--num-layers-70", str(options.last_layers)]
    recipe = [*take, "--adapter", options.adapter, "--accept-differences"]
    build = [*CKPTKIT, "split-llama", "build", str(paths["first"]), str(paths["last"]), "-o", str(paths["split"])]
    for _ in range(TURNS):
        remove(paths["split"])
        builds.append(run([*build, *recipe]))
        copies.append(run(cp_command(paths["split"], paths["copy"], sync=not is_memory(options.workdir))))
        remove(paths["copy"])
        say(f"built in {builds[-1].clock:.1f} s, copied in {copies[-1].clock:.1f} s")
    return builds, copies


def _fit(options: argparse.Namespace, paths: dict[str, Path]) -> Run:
    """An adapter fitted to random tokens: what it is good for is not the question, what it takes is."""
    calibration = options.workdir / "calibration.json"
    draw, length = random.Random(0), 512
    vocabulary = released(NAMES[0])["vocab_size"] if "vocab_size" not in options.set else options.set["vocab_size"]
    rows = [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(-(-options.tokens // length))]
    calibration.write_text(json.dumps(rows), encoding="utf-8")
    command = [*CKPTKIT, "split-llama", "fit", str(paths["split"]), "-o", str(paths["fitted"])]
    command += ["--last", str(paths["last"]), "--calibration", str(calibration), "--device", options.device]
    fitted = run([*command, "--adapter-init", options.fit, "--calibration-tokens", str(options.tokens)])
    say(f"fitted in {fitted.clock:.1f} s\n{fitted.output}")
    return fitted


def _row(name: str, nbytes: int, found: Run, copy: Run | None) -> list[str]:
    against = ["-", "-"] if copy is None else [f"{copy.clock:.1f}", f"{found.clock / copy.clock:.2f}"]
    return [name, f"{nbytes / 1e9:.1f}", f"{found.clock:.1f}", *against, f"{found.anonymous / 2**20:.0f}"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="for everything; three times the hybrid must fit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--first-layers", type=int, default=32, metavar="N")
    parser.add_argument("--last-layers", type=int, default=8, metavar="M")
    parser.add_argument("--adapter", default="linear")
    parser.add_argument("--fit", metavar="INIT", help="also fit the adapter, e.g. lstsq")
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N")
    for name in ("--set", "--set-last"):
        parser.add_argument(
            name, type=change, action="append", default=[], metavar="KEY=JSON", help="another size, for a trial run"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write verify's page")
    options = parser.parse_args()
    options.set, options.set_last = dict(options.set), dict(options.set_last)
    return options


if __name__ == "__main__":
    sys.exit(main())
