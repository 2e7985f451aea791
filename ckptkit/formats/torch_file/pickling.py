"""A writer of pickles as torch.save makes them: protocol 2, and only what torch's weights-only loader accepts.

For a dict of tensors the bytes are torch's own. Strings are shared by value, not by identity, so that equal inputs
give equal bytes; lists, dicts, records and tensors that occur twice stay one object.

Source: the opcode descriptions of CPython's `pickletools`; grouping and memo numbers as its C pickler has them.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

from ckptkit.dtypes import TORCH_DTYPE_NAMES
from ckptkit.formats.torch_file.pickle_names import LISTED_DTYPES, LISTED_NAMES
from ckptkit.formats.torch_file.torch_types import STORAGES_BY_DTYPE, ClassName, Namespace, Record, TorchDType
from ckptkit.tensors import Tensor

_BATCH = 1000
_PYTHON2_SPELLING = {"builtins": "__builtin__"}


@dataclass(frozen=True, slots=True)
class Storage:
    """A tensor that a pickle refers to.

    Attributes:
        tensor: Its bytes, as written, are the storage.
        label: The keys that lead to it, joined by dots.
    """

    tensor: Tensor
    label: str


def write_pickle(obj: object) -> tuple[bytes, list[Storage]]:
    """The pickle of an object, and the storages `0`, `1`, ... that it refers to.

    Raises:
        TypeError: A part of it has a type that cannot be written.
    """
    writer = _Writer()
    writer.save(obj)
    return bytes(writer.out) + b".", writer.storages


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.storages: list[Storage] = []
        self.keys: list[str] = []
        self.memo: dict[object, int] = {}
        self.puts = 0

    def save(self, obj: object) -> None:
        save = _SAVERS.get(type(obj))
        if save is None:
            at = f" at {'.'.join(self.keys)}" if self.keys else ""
            raise TypeError(f"a {type(obj).__name__}{at} cannot be written to a checkpoint")
        save(self, obj)

    def put(self, key: object = None) -> None:
        """Numbers the value on top of the stack; it is found again under `key`."""
        if key is not None:
            self.memo[key] = self.puts
        self.out += b"q%c" % self.puts if self.puts < 256 else b"r" + struct.pack("<I", self.puts)
        self.puts += 1

    def again(self, key: object) -> bool:
        """Refers to the value under `key`, if it is there."""
        index = self.memo.get(key)
        if index is None:
            return False
        self.out += b"h%c" % index if index < 256 else b"j" + struct.pack("<I", index)
        return True

    def name(self, module: str, name: str) -> None:
        """A class or function."""
        key = (module, name)
        if not self.again(key):
            self.out += f"c{_PYTHON2_SPELLING.get(module, module)}\n{name}\n".encode()
            self.put(key)

    def items(self, pairs: Any, size: int, ordered: bool) -> None:
        """Fills the dict on top of the stack in groups.

        CPython's two loops end differently, which `ordered` tells apart: after a full last group a plain dict has an
        empty one, and a last group of one item is a single item in an ordered dict.
        """
        if size == 1:
            self._pairs(pairs, 1)
            self.out += b"s"
            return
        full, rest = divmod(size, _BATCH)
        for batch in [_BATCH] * full + [rest] * (rest > 0):
            single = ordered and batch == 1
            self.out += b"" if single else b"("
            self._pairs(pairs, batch)
            self.out += b"s" if single else b"u"
        if size and not rest and not ordered:
            self.out += b"(u"

    def _pairs(self, pairs: Any, count: int) -> None:
        for key, value in islice(pairs, count):
            self.save(key)
            self.keys.append(str(key))
            self.save(value)
            self.keys.pop()


def _save_none(writer: _Writer, obj: None) -> None:
    writer.out += b"N"


def _save_bool(writer: _Writer, obj: bool) -> None:
    writer.out += b"\x88" if obj else b"\x89"


def _save_int(writer: _Writer, obj: int) -> None:
    if 0 <= obj < 1 << 8:
        writer.out += b"K%c" % obj
    elif 0 <= obj < 1 << 16:
        writer.out += b"M" + struct.pack("<H", obj)
    elif -(1 << 31) <= obj < 1 << 31:
        writer.out += b"J" + struct.pack("<i", obj)
    else:
        data = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
        if obj < 0 and len(data) > 1 and data[-1] == 0xFF and data[-2] & 0x80:
            data = data[:-1]
        if len(data) > 255:
            raise TypeError("an integer of more than 255 bytes cannot be written to a checkpoint")
        writer.out += b"\x8a%c" % len(data) + data


def _save_float(writer: _Writer, obj: float) -> None:
    writer.out += b"G" + struct.pack(">d", obj)


def _save_str(writer: _Writer, obj: str) -> None:
    if not writer.again(obj):
        data = obj.encode("utf-8", "surrogatepass")
        writer.out += b"X" + struct.pack("<I", len(data)) + data
        writer.put(obj)


def _save_bytes(writer: _Writer, obj: bytes) -> None:
    """Protocol 2 has no bytes: they travel as text that is encoded again (empty ones too, which torch would refuse)."""
    writer.name("_codecs", "encode")
    _save_tuple(writer, (obj.decode("latin1"), "latin1"))
    writer.out += b"R"
    writer.put()


def _save_tuple(writer: _Writer, obj: tuple[object, ...]) -> None:
    if not obj:
        writer.out += b")"
        return
    if len(obj) > 3:
        writer.out += b"("
    for item in obj:
        writer.save(item)
    writer.out += b"t" if len(obj) > 3 else (b"\x85", b"\x86", b"\x87")[len(obj) - 1]
    writer.put()


def _save_list(writer: _Writer, obj: list[object]) -> None:
    if writer.again(id(obj)):
        return
    writer.out += b"]"
    writer.put(id(obj))
    if len(obj) == 1:
        writer.save(obj[0])
        writer.out += b"a"
        return
    for start in range(0, len(obj), _BATCH):
        writer.out += b"("
        for item in obj[start : start + _BATCH]:
            writer.save(item)
        writer.out += b"e"


def _save_dict(writer: _Writer, obj: dict[object, object]) -> None:
    if writer.again(id(obj)):
        return
    writer.out += b"}"
    writer.put(id(obj))
    writer.items(iter(obj.items()), len(obj), ordered=False)


def _save_ordered_dict(writer: _Writer, obj: OrderedDict[object, object]) -> None:
    if writer.again(id(obj)):
        return
    writer.name("collections", "OrderedDict")
    writer.out += b")R"
    writer.put(id(obj))
    writer.items(iter(obj.items()), len(obj), ordered=True)


def _save_namespace(writer: _Writer, obj: Namespace) -> None:
    if writer.again(id(obj)):
        return
    if not all(type(key) is str for key in obj.fields):
        raise TypeError("the fields of a Namespace are named by strings")
    writer.name("argparse", "Namespace")
    writer.out += b")\x81"
    writer.put(id(obj))
    if obj.fields:
        writer.save(obj.fields)
        writer.out += b"b"


def _save_dtype(writer: _Writer, obj: TorchDType) -> None:
    if obj.name not in LISTED_DTYPES:
        raise TypeError(f"{obj} is not an element type")
    writer.name("torch", obj.name)


def _save_class(writer: _Writer, obj: ClassName) -> None:
    if (obj.module, obj.name) not in LISTED_NAMES:
        raise TypeError(f"{obj.module}.{obj.name} is not a name that checkpoints use")
    writer.name(obj.module, obj.name)


def _save_record(writer: _Writer, obj: Record) -> None:
    """A call where there is no state; otherwise a new object that is given its state."""
    if writer.again(id(obj)):
        return
    _save_class(writer, ClassName(obj.module, obj.name))
    _save_tuple(writer, obj.args)
    writer.out += b"R" if obj.state is None else b"\x81"
    writer.put(id(obj))
    if obj.state is not None:
        writer.save(obj.state)
        writer.out += b"b"


def _save_tensor(writer: _Writer, obj: Tensor) -> None:
    if writer.again(id(obj)):
        return
    typed = STORAGES_BY_DTYPE.get(obj.out_dtype)
    writer.name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    writer.out += b"("
    _save_storage(writer, obj, typed)
    writer.save(0)
    writer.save(obj.shape)
    writer.save(_strides(obj.shape))
    writer.save(False)
    writer.name("collections", "OrderedDict")
    writer.out += b")R"
    writer.put()
    if not typed:
        writer.name("torch", TORCH_DTYPE_NAMES[obj.out_dtype])
    writer.out += b"t"
    writer.put()
    writer.out += b"R"
    writer.put(id(obj))


def _save_storage(writer: _Writer, tensor: Tensor, typed: str | None) -> None:
    """The persistent id ("storage", class, key, location, size); the size of an untyped one is in bytes."""
    writer.out += b"("
    writer.save("storage")
    writer.name(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))
    writer.save(str(len(writer.storages)))
    writer.save("cpu")
    writer.save(tensor.numel if typed else tensor.nbytes)
    writer.out += b"t"
    writer.put()
    writer.out += b"Q"
    writer.storages.append(Storage(tensor, ".".join(writer.keys)))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


_SAVERS: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): _save_none,
    bool: _save_bool,
    int: _save_int,
    float: _save_float,
    str: _save_str,
    bytes: _save_bytes,
    tuple: _save_tuple,
    list: _save_list,
    dict: _save_dict,
    OrderedDict: _save_ordered_dict,
    Namespace: _save_namespace,
    TorchDType: _save_dtype,
    ClassName: _save_class,
    Record: _save_record,
    Tensor: _save_tensor,
}
