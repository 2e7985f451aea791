"""The `quantization_config` of a config.json: how the weights of a directory are quantised."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeGuard

from ckptkit.errors import InputError, UnsupportedError

FP8, MXFP4, INT4 = "fp8", "mxfp4", "int4"
KEY = "quantization_config"
_HINT = "convert from the unquantised model of the same name"
_MOST = 1 << 20


@dataclass(frozen=True)
class Scheme:
    """A way to quantise.

    Attributes:
        kind: `fp8`, `mxfp4` or `int4`.
        block: Height and width of the blocks of `fp8`; None where each tensor, or each row, has a scale.
        group: Numbers in a row that share a scale, for `int4`; None where each row has a scale.
    """

    kind: str
    block: tuple[int, int] | None = None
    group: int | None = None

    def __str__(self) -> str:
        if self.kind == MXFP4:
            return "MXFP4, groups of 32"
        if self.kind == INT4:
            return f"INT4, groups of {self.group}" if self.group else "INT4, a scale for each row"
        return "FP8, blocks of {} x {}".format(*self.block) if self.block else "FP8, a scale for each tensor or row"


def stated(config: dict[str, Any]) -> Any:
    """The `quantization_config` of a config.json or of the text model in it, or None."""
    inner = config.get("text_config")
    return config.get(KEY) or (inner.get(KEY) if isinstance(inner, dict) else None) or None


def without_scheme(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json that says nothing of quantised weights."""
    found = deepcopy(config)
    found.pop(KEY, None)
    if isinstance(inner := found.get("text_config"), dict):
        inner.pop(KEY, None)
    return found


def scheme_of(config: dict[str, Any], where: object) -> Scheme | None:
    """The way in which the weights of a config.json are quantised, or None if they are not.

    Args:
        config: config.json as parsed.
        where: Its file, for messages.

    Raises:
        InputError: It describes blocks or groups that cannot be.
        UnsupportedError: They are quantised in another way than is read here.
    """
    found = stated(config)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise UnsupportedError(f"quantised weights ({str(found)[:40]})", where=where, hint=_HINT)
    method = found.get("quant_method", "of unknown kind")
    if method == "fp8":
        return _fp8(found, where)
    if method == "mxfp4":
        return Scheme(MXFP4)
    if method == "compressed-tensors":
        return _compressed_tensors(found, where)
    raise UnsupportedError(f"quantised weights ({str(method)[:40]})", where=where, hint=_HINT)


def _fp8(found: dict[str, Any], where: object) -> Scheme:
    if found.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedError(f"quantised weights (FP8 in the form {str(found['fmt'])[:40]})", where=where, hint=_HINT)
    if found.get("expert_dtype") not in (None, "fp8"):
        what = f"FP8 with experts in {str(found['expert_dtype'])[:40]}"
        raise UnsupportedError(f"quantised weights ({what})", where=where, hint=_HINT)
    block = found.get("weight_block_size")
    if block is None:
        return Scheme(FP8)
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_size, block)):
        raise InputError(f"weight_block_size is {str(block)[:40]}, and should be two sizes", where=where)
    return Scheme(FP8, (block[0], block[1]))


def _compressed_tensors(found: dict[str, Any], where: object) -> Scheme:
    """The one scheme of all groups of layers: packed integers of four bits."""
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise InputError("compressed-tensors without config_groups", where=where)
    schemes = {_packed_int4(group, found.get("format"), where) for group in groups.values()}
    if len(schemes) > 1:
        raise UnsupportedError("quantised weights (compressed-tensors in several ways)", where=where, hint=_HINT)
    return schemes.pop()


def _packed_int4(group: dict[str, Any], format: Any, where: object) -> Scheme:
    format, weights = group.get("format") or format, group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if (format, bits, kind) != ("pack-quantized", 4, "int") or strategy not in ("group", "channel"):
        what = f"compressed-tensors, {format} of {bits} bits by {strategy}"
        raise UnsupportedError(f"quantised weights ({what[:80]})", where=where, hint=_HINT)
    if weights.get("symmetric") is not True or weights.get("actorder") not in (None, False, "weight", "static"):
        raise UnsupportedError("quantised weights (INT4 with zero points or in another order)", where=where, hint=_HINT)
    if strategy == "channel":
        return Scheme(INT4)
    size = weights.get("group_size")
    if not _is_size(size) or size % 8:
        raise InputError(f"group_size is {str(size)[:40]}, and should be a multiple of 8", where=where)
    return Scheme(INT4, group=size)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= _MOST
