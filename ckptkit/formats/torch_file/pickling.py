"""A writer of pickles as torch.save makes them: protocol 2, and only what torch's weights-only loader accepts.

For a dict of tensors the bytes are torch's own. Strings are shared by value, not by identity, so that equal inputs
give equal bytes; lists, dicts, records and tensors that occur twice stay one object.

Source: the opcode descriptions of CPython's `pickletools`; grouping and memo numbers as its C pickler has them.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
    writer = Writer()
    writer.save(obj)
    return writer.finish(), writer.storages


class Writer:
    """Writes one pickle.

    Attributes:
        out: What is written and not handed on yet.
        storages: The storages that it refers to.
        keys: The keys of dicts that lead to the value in hand.
        memo: Values that are found again -> their numbers.
        puts: Count of the values that have numbers.
    """

    def __init__(self, hand_on: Callable[[bytes], object] | None = None) -> None:
        """Starts a pickle.

        Args:
            hand_on: Takes the bytes, piece by piece, of a pickle that is too large to be kept.
        """
        self._hand_on = hand_on
        self.out = bytearray(b"\x80\x02")
        self.storages: list[Storage] = []
        self.keys: list[str] = []
        self.memo: dict[object, int] = {}
        self.kept: list[object] = []  # objects that `memo` knows by their identity, and nobody else keeps
        self.puts = 0

    def finish(self) -> bytes:
        """Ends the pickle. Returns what of it is not handed on."""
        self.out += b"."
        self._spill(0)
        return bytes(self.out)

    def _spill(self, least: int = 1 << 16) -> None:
        """Hands on what is written, if there is enough of it."""
        if self._hand_on is not None and len(self.out) >= least:
            self._hand_on(bytes(self.out))
            self.out.clear()

    def save(self, obj: object) -> None:
        """Writes a value.

        Raises:
            TypeError: It, or a part of it, has a type that cannot be written.
        """
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
        self.out += reference(index)
        return True

    def name(self, module: str, name: str) -> None:
        """A class or function."""
        key = (module, name)
        if not self.again(key):
            self.out += f"c{_PYTHON2_SPELLING.get(module, module)}\n{name}\n".encode()
            self.put(key)

    def items(self, pairs: Iterator[object], size: int, ordered: bool = False) -> None:
        """Fills the dict on top of the stack in groups.

        CPython's two loops end differently, which `ordered` tells apart: after a full last group a plain dict has an
        empty one, and a last group of one item is a single item in an ordered dict.

        Args:
            pairs: Writes one key and its value at each step.
            size: How many there are.
            ordered: Whether the dict is an `OrderedDict`.
        """
        if size == 1:
            next(pairs)
            self.out += b"s"
            return
        full, rest = divmod(size, _BATCH)
        for batch in [_BATCH] * full + [rest] * (rest > 0):
            single = ordered and batch == 1
            self.out += b"" if single else b"("
            for _ in islice(pairs, batch):
                pass
            self.out += b"s" if single else b"u"
            self._spill()
        if size and not rest and not ordered:
            self.out += b"(u"

    def elements(self, values: Iterator[object], size: int) -> None:
        """Fills the list on top of the stack in groups.

        Args:
            values: Writes one element at each step.
            size: How many there are.
        """
        if size == 1:
            next(values)
            self.out += b"a"
            return
        for start in range(0, size, _BATCH):
            self.out += b"("
            for _ in islice(values, min(_BATCH, size - start)):
                pass
            self.out += b"e"
            self._spill()

    def pairs(self, pairs: Iterable[tuple[object, object]]) -> Iterator[None]:
        """Writes keys and values."""
        for key, value in pairs:
            self.save(key)
            self.keys.append(str(key))
            self.save(value)
            self.keys.pop()
            yield


def reference(index: int) -> bytes:
    """The bytes that stand for the value of this number."""
    return b"h%c" % index if index < 256 else b"j" + struct.pack("<I", index)


def _save_none(writer: Writer, obj: None) -> None:
    writer.out += b"N"


def _save_bool(writer: Writer, obj: bool) -> None:
    writer.out += b"\x88" if obj else b"\x89"


def integer(value: int) -> bytes:
    """The bytes of an integer.

    Raises:
        TypeError: It has more than 255 bytes.
    """
    if 0 <= value < 1 << 8:
        return b"K%c" % value
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if value < 0 and len(data) > 1 and data[-1] == 0xFF and data[-2] & 0x80:
        data = data[:-1]
    if len(data) > 255:
        raise TypeError("an integer of more than 255 bytes cannot be written to a checkpoint")
    return b"\x8a%c" % len(data) + data


def _save_int(writer: Writer, obj: int) -> None:
    writer.out += integer(obj)


def _save_float(writer: Writer, obj: float) -> None:
    writer.out += b"G" + struct.pack(">d", obj)


def _save_str(writer: Writer, obj: str) -> None:
    if not writer.again(obj):
        data = obj.encode("utf-8", "surrogatepass")
        writer.out += b"X" + struct.pack("<I", len(data)) + data
        writer.put(obj)


def _save_bytes(writer: Writer, obj: bytes) -> None:
    """Protocol 2 has no bytes: they travel as text that is encoded again (empty ones too, which torch would refuse)."""
    writer.name("_codecs", "encode")
    _save_tuple(writer, (obj.decode("latin1"), "latin1"))
    writer.out += b"R"
    writer.put()


def _save_tuple(writer: Writer, obj: tuple[object, ...]) -> None:
    if not obj:
        writer.out += b")"
        return
    if len(obj) > 3:
        writer.out += b"("
    for item in obj:
        writer.save(item)
    writer.out += b"t" if len(obj) > 3 else (b"\x85", b"\x86", b"\x87")[len(obj) - 1]
    writer.put()


def _save_list(writer: Writer, obj: list[object]) -> None:
    if writer.again(id(obj)):
        return
    writer.out += b"]"
    writer.put(id(obj))
    writer.elements(map(writer.save, obj), len(obj))


def _save_dict(writer: Writer, obj: dict[object, object]) -> None:
    if writer.again(id(obj)):
        return
    writer.out += b"}"
    writer.put(id(obj))
    writer.items(writer.pairs(obj.items()), len(obj))


def _save_ordered_dict(writer: Writer, obj: OrderedDict[object, object]) -> None:
    if writer.again(id(obj)):
        return
    writer.name("collections", "OrderedDict")
    writer.out += b")R"
    writer.put(id(obj))
    writer.items(writer.pairs(obj.items()), len(obj), ordered=True)


def _save_namespace(writer: Writer, obj: Namespace) -> None:
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


def _save_dtype(writer: Writer, obj: TorchDType) -> None:
    if obj.name not in LISTED_DTYPES:
        raise TypeError(f"{obj} is not an element type")
    writer.name("torch", obj.name)


def _save_class(writer: Writer, obj: ClassName) -> None:
    if (obj.module, obj.name) not in LISTED_NAMES:
        raise TypeError(f"{obj.module}.{obj.name} is not a name that checkpoints use")
    writer.name(obj.module, obj.name)


def _save_record(writer: Writer, obj: Record) -> None:
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


def _save_tensor(writer: Writer, obj: Tensor) -> None:
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


def _save_storage(writer: Writer, tensor: Tensor, typed: str | None) -> None:
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


@dataclass(frozen=True, slots=True)
class Written:
    """A value that writes itself: for parts of which there are too many to be objects."""

    save: Callable[[Writer], None]


def _save_written(writer: Writer, obj: Written) -> None:
    obj.save(writer)


class Pattern:
    """Writes many objects that differ in a few values, by the bytes that the others have in common.

    The objects are referred to by nothing else in the pickle.
    """

    def __init__(self, writer: Writer, make: Callable[..., tuple[object, ...]]) -> None:
        """Starts without a pattern. It is made after number 255, when all numbers have equally many bytes.

        Args:
            writer: The pickle.
            make: Values -> the objects to write, one after the other, with these values in them.
        """
        self._writer = writer
        self._make = make
        self._parts: list[bytes | int] = []  # constants, and between them numbers and values
        self._numbers: list[int] = []
        self._values: list[tuple[int, int]] = []
        self._packs: dict[tuple[int, ...], Callable[..., bytes]] = {}

    def save(self, *values: bytes) -> None:
        """Writes objects with these values.

        Args:
            values: The bytes of each; they take no numbers.
        """
        writer, parts = self._writer, self._parts
        if not parts:
            first = writer.puts
            self.save_new(*map(encoded, values))
            if first >= 256:
                self._trace(len(values))
            return
        for at in self._numbers:
            parts[at] = writer.puts
            writer.puts += 1
        for at, index in self._values:
            parts[at] = values[index]
        lengths = tuple(map(len, values))
        pack = self._packs.get(lengths) or self._packs.setdefault(lengths, self._packing())
        writer.out += pack(*parts)

    def save_new(self, *values: object) -> None:
        """Writes objects with values that take numbers, because nothing has written them yet."""
        made = self._make(*values)
        self._writer.kept.append(made)
        for obj in made:
            self._writer.save(obj)

    def _packing(self) -> Callable[..., bytes]:
        """What joins parts of these lengths."""
        return struct.Struct("<" + "".join("I" if isinstance(p, int) else f"{len(p)}s" for p in self._parts)).pack

    def _trace(self, count: int) -> None:
        """Makes the pattern: the second object of a kind finds all names and strings of the first."""
        tracer = _Tracer(self._writer.memo)
        for obj in self._make(*(Written(partial(_mark, number)) for number in range(count))):
            tracer.save(obj)
        start = 0
        for end, value in tracer.marks:
            self._parts += [bytes(tracer.out[start:end]), 0 if value is None else b""]
            if value is None:
                self._numbers.append(len(self._parts) - 1)
            else:
                self._values.append((len(self._parts) - 1, value))
            start = end
        self._parts.append(bytes(tracer.out[start:]))


class _Tracer(Writer):
    """Notes where numbers and values stand, instead of writing them."""

    def __init__(self, memo: dict[object, int]) -> None:
        super().__init__()
        self.out.clear()
        self.memo = memo
        self.marks: list[tuple[int, int | None]] = []
        self._inside: set[object] = set()

    def put(self, key: object = None) -> None:
        if isinstance(key, str | tuple):
            raise TypeError(f"{key!r} is not in all objects of a pattern")
        self._inside.add(key)
        self.out += b"r"
        self.marks.append((len(self.out), None))
        self.puts += 1

    def again(self, key: object) -> bool:
        if key in self._inside:
            raise TypeError("a pattern cannot refer to a part of itself")
        return super().again(key)


def encoded(data: bytes) -> Written:
    """A value whose bytes are known."""
    return Written(partial(_append, data))


def _append(data: bytes, writer: Writer) -> None:
    writer.out += data


def _mark(number: int, writer: Writer) -> None:
    assert isinstance(writer, _Tracer)
    writer.marks.append((len(writer.out), number))


_SAVERS: dict[type, Callable[[Writer, Any], None]] = {
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
    Written: _save_written,
}
