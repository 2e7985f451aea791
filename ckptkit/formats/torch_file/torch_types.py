"""The objects in torch's pickles as inert values, and torch's names for element types.

This module does not import torch. Its values hold the content of a file and have no behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME, DType
from ckptkit.errors import InputError

_FOREIGN = (
    "complex32 complex128 quint8 qint8 qint32 quint4x2 quint2x4 float8_e4m3fnuz float8_e5m2fnuz float4_e2m1fn_x2 "
    "bits8 bits16 bits1x8 bits2x4 bits4x2 "
    "int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7"
)
FOREIGN_TORCH_DTYPES = frozenset(_FOREIGN.split())
"""Types that torch has and `ckptkit.tensors` has not."""

STORAGE_DTYPE_NAMES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
"""Typed storage class -> `torch.<name>` of its elements. Types that are not here live in an UntypedStorage."""

STORAGES_BY_DTYPE: dict[DType, str] = {
    DTYPES_BY_TORCH_NAME[name]: storage for storage, name in STORAGE_DTYPE_NAMES.items() if name in DTYPES_BY_TORCH_NAME
}
"""Element type -> typed storage class, where torch has one."""


@dataclass(frozen=True, slots=True)
class TorchDType:
    """`torch.<name>` as a value, as in `args.params_dtype`."""

    name: str

    def __str__(self) -> str:
        """As torch prints it."""
        return f"torch.{self.name}"

    @property
    def dtype(self) -> DType | None:
        """The element type, or None for one that ckptkit does not have."""
        return DTYPES_BY_TORCH_NAME.get(self.name)


@dataclass(slots=True)
class Namespace:
    """The attributes of an `argparse.Namespace` (or a `types.SimpleNamespace`)."""

    fields: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class itself as a value (a default factory, a type among the arguments)."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Record:
    """An object of a listed class, as data that cannot be called.

    It compares and hashes by identity, so that a file may use any record as a key.

    Attributes:
        module: Module of its class, as the file spells it.
        name: Name of its class, or of the function that would make it.
        args: Arguments for the class; for an enum member, its value.
        state: Its attributes (in most cases a dict), or None.
    """

    module: str
    name: str
    args: tuple[object, ...] = ()
    state: object = None


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor whose bytes cannot be named as rows of the file.

    It is an error only if a model needs it: files also hold optimizer states and buffers that are no weights.

    Attributes:
        reason: The reason, as the end of a sentence that starts with the name of the tensor.
        shape: Sizes in elements, if known.
    """

    reason: str
    shape: tuple[int, ...] | None = None

    def error(self, name: str, where: object) -> InputError:
        """The error to raise if tensor `name` of file `where` is needed."""
        return InputError(
            f"tensor {name} {self.reason}", where=where, hint="save it again as a dense, contiguous tensor"
        )
