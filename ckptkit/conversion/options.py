"""The options of a conversion: their choices, and which formats take them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME, DType
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.hybrid_names import GPT, MODELS
from ckptkit.tables.lora import LAYOUTS as ADAPTER_LAYOUTS
from ckptkit.tables.prediction import CORE_0_16, RELEASES

if TYPE_CHECKING:
    from ckptkit.conversion.quantising import Quantise
    from ckptkit.conversion.target import WritableFormat

DEFAULT_SHARD_SIZE = 5_000_000_000
CASTS = ("bfloat16", "float16", "float32", "float64")
FULL, TEXT, LEGACY = "full", "text", "legacy"
LAYOUTS = (FULL, TEXT, LEGACY)
VALUE = "value"
"""The head that can take the place of a language model's."""

_SHORT = {
    "fp32": "float32",
    "f32": "float32",
    "fp16": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
}

_MEGATRON = {"only": "Megatron formats"}
_SHARDED = {"only": "formats that are sharded over ranks"}
_SAFETENSORS = {"only": "safetensors files"}


@dataclass(frozen=True)
class Options:
    """The requested output. `convert` has arguments of the same names, and describes them in full.

    Some options apply to some formats only: the metadata `only` names these formats for error messages, and each
    `WritableFormat` lists the options that it takes. The metadata `choices` lists the allowed values.

    Attributes:
        grid: The parallel grid of a sharded output.
        spec: Name of the `Spelling` of Megatron names.
        experts: Naming of experts, `grouped` or `sequential`, or None for the default of `spec`.
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple of this times TP.
        megatron_model: Model class of Megatron-Core whose names are written, `gpt` or `hybrid`.
        megatron_core: Release of Megatron-Core whose names files of ranks get, where releases differ.
        shard_size: Largest safetensors shard in bytes. None keeps the source's files, or is `DEFAULT_SHARD_SIZE`.
        dtype: Type that floats are cast to, or None.
        strict_config: Refuse config features that Megatron's arguments cannot express.
        layout: `full`; `text` for a multimodal model's text part under a text model's names; `legacy` for the published
            layout of a split Llama.
        head: `value` for a value head in place of the language model head, or None.
        head_init: Initialisation of the new head, see `value_head.to_value_model`.
        adapter_layout: Names of an adapter in Megatron, see `tables/lora.py`; None for `fused`.
        lossy: Whether the factors of an adapter may be rounded where their scales ask for it.
        quantise: How the weights are quantised, or None.
    """

    grid: Parallelism = field(default_factory=Parallelism, metadata=_SHARDED)
    spec: str = field(default="te", metadata=_MEGATRON)
    experts: str | None = field(default=None, metadata=_MEGATRON)
    make_vocab_size_divisible_by: int | None = field(default=None, metadata=_MEGATRON)
    megatron_model: str = field(default=GPT, metadata={**_MEGATRON, "choices": MODELS})
    megatron_core: str = field(default=CORE_0_16, metadata={"only": "files of ranks", "choices": RELEASES})
    shard_size: int | None = field(default=None, metadata=_SAFETENSORS)
    dtype: DType | None = None
    strict_config: bool = False
    layout: str = field(default=FULL, metadata={"choices": LAYOUTS})
    head: str | None = field(default=None, metadata={"choices": (VALUE,)})
    head_init: str | None = None
    adapter_layout: str | None = field(default=None, metadata={**_SHARDED, "choices": ADAPTER_LAYOUTS})
    lossy: bool = False
    quantise: Quantise | None = field(default=None, metadata={"only": "Hugging Face outputs"})


_FLAGS = {"grid": "a parallel size such as --tp"}


def check_options(options: Options, format: WritableFormat) -> None:
    """Checks that each option has an allowed value and that the format takes it. No option is ignored in silence.

    Raises:
        UsageError: An option is not one of its choices, or does not apply to this format.
    """
    for option in fields(Options):
        value = getattr(options, option.name)
        if value == getattr(Options(), option.name):
            continue
        flag = _FLAGS.get(option.name, f"--{option.name.replace('_', '-')}")
        choices = option.metadata.get("choices")
        if choices and value not in choices:
            hint = f"one of {', '.join(choices)}" if len(choices) > 1 else f"the only choice is: {choices[0]}"
            raise UsageError(f"{flag} {value}", hint=hint)
        only = option.metadata.get("only")
        if only and option.name not in format.takes:
            raise UsageError(f"{flag} applies only to {only}, and --to is {format.name}", hint="drop it")
    if options.head is not None and options.layout == LEGACY:
        raise UsageError("--layout legacy: a value model has no such layout", hint="drop --layout legacy")
    if options.head is None and options.head_init is not None:
        raise UsageError(
            "--head-init sets a new head's weights, but no new head was asked for", hint=f"add --head {VALUE}"
        )


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
