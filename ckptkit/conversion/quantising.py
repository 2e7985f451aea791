"""`--quantise`: a Hugging Face output with quantised weights, by a scheme or like a reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.sidecar_contents import ORIGINAL
from ckptkit.dtypes import DTYPES, TORCH_DTYPE_NAMES
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.hf import INDEX, lay_out_like, lay_out_shards, open_hf
from ckptkit.formats.hub import locate
from ckptkit.formats.quantised.archive import Quantised, dequantised
from ckptkit.formats.quantised.scheme import FP8, INT4, KEY, MXFP4, stated, without_scheme
from ckptkit.formats.quantised.stored import BLOCKS, PACKED, SCALE, SCALE_INV, SCALES, SHAPE, Stored
from ckptkit.io.castable import CASTABLE
from ckptkit.io.computed import as_matrix, recast
from ckptkit.io.dequantised import slices
from ckptkit.io.plan import OutputFile
from ckptkit.io.quantised import Coding, Likeness, quantised
from ckptkit.tables.config_fields import set_dtype
from ckptkit.tensors import Tensor, vstack

LIKE = "like:"
FP8_BLOCK, FP8_POWERS = "fp8-block", "fp8-block-ue8m0"
SCHEMES = (FP8_BLOCK, FP8_POWERS, MXFP4, INT4)
_BLOCK, _GROUP = (128, 128), 32
_GPT_OSS = "GptOssForCausalLM"
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
"""Ends of the names of its experts; where they are not MXFP4, outputs are columns, which no other scheme's readers
expect."""
_WHY_NOT = {
    INT4: f"takes single matrices whose rows are whole groups of {_GROUP}",
    MXFP4: f"is for experts alone, whose rows are whole groups of {_GROUP}",
}
"""Scheme -> why it leaves a matrix as it is; the others leave only those experts."""
_PLAIN = ("embed", "mlp.router.", "shared_experts.gate_weight", "eh_proj", "output_layer", "per_layer")
"""Parts of canonical names of matrices that no scheme quantises by itself: tables of tokens, routers, and heads."""
_RATES = ("linear_attn.in_proj_ba.", "linear_attn.in_proj_b.", "linear_attn.in_proj_a.")
"""The same of Hugging Face names: betas and decays of DeltaNets, a row for each head, which published archives leave
out. Engines cannot divide blocks of so few rows over tensor parallel ranks."""


@dataclass(frozen=True)
class Quantise:
    """What `--quantise` asks for.

    Attributes:
        text: As it was given.
        like: The reference, which may be what a sidecar keeps of it; None for a scheme.
    """

    text: str
    like: Quantised | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text


def quantise_called(text: str | None, stack: ExitStack, *, headers_only: bool) -> Quantise | None:
    """What `--quantise` asks for.

    Args:
        text: Its value, or None.
        stack: Keeps fetched files until it closes.
        headers_only: Fetch no more than a plan needs.

    Raises:
        UsageError: It is no scheme.
        InputError: The reference is damaged, or not quantised.
        UnsupportedError: The reference is quantised in another way than is read here.
    """
    if text is None or text in (*SCHEMES, ORIGINAL):
        return None if text is None else Quantise(text)
    if not text.startswith(LIKE) or text == LIKE:
        raise UsageError(f"--quantise {text}", hint=f"one of {', '.join(SCHEMES)}, {ORIGINAL}, or {LIKE}REFERENCE")
    place = stack.enter_context(locate(text.removeprefix(LIKE), headers_only=headers_only)).path
    found = dequantised(open_hf(place)).quantised
    if found is None or not found.stored:
        raise InputError("no tensor is quantised in it", where=place, hint="name a quantised directory, or a scheme")
    return Quantise(text, found)


def names_for(source: Checkpoint, wanted: Quantise) -> set[str]:
    """Names of the tensors from which a quantised output is made, as of `Checkpoint.hf_tensors`."""
    if wanted.like is not None:
        return wanted.like.names
    if wanted.text != MXFP4:
        return source.stored_names
    names = source.hf_tensors(source.stored_names)
    return {name + BLOCKS if name.endswith(_EXPERTS) else name for name in names}


@dataclass(frozen=True)
class QuantisedOutput:
    """A Hugging Face model with quantised weights.

    Attributes:
        tensors: Stored name -> tensor.
        config: config.json.
        scheme: What is said of how it is quantised.
        count: Number of quantised tensors.
        like: The reference, or None.
        likenesses: The tensors beside those of the reference.
        notes: Sentences for the user.
        lossy: Sentences about losses.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    scheme: str
    count: int
    like: Quantised | None = None
    likenesses: tuple[Likeness, ...] = ()
    notes: tuple[str, ...] = ()
    lossy: tuple[str, ...] = ()

    def lay_out(self, shard_size: int | None, default: int) -> list[OutputFile]:
        """The files with tensors and their index: those of the reference where the tensors still fit.

        Args:
            shard_size: Largest size of a shard, or None to keep the reference's files.
            default: Largest size of a shard where there are none to keep.
        """
        like = self.like
        kept = lay_out_like(self.tensors, like.headers if like is not None and shard_size is None else {})
        if kept is None or like is None:
            return lay_out_shards(self.tensors, shard_size or default)
        index = like.small.get(INDEX)
        return kept if index is None else [*kept, OutputFile.copy(INDEX, str(index), index.stat().st_size)]

    @property
    def config_json(self) -> OutputFile:
        """config.json: a copy of the reference's, unless the model has another one."""
        path = None if self.like is None else self.like.small.get("config.json")
        if self.like is not None and path is not None and self.config == self.like.config:
            return OutputFile.copy("config.json", str(path), path.stat().st_size)
        return OutputFile.small("config.json", json.dumps(self.config, indent=2).encode() + b"\n")


def quantise(source: Checkpoint, tensors: Mapping[str, Tensor], wanted: Quantise) -> QuantisedOutput:
    """Quantises the tensors of a Hugging Face model.

    Args:
        source: The model.
        tensors: Everything that the output holds, by name.
        wanted: How.

    Raises:
        InputError: The reference is another model.
        UnsupportedError: The scheme has no tensors in this model.
    """
    return _like(source, tensors, wanted.like) if wanted.like is not None else _new(source, tensors, wanted.text)


def _like(source: Checkpoint, tensors: Mapping[str, Tensor], like: Quantised) -> QuantisedOutput:
    stored = {item.name: item for item in like.stored.values()}
    found: dict[str, Tensor] = {}
    likenesses: list[Likeness] = []
    count = 0
    for name, tensor in tensors.items():
        item = stored.pop(name, None)
        if item is None:
            found[name] = tensor
            continue
        found |= _as_stored(item, tensor, like, likenesses.append)
        count += 1
    if stored:
        name = min(stored)
        what = f"the reference of --quantise has {name}, which this model has not ({len(stored):,} such tensors)"
        raise InputError(what, where=like.path, hint="name the quantised archive of this model")
    found |= like.activations
    read = without_scheme(like.config)
    set_dtype(read, TORCH_DTYPE_NAMES[like.dtype])  # as a source has it; a reference of weights has it as it is
    same = source.sidecar.config in (read, without_scheme(like.config))
    config = like.config if same else {**source.sidecar.config, KEY: stated(like.config)}
    notes = () if same else ("config.json is not that of the reference but for the quantised weights",)
    lossy = (f"of {count:,} quantised tensors, those that were changed are rounded anew ({like.scheme})",)
    return QuantisedOutput(found, config, str(like.scheme), count, like, tuple(likenesses), notes, lossy)


def _as_stored(
    item: Stored, tensor: Tensor, like: Quantised, compared: Callable[[Likeness], None]
) -> dict[str, Tensor]:
    """A tensor in the form in which a reference stores it; its likenesses are handed on."""
    if tensor.shape != item.shape or tensor.out_dtype.name not in CASTABLE:
        what = f"{item.name} is {tensor.out_dtype}{list(tensor.shape)}, and in the reference {list(item.shape)}"
        raise InputError(what, where=like.path, hint="name the quantised archive of this model")
    codes, scales = item.parts[item.codes], item.parts[item.scales]
    held = item.codes not in like.absent
    powers = isinstance(about := stated(like.config), dict) and about.get("scale_fmt") == "ue8m0"
    coding = Coding(item.kind, item.block, scales.dtype, powers)
    parts: list[tuple[str, Tensor, Tensor, Tensor]] = []
    if item.kind == FP8:
        grid = [-(-size // block) for size, block in zip(item.shape[-2:], item.block, strict=True)]
        folded = scales.reshape((*item.shape[:-2], *grid))
        some = zip(slices(_uncast(tensor)), slices(codes), slices(folded), strict=True)
        names = [item.name] if len(item.shape) == 2 else (f"{item.name}[{n}]" for n in range(codes.numel))
        parts = [(name, *three) for name, three in zip(names, some, strict=False)]
    else:
        numbers = _uncast(tensor)
        rows = numbers.numel // numbers.shape[-1]
        wide = codes.reshape((rows, codes.numel // rows))
        parts = [(item.name, as_matrix(numbers), wide, as_matrix(scales))]
    made: list[tuple[Tensor, Tensor]] = []
    for name, numbers, old_codes, old_scales in parts:
        likeness = Likeness(name, numbers, coding, old_codes if held else None, old_scales)
        compared(likeness)
        made.append(quantised(name, numbers, coding, likeness))
    new = {item.codes: vstack([pair[0] for pair in made]).reshape(codes.shape)}
    new[item.scales] = vstack([pair[1] for pair in made]).reshape(scales.shape)
    return {name: new.get(name, part) for name, part in item.parts.items()}


def _new(source: Checkpoint, tensors: Mapping[str, Tensor], scheme: str) -> QuantisedOutput:
    if scheme == MXFP4 and source.config.architecture != _GPT_OSS:
        raise UnsupportedError(
            f"--quantise mxfp4: no library reads it for {source.config.architecture}",
            where=source.path,
            hint=f"choose {FP8_BLOCK} or {INT4}",
        )
    plain = {
        name
        for key, item in source.items.items()
        if item.row.split.padded or any(word in key for word in _PLAIN)
        for name in item.hf
    }
    plain |= {name for item in source.items.values() for name in item.hf if any(part in name for part in _RATES)}
    own = {name for item in source.items.values() for name in item.hf} - plain
    found: dict[str, Tensor] = {}
    left: list[str] = []
    count = passed_over = 0
    for name, tensor in tensors.items():
        wide = tensor.out_dtype.name in CASTABLE and len(tensor.shape) in (2, 3)
        by_columns = source.config.architecture == _GPT_OSS and name.endswith(_EXPERTS)
        experts = wide and len(tensor.shape) == 3 and ".experts." in name and not by_columns
        matrix = wide and len(tensor.shape) == 2 and name.endswith(".weight")
        parts = {}
        if (matrix and name in own) or experts:
            parts = _QUANTISERS[scheme](name, tensor)
        count += bool(parts)
        passed_over += not parts and ((matrix and name in own) or experts or by_columns)
        found |= parts or {name: tensor}
        if matrix and not parts:
            left.append(name.removesuffix(".weight"))
    if not count:
        raise UnsupportedError(f"--quantise {scheme} has no tensors in this model", where=source.path)
    about = _DESCRIPTIONS[scheme](left)
    config = {**without_scheme(source.sidecar.config), KEY: about}
    lossy = (f"{count:,} tensors are rounded ({scheme})",)
    why = _WHY_NOT.get(scheme, "has no form for experts that are transposed")
    notes = (f"{passed_over:,} matrices stay as they are: {scheme} {why}",) * bool(passed_over)
    return QuantisedOutput(found, config, scheme, count, notes=notes, lossy=lossy)


def _fp8(name: str, tensor: Tensor, *, powers: bool = False) -> dict[str, Tensor]:
    coding = Coding(FP8, _BLOCK, DTYPES["F32"], powers)
    pairs = [quantised(name, matrix, coding) for matrix in slices(_uncast(tensor))]
    grid = [-(-size // block) for size, block in zip(tensor.shape[-2:], _BLOCK, strict=True)]
    scales = vstack([pair[1] for pair in pairs]).reshape((*tensor.shape[:-2], *grid))
    return {name: vstack([pair[0] for pair in pairs]).reshape(tensor.shape), name + SCALE_INV: scales}


def _int4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if len(tensor.shape) != 2 or tensor.shape[1] % _GROUP:
        return {}
    dtype = tensor.out_dtype if tensor.out_dtype.name != "F64" else DTYPES["F32"]
    codes, scales = quantised(name, _uncast(tensor), Coding(INT4, (1, _GROUP), dtype))
    shape = b"".join(size.to_bytes(8, "little") for size in tensor.shape)
    module = name.removesuffix(".weight")
    stated_shape = Tensor.from_bytes(shape, DTYPES["I64"], (2,))
    return {module + PACKED: codes, module + SCALE: scales, module + SHAPE: stated_shape}


def _mxfp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.endswith(BLOCKS) or tensor.shape[-1] % 32:
        return {}
    coding = Coding(MXFP4, (1, 32), DTYPES["U8"])
    codes, scales = quantised(name, as_matrix(_uncast(tensor)), coding)
    groups = (*tensor.shape[:-1], tensor.shape[-1] // 32)
    return {name: codes.reshape((*groups, 16)), name.removesuffix(BLOCKS) + SCALES: scales.reshape(groups)}


_QUANTISERS: dict[str, Callable[[str, Tensor], dict[str, Tensor]]] = {
    FP8_BLOCK: _fp8,
    FP8_POWERS: lambda name, tensor: _fp8(name, tensor, powers=True),
    INT4: _int4,
    MXFP4: _mxfp4,
}


def _about_fp8(left: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(_BLOCK),
        "modules_to_not_convert": left,
    }


def _about_int4(left: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": _GROUP,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
        "kv_cache_scheme": None,
    }


def _about_mxfp4(left: list[str]) -> dict[str, Any]:
    return {"quant_method": "mxfp4", "modules_to_not_convert": left}


_DESCRIPTIONS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    FP8_BLOCK: _about_fp8,
    FP8_POWERS: lambda left: {**_about_fp8(left), "scale_fmt": "ue8m0"},
    INT4: _about_int4,
    MXFP4: _about_mxfp4,
}


def _uncast(tensor: Tensor) -> Tensor:
    """A tensor whose cast is computed: it is cut into slices and permuted."""
    return tensor if tensor.cast is None else recast(tensor, tensor.cast)
