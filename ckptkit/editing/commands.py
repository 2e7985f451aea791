"""The operations of `ckptkit surgery`, from paths to a finished output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.sources import facts_of
from ckptkit.conversion.execution import ConversionResult, Execution, How, carry_out
from ckptkit.conversion.options import Options
from ckptkit.conversion.planning import make_plan
from ckptkit.editing import recipes, vocabulary
from ckptkit.editing.averaging import UNIFORM, averaged, check_weights, decayed
from ckptkit.editing.inputs import Input, Opening, check_alike, left_out_of
from ckptkit.editing.layers import Place, is_layer_list, layer_list, stacked
from ckptkit.editing.merging import merged
from ckptkit.editing.record import recorded
from ckptkit.editing.token_rows import TokenRows
from ckptkit.editing.tokenizers import (
    CONFIG,
    MergedTokenizer,
    chat_template,
    merged_tokenizer,
    template_files,
    with_tokenizer,
)
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.hub import is_reference
from ckptkit.formats.tokenizer_json import TOKENIZER
from ckptkit.formats.torch_legacy import has_iterations
from ckptkit.formats.torch_legacy import iterations as iterations_in
from ckptkit.io.regular import read_bounded
from ckptkit.io.stores.opening import must_be_on_disk

PRECISIONS = ("float32", "float64")
RECIPE = "mergekit_config.yml"
"""Name of the copy of a recipe beside the model."""


@dataclass(frozen=True)
class Output:
    """The requested output of an operation.

    Attributes:
        path: The directory to create.
        to: `hf`, `packed`, `torch` or `torch_dist`.
        options: Everything else about it.
        hash_inputs: Whether the record holds the SHA-256 of the files that the weights come from.
    """

    path: str | Path
    to: str = "hf"
    options: Options = Options()  # noqa: RUF009  frozen
    hash_inputs: bool = False


class _Work:
    """One operation: opens its inputs, and carries out the plan of the model that it makes."""

    def __init__(
        self,
        stack: ExitStack,
        output: Output,
        source: Mapping[str, Any] | None,
        how: How,
        drop_prediction: bool = False,
    ) -> None:
        self.started, self.execution = time.monotonic(), Execution(**how)
        self.output = output
        self.opening = Opening(stack, self.execution.dry_run, dict(source or {}), drop_prediction)

    def write(
        self,
        operation: str,
        what: Mapping[str, Any],
        model: Checkpoint,
        inputs: Sequence[Input],
        *,
        notes: Sequence[str] = (),
        lossy: Sequence[str] = (),
        further: Mapping[str, bytes] | None = None,
    ) -> ConversionResult:
        """Writes the model, with a record of what was done."""
        output, execution = self.output, self.execution
        hash_inputs = output.hash_inputs and not execution.dry_run
        if self.opening.drop_prediction:
            lossy = (*left_out_of(inputs), *lossy)
        own = [f"{one.name}: {note}" for one in inputs for note in one.model.notes]
        disagreements = [text for one in inputs for text in one.model.disagreements]
        model = recorded(model, operation, what, inputs, hash_inputs=hash_inputs, further=further)
        model = replace(model, notes=(*own, *notes), disagreements=tuple(disagreements))
        plan = make_plan(model, output.to, output.options)
        plan = replace(plan, lossy=(*lossy, *plan.lossy))
        source = {
            **facts_of(inputs[0].model),
            "path": " + ".join(one.name for one in inputs),
            "operation": dict(model.sidecar.operation),
        }
        target = {"path": str(output.path), "format": output.to, "grid": str(output.options.grid), **plan.facts}
        return carry_out(plan, [one.model for one in inputs], source, target, execution, self.started)


def average(
    models: Sequence[str | Path],
    output: Output,
    *,
    weights: Sequence[float] | None = None,
    iterations: Sequence[int] | None = None,
    last: int | None = None,
    decay: str | None = None,
    precision: str | None = None,
    accept_differences: bool = False,
    drop_prediction: bool = False,
    source: Mapping[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Averages models, or the iterations of one run: `sum(w * W) / sum(w)`, rounded once.

    Args:
        models: Checkpoints of any formats; with `iterations` or `last`, the root of one run.
        output: What to write.
        weights: A weight for each model or iteration. They are divided by their sum. The default is `decay`.
        iterations: Numbers of the iterations.
        last: Number of the latest iterations.
        decay: Weights by age, see `averaging.decayed`; models count as older the earlier they are named.
        precision: Type of the sums, `float32` or `float64`; the default is float64 for results of 32 bits or more.
        accept_differences: Continue if settings differ that stored bytes do not depend on.
        drop_prediction: Leave out layers of multi-token prediction.
        source: Options of `open_checkpoint`, for models that do not describe themselves.
        how: How the plan is carried out: see `Execution`.

    Raises:
        UsageError: The request cannot work, or the models have different settings.
        InputError: A source is damaged, or has tensors that another lacks.
        UnsupportedError: The models have different sizes.
        StorageError: The destination cannot be written.
    """
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"--precision {precision}", hint=f"one of {', '.join(PRECISIONS)}")
    if weights is not None and decay is not None:
        raise UsageError("--weights and --decay exclude each other", hint="pass one of them")
    with ExitStack() as stack:
        work = _Work(stack, output, source, how, drop_prediction)
        if weights is None and iterations is not None:
            iterations = sorted(iterations)  # decays count from the oldest
        inputs = _averaged_inputs(work.opening, models, iterations, last)
        chosen = decayed(decay or UNIFORM, len(inputs)) if weights is None else check_weights(weights, len(inputs))
        notes = check_alike(inputs, accept_differences=accept_differences)
        double = None if precision is None else precision == PRECISIONS[1]
        found = averaged(inputs, chosen, dtype=output.options.dtype, double=double)
        shares = [weight / sum(chosen) for weight in chosen]
        given = {"decay": decay, "precision": precision}
        what = {"weights": shares, **{name: value for name, value in given.items() if value is not None}}
        told = ", ".join(f"{one.name} {share:.4g}" for one, share in zip(inputs, shares, strict=True))
        notes += [*found.notes, f"{found.averaged:,} tensors are averaged: {told}"]
        return work.write("average", what, found.model, inputs, notes=notes)


def _averaged_inputs(
    opening: Opening, models: Sequence[str | Path], iterations: Sequence[int] | None, last: int | None
) -> list[Input]:
    if iterations is None and last is None:
        if len(models) < 2:
            hint = "name at least two, or one run with --iterations or --last"
            raise UsageError("one model has no average", hint=hint)
        names = _unique([str(path) for path in models])
        return [opening.open(path, name) for path, name in zip(models, names, strict=True)]
    if iterations is not None and last is not None:
        raise UsageError("--iterations and --last exclude each other", hint="pass one of them")
    if len(models) != 1:
        raise UsageError("--iterations and --last are about one run", hint="name its root alone")
    root = Path(models[0])
    given = f"--last {last}" if iterations is None else "--iterations"
    if opening.options.get("iteration") is not None:
        raise UsageError(f"--iteration and {given} exclude each other", hint="pass one of them")
    if root.is_dir() and not has_iterations(root):
        hint = "name the folder that has the folders iter_... in it; models of other formats are named one by one"
        raise UsageError(f"{given} is about the root of a Megatron run", where=root, hint=hint)
    if last is not None:
        if not root.is_dir():
            must_be_on_disk(root)
            raise InputError("no such directory", where=root)
        there = iterations_in(root)
        if len(there) < last:
            raise UsageError(f"{given}: {len(there)} iterations are there", where=root)
        iterations = [int(folder.name.rpartition("_")[2]) for folder in there[-last:]]
    assert iterations is not None
    if len(iterations) < 2 or len(set(iterations)) < len(iterations):
        raise UsageError("an average is of at least two different iterations", hint="as in --iterations 1000,2000")
    return [opening.open(root, f"{root}:{number}", number) for number in iterations]


def _unique(names: Sequence[str]) -> list[str]:
    """Names that tell apart models that are named twice."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def slice_layers(
    model: str | Path,
    output: Output,
    *,
    layers: str | None = None,
    drop: str | None = None,
    drop_prediction: bool = False,
    source: Mapping[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Keeps, drops, repeats or reorders the layers of a model. Every tensor that is written is a copy.

    Args:
        model: A checkpoint of any format.
        output: What to write.
        layers: The new layers, in their order, as in `0-15,24-31`.
        drop: Layers to leave out, instead.
        drop_prediction: Leave out layers of multi-token prediction.
        source: Options of `open_checkpoint`.
        how: How the plan is carried out: see `Execution`.

    Raises:
        UsageError: The request cannot work.
        InputError: The source is damaged.
        UnsupportedError: config.json cannot describe these layers.
        StorageError: The destination cannot be written.
    """
    if (layers is None) == (drop is None):
        raise UsageError("slice needs either --layers or --drop", hint="as in --layers 0-15,24-31")
    with ExitStack() as stack:
        work = _Work(stack, output, source, how, drop_prediction)
        one = work.opening.open(model)
        count = one.model.config.num_layers
        if layers is not None:
            kept = layer_list(layers, count, "--layers")
        else:
            dropped = set(layer_list(drop or "", count, "--drop"))
            kept = [layer for layer in range(count) if layer not in dropped]
        made = stacked(one, one, one, [Place(one, layer) for layer in kept])
        left = sorted(set(range(count)) - set(kept))
        notes = [f"{len(kept)} layer{'s' * (len(kept) != 1)}, of {count} in the source"]
        if left:
            notes.append(f"left out: {'layer' if len(left) == 1 else 'layers'} {_as_ranges(left)}")
        return work.write("slice", {"layers": _as_ranges(kept)}, made, [one], notes=notes)


def stack_layers(
    parts: Sequence[str],
    output: Output,
    *,
    accept_differences: bool = False,
    drop_prediction: bool = False,
    source: Mapping[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Joins layers of several models of equal sizes. Every tensor that is written is a copy.

    Embedding, config.json and tokenizer are those of the first model, the last norm and the head those of the last.

    Args:
        parts: `MODEL:LAYERS` each, or `MODEL` for all its layers.
        output: What to write.
        accept_differences: Continue if settings differ that stored bytes do not depend on.
        drop_prediction: Leave out layers of multi-token prediction.
        source: Options of `open_checkpoint`, for models that do not describe themselves.
        how: How the plan is carried out: see `Execution`.

    Raises:
        UsageError: The request cannot work, or the models have different settings.
        InputError: A source is damaged.
        UnsupportedError: The models have different sizes, or config.json cannot describe these layers.
        StorageError: The destination cannot be written.
    """
    named = [_named(text) for text in parts]
    if not named:
        raise UsageError("nothing to stack", hint="name MODEL:LAYERS, as in A:0-15 B:8-23")
    with ExitStack() as stack:
        work = _Work(stack, output, source, how, drop_prediction)
        opened = {path: work.opening.open(path) for path in dict.fromkeys(path for path, _ in named)}
        inputs = list(opened.values())
        notes = check_alike(inputs, accept_differences=accept_differences, layers=False)
        _check_types(inputs, output.options)
        places = []
        for path, layers in named:
            count = opened[path].model.config.num_layers
            numbers = range(count) if layers is None else layer_list(layers, count, f"{path}:")
            places += [Place(opened[path], number) for number in numbers]
        first, last = opened[named[0][0]], opened[named[-1][0]]
        made = stacked(first, first, last, places)
        if made.config.tied and first is not last:
            notes.append(f"the head is the embedding of {first.name}: the models tie the two")
        runs = [{"model": path, "layers": layers or "all"} for path, layers in named]
        notes = [f"{len(places)} layers", *notes, *_left_behind(inputs[1:])]
        return work.write("stack", {"layers": runs}, made, inputs, notes=notes)


def _named(text: str) -> tuple[str, str | None]:
    """The path and the layers in `MODEL:LAYERS`.

    Raises:
        UsageError: A model is named, and what follows the colon are no layers.
    """
    path, colon, layers = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    if is_layer_list(layers):
        return path, layers
    if Path(path).exists() or is_reference(path):
        layer_list(layers, 1, f"{path}:")
    return text, None


def _check_types(inputs: Sequence[Input], options: Options) -> None:
    types = dict.fromkeys(one.model.main_dtype for one in inputs)
    if len(types) > 1 and options.dtype is None:
        raise UsageError(f"the models are {' and '.join(types)}", hint="--dtype makes them one")


def _left_behind(inputs: Sequence[Input]) -> list[str]:
    """Notes about the towers of models that give layers alone."""
    return [
        f"{len(one.model.sidecar.extras):,} tensors outside of the layers of {one.name} are left behind"
        for one in inputs
        if one.model.sidecar.extras
    ]


def _as_ranges(numbers: Sequence[int]) -> str:
    """Numbers as `layer_list` reads them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def merge(
    recipe: str | Path,
    output: Output,
    *,
    seed: int = 0,
    accept_differences: bool = False,
    drop_prediction: bool = False,
    source: Mapping[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Merges models by a recipe in mergekit's YAML.

    Args:
        recipe: The file. Relative paths in it count from the current directory, or else from the file.
        output: What to write; its type outranks that of the recipe.
        seed: Seed of the methods that draw random numbers.
        accept_differences: Continue if settings differ that stored bytes do not depend on.
        drop_prediction: Leave out layers of multi-token prediction.
        source: Options of `open_checkpoint`, for models that do not describe themselves.
        how: How the plan is carried out: see `Execution`.

    Raises:
        UsageError: The request cannot work, or the models have different settings.
        InputError: A source is damaged, or the recipe contradicts itself.
        UnsupportedError: The recipe asks for what is not done here, or the models cannot be merged.
        StorageError: The destination cannot be written.
    """
    file = Path(recipe)
    text = read_bounded(file, recipes.LARGEST)
    wanted = recipes.read_recipe(text, file)
    with ExitStack() as stack:
        work = _Work(stack, output, source, how, drop_prediction)
        opened = {name: work.opening.open(recipes.model_path(name, file), name) for name in wanted.models}
        inputs = list(opened.values())
        notes = check_alike(
            inputs,
            accept_differences=accept_differences,
            layers=not wanted.sliced,
            vocabulary=wanted.tokenizer is None,
        )
        further: dict[str, bytes] = {}
        tokenizer, rows = None, None
        if wanted.tokenizer is not None:
            base = opened[wanted.base or wanted.models[0]]
            tokenizer = merged_tokenizer(wanted.tokenizer, base, opened, file)
            given = wanted.tokenizer
            rows = TokenRows(tokenizer.tokens, tokenizer.owned, given.tokens, given.multiple, file)
        found = merged(wanted, opened, out=output.options.dtype, seed=seed, where=file, tokens=rows)
        model = found.model
        if tokenizer is not None:
            model, further, told = _with_tokenizer(model, tokenizer, base)
            notes += told
        if wanted.chat_template is not None:
            further |= _with_template(wanted.chat_template, model, inputs, further, file)
        what = {"recipe": wanted.text, "method": wanted.method, "seed": seed}
        further[RECIPE] = text
        return work.write("merge", what, model, inputs, notes=[*notes, *found.notes], further=further)


def _with_tokenizer(
    model: Checkpoint, tokenizer: MergedTokenizer, base: Input
) -> tuple[Checkpoint, dict[str, bytes], list[str]]:
    """A merged model with its tokenizer, the files that are made for it, and notes."""
    own = tokenizer.owned[base.name]
    moved = {number: tokenizer.tokens[token] for token, number in own.items() if token in tokenizer.tokens}
    model, made, notes = vocabulary.with_ids(model, own, moved)
    notes.append(f"{len(tokenizer.tokens):,} tokens, of {len(own):,} in {base.name}")
    return with_tokenizer(model, tokenizer), {**made, **tokenizer.made}, notes


def _with_template(
    wanted: str, model: Checkpoint, inputs: Sequence[Input], made: Mapping[str, bytes], where: Path
) -> dict[str, bytes]:
    """The files of the chat template that a recipe asks for."""
    if not (model.sidecar.small.keys() | made.keys()) & {TOKENIZER, CONFIG}:
        raise InputError("chat_template: the model has no tokenizer that it could belong to", where=where)
    text = chat_template(wanted, inputs, where)
    return {} if text is None else template_files(text, model, made)


def resize_vocabulary(
    model: str | Path,
    output: Output,
    *,
    tokenizer: str | Path | None = None,
    size: int | None = None,
    new_rows: str = vocabulary.MEAN,
    seed: int = 0,
    source: Mapping[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Gives a model another vocabulary: the rows of tokens that it keeps are copies, in the embedding and in the head.

    Args:
        model: A checkpoint of any format.
        output: What to write.
        tokenizer: Folder of the new tokenizer, with tokenizer.json. Tokens are matched by their text.
        size: Number of rows; without `tokenizer` the last rows are left out, or new ones follow them.
        new_rows: How rows are made that no old token has: `mean` of all old rows, mean of the `pieces` that the old
            tokenizer makes of the token's text, `zeros`, or `normal` with mean and deviation of each column.
        seed: Seed of `normal`.
        source: Options of `open_checkpoint`.
        how: How the plan is carried out: see `Execution`.

    Raises:
        UsageError: The request cannot work.
        InputError: The source or a tokenizer is damaged.
        UnsupportedError: The model has no tokenizer.json to match tokens by.
        StorageError: The destination cannot be written.
    """
    if tokenizer is None and size is None:
        raise UsageError("resize-vocab needs --tokenizer or --size", hint="as in --size 32064")
    if size is not None and not 0 < size <= vocabulary.MOST_ROWS:
        raise UsageError(f"--size {size}", hint=f"1 to {vocabulary.MOST_ROWS:,}")
    if new_rows not in vocabulary.KINDS:
        raise UsageError(f"--new-rows {new_rows}", hint=f"one of {', '.join(vocabulary.KINDS)}")
    with ExitStack() as stack:
        work = _Work(stack, output, source, how)
        one = work.opening.open(model)
        before = one.model.config.vocab_size
        further: dict[str, bytes] = {}
        notes: list[str] = []
        if tokenizer is None:
            rows = vocabulary.rows_of_size(size or 0, before, new_rows, seed)
            made = vocabulary.with_rows(one, rows)
        else:
            folder, old = Path(tokenizer), vocabulary.tokenizer_of(one)
            rows, moved = vocabulary.rows_by_token(old, folder / TOKENIZER, before, size, new_rows, seed)
            made, further, notes = vocabulary.with_tokens(vocabulary.with_rows(one, rows), folder, old, moved)
        copied = len(rows.old) - rows.made
        notes.append(
            f"{len(rows.old):,} rows, of {before:,}: {copied:,} are copies, {rows.made:,} are made ({new_rows})"
        )
        given = {"tokenizer": None if tokenizer is None else str(tokenizer), "size": size}
        what = {**{key: value for key, value in given.items() if value is not None}, "new_rows": new_rows, "seed": seed}
        return work.write("resize-vocab", what, made, [one], notes=notes, further=further)
