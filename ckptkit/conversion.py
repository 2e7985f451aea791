"""The main job on one page: open -> translate -> shard -> plan -> move -> commit.

`open_checkpoint` gives the canonical view of any source; a target lays that view out as files; the plan is then
complete and can be shown, checked against the disk, and executed. Nothing on the way loads a tensor.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptkit import __version__
from ckptkit.checkpoint import DEFAULT_DIVISIBLE_BY, EMBEDDING, LAYOUTS, Checkpoint, check_grid
from ckptkit.errors import InputError, StorageError, UnsupportedError, UsageError
from ckptkit.families import family_of
from ckptkit.families.args import inexpressible, to_args
from ckptkit.families.fields import set_dtype
from ckptkit.families.spelling import Spelling
from ckptkit.formats.hf import BIN_INDEX, INDEX, lay_out_like, lay_out_shards
from ckptkit.formats.hub import locate
from ckptkit.formats.packed import lay_out_packed
from ckptkit.formats.torch_dist import GlobalTensor, StageRanks, lay_out_torch_dist
from ckptkit.formats.torch_legacy import RankKey, lay_out_torch_legacy
from ckptkit.formats.torch_types import DTYPES_BY_TORCH_NAME, TORCH_DTYPE_NAMES
from ckptkit.io.commit import Destination
from ckptkit.io.engine import MEMORY_LIMIT, check_cast
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.opening import open_checkpoint
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import padded_vocab_size
from ckptkit.sharding.stages import split_layers, stage_of_layer
from ckptkit.tensors import DType, Tensor

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
        layout: `full`, or `text` for a multimodal model's text part under a text model's names.
    """

    grid: Parallelism = field(default_factory=Parallelism)
    spec: str = "te"
    dtype: DType | None = None
    shard_size: int | None = None
    divisible_by: int | None = None
    strict_config: bool = False
    experts: str | None = None
    layout: str = "full"


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did, or with `dry_run` would do. Sizes in bytes, time in seconds."""

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
    strict_config: bool = False,
    experts: str | None = None,
    layout: str = "full",
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    hash: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionResult:
    """Converts a checkpoint of any format and grid to another.

    Args:
        src: A Hugging Face, packed or Megatron checkpoint directory, or `org/model@revision` on the hub.
        dst: The directory to create.
        to: `hf`, `packed`, `torch` or `torch_dist`.
        grid: The grid of a `torch` or `torch_dist` output.
        spec: Megatron names as the `te` or the `local` layer spec has them.
        dtype: Casts floating point tensors (`bfloat16`, `float16`, `float32`).
        shard_size: Largest safetensors shard in bytes.
        make_vocab_size_divisible_by: As Megatron-LM's option; 128 for sharded formats, 1 for `packed`.
        hf_reference: Hugging Face directory that supplies config.json, tokenizer and shard map.
        strict_config: Refuse config features that Megatron's arguments cannot express.
        experts: Naming of Megatron's experts, `grouped` or `sequential`; by default what goes with `spec`.
        layout: `full`, or `text`: the text part of a multimodal model alone. Its other tensors stay in the sidecar of
            a Megatron output, and stay behind in a Hugging Face one.
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
        grid, spec, _dtype(dtype), shard_size, make_vocab_size_divisible_by, strict_config, experts, layout
    )
    with ExitStack() as stack:
        source = _open(stack, src, hf_reference, headers_only=dry_run)
        plan = make_plan(source, to, options)
        hashes: dict[str, str] = {}
        try:
            destination = Destination(Path(dst), plan, sources=[source.path], overwrite=overwrite, resume=resume)
            free = destination.free
            if not dry_run:
                hashes = destination.write(threads=threads, hash=hash, progress=progress)
        except StorageError as error:
            if not dry_run:
                raise
            plan, free = replace(plan, notes=(*plan.notes, f"it could not be written here: {error}")), 0
    through, rearranged = plan.traffic()
    return ConversionResult(
        source={**_describe(source), "path": str(src), "origin": source.sidecar.origin},
        target={"path": str(dst), "format": to, "grid": str(grid)},
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
        dry_run=dry_run,
        seconds=time.monotonic() - started,
        hashes=hashes,
    )


def _open(stack: ExitStack, src: str | Path, hf_reference: str | Path | None, headers_only: bool) -> Checkpoint:
    """Opens the source, a path or a hub reference, and notes in its sidecar where it came from."""
    located = stack.enter_context(locate(src, headers_only=headers_only))
    reference = None
    if hf_reference is not None:
        reference = stack.enter_context(locate(hf_reference, headers_only=headers_only)).path
    source = open_checkpoint(located.path, hf_reference=reference)
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
    if source.disagreements:
        raise InputError(
            f"the checkpoint contradicts itself: {'; '.join(source.disagreements)}",
            where=source.path,
            hint="pass --hf-reference with the right config.json, which then counts",
        )
    dropped: list[str] = []
    if to == "hf" and options.layout == "text":
        source, dropped = _text_only(source)
    source, lossy = _cast(source, options.dtype)
    lossy = [*dropped, *lossy]
    notes = [*source.notes]
    if to != "hf":
        features = inexpressible(source.config)
        if features and options.strict_config:
            raise UnsupportedError(f"Megatron's arguments cannot express: {'; '.join(features)}", where=source.path)
        notes += [f"not in Megatron's arguments: {text}" for text in features]
    files = TARGETS[to](source, options)
    return Plan(tuple(files), tuple(source.comparisons), tuple(lossy), tuple(notes), dict(source.coverage))


def _to_hf(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Hugging Face: unpack every item; the shard map and header bytes of the origin where they still fit."""
    headers = source.sidecar.headers if options.shard_size is None else {}
    tensors = _hf_tensors(source)
    files = lay_out_like(tensors, headers)
    stale = set() if files is not None else {INDEX, BIN_INDEX}
    files = files or lay_out_shards(tensors, options.shard_size or DEFAULT_SHARD_SIZE)
    taken = {file.path for file in files} | stale | {"config.json"}
    small = [
        OutputFile.copy(name, str(path), path.stat().st_size)
        for name, path in sorted(source.sidecar.small.items())
        if name not in taken
    ]
    return [*files, *small, _config_file(source)]


def _hf_tensors(source: Checkpoint) -> dict[str, Tensor]:
    """Everything that the Hugging Face model holds, named as its origin named it."""
    family, config = source.family, source.config
    stored = {name for header in source.sidecar.headers.values() for name in header.entries}
    spelling = family.hf_spelling(stored, config) if stored else family.hf_spellings[0]
    tensors: dict[str, Tensor] = {}
    for key, item in source.items.items():
        tensors.update(item.unpack(source.tensors[key]))
    tensors.update(source.sidecar.extras)
    tensors.update(family.missing_buffers(tensors, config, DTYPES_BY_TORCH_NAME[_main_dtype(source)]))
    for replica in family.replicas:
        if spelling.written(replica.hf) in stored and replica.when(config):
            tensors[replica.hf] = tensors[replica.of]
    return family.fuse(tensors, config, spelling.name)


def _config_file(source: Checkpoint) -> OutputFile:
    """config.json verbatim unless a field that the conversion owns (the dtype) has changed."""
    path = source.sidecar.small.get("config.json")
    if path is not None and json.loads(path.read_bytes()) == source.sidecar.config:
        return OutputFile.copy("config.json", str(path), path.stat().st_size)
    return OutputFile.small("config.json", json.dumps(source.sidecar.config, indent=2).encode() + b"\n")


def _to_packed(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron names, one rank's worth: the only stage of a grid of one."""
    grid, divisible_by = Parallelism(), options.divisible_by or 1
    spelling = _spelling(source, options)
    (stage,), (rank,) = split_layers(source.config.num_layers, grid), grid.ranks()
    tensors = source.chunk(stage, rank, grid, spelling, divisible_by)
    args = _args(source, grid, spelling, divisible_by)
    files = lay_out_packed(tensors, args, options.shard_size or DEFAULT_SHARD_SIZE)
    return [*files, *_sidecar(source, "packed", spelling, grid, divisible_by)]


def _to_torch(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron-LM: each rank's file from its stages' chunks."""
    grid, divisible_by = options.grid, options.divisible_by or DEFAULT_DIVISIBLE_BY
    check_grid(source.config, grid)
    spelling = _spelling(source, options)
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
            ranks[rank.pp, rank.tp, rank.ep][key] = chunk if spelling.name == "local" else _with_extra_states(chunk)
    files = lay_out_torch_legacy(ranks, _args(source, grid, spelling, divisible_by), _main_dtype(source))
    return [*files, *_sidecar(source, "torch", spelling, grid, divisible_by)]


def _to_torch_dist(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron-Core's distributed checkpoint: whole tensors, in the chunks that the ranks of the grid would write."""
    grid, divisible_by = options.grid, options.divisible_by or DEFAULT_DIVISIBLE_BY
    check_grid(source.config, grid)
    spelling = source.family.spelling("te", text=options.layout == "text")
    homes = stage_of_layer(split_layers(source.config.num_layers, grid))
    last = grid.pp - 1
    tensors = []
    for key, item in source.items.items():
        split = item.row.split
        pp_rank = homes[item.layer][0].pp_rank if item.layer is not None else 0 if key == EMBEDDING else last
        whole = source.padded(key, grid.tp, divisible_by)
        tensors.append(GlobalTensor(spelling.written(key), whole, split.axis, split.blocks, pp_rank))
    args = _args(source, grid, _spelling(source, options), divisible_by)
    ranks = StageRanks(grid.tp, grid.ep, grid.etp)
    files = lay_out_torch_dist(tensors, args, dtype=_main_dtype(source), ranks=ranks, spec=options.spec)
    return [*files, *_sidecar(source, "torch_dist", spelling, grid, divisible_by)]


def _spelling(source: Checkpoint, options: Options) -> Spelling:
    return source.family.spelling(options.spec, options.experts, text=options.layout == "text")


TARGETS: dict[str, Callable[[Checkpoint, Options], list[OutputFile]]] = {
    "hf": _to_hf,
    "packed": _to_packed,
    "torch": _to_torch,
    "torch_dist": _to_torch_dist,
}
SHARDED = ("torch", "torch_dist")

_TE_MODULES = (".linear_qkv", ".linear_proj", ".linear_fc1", ".linear_fc2", "_layernorm")


def _with_extra_states(chunk: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Adds the empty `_extra_state` of every Transformer Engine module, which its strict loading asks for."""
    states: dict[str, Tensor | None] = {}
    for name in chunk:
        module = name.rsplit(".", 1)[0]
        if module.endswith(_TE_MODULES):
            states[f"{module}._extra_state"] = None
        if module.endswith(".self_attention.linear_qkv"):
            states[f"{module.removesuffix('linear_qkv')}core_attention._extra_state"] = None
    return {**chunk, **states}


def _args(source: Checkpoint, grid: Parallelism, spelling: Spelling, divisible_by: int) -> dict[str, Any]:
    rows = padded_vocab_size(source.tensors[EMBEDDING].shape[0], divisible_by, grid.tp)
    config = replace(source.config, dtype=_main_dtype(source))
    return to_args(config, grid, rows, divisible_by, spelling.experts)


def _main_dtype(source: Checkpoint) -> str:
    """What torch calls the type that most bytes have."""
    sizes: Counter[DType] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.out_dtype] += tensor.nbytes
    return TORCH_DTYPE_NAMES[sizes.most_common(1)[0][0]]


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
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        return asdict(self)


def inspect(path: str | Path) -> Inspection:
    """Reads the headers of a checkpoint and sums them up by role.

    Raises:
        InputError: It is damaged or incomplete.
        UnsupportedError: No family or format of ours.
    """
    with ExitStack() as stack:
        source = _open(stack, path, None, headers_only=True)
    dtypes: Counter[str] = Counter()
    roles: dict[str, dict[str, Any]] = {}
    for key, tensor in source.tensors.items():
        name = source.items[key].row.megatron.replace("decoder.layers.{i}", "layers.*")
        role = roles.setdefault(name, {"role": name, "tensors": 0, "parameters": 0, "bytes": 0})
        role["tensors"] += 1
        role["parameters"] += tensor.numel
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
        notes=[*source.notes, *source.disagreements],
    )
