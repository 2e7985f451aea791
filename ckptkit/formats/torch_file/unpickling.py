"""A pickle machine that cannot run code.

It knows the opcodes that checkpoints use (protocols 2 to 5, and the byte strings of Python 2). For names, calls, new
objects and persistent ids it asks its caller for a value. It imports nothing and calls nothing that a file names. The
standard library's unpickler is no base for that: it allocates as much as a file asks for (one PUT with a large index
takes gigabytes), and hashing a deeply nested key ends the process.

Memory is bounded by the size of the pickle. Every container and every memo takes some bytes of the pickle. Copies made
by calls are counted, because a few bytes can name a large list again and again.

Source: the opcode descriptions of CPython's `pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

from ckptkit.errors import CkptkitError, InputError
from ckptkit.formats.garbage import collection_paused
from ckptkit.formats.torch_file.torch_types import ClassName, Record, TorchDType

_MAX_INT_BYTES = 255
_MAX_KEY_PARTS = 64
_ALLOWANCE = 1_000_000
_PLAIN_KEYS = (str, int, float, bool, bytes, complex, type(None), TorchDType, ClassName, Record)


class Meaning(Protocol):
    """The meaning of the names in a file."""

    def resolve(self, module: str, name: str) -> object:
        """The value of a global; refuses by raising `CkptkitError`."""

    def call(self, target: object, args: tuple[object, ...]) -> object:
        """The value of a call of a resolved global, or of a new object of it."""

    def build(self, target: object, state: object) -> None:
        """Gives an object its state."""

    def persistent(self, pid: object) -> object:
        """The value of a persistent id."""


class Damage(Exception):
    """The pickle makes no sense; the message says why."""


def run_pickle(data: bytes, meaning: Meaning, where: object) -> object:
    """The value of a pickle. Bytes after its end are ignored, as pickle does.

    Raises:
        InputError: It is damaged, uses an opcode that no checkpoint needs, or names something that `meaning` refuses.
    """
    machine = _Machine(data, meaning)
    try:
        with collection_paused():
            return machine.run()
    except CkptkitError:
        raise
    except Damage as error:
        reason = str(error)
    except (IndexError, struct.error):
        reason = "it is cut off or takes more values than it made"
    except UnicodeError:
        reason = "a string is not valid text"
    except OverflowError:
        reason = "a number is out of range"
    raise InputError(
        f"its pickle is damaged at byte {machine.at:,} of {len(data):,}: {reason}",
        where=where,
        hint="fetch or copy it again",
    )


class _Machine:
    """The stack, the marks and the memo."""

    def __init__(self, data: bytes, meaning: Meaning) -> None:
        self.data = data
        self.at = 0
        self.meaning = meaning
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.room = _ALLOWANCE + len(data)

    def spend(self, count: int) -> None:
        """Counts `count` values that take memory, but no bytes of the file. Sound files use half of the allowance."""
        self.room -= count
        if self.room < 0:
            raise Damage("it asks for more memory than a file of its size has use for")

    def run(self) -> object:
        data, opcodes = self.data, _OPCODES
        while True:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            operation = opcodes.get(code)
            if operation is None:
                raise Damage(f"opcode {bytes([code])!r} is not one that checkpoints use")
            operation(self)

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        start = self.at
        if size > len(self.data) - start:
            raise Damage("it is cut off")
        self.at = start + size
        return self.data[start : self.at]

    def number(self, size: int) -> int:
        """A little-endian count of `size` bytes."""
        start, stop = self.at, self.at + size
        if stop > len(self.data):
            raise Damage("it is cut off")
        self.at = stop
        return int.from_bytes(self.data[start:stop], "little")

    def line(self) -> str:
        """Text up to a line break."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise Damage("it is cut off")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_marked(self) -> list[Any]:
        """The values since the last mark."""
        if not self.marked:
            raise Damage("a mark is missing")
        values, self.stack = self.stack, self.marked.pop()
        return values

    def put(self, index: int) -> None:
        self.spend(2)
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Damage(f"value {index} is used before it is made")
        self.stack.append(self.memo[index])


def _constant(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


def _unpacked(layout: str) -> Callable[[_Machine], None]:
    codec = struct.Struct(layout)
    return lambda machine: machine.push(codec.unpack(machine.take(codec.size))[0])


def _text(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(size)).decode("utf-8", "surrogatepass"))


def _old_text(size: int) -> Callable[[_Machine], None]:
    """A `str` of Python 2, which torch reads as UTF-8."""
    return lambda machine: machine.push(machine.take(machine.number(size)).decode("utf-8"))


def _bytes(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(size)))


def _integer(size: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        length = machine.number(size)
        if length > _MAX_INT_BYTES:
            raise Damage(f"an integer of {length:,} bytes")
        machine.push(int.from_bytes(machine.take(length), "little", signed=True))

    return operation


def _put(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.put(machine.number(size))


def _get(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.get(machine.number(size))


def _tuple(size: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < size:
            raise Damage("it takes more values than it made")
        machine.spend(2)
        stack[-size:] = [tuple(stack[-size:])]

    return operation


def _protocol(machine: _Machine) -> None:
    if (version := machine.number(1)) > 5:
        raise Damage(f"protocol {version} is not known")


def _frame(machine: _Machine) -> None:
    machine.take(8)  # how far to read ahead, which does not concern bytes at hand


def _mark(machine: _Machine) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    _target(machine, list).append(value)


def _appends(machine: _Machine) -> None:
    values = machine.pop_marked()
    _target(machine, list).extend(values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _target(machine, dict)[check_key(key)] = value


def _set_items(machine: _Machine) -> None:
    values = machine.pop_marked()
    if len(values) % 2:
        raise Damage("a key without a value")
    target = _target(machine, dict)
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[check_key(key)] = value


def _add_items(machine: _Machine) -> None:
    values = machine.pop_marked()
    _target(machine, set).update(map(check_key, values))


def _target(machine: _Machine, kind: type) -> Any:
    if type(machine.stack[-1]) is not kind:
        raise Damage(f"items for something that is no {kind.__name__}")
    return machine.stack[-1]


def check_key(key: object) -> Any:
    """`key` itself, if it may be hashed: plain values, and small tuples of them.

    Hashing recurses into tuples without limit and anew for every shared part, so a file could stop the process or
    keep it busy for ever.

    Raises:
        Damage: The key has another type, or is too large.
    """
    pending, seen = [key], 0
    while pending:
        part = pending.pop()
        seen += 1
        if type(part) is tuple:
            pending.extend(part[: _MAX_KEY_PARTS + 1])
        elif type(part) not in _PLAIN_KEYS:
            raise Damage(f"a key of type {type(part).__name__}")
        if seen + len(pending) > _MAX_KEY_PARTS:
            raise Damage("a key of too many parts")
    return key


def _extent(value: object) -> int:
    """How much there is to copy of a value."""
    return len(value) if isinstance(value, list | tuple | dict | set | frozenset | str | bytes) else 1


def _new(kind: type) -> Callable[[_Machine], None]:
    """An empty container."""
    cost = 8 if kind is set else 2  # in the memory of some tens of bytes

    def operation(machine: _Machine) -> None:
        machine.spend(cost)
        machine.push(kind())

    return operation


def _frozen_set(machine: _Machine) -> None:
    values = machine.pop_marked()
    machine.spend(8)
    machine.push(frozenset(map(check_key, values)))


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_marked()


def _pop_mark(machine: _Machine) -> None:
    machine.pop_marked()


def _duplicate(machine: _Machine) -> None:
    machine.push(machine.stack[-1])


def _global(machine: _Machine) -> None:
    module, name = machine.line(), machine.line()
    machine.push(machine.meaning.resolve(module, name))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Damage("a name that is not a string")
    machine.push(machine.meaning.resolve(module, name))


def _reduce(machine: _Machine) -> None:
    args, target = machine.stack.pop(), machine.stack.pop()
    if type(args) is not tuple:
        raise Damage("a call without arguments")
    machine.spend(sum(map(_extent, args)))
    machine.push(machine.meaning.call(target, args))


def _new_object_ex(machine: _Machine) -> None:
    keywords = machine.stack.pop()
    if type(keywords) is not dict or keywords:
        raise Damage("a new object with keyword arguments")
    _reduce(machine)


def _build(machine: _Machine) -> None:
    state = machine.stack.pop()
    machine.spend(_extent(state))
    machine.meaning.build(machine.stack[-1], state)


def _persistent(machine: _Machine) -> None:
    machine.push(machine.meaning.persistent(machine.stack.pop()))


_STOP = ord(".")
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    code[0]: operation
    for code, operation in {
        b"\x80": _protocol,
        b"\x95": _frame,
        b"(": _mark,
        b"0": _pop,
        b"1": _pop_mark,
        b"2": _duplicate,
        b"N": _constant(None),
        b"\x88": _constant(True),
        b"\x89": _constant(False),
        b"J": _unpacked("<i"),
        b"K": _unpacked("<B"),
        b"M": _unpacked("<H"),
        b"G": _unpacked(">d"),
        b"\x8a": _integer(1),
        b"\x8b": _integer(4),
        b"U": _old_text(1),
        b"T": _old_text(4),
        b"X": _text(4),
        b"\x8c": _text(1),
        b"\x8d": _text(8),
        b"B": _bytes(4),
        b"C": _bytes(1),
        b"\x8e": _bytes(8),
        b"\x96": _bytes(8),
        b")": _constant(()),
        b"\x85": _tuple(1),
        b"\x86": _tuple(2),
        b"\x87": _tuple(3),
        b"t": lambda machine: machine.push(tuple(machine.pop_marked())),
        b"]": _new(list),
        b"}": _new(dict),
        b"\x8f": _new(set),
        b"\x91": _frozen_set,
        b"a": _append,
        b"e": _appends,
        b"s": _set_item,
        b"u": _set_items,
        b"\x90": _add_items,
        b"q": _put(1),
        b"r": _put(4),
        b"\x94": lambda machine: machine.put(len(machine.memo)),
        b"h": _get(1),
        b"j": _get(4),
        b"c": _global,
        b"\x93": _stack_global,
        b"R": _reduce,
        b"\x81": _reduce,  # NEWOBJ: a class and its arguments, the same pair as a call
        b"\x92": _new_object_ex,
        b"b": _build,
        b"Q": _persistent,
    }.items()
}
