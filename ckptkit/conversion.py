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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptkit import __version__
from ckptkit.checkpoint import DEFAULT_DIVISIBLE_BY, EMBEDDING, Checkpoint, check_grid, open_checkpoint
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families.args import inexpressible, to_args
from ckptkit.formats.hf import lay_out_like, lay_out_shards
from ckptkit.formats.hub import locate
from ckptkit.formats.packed import lay_out_packed
from ckptkit.formats.torch_legacy import lay_out_torch_legacy
from ckptkit.formats.torch_types import DTYPES_BY_TORCH_NAME, TORCH_DTYPE_NAMES
from ckptkit.io.commit import Destination
from ckptkit.io.engine import MEMORY_LIMIT, check_cast
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import padded_vocab_size
from ckptkit.sharding.stages import split_layers
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
    """

    grid: Parallelism = field(default_factory=Parallelism)
    spec: str = "te"
    dtype: DType | None = None
    shard_size: int | None = None
    divisible_by: int | None = None
    strict_config: bool = False


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
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    hash: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionResult:
    """Converts a checkpoint of any format and grid to another.

    Args:
        src: The source: a Hugging Face, packed or Megatron checkpoint directory, or `org/model@revision` on the hub.
        dst: The directory to create.
        to: `hf`, `packed` or `torch`.
        grid: The grid of a `torch` output.
        spec: Megatron names as the `te` or the `local` layer spec has them.
        dtype: Casts floating point tensors (`bfloat16`, `float16`, `float32`).
        shard_size: Largest safetensors shard in bytes.
        make_vocab_size_divisible_by: As Megatron-LM's option; 128 for `torch`, 1 for `packed`.
        hf_reference: Hugging Face directory that supplies config.json, tokenizer and shard map.
        strict_config: Refuse config features that Megatron's arguments cannot express.
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
    options = Options(grid, spec, _dtype(dtype), shard_size, make_vocab_size_divisible_by, strict_config)
    with ExitStack() as stack:
        source = _open(stack, src, hf_reference, headers_only=dry_run)
        plan = make_plan(source, to, options)
        destination = Destination(Path(dst), plan, sources=[source.path], overwrite=overwrite, resume=resume)
        hashes: dict[str, str] = {}
        if not dry_run:
            hashes = destination.write(threads=threads, hash=hash, progress=progress)
    through, rearranged = plan.traffic()
    return ConversionResult(
        source={**_describe(source), "path": str(src), "origin": source.sidecar.origin},
        target={"path": str(dst), "format": to, "grid": str(grid if to == "torch" else Parallelism())},
        files=[{"path": file.path, "bytes": file.size, "tensors": file.tensors} for file in plan.files],
        bytes_total=plan.nbytes,
        bytes_through=through,
        bytes_rearranged=rearranged,
        memory_needed=MEMORY_LIMIT,
        disk_needed=plan.nbytes,
        disk_free=destination.free,
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
    if options.spec not in ("te", "local"):
        raise UsageError(f"--spec {options.spec}", hint="te or local")
    if to != "torch" and options.grid != Parallelism():
        raise UsageError(f"--to {to} is not sharded over ranks", hint="drop the parallel sizes, or use --to torch")
    if source.disagreements:
        raise InputError(
            f"the checkpoint contradicts itself: {'; '.join(source.disagreements)}",
            where=source.path,
            hint="pass --hf-reference with the right config.json, which then counts",
        )
    source, lossy = _cast(source, options.dtype)
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
    tensors: dict[str, Tensor] = {}
    for key, item in source.items.items():
        tensors.update(item.unpack(source.tensors[key]))
    tensors.update(source.sidecar.extras)
    stored = {name for header in source.sidecar.headers.values() for name in header.entries}
    for replica in source.family.replicas:
        if replica.hf in stored and replica.when(source.config):
            tensors[replica.hf] = tensors[replica.of]
    files = lay_out_like(tensors, source.sidecar.headers) if options.shard_size is None else None
    known = files is not None
    files = files or lay_out_shards(tensors, options.shard_size or DEFAULT_SHARD_SIZE)
    written = {file.path for file in files}
    stale = {"model.safetensors.index.json", "pytorch_model.bin.index.json"} if not known else set()
    small = [
        OutputFile.copy(name, str(path), path.stat().st_size)
        for name, path in sorted(source.sidecar.small.items())
        if name not in written | stale | {"config.json"}
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
    divisible_by = options.divisible_by or 1
    (stage,) = split_layers(source.config.num_layers, Parallelism())
    tensors = source.chunk(stage, 0, Parallelism(), options.spec, divisible_by)
    args = _args(source, Parallelism(), divisible_by)
    files = lay_out_packed(tensors, args, options.shard_size or DEFAULT_SHARD_SIZE)
    return [*files, *_sidecar(source, "packed", options, Parallelism(), divisible_by)]


def _to_torch(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron-LM: each rank's file from its stages' chunks."""
    grid, divisible_by = options.grid, options.divisible_by or DEFAULT_DIVISIBLE_BY
    check_grid(source.config, grid)
    ranks: dict[tuple[int, int], dict[str, Mapping[str, Tensor | None]]] = {rank: {} for rank in grid.ranks()}
    for stage in split_layers(source.config.num_layers, grid):
        key = "model" if grid.vpp == 1 else f"model{stage.vp_stage}"
        for tp_rank in range(grid.tp):
            chunk = source.chunk(stage, tp_rank, grid, options.spec, divisible_by)
            ranks[stage.pp_rank, tp_rank][key] = _with_extra_states(chunk) if options.spec == "te" else chunk
    files = lay_out_torch_legacy(ranks, _args(source, grid, divisible_by), _main_dtype(source))
    return [*files, *_sidecar(source, "torch", options, grid, divisible_by)]


TARGETS: dict[str, Callable[[Checkpoint, Options], list[OutputFile]]] = {
    "hf": _to_hf,
    "packed": _to_packed,
    "torch": _to_torch,
}

_TE_MODULES = (".linear_qkv", ".linear_proj", ".linear_fc1", ".linear_fc2", ".final_layernorm", "_layernorm")


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


def _args(source: Checkpoint, grid: Parallelism, divisible_by: int) -> dict[str, Any]:
    rows = padded_vocab_size(source.tensors[EMBEDDING].shape[0], divisible_by, grid.tp)
    config = replace(source.config, dtype=_main_dtype(source))
    return to_args(config, grid, rows, divisible_by)


def _main_dtype(source: Checkpoint) -> str:
    """What torch calls the type that most bytes have."""
    sizes: Counter[DType] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.out_dtype] += tensor.nbytes
    return TORCH_DTYPE_NAMES[sizes.most_common(1)[0][0]]


def _sidecar(
    source: Checkpoint, format: str, options: Options, grid: Parallelism, divisible_by: int
) -> list[OutputFile]:
    small = {name: path for name, path in source.sidecar.small.items() if name != "config.json"}
    manifest = {
        "tool": f"ckptkit {__version__}",
        "format": format,
        "family": source.family.name,
        "architecture": source.config.architecture,
        "spec": options.spec,
        "grid": asdict(grid),
        "make_vocab_size_divisible_by": divisible_by,
    }
    files = replace(source.sidecar, small=small).lay_out(manifest)
    config = _config_file(source)
    return [*files, replace(config, path=f"ckptkit/hf/{config.path}")]


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
    config = dict(source.sidecar.config)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
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
