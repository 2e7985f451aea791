"""What a conversion is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME, DType
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.hybrid_names import GPT

if TYPE_CHECKING:
    pass


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


@dataclass(frozen=True)
class Execution:
    """How a plan is carried out; the attributes are those of `convert`."""

    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    threads: int | None = None
    hash: bool = False
    progress: Callable[[int, int], None] | None = None


def dtype_called(name: str | None) -> DType | None:
    """The element type that `--dtype` names, or None.

    Raises:
        UsageError: No floating-point type has this name.
    """
    if name is None:
        return None
    full = _SHORT.get(name, name)
    if full not in CASTS:
        raise UsageError(f"--dtype {name}", hint=f"one of {', '.join(CASTS)}")
    return DTYPES_BY_TORCH_NAME[full]
