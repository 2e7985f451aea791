"""Element types, under the names that safetensors and torch give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class DType(NamedTuple):
    """An element type, named as safetensors names it (`BF16`), with its size in bytes."""

    name: str
    itemsize: int
    is_float: bool

    def __str__(self) -> str:
        return self.name


_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


_OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8}


DTYPES: dict[str, DType] = {
    **{name: DType(name, size, True) for name, size in _FLOATS.items()},
    **{name: DType(name, size, False) for name, size in _OTHERS.items()},
}


TORCH_DTYPE_NAMES: dict[DType, str] = {
    DTYPES[name]: torch_name
    for name, torch_name in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
    }.items()
}
"""Element type -> `torch.<name>`; every `DType` has one."""


DTYPES_BY_TORCH_NAME: dict[str, DType] = {name: dtype for dtype, name in TORCH_DTYPE_NAMES.items()}
"""`torch.<name>` -> element type."""


@overload
def rounded_to_bf16(bits: int) -> int: ...
@overload
def rounded_to_bf16(bits: NDArray[np.uint32]) -> NDArray[np.uint32]: ...
def rounded_to_bf16(bits: Any) -> Any:
    """The upper half of F32 numbers, rounded to nearest, ties to even; NaN is not looked at.

    Args:
        bits: The bits of one number, or of an array of them, which is left as it is.
    """
    # Adds just below half of the last kept bit, and that bit: a carry rounds up, ties go to even.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded
