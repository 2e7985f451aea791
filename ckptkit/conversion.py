"""The main job on one page: open -> translate -> shard -> plan -> move -> commit.

`open_checkpoint` gives the canonical view of any source; a target lays that view out as files; the plan is then
complete and can be shown, checked against the disk, and executed. Nothing on the way loads a tensor.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit import __version__
from ckptkit.checkpoint import (
    EMBEDDING,
    LAYOUTS,
    Checkpoint,
    check_grid,
    is_on,
    vocabulary_multiple,
)
from ckptkit.errors import InputError, StorageError, UnsupportedError, UsageError
from ckptkit.families import family_of
from ckptkit.families.args import inexpressible, to_args
from ckptkit.families.divisibility import sharing_problem
from ckptkit.families.fields import set_dtype
from ckptkit.families.hybrid import GPT, HYBRID, MODELS, hybrid_args, inexpressible_as_hybrid
from ckptkit.families.spelling import Spelling
from ckptkit.formats.hf import BIN_INDEX, INDEX, lay_out_like, lay_out_shards
from ckptkit.formats.hub import locate
from ckptkit.formats.packed import lay_out_packed
from ckptkit.formats.torch_dist import FOLDER, GlobalTensor, StageRanks, lay_out_torch_dist
from ckptkit.formats.torch_legacy import RankKey, lay_out_torch_legacy
from ckptkit.formats.torch_types import DTYPES_BY_TORCH_NAME, TORCH_DTYPE_NAMES
from ckptkit.io.castable import check_cast
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.opening import open_checkpoint
from ckptkit.run_config import run_config
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.sharding.rules import padded_vocab_size
from ckptkit.sharding.stages import split_layers, stage_of_layer
from ckptkit.tensors import DType, Tensor
from ckptkit.value_head import VALUE, ZEROS, to_value_model

if TYPE_CHECKING:
    from ckptkit.io.commit import Destination

DEFAULT_SHARD_SIZE = 5_000_000_000
CASTS = ("bfloat16", "float16", "float32", "float64")
_SHORT = {
    "fp32": "float32",
    "f32": "float32",
    "fp16": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
}


@dataclass(frozen=True)
class Options:
    """What the output shall look like.

    Attributes:
        grid: The parallel grid of a sharded output.
        spec: Spelling of Megatron names, `te` or `local`.
        dtype: Type that floats are cast to, or None.
        shard_size: Largest safetensors shard in bytes, or None for the source's own files (or the default).
        divisible_by: The vocabulary is padded to a multiple of this times TP.
        strict_config: Refuse what Megatron's arguments cannot express.
        experts: Naming of experts, `grouped` or `sequential`, or None for what goes with the spec.
        layout: `full`; `text` for a multimodal model's text part under a text model's names; `legacy` for an older
            layout of the family.
        head: `value` for a value head in place of the language model head, or None.
        head_init: What a new head holds, see `value_head.to_value_model`.
        model: Megatron-Core's model whose names are written, `gpt` or `hybrid`.
    """

    grid: Parallelism = field(default_factory=Parallelism)
    spec: str = "te"
    dtype: DType | None = None
    shard_size: int | None = None
    divisible_by: int | None = None
    strict_config: bool = False
    experts: str | None = None
    layout: str = "full"
    head: str | None = None
    head_init: str | None = None
    model: str = GPT


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did, or with `dry_run` would do. Sizes in bytes, time in seconds.

    `dropped` tells of stored things that the model does not use and that stay behind, one record for each kind: `what`,
    `parts`, `elements`, and how far they have moved from what a conversion puts there (`max_abs_difference`, with the
    tensor in `where`); that is None in a dry run, which reads no weights.
    """

    source: dict[str, Any]
    target: dict[str, Any]
    files: list[dict[str, Any]]
    bytes_total: int
    bytes_through: int
    bytes_rearranged: int
    memory_needed: int
    disk_needed: int
    disk_free: int
    coverage: dict[str, int]
    lossy: list[str]
    notes: list[str]
    dropped: list[dict[str, Any]]
    dry_run: bool
    seconds: float
    hashes: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    grid: Parallelism = Parallelism(),  # noqa: B008  frozen
    spec: str = "te",
    dtype: str | None = None,
    shard_size: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
    strict_config: bool = False,
    experts: str | None = None,
    layout: str = "full",
    head: str | None = None,
    head_init: str | None = None,
    megatron_model: str = GPT,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    hash: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionResult:
    """Converts a checkpoint of any format and grid to another.

    Args:
        src: A checkpoint of any format that `open_checkpoint` knows, or `org/model@revision` on the hub.
        dst: The directory to create.
        to: `hf`, `packed`, `torch` or `torch_dist`.
        grid: The grid of a `torch` or `torch_dist` output.
        spec: Megatron names as the `te` or the `local` layer spec has them.
        dtype: Casts floating point tensors (`bfloat16`, `float16`, `float32`).
        shard_size: Largest safetensors shard in bytes.
        make_vocab_size_divisible_by: As Megatron-LM's option; 128 for sharded formats, 1 for `packed`.
        hf_reference: Hugging Face directory that supplies config.json, tokenizer and shard map.
        iteration: Number of the source's iteration, if `src` is the root of several.
        stored_grid: The grid of `mp_rank_*` files whose `args` do not say it.
        vocab_size: The true size of the source's vocabulary, where nothing else tells it from its padding.
        strict_config: Refuse config features that Megatron's arguments cannot express.
        experts: Naming of Megatron's experts, `grouped` or `sequential`; by default what goes with `spec`.
        layout: `full`, or `text`: the text part of a multimodal model alone. Its other tensors stay in the sidecar of
            a Megatron output, and stay behind in a Hugging Face one. Or `legacy`: a split Llama's published layout.
        head: `value` turns a language model into a value model: one output per token in place of the logits.
        head_init: Its weights: `zeros` (the default), `normal`, or `file:PATH` of a safetensors file.
        megatron_model: Megatron-Core's model whose names and arguments are written: `gpt` or `hybrid`.
        dry_run: Plan only; nothing is written.
        overwrite: Replace an existing destination, atomically.
        resume: Go on from what a killed run left.
        threads: Threads that move bytes.
        hash: Also compute the SHA-256 of every output file.
        progress: Called with (bytes done, bytes in all).

    Raises:
        UsageError: The request cannot work.
        InputError: The source is damaged, incomplete, or contradicts itself.
        UnsupportedError: The source is sound, but no table converts it.
        StorageError: The destination cannot be written.
    """
    started = time.monotonic()
    options = Options(
        grid,
        spec,
        _dtype(dtype),
        shard_size,
        make_vocab_size_divisible_by,
        strict_config,
        experts,
        layout,
        head,
        head_init,
        megatron_model,
    )
    with ExitStack() as stack:
        source = open_source(
            stack,
            src,
            hf_reference,
            headers_only=dry_run,
            iteration=iteration,
            stored_grid=stored_grid,
            vocab_size=vocab_size,
        )
        plan = make_plan(source, to, options)
        about = {**_describe(source), "path": str(src), "origin": source.sidecar.origin}
        target = {"path": str(dst), "format": to, "grid": str(grid)}
        execution = Execution(dry_run, overwrite, resume, threads, hash, progress)
        return carry_out(plan, [source], about, target, execution, started)


@dataclass(frozen=True)
class Execution:
    """How a plan is carried out; the attributes are those of `convert`."""

    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    threads: int | None = None
    hash: bool = False
    progress: Callable[[int, int], None] | None = None


def carry_out(
    plan: Plan,
    read: Sequence[Checkpoint],
    source: dict[str, Any],
    target: dict[str, Any],
    how: Execution,
    started: float,
) -> ConversionResult:
    """Writes what a plan says and sums it up; a dry run only sums it up.

    Args:
        plan: What to write.
        read: What the plan was made from; the destination must not overlap it.
        source: Facts about what is read, for the result.
        target: The same about what is written; `path` is the destination.
        how: How to do it.
        started: When the whole command started, as `time.monotonic` gives it.

    Raises:
        UsageError: The destination is in use, or overlaps a source.
        InputError: A source is gone, damaged or changed, or two tensors that must be equal differ.
        StorageError: The destination cannot be written.
    """
    # With NumPy, which commands that look at headers do not wait for.
    from ckptkit.io.drift import summarise
    from ckptkit.io.engine import MEMORY_LIMIT

    dropped = summarise(plan.dropped, measure=not how.dry_run)
    hashes: dict[str, str] = {}
    try:
        destination = _destination(plan, read, Path(target["path"]), how)
        free = destination.free
        if not how.dry_run:
            hashes = destination.write(threads=how.threads, hash=how.hash, progress=how.progress)
    except StorageError as error:
        if not how.dry_run:
            raise
        plan, free = replace(plan, notes=(*plan.notes, f"it could not be written here: {error}")), 0
    through, rearranged = plan.traffic()
    return ConversionResult(
        source=source,
        target=target,
        files=[{"path": file.path, "bytes": file.size, "tensors": file.tensors} for file in plan.files],
        bytes_total=plan.nbytes,
        bytes_through=through,
        bytes_rearranged=rearranged,
        memory_needed=MEMORY_LIMIT,
        disk_needed=plan.nbytes,
        disk_free=free,
        coverage=dict(plan.coverage),
        lossy=list(plan.lossy),
        notes=list(plan.notes),
        dropped=dropped,
        dry_run=how.dry_run,
        seconds=time.monotonic() - started,
        hashes=hashes,
    )


def _destination(plan: Plan, read: Sequence[Checkpoint], out: Path, how: Execution) -> Destination:
    from ckptkit.io.commit import Destination

    return Destination(
        out,
        plan,
        sources=[folder for checkpoint in read for folder in (checkpoint.path, *checkpoint.seen.folders)],
        seen=[checkpoint.seen for checkpoint in read],
        overwrite=how.overwrite,
        resume=how.resume,
    )


def check_destination(plan: Plan, read: Sequence[Checkpoint], out: str | Path, how: Execution) -> None:
    """Whether a plan could be carried out, asked before work that only changes which bytes it has; as `carry_out`.

    A dry run asks nothing here, and what goes on from an earlier run has a place already.

    Raises:
        UsageError: The destination is in use, or overlaps a source.
        StorageError: The destination cannot be written, or has no room.
    """
    if not (how.dry_run or how.resume):
        _destination(plan, read, Path(out), how)  # which looks at the place and the room


def open_source(
    stack: ExitStack, src: str | Path, hf_reference: str | Path | None, *, headers_only: bool, **options: Any
) -> Checkpoint:
    """Opens a checkpoint, a path or a hub reference, and notes in its sidecar where it came from.

    Args:
        stack: What keeps fetched files until they are no longer needed.
        src: A directory, or `org/model@revision` on the hub.
        hf_reference: The same, for what supplies config.json, tokenizer and shard map.
        headers_only: Fetch no more than a plan needs.
        options: Further options of `open_checkpoint`.
    """
    located = stack.enter_context(locate(src, headers_only=headers_only))
    reference = None
    if hf_reference is not None:
        reference = stack.enter_context(locate(hf_reference, headers_only=headers_only)).path
    source = open_checkpoint(located.path, hf_reference=reference, **options)
    if located.origin:
        source.sidecar = replace(source.sidecar, origin=located.origin)
    return source


def make_plan(source: Checkpoint, to: str, options: Options) -> Plan:
    """The complete plan of a conversion.

    Raises:
        UsageError: `to` is no format, or the grid cannot hold the model.
        InputError: Stored `args` contradict config.json.
        UnsupportedError: A cast that does not exist, or (strict) a config that Megatron cannot express.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}", hint=f"one of {', '.join(TARGETS)}")
    if options.layout not in LAYOUTS:
        raise UsageError(f"--layout {options.layout}", hint=f"one of {', '.join(LAYOUTS)}")
    if to not in SHARDED and options.grid != Parallelism():
        raise UsageError(f"--to {to} is not sharded over ranks", hint="drop the parallel sizes, or use --to torch")
    _check_options(to, options)
    _check_model(source, to, options.model)
    of_ranks = to != "hf" and _spelling(source, options).blocks
    if (to == "packed" and of_ranks) or (to == "torch_dist" and (of_ranks or options.spec not in DISTRIBUTED_SPECS)):
        raise UsageError(f"--spec {options.spec} is a layout of ranks' files", hint="use --to torch")
    if source.disagreements:
        raise InputError(
            f"the checkpoint contradicts itself: {'; '.join(source.disagreements)}",
            where=source.path,
            hint="pass --hf-reference with the right config.json, which then counts",
        )
    if options.head not in (None, VALUE):
        raise UsageError(f"--head {options.head}", hint=f"{VALUE} is what can be asked for")
    if options.head is None and options.head_init is not None:
        raise UsageError("--head-init is of a new head", hint=f"add --head {VALUE}")
    dropped: list[str] = []
    if to == "hf" and options.layout == "text":
        source, dropped = _text_only(source)
    if to == "hf" and source.towers_are_missing:
        raise InputError(
            f"{source.config.architecture} has tensors outside of the text model, and they are not here",
            where=source.path,
            hint="--hf-reference with the original's weights supplies them, --layout text leaves them out",
        )
    if options.layout == "legacy":
        source, dropped = _legacy(source, to)
    source, lossy = _cast(source, options.dtype)
    if options.head is not None:
        source, left = to_value_model(source, options.head_init or ZEROS)
        dropped += left
    lossy = [*dropped, *lossy]
    notes = [*source.notes]
    if to != "hf":
        features = inexpressible(source.config)
        if options.model == HYBRID:
            features += inexpressible_as_hybrid(layer.rope.kind for layer in source.config.layers)
        if features and options.strict_config:
            raise UnsupportedError(f"Megatron's arguments cannot express: {'; '.join(features)}", where=source.path)
        notes += [f"not in Megatron's arguments: {text}" for text in features]
    if to == "torch_dist" and (why := _run_config(source, options)[1]) is not None:
        notes.append(f"no run_config.yaml, which Megatron-Bridge needs to load it by itself: {why}")
    if to in SHARDED and (problem := sharing_problem(source.config, options.grid)):
        notes.append(f"a runtime that keeps keys and values within a stage cannot run this: {problem}")
    files = TARGETS[to](source, options)
    coverage, unused = dict(source.coverage), tuple(source.dropped(source.stored_names)) if to == "hf" else ()
    if unused:
        coverage["unused parts dropped"] = len(unused)
    return Plan(tuple(files), tuple(source.comparisons), tuple(lossy), tuple(notes), coverage, unused)


def _check_options(to: str, options: Options) -> None:
    """Whether the format has what is asked of it: nothing that was asked for is left out in silence."""
    if to == "hf":
        asked = {
            "--spec": options.spec != Options.spec,
            "--experts": options.experts is not None,
            "--make-vocab-size-divisible-by": options.divisible_by is not None,
        }
        if given := [name for name, is_given in asked.items() if is_given]:
            raise UsageError(f"{given[0]} is about Megatron's formats, and --to is hf", hint=f"drop {given[0]}")
    elif to in SHARDED and options.shard_size is not None:
        raise UsageError(f"--shard-size is about safetensors files, and --to is {to}", hint="drop --shard-size")


def _check_model(source: Checkpoint, to: str, model: str) -> None:
    """Whether there is a model of Megatron-Core's that can be written so."""
    if model not in MODELS:
        raise UsageError(f"--megatron-model {model}", hint=f"one of {', '.join(MODELS)}")
    if model == HYBRID and to == "hf":
        raise UsageError("--megatron-model is of Megatron's formats", hint="drop it, or use --to torch_dist")
    if model == HYBRID and source.config.adapter is not None:
        raise UsageError("--megatron-model hybrid: it has layers of one width", hint="use --megatron-model gpt")


def _to_hf(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Hugging Face: unpack every item; the shard map and header bytes of the origin where they still fit."""
    headers = source.sidecar.headers if options.shard_size is None else {}
    tensors = source.hf_tensors(source.stored_names)
    files = lay_out_like(tensors, headers)
    stale = set() if files is not None else {INDEX, BIN_INDEX}
    files = files or lay_out_shards(tensors, options.shard_size or DEFAULT_SHARD_SIZE)
    taken = {file.path for file in files} | stale | {"config.json"}
    code = {path.name: path for path in source.family.code if "auto_map" in source.sidecar.config}
    small = [
        OutputFile.copy(name, str(path), path.stat().st_size)
        for name, path in sorted({**code, **source.sidecar.small}.items())
        if name not in taken
    ]
    return [*files, *small, _config_file(source)]


def _config_file(source: Checkpoint) -> OutputFile:
    """config.json verbatim unless a field that the conversion owns (the dtype) has changed."""
    path = source.sidecar.small.get("config.json")
    if path is not None and json.loads(path.read_bytes()) == source.sidecar.config:
        return OutputFile.copy("config.json", str(path), path.stat().st_size)
    return OutputFile.small("config.json", json.dumps(source.sidecar.config, indent=2).encode() + b"\n")


def _to_packed(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron names, one rank's worth: the only stage of a grid of one."""
    grid, divisible_by = Parallelism(), 1 if options.divisible_by is None else _multiple(source, options)
    spelling = _spelling(source, options)
    (stage,), (rank,) = split_layers(source.config.num_layers, grid), grid.ranks()
    tensors = source.chunk(stage, rank, grid, spelling, divisible_by)
    args = _args(source, grid, spelling, divisible_by)
    files = lay_out_packed(tensors, args, options.shard_size or DEFAULT_SHARD_SIZE)
    return [*files, *_sidecar(source, "packed", spelling, grid, divisible_by)]


def _to_torch(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron-LM: each rank's file from its stages' chunks."""
    grid, spelling = options.grid, _spelling(source, options)
    check_grid(source.config, grid)
    divisible_by = _multiple(source, options)
    ranks: dict[RankKey, dict[str, Mapping[str, Tensor | None]]] = {
        (rank.pp, rank.tp, rank.ep): {} for rank in grid.ranks()
    }
    if len(ranks) < grid.world_size:
        raise UsageError(
            f"{grid}: the torch format names files by TP, PP and EP rank, which would collide",
            hint="--etp at most --tp",
        )
    for stage in split_layers(source.config.num_layers, grid):
        key = "model" if grid.vpp == 1 else f"model{stage.vp_stage}"
        for rank in (rank for rank in grid.ranks() if rank.pp == stage.pp_rank):
            chunk = source.chunk(stage, rank, grid, spelling, divisible_by)
            te = spelling.extra_states and not source.family.local_only(source.config)
            ranks[rank.pp, rank.tp, rank.ep][key] = _with_extra_states(chunk, source.family.plain) if te else chunk
    files = lay_out_torch_legacy(ranks, _args(source, grid, spelling, divisible_by), source.main_dtype)
    return [*files, *_sidecar(source, "torch", spelling, grid, divisible_by)]


def _to_torch_dist(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron-Core's distributed checkpoint: whole tensors, in the chunks that the ranks of the grid would write."""
    grid, divisible_by = options.grid, _multiple(source, options)
    check_grid(source.config, grid)
    spelling = source.family.spelling("te", text=options.layout == "text")
    spelling = replace(spelling, hybrid=options.model == HYBRID)
    stages = split_layers(source.config.num_layers, grid)
    homes = stage_of_layer(stages)
    tensors = []
    for key, item in source.items.items():
        split = item.row.split
        on = homes[item.layer][0] if item.layer is not None else next(s for s in stages if is_on(item, s, grid))
        pp_rank = on.pp_rank
        whole = source.padded(key, grid.tp, divisible_by)
        tensors.append(GlobalTensor(spelling.written(key), whole, split.axis, split.blocks, pp_rank))
    args = _args(source, grid, _spelling(source, options), divisible_by)
    ranks = StageRanks(grid.tp, grid.ep, grid.etp)
    family, layers = source.family, source.config.layers
    files = lay_out_torch_dist(
        tensors,
        args,
        dtype=source.main_dtype,
        ranks=ranks,
        spec="local" if family.local_only(source.config) else options.spec,
        groups=[family.attention_of(layer) for layer in layers] if family.attention_of is not None else [],
        plain=family.plain,
        stacked=False if spelling.hybrid else None,
    )
    return [*files, *_run_config(source, options)[0], *_sidecar(source, "torch_dist", spelling, grid, divisible_by)]


def _run_config(source: Checkpoint, options: Options) -> tuple[list[OutputFile], str | None]:
    """What Megatron-Bridge needs besides, or why it gets nothing."""
    if options.model == HYBRID:
        return [], "only GPTModel is described to it"
    spelling, divisible_by = _spelling(source, options), _multiple(source, options)
    try:
        file = run_config(source, options.grid, divisible_by, spelling, FOLDER, text=options.layout == "text")
    except UnsupportedError as error:
        return [], error.what
    return [file], None


def _spelling(source: Checkpoint, options: Options) -> Spelling:
    spelling = source.family.spelling(options.spec, options.experts, text=options.layout == "text")
    return replace(spelling, hybrid=options.model == HYBRID)


TARGETS: dict[str, Callable[[Checkpoint, Options], list[OutputFile]]] = {
    "hf": _to_hf,
    "packed": _to_packed,
    "torch": _to_torch,
    "torch_dist": _to_torch_dist,
}
SHARDED = ("torch", "torch_dist")
DISTRIBUTED_SPECS = ("te", "local")
"""Whose modules a torch_dist checkpoint can be for: its keys are the same, and only its extra states differ."""

_TE_MODULES = (".linear_qkv", ".linear_proj", ".linear_fc1", ".linear_fc2", "_layernorm", ".final_norm")


def _with_extra_states(chunk: Mapping[str, Tensor], plain: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Adds the empty `_extra_state` of every Transformer Engine module, which its strict loading asks for.

    Args:
        chunk: The tensors of a model chunk.
        plain: Endings of modules that are not Transformer Engine's.
    """
    states: dict[str, Tensor | None] = {}
    for name in chunk:
        module = name.rsplit(".", 1)[0]
        if module.endswith(_TE_MODULES) and not module.endswith(plain):
            states[f"{module}._extra_state"] = None
        if module.endswith(".self_attention.linear_qkv"):
            states[f"{module.removesuffix('linear_qkv')}core_attention._extra_state"] = None
    return {**chunk, **states}


def _multiple(source: Checkpoint, options: Options) -> int:
    """What the vocabulary is padded to a multiple of, times TP."""
    spelling = _spelling(source, options)
    return vocabulary_multiple(source.config.vocab_size, options.grid.tp, spelling, options.divisible_by)


def _args(source: Checkpoint, grid: Parallelism, spelling: Spelling, divisible_by: int) -> dict[str, Any]:
    rows = padded_vocab_size(source.tensors[EMBEDDING].shape[0], divisible_by, grid.tp)
    config = replace(source.config, dtype=source.main_dtype)
    args = to_args(config, grid, rows, divisible_by, spelling.experts)
    if not spelling.hybrid:
        return args
    stages = sorted(split_layers(config.num_layers, grid), key=lambda stage: (stage.vp_stage, stage.pp_rank))
    return hybrid_args(args, [layer.moe for layer in config.layers], [stage.layers for stage in stages])


def _sidecar(
    source: Checkpoint, format: str, spelling: Spelling, grid: Parallelism, divisible_by: int
) -> list[OutputFile]:
    small = {name: path for name, path in source.sidecar.small.items() if name != "config.json"}
    manifest = {
        "tool": f"ckptkit {__version__}",
        "format": format,
        "family": source.family.name,
        "architecture": source.config.architecture,
        "spec": spelling.name,
        "experts": spelling.experts,
        "megatron_model": HYBRID if spelling.hybrid else GPT,
        "prefix": spelling.prefix,
        "grid": asdict(grid),
        "make_vocab_size_divisible_by": divisible_by,
    }
    files = replace(source.sidecar, small=small).lay_out(manifest)
    config = _config_file(source)
    return [*files, replace(config, path=f"ckptkit/hf/{config.path}")]


def _text_only(source: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The text part of a multimodal model as a model of its own, and what that leaves behind."""
    if source.family.text_only is None:
        raise UsageError(f"--layout text: {source.config.architecture} is a text model already", where=source.path)
    raw = source.family.text_only(source.sidecar.config)
    family = family_of(raw, source.path)
    sidecar = replace(source.sidecar, config=raw, headers={}, extras={})
    config = family.parse(raw)
    items = {item.key: item for item in family.items(config)}
    dropped = len(source.sidecar.extras)
    text = replace(source, family=family, config=config, items=items, sidecar=sidecar, spelling=family.spellings[0])
    return text, [f"{dropped} tensors outside the text model are left out (--layout text)"]


def _legacy(source: Checkpoint, to: str) -> tuple[Checkpoint, list[str]]:
    """A model under its family's older layout, and what that loses."""
    if to != "hf" or source.family.legacy_config is None:
        which = f"--to {to}" if to != "hf" else source.config.architecture
        raise UsageError(f"--layout legacy: {which} has none", where=source.path, hint="drop --layout legacy")
    names = {path.name for path in source.family.code}
    sidecar = replace(
        source.sidecar,
        config=source.family.legacy_config(source.sidecar.config),
        small={name: path for name, path in source.sidecar.small.items() if name not in names},
    )
    what = "the legacy layout does not describe the model by itself, and transformers takes it for another one"
    return replace(source, sidecar=sidecar), [what]


def _cast(source: Checkpoint, dtype: DType | None) -> tuple[Checkpoint, list[str]]:
    """The source with floats cast to `dtype`, its config.json saying so, and what that loses."""
    if dtype is None:
        return source, []
    lost: Counter[str] = Counter()

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.dtype.is_float or tensor.dtype == dtype:
            return tensor
        check_cast(tensor.dtype, dtype)
        if not _holds(dtype, tensor.dtype):
            lost[f"{tensor.dtype} -> {dtype}"] += 1
        return tensor.astype(dtype)

    tensors = {key: cast(tensor) for key, tensor in source.tensors.items()}
    extras = {name: cast(tensor) for name, tensor in source.sidecar.extras.items()}
    name = TORCH_DTYPE_NAMES[dtype]
    config = deepcopy(source.sidecar.config)
    set_dtype(config, name)
    sidecar = replace(source.sidecar, config=config, extras=extras)
    lossy = [f"{count} tensors are rounded ({pair})" for pair, count in lost.items()]
    return replace(source, tensors=tensors, sidecar=sidecar, config=replace(source.config, dtype=name)), lossy


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` exists in `wide`."""
    return wide.name == "F64" or (wide.name == "F32" and narrow.itemsize < 4)


def _dtype(name: str | None) -> DType | None:
    if name is None:
        return None
    full = _SHORT.get(name, name)
    if full not in CASTS:
        raise UsageError(f"--dtype {name}", hint=f"one of {', '.join(CASTS)}")
    return DTYPES_BY_TORCH_NAME[full]


def _describe(source: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "format": source.format,
        "family": source.family.name,
        "architecture": source.config.architecture,
        "grid": str(source.grid),
    }


@dataclass(frozen=True)
class Inspection:
    """What the headers of a checkpoint say. Sizes in bytes."""

    path: str
    format: str
    family: str
    architecture: str
    grid: str
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    roles: list[dict[str, Any]]
    optimizer: dict[str, int]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        return asdict(self)


def inspect(
    path: str | Path,
    *,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
) -> Inspection:
    """Reads the headers of a checkpoint and sums them up by role.

    Args:
        path: A checkpoint of any format, or `org/model@revision` on the hub.
        hf_reference: As for `convert`, and so are the others.
        iteration: Number of the iteration.
        stored_grid: The stored grid, where `args` do not say it.
        vocab_size: The true size of the vocabulary.

    Raises:
        InputError: It is damaged or incomplete.
        UnsupportedError: No family or format of ours.
    """
    with ExitStack() as stack:
        source = open_source(
            stack,
            path,
            hf_reference,
            headers_only=True,
            iteration=iteration,
            stored_grid=stored_grid,
            vocab_size=vocab_size,
        )
    dtypes: Counter[str] = Counter()
    roles: dict[str, dict[str, Any]] = {}
    for key, tensor in source.tensors.items():
        name = source.items[key].row.megatron.replace("decoder.layers.{i}", "layers.*")
        role = roles.setdefault(name, {"role": name, "tensors": 0, "parameters": 0, "bytes": 0})
        role["tensors"] += 1
        role["parameters"] += source.items[key].parameters
        role["bytes"] += tensor.nbytes
        dtypes[tensor.dtype.name] += tensor.nbytes
    return Inspection(
        path=str(path),
        format=source.format,
        family=source.family.name,
        architecture=source.config.architecture,
        grid=str(source.grid),
        parameters=source.parameters,
        bytes=sum(dtypes.values()),
        dtypes=dict(dtypes),
        roles=list(roles.values()),
        optimizer=asdict(source.optimizer),
        notes=[*source.notes, *source.disagreements],
    )
