"""A released model at its true dimensions with random weights: made, converted, and verified in bf16.

    python -m benchmarks.big_models Llama-3.1-8B --workdir /tmp/big --device cuda --tp 2 --pp 2
    python -m benchmarks.big_models Qwen3-30B-A3B --workdir /tmp/big --out /dev/shm/big --device cuda --layers 24

The checkpoint is drawn on the device tensor by tensor and streamed to safetensors files, so that memory does not grow
with the model. Linears keep the size of their input and norms are drawn around one, so activations stay finite through
any number of layers, and what the layers add stays visible beside the residual stream. Then `ckptkit convert` runs,
measured as `make bench` measures, and `ckptkit verify --dtype bfloat16`, which runs the two sides one after the other.
It prints a row of Markdown on stdout, and all figures as JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import CommandError, run
from ckptkit.dtypes import DTYPES
from ckptkit.families import family_of
from ckptkit.formats.hf import INDEX
from ckptkit.formats.safetensors import build_header
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor
from ckptkit.verification.reports.report import installed_versions

if TYPE_CHECKING:
    import torch

CONFIGS = Path(__file__).parents[1] / "fixtures" / "released_configs.json"
LARGE = CONFIGS.with_name("large_models.json")
SHARD = 4 << 30
"""Bytes of a safetensors file, one tensor more or less."""
SEED = 0
SIZES = ("tp", "pp", "ep")
CKPTKIT = [sys.executable, "-m", "ckptkit"]


@dataclass(frozen=True)
class Made:
    """A checkpoint that was written: bytes and seconds."""

    nbytes: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """All figures of one model.

    Attributes:
        name: The model.
        layers: Its layers, fewer than the released one's if so asked.
        parameters: How many.
        nbytes: Size of the Hugging Face checkpoint, bytes.
        grid: The grid.
        device: Where it was verified, in words.
        make_seconds: Drawing and writing.
        convert_seconds: `ckptkit convert`, the interpreter's start included.
        convert_memory: Its peak of anonymous memory, bytes.
        verify_seconds: `ckptkit verify`.
        verify_memory: Peak of anonymous memory of its first process, bytes.
        report: What verify found.
        versions: Package -> version.
    """

    name: str
    layers: int
    parameters: int
    nbytes: int
    grid: str
    device: str
    make_seconds: float
    convert_seconds: float
    convert_memory: int
    verify_seconds: float
    verify_memory: int
    report: dict[str, Any]
    versions: dict[str, str]

    @property
    def logits(self) -> dict[str, Any]:
        """Details of the logits level."""
        details: dict[str, Any] = next(
            (level["details"] for level in self.report["levels"] if level["name"] == "logits"), {}
        )
        return details

    def row(self) -> str:
        """One row of Markdown."""
        noise, routing = self.logits.get("noise") or {}, self.logits.get("routing")
        ratios = f"{noise['median']:.2f} / {noise['p99']:.2f}" if noise else "-"
        routers = "-"
        if routing:
            worst = max(layer["noise_ratio"] for layer in routing["layers"])
            ties, beyond = (sum(layer[key] for layer in routing["layers"]) for key in ("near_ties", "disagreements"))
            routers = f"{worst:.2f}, {ties} near-ties, {beyond} beyond"
        top1 = self.logits.get("agreement", {}).get("top1_agreement", math.nan)
        cells = [
            self.name,
            str(self.layers),
            f"{self.parameters / 1e9:.2f} B",
            f"{self.nbytes / 1e9:.1f} GB",
            self.grid,
            f"{self.make_seconds:.0f} s ({self.nbytes / self.make_seconds / 1e9:.2f} GB/s)",
            f"{self.convert_seconds:.1f} s ({self.nbytes / self.convert_seconds / 1e9:.2f} GB/s)",
            f"{self.convert_memory / 2**20:.0f} MiB",
            f"{self.verify_seconds:.0f} s",
            ratios,
            routers,
            f"{100 * top1:.1f} %",
            str(self.report["verdict"]),
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| model | layers | parameters | size | grid | made | converted | memory | verified | noise floor: median / p99 |"
    " routers: worst ratio | top-1 | verdict |\n" + "|---" * 13 + "|"
)


def main() -> int:
    """Runs what the options ask for; the exit code is 0 if the models are the same."""
    options = _options()
    released_one = released(options.name)
    config = shrink(text_alone(released_one) if options.text else released_one, options.layers, options.set)
    source, target = options.workdir / "hf", (options.out or options.workdir) / "megatron"
    for path in (source, target):
        if path.exists():
            print(f"error: {path} exists; remove it, or choose another --workdir", file=sys.stderr)
            return 2
    refusal = no_room(options.workdir, options.out or options.workdir, nbytes_of(config))
    if refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 5
    try:
        result = measure(options, config, source, target)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(source, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
    print(f"{HEAD}\n{result.row()}")
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return 0 if result.report["verdict"] == "same" else 1


def measure(options: argparse.Namespace, config: dict[str, Any], source: Path, target: Path) -> Result:
    """Makes, converts and verifies one model.

    Raises:
        CommandError: A command failed, other than by finding a difference.
    """
    made = write_checkpoint(source, config, options.device)
    say(f"made {made.nbytes / 1e9:.1f} GB in {made.seconds:.1f} s")
    return converted_and_verified(options, source, target, made, _text(config)["num_hidden_layers"])


def converted_and_verified(
    options: argparse.Namespace, source: Path, target: Path, made: Made, num_layers: int
) -> Result:
    """Converts a checkpoint and verifies the outcome in bf16.

    Raises:
        CommandError: A command failed, other than by finding a difference.
    """
    sizes = [f"--{name}={getattr(options, name)}" for name in SIZES]
    converted = run([*CKPTKIT, "convert", str(source), str(target), "--to", "torch", *sizes, "--spec", "local"])
    say(f"converted in {converted.clock:.1f} s")
    report_file = options.workdir / "report.json"
    reports = [f"--json={report_file}", *([f"--html={options.html}"] if options.html else [])]
    # Exit code 1 says that the models differ, which is a result.
    how = ["--device", options.device, "--dtype", "bfloat16", *reports]
    verified = run([*CKPTKIT, "verify", str(source), str(target), *how], codes=(0, 1))
    report = json.loads(report_file.read_text())
    say(f"verified in {verified.clock:.1f} s: {report['verdict']}")
    for level in report["levels"]:
        say(f"  {level['name']}, {level['seconds']:.0f} s: {level['summary']} {level['details'].get('seconds', '')}")
    return Result(
        name=options.name,
        layers=num_layers,
        parameters=made.parameters,
        nbytes=made.nbytes,
        grid=" x ".join(f"{name.upper()}{getattr(options, name)}" for name in SIZES if getattr(options, name) > 1),
        device=device_name(options.device),
        make_seconds=made.seconds,
        convert_seconds=converted.clock,
        convert_memory=converted.anonymous,
        verify_seconds=verified.clock,
        verify_memory=verified.anonymous,
        report=report,
        versions=installed_versions(),
    )


# The checkpoint -------------------------------------------------------------------------------------------------------


def released(name: str) -> dict[str, Any]:
    """config.json of a released model.

    Raises:
        SystemExit: There is none of that name.
    """
    known = {key: value for file in (CONFIGS, LARGE) for key, value in json.loads(file.read_text("utf-8")).items()}
    if name not in known:
        raise SystemExit(f"error: no released config named {name}; known: {', '.join(sorted(known))}")
    config: dict[str, Any] = known[name]["config"]
    return config


def shrink(config: dict[str, Any], layers: int | None, changes: dict[str, Any]) -> dict[str, Any]:
    """`config` with fewer layers and other sizes, of the text model if there are several."""
    shrunk = json.loads(json.dumps(config))
    text = _text(shrunk)
    if layers is not None:
        text["num_hidden_layers"] = layers
        for kinds in ("layer_types", "mlp_layer_types"):
            if text.get(kinds):
                text[kinds] = text[kinds][:layers]
    text.update(changes)
    return dict(shrunk)


def text_alone(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the text model inside of a model with towers."""
    names = [name.replace("ForConditionalGeneration", "ForCausalLM") for name in config["architectures"]]
    return {**_text(config), "architectures": names, "tie_word_embeddings": config.get("tie_word_embeddings", False)}


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = config.get("text_config") or config
    return text


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, as released models of the family spell them."""
    family = family_of(config, CONFIGS)
    model = family.parse(config)
    plain = {
        name: Tensor.full(DTYPES["BF16"], shape) for item in family.items(model) for name, shape in item.parts.items()
    }
    if model.activation == "xielu":  # constants that Megatron has no place for, and transformers does not load without
        for layer in range(model.num_layers):
            names = (f"model.layers.{layer}.mlp.act_fn.{name}" for name in ("beta", "eps"))
            plain.update({name: Tensor.full(DTYPES["BF16"], ()) for name in names})
    stored = family.fuse(plain, model, family.hf_spellings[0].name)
    return {name: tensor.shape for name, tensor in stored.items()}


def nbytes_of(config: dict[str, Any]) -> int:
    """Bytes of the checkpoint's tensors in bf16."""
    return 2 * sum(math.prod(shape) for shape in shapes_of(config).values())


def write_checkpoint(path: Path, config: dict[str, Any], device: str, seed: int = SEED) -> Made:
    """Draws a checkpoint in bf16 on the device and streams it to disk; holds two tensors at a time."""
    import torch

    model = family_of(config, CONFIGS).parse(config)
    shapes = shapes_of(config)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n", encoding="utf-8")
    started = time.perf_counter()
    generator = torch.Generator(device).manual_seed(seed)
    shards = list(_shards(shapes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path / file, {name: shapes[name] for name in names}, model, generator)
        weight_map.update(dict.fromkeys(names, file))
    if device == "cuda":
        torch.cuda.empty_cache()  # the models to be verified need it
    total = nbytes_of(config)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Made(total, total // 2, time.perf_counter() - started)


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * math.prod(shape)
        if size >= SHARD:
            yield names
            names, size = [], 0
    if names:
        yield names


def _write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], model: ModelConfig, generator: torch.Generator
) -> None:
    header = build_header(
        {name: Tensor.full(DTYPES["BF16"], shape) for name, shape in shapes.items()}, {"format": "pt"}
    )
    with path.open("wb", buffering=0) as file:
        file.write(header.raw)
        for name, shape in shapes.items():
            left = memoryview(draw(name, shape, model, generator).cpu().flatten().view(_uint8()).numpy())
            while left:
                left = left[file.write(left) or 0 :]


def _uint8() -> torch.dtype:
    import torch

    return torch.uint8


def draw(name: str, shape: tuple[int, ...], model: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """Random values of a parameter in bf16, as its place in the model wants them.

    Norms are around one (around zero where the model adds one), scalars and learned scales too; biases are small. A
    linear draws with the standard deviation that keeps the size of its input, a router with twice that, so that it has
    a mind. An embedding that is also the head is drawn as a head: logits must be far enough apart to have a largest.
    """
    import torch

    def normal(mean: float, std: float) -> torch.Tensor:
        values = torch.randn(shape, device=generator.device, dtype=torch.bfloat16, generator=generator)
        return values.mul_(std).add_(mean)

    if len(shape) < 2:
        if name.endswith("A_log"):  # of a DeltaNet: with the next one, memories of a few to some hundred tokens
            return normal(0.0, 1.0)
        if name.endswith("dt_bias"):
            return normal(-3.0, 1.0)
        if name.endswith("bias"):
            return normal(0.0, 0.02)
        if "alpha" in name:
            return normal(0.0, 0.3)
        if "act_fn" in name:  # constants of Apertus's activation
            return torch.full(shape, 0.5 if name.endswith("beta") else -1e-6, dtype=torch.bfloat16)
        zero = model.zero_centered_norms and "norm" in name and "linear_attn" not in name
        return normal(0.0 if zero else 1.0, 0.1)
    if "embed_tokens" in name:
        return normal(0.0, 1.0 if not model.tied else 4.0 * shape[-1] ** -0.5)
    gain = 4.0 if name.startswith("lm_head") else 2.0 if _is_router(name) else 1.0
    return normal(0.0, gain * shape[-1] ** -0.5)


def _is_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.proj.weight"))


# The machine ----------------------------------------------------------------------------------------------------------


def no_room(first: Path, second: Path, needed: int) -> str | None:
    """Why the two checkpoints of `needed` bytes do not fit, or None."""
    first.mkdir(parents=True, exist_ok=True)
    second.mkdir(parents=True, exist_ok=True)
    same = os.stat(first).st_dev == os.stat(second).st_dev
    for path, copies in [(first, 2)] if same else [(first, 1), (second, 1)]:
        free = shutil.disk_usage(path).free
        if free < copies * needed * 1.02:
            return (
                f"{path} has {free / 1e9:.1f} GB free, {copies * needed / 1e9:.1f} GB are needed; see --out, --layers"
            )
    return None


def device_name(device: str) -> str:
    """The device in words."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} cores, {platform.machine()}"


def say(text: str) -> None:
    """Tells how far it is, on stderr."""
    print(text, file=sys.stderr, flush=True)


def change(text: str) -> tuple[str, Any]:
    """KEY=JSON of an option as key and value."""
    key, _, value = text.partition("=")
    return key, json.loads(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a key of fixtures/released_configs.json or large_models.json")
    parser.add_argument("--workdir", type=Path, required=True, help="for the checkpoint, and the reports")
    parser.add_argument("--out", type=Path, help="for the converted checkpoint, if another disk; default: the workdir")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the released model has")
    parser.add_argument(
        "--set", type=change, action="append", default=[], metavar="KEY=JSON", help="another size, for a trial run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write verify's page")
    parser.add_argument("--text", action="store_true", help="the text model alone, of one with towers")
    parser.add_argument("--keep", action="store_true", help="leave both checkpoints where they are")
    options = parser.parse_args()
    options.set = dict(options.set)
    return options


if __name__ == "__main__":
    sys.exit(main())
