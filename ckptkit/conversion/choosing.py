"""What a checkpoint can become: the formats, and a command for each that its sizes allow."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint, check_grid
from ckptkit.checkpoints.sidecar_contents import ORIGINAL, notes_of_scales
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.checkpoints.sources import open_source
from ckptkit.errors import UsageError
from ckptkit.formats.hf import HF
from ckptkit.formats.sidecar import FOLDER
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers

TRAINED = ("torch", "torch_dist", "dcp", "fsdp")
"""Formats that training programs write."""
MEANINGS = {
    "hf": "a Hugging Face directory, for transformers, vLLM and SGLang",
    "packed": "Megatron's names and fused tensors in unsharded safetensors files",
    "torch": "mp_rank files on a fixed grid, for Megatron-LM (--ckpt-format torch)",
    "torch_dist": "a distributed checkpoint, for Megatron-LM on any grid and Megatron-Bridge",
    "peft": "a directory of PEFT, for transformers and vLLM",
}
"""Format -> what it is for; a test compares the formats with those that can be written."""
_LARGEST_TP = 4
SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class Choice:
    """A format that a checkpoint can become.

    Attributes:
        to: The format.
        what: What it is for.
        command: A command that writes it.
    """

    to: str
    what: str
    command: str


@dataclass(frozen=True)
class Choices:
    """What a checkpoint is, and what it can become.

    Attributes:
        path: The checkpoint.
        format: Its format.
        family: Its family.
        architecture: Hugging Face's name of its model class.
        grid: Its grid.
        choices: The formats.
        notes: What else to know.
    """

    path: str
    format: str
    family: str
    architecture: str
    grid: str
    choices: list[Choice]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"schema": SCHEMA, **asdict(self)}


def choices_of(path: str | Path, **source: Any) -> Choices:
    """Reads the headers of a checkpoint, and says what it can become.

    Args:
        path: A checkpoint of any format, or `org/model@revision` on the hub.
        source: Facts about it, as for `convert`.

    Raises:
        InputError: It is damaged or incomplete.
        UnsupportedError: No family or format of ours.
    """
    options = SourceOptions(**source)
    with ExitStack() as stack:
        keywords = options.keywords()
        reference = keywords.pop("hf_reference", None)
        opened = open_source(stack, path, reference, headers_only=True, **keywords)
        described = options.hf_reference is not None or opened.format not in TRAINED or _describes_itself(opened)
        quantised = opened.sidecar.quantised is not None and opened.format == HF.name
    words = [*options.words(""), *([] if described else ["--hf-reference", "DIR"])]
    found = [
        Choice(to, MEANINGS[to], _command(path, to, [*grid, *words]))
        for to, grid in (_of_adapter(opened) if opened.lora is not None else _of_model(opened))
    ]
    notes = list(_notes(path, opened, described, quantised))
    facts = (str(path), opened.format, opened.family.name, opened.config.architecture, str(opened.grid))
    return Choices(*facts, found, notes)


def _command(path: str | Path, to: str, words: list[str]) -> str:
    """The command that writes a format."""
    name = Path(str(path).split("@")[0]).resolve().name
    return shlex.join(["ckptkit", "convert", str(path), f"{name}-{to.replace('_', '-')}", "--to", to, *words])


def _of_model(source: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """The formats of a model, each with a grid that divides it."""
    grid = _grid(source)
    if source.format != HF.name:
        yield "hf", []
    yield "torch", [*grid, *_pipeline(source)]
    yield "torch_dist", grid
    yield "packed", []
    if source.format == HF.name:
        yield "hf", ["--shard-size", "5GB"]


def _of_adapter(source: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """The formats of an adapter."""
    if source.format != "peft":
        yield "peft", []
    else:
        yield "torch_dist", _grid(source)


def _grid(source: Checkpoint) -> list[str]:
    """The largest usual tensor parallel size that divides the model, and with experts 2 groups of them."""
    config, tp = source.config, _LARGEST_TP
    while tp > 1 and not _fits(source, Parallelism(tp=tp)):
        tp //= 2
    words = ["--tp", str(tp)] if tp > 1 else []
    experts = config.num_experts and _fits(source, Parallelism(tp=tp, ep=2))
    return [*words, *(["--ep", "2"] if experts else [])]


def _pipeline(source: Checkpoint) -> list[str]:
    """Two stages, if the layers divide."""
    return ["--pp", "2"] if _fits(source, Parallelism(pp=2)) else []


def _fits(source: Checkpoint, grid: Parallelism) -> bool:
    """Whether a grid divides a model."""
    with suppress(UsageError):
        check_grid(source.config, grid)
        split_layers(source.config.num_layers, grid)
        return True
    return False


def _describes_itself(source: Checkpoint) -> bool:
    """Whether a trained checkpoint comes with config.json and tokenizer: in its sidecar, or beside it."""
    return "config.json" in source.sidecar.small or (source.path / FOLDER).is_dir()


def _notes(path: str | Path, source: Checkpoint, described: bool, quantised: bool) -> Iterator[str]:
    """What else to know about a source."""
    if not described:
        yield (
            "--hf-reference DIR supplies config.json and tokenizer: the Hugging Face directory that training began"
            " with. Without it config.json is made of `args`, and there is no tokenizer"
        )
    if quantised:
        yield (
            "its weights become bfloat16 on the way; Megatron's formats keep the scales beside them, and `--to hf"
            f" --quantise {ORIGINAL}` gives the codes back; where these got lost, `--quantise"
            f" like:{shlex.quote(str(path))}` does"
        )
    yield from notes_of_scales(source.sidecar)
    if source.lora is not None:
        yield (
            "an adapter of a model: `--hf-reference BASE` names it where it is needed, and `ckptkit adapter merge BASE"
            f" {shlex.quote(str(path))} -o OUT --to hf` adds it to the weights"
        )
    if source.optimizer.nbytes:
        yield "the optimizer's state is left out"
    yield from source.notes
