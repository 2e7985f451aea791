"""Building a split Llama: a copy plan over two models. Only the adapter is made; all other bytes pass through."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from ckptkit.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from ckptkit.checkpoints.sources import open_source
from ckptkit.conversion.execution import ConversionResult, Execution, How, carry_out, check_destination
from ckptkit.conversion.options import Options
from ckptkit.conversion.planning import make_plan
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families.split_llama import ARCHITECTURE, KINDS, LINEAR, RELU, SPLIT_LLAMA, compose
from ckptkit.formats.json_files import read_json
from ckptkit.formats.sidecar import Sidecar
from ckptkit.steps import Tell, nobody
from ckptkit.surgery.initialisation import FITTED, Request, initialise
from ckptkit.surgery.matching import differences
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor
from ckptkit.version import __version__

DEFAULT_INIT = "kaiming"
RECIPE = "split_recipe"
"""Key of config.json under which the recipe of a build is."""

ADAPTER = "decoder.adapter."
_LAYERS = "decoder.layers."
_KEPT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that are copied from the first model, because its embedding reads the tokens."""


@dataclass(frozen=True)
class SplitRecipe:
    """The recipe of a split Llama.

    Attributes:
        first: The narrow model: a checkpoint of any format, or `org/model@revision` on the hub.
        last: The wide model.
        num_first: Layers taken from the front of the first one.
        num_last: Layers taken from the end of the last one.
        adapter: `linear`, `two-linear` or `mlp`.
        init: How the adapter starts: the name of an initialisation, perhaps with `:` and an argument.
        seed: Seed of a random adapter.
        stated: Further entries of a file with the original schema, to be checked against the models.
        options: Options of single initialisations.
    """

    first: str
    last: str
    num_first: int
    num_last: int
    adapter: str = LINEAR
    init: str = DEFAULT_INIT
    seed: int = 0
    stated: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def read_schema(path: Path) -> SplitRecipe:
    """The recipe in a JSON file of the original schema: `path8b`, `path70b`, `num_layers_8`, `num_layers_70`, `mlp`.

    Relative paths count from the current directory, or else from the file.

    Raises:
        InputError: A key is missing or of the wrong type.
    """
    raw = read_json(path)
    if raw.get("architectures", [ARCHITECTURE]) != [ARCHITECTURE]:
        raise InputError(
            f"architectures is {raw['architectures']!r}", where=path, hint=f'it must be ["{ARCHITECTURE}"]'
        )
    for key, kind in (("path8b", str), ("path70b", str), ("num_layers_8", int), ("num_layers_70", int)):
        if type(raw.get(key)) is not kind:
            raise InputError(f"{key} must be {_WORDS[kind]}, not {raw.get(key)!r}", where=path)
    if not isinstance(raw.get("mlp", False), bool):
        raise InputError(f"mlp must be true or false, not {raw['mlp']!r}", where=path)
    return SplitRecipe(
        _relative(raw["path8b"], path),
        _relative(raw["path70b"], path),
        raw["num_layers_8"],
        raw["num_layers_70"],
        RELU if raw.get("mlp") else LINEAR,
        stated={key: raw[key] for key in ("vocab_size", "rms_norm_eps") if key in raw},
    )


_WORDS = {str: "a path", int: "a number of layers"}


def _relative(path: str, file: Path) -> str:
    beside = file.parent / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


def build(
    recipe: SplitRecipe,
    out: str | Path,
    *,
    accept_differences: bool = False,
    layout: str = "full",
    shard_size: int | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Builds a split Llama as a Hugging Face directory that loads by itself.

    Args:
        recipe: The models and the adapter.
        out: The directory to create.
        accept_differences: Continue even if settings differ that should match.
        layout: `full`, or `legacy` for the published layout. Loading that needs the directories of both models.
        shard_size: Largest safetensors shard in bytes.
        how: How the plan is carried out (`dry_run`, `overwrite`, `resume`, `threads`, `hash`, `progress`, `tell`):
            see `Execution`.

    Raises:
        UsageError: The request cannot work.
        InputError: A source is damaged, incomplete, or contradicts itself.
        UnsupportedError: The two models cannot become one.
        StorageError: The destination cannot be written.
    """
    started = time.monotonic()
    execution = Execution(**how)
    if recipe.adapter not in KINDS:
        raise UsageError(f"--adapter {recipe.adapter}", hint=f"one of {', '.join(KINDS)}")
    recipe = replace(recipe, options={**recipe.options, "dry_run": execution.dry_run})
    with ExitStack() as stack:
        first, last = (
            open_source(stack, path, None, headers_only=execution.dry_run) for path in (recipe.first, recipe.last)
        )
        notes = _check(recipe, first, last, accept_differences)
        options = Options(layout=layout, shard_size=shard_size)
        fits = recipe.init.partition(":")[0] in FITTED
        if fits:  # which takes long, and is lost if nothing can be written then
            unfitted = replace(recipe, options={**recipe.options, "dry_run": True})
            rehearsed = make_plan(assemble(unfitted, first, last, notes), "hf", options)
            check_destination(rehearsed, [first, last], out, execution)
        fitting = time.monotonic()
        hybrid = assemble(recipe, first, last, notes, execution.tell)
        fitted = time.monotonic() - fitting if fits and not execution.dry_run else 0.0
        plan = make_plan(hybrid, "hf", options)
        source = {
            "path": f"{recipe.first} + {recipe.last}",
            "format": "hf",
            "family": SPLIT_LLAMA.name,
            "architecture": ARCHITECTURE,
            "grid": str(hybrid.grid),
            "recipe": hybrid.sidecar.config[RECIPE],
        }
        target = {"path": str(out), "format": "hf", "grid": str(hybrid.grid)}
        return carry_out(plan, [first, last], source, target, execution, started, fitted)


def _check(recipe: SplitRecipe, first: Checkpoint, last: Checkpoint, accept: bool) -> list[str]:
    """Notes about the two models. An error if they cannot become one."""
    counts = (("--num-layers-8", recipe.num_first, first), ("--num-layers-70", recipe.num_last, last))
    for option, count, model in counts:
        if not 1 <= count <= model.config.num_layers:
            raise UsageError(
                f"{option} {count}: the model has {model.config.num_layers} layers",
                where=model.path,
                hint=f"take 1 to {model.config.num_layers}",
            )
    found = differences(first, last)
    _check_stated(recipe.stated, last.config)
    if found.fatal:
        raise UnsupportedError(f"{recipe.first} and {recipe.last} cannot become one model: {'; '.join(found.fatal)}")
    if found.risky and not accept:
        raise UsageError(
            f"{recipe.first} and {recipe.last} differ: {'; '.join(found.risky)}",
            hint="--accept-differences builds it all the same",
        )
    return [*(f"the two models differ: {text}" for text in found.risky), *found.notes]


def _check_stated(stated: Mapping[str, Any], last: ModelConfig) -> None:
    known = {"vocab_size": last.vocab_size, "rms_norm_eps": last.norm_eps}
    for key, value in stated.items():
        if value != known[key]:
            raise InputError(f"--config says {key} {value!r}, the models say {known[key]!r}")


def assemble(
    recipe: SplitRecipe, first: Checkpoint, last: Checkpoint, notes: list[str], tell: Tell = nobody
) -> Checkpoint:
    """The split Llama of two opened models as a checkpoint that can be laid out in any format.

    Args:
        recipe: The layers to take, and the adapter.
        first: The narrow model.
        last: The wide one.
        notes: Sentences about the two that a user should read.
        tell: Told what a fit is at.

    Raises:
        UsageError: The adapter cannot be initialised so.
        InputError: The file that initialises the adapter is damaged.
        UnsupportedError: The two models differ in a setting that both halves share.
    """
    raw = compose(first.sidecar.config, last.sidecar.config, recipe.num_first, recipe.num_last, recipe.adapter)
    name, _, argument = recipe.init.partition(":")
    request = Request(
        recipe.adapter,
        first.config.hidden_size,
        last.config.hidden_size,
        recipe.seed,
        argument,
        first,
        last,
        recipe.num_first,
        recipe.num_last,
        recipe.options,
        tell,
    )
    made = initialise(name, request)
    dtype = DTYPES_BY_TORCH_NAME[last.main_dtype]
    adapter = {f"{ADAPTER}{key}.weight": matrix.tensor(dtype) for key, matrix in made.matrices.items()}
    raw.update(path8b=recipe.first, path70b=recipe.last)
    raw[RECIPE] = _recipe(recipe, first, last, made.recipe)
    config = replace(SPLIT_LLAMA.parse(raw), dtype=last.main_dtype)
    items = {item.key: item for item in SPLIT_LLAMA.items(config)}
    left = first.sidecar.extras.keys() | last.sidecar.extras.keys()
    copied = len(items) - len(adapter)
    return Checkpoint(
        path=first.path,
        format="hf",
        family=SPLIT_LLAMA,
        config=config,
        sidecar=Sidecar(raw, {name: path for name, path in first.sidecar.small.items() if name in _KEPT_FILES}),
        items=items,
        tensors={key: adapter[key] if key in adapter else _taken(key, recipe, first, last) for key in items},
        spelling=SPLIT_LLAMA.spellings[0],
        padded_vocab_size=config.vocab_size,
        comparisons=(*first.comparisons, *last.comparisons),
        coverage={
            "copied": copied,
            "made": len(adapter),
            "left behind": len(first.tensors) + len(last.tensors) - copied,
        },
        notes=(*made.notes, *notes, *first.notes, *last.notes, *(f"{name} is left behind" for name in sorted(left))),
        disagreements=(*first.disagreements, *last.disagreements),
    )


def _taken(key: str, recipe: SplitRecipe, first: Checkpoint, last: Checkpoint) -> Tensor:
    """The tensor of one of the two models that becomes `key` of the split Llama."""
    if key == EMBEDDING:
        return first.tensors[key]
    if not key.startswith(_LAYERS):
        return last.tensors[EMBEDDING if key == HEAD and last.config.tied else key]
    number, _, rest = key.removeprefix(_LAYERS).partition(".")
    layer = int(number)
    if layer < recipe.num_first:
        return first.tensors[key]
    offset = last.config.num_layers - recipe.num_last - recipe.num_first
    return last.tensors[f"{_LAYERS}{layer + offset}.{rest}"]


def _recipe(recipe: SplitRecipe, first: Checkpoint, last: Checkpoint, init: dict[str, Any]) -> dict[str, Any]:
    """The record of a build for config.json."""
    start = last.config.num_layers - recipe.num_last
    halves = {
        "first": (recipe.first, first, range(recipe.num_first)),
        "last": (recipe.last, last, range(start, last.config.num_layers)),
    }
    return {
        "tool": f"ckptkit {__version__}",
        **{
            name: {
                "path": path,
                "layers": [layers.start, layers.stop],
                "of_layers": model.config.num_layers,
                "fingerprint": model.sidecar.fingerprint,
                **({"origin": model.sidecar.origin} if model.sidecar.origin else {}),
            }
            for name, (path, model, layers) in halves.items()
        },
        "adapter_init": init,
    }
