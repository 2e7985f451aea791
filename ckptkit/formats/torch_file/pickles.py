"""The files of torch.save and the bare pickles beside them, read and written without torch and without running code.

A file is a zip archive (`zipfiles`) with a pickle, `<name>/data.pkl`, and one record `<name>/data/<key>` per storage;
the pickle names storages by persistent ids `("storage", class, key, location, elements)`. Reading gives plain
containers with `Tensor` leaves that name bytes of the file; nothing but the pickle is read.

Source: torch/serialization.py and torch/_utils.py of torch 2.13.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.garbage import collection_paused
from ckptkit.formats.torch_file.pickle_names import (
    LISTED_DTYPES,
    LISTED_NAMES,
    NESTED_CLASSES,
    PYTHON2_MODULES,
    PYTHON2_NAMES,
)
from ckptkit.formats.torch_file.pickling import write_pickle
from ckptkit.formats.torch_file.torch_types import (
    STORAGE_DTYPE_NAMES,
    ClassName,
    Namespace,
    Record,
    TorchDType,
    UnreadableTensor,
)
from ckptkit.formats.torch_file.trees import check_tree
from ckptkit.formats.torch_file.unpickling import Damage, check_key, run_pickle
from ckptkit.formats.torch_file.zipfiles import ALIGNMENT, Archive, lay_out_archive, open_archive, read_start
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import MAX_AXES, Tensor

__all__ = [
    "ClassName",
    "Namespace",
    "Record",
    "TorchDType",
    "UnreadableTensor",
    "dumps",
    "lay_out_torch_file",
    "loads",
    "read_torch_file",
]

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_SAVE_AGAIN = "load it with torch and save it again with torch.save"


def read_torch_file(path: str | Path, start: int = 0, length: int | None = None) -> object:
    """The content of a file of torch.save.

    Containers come back as dict, list, tuple and set. Tensors and parameters come back as `Tensor`, without their data;
    one tensor of the file is one object. Tensors whose elements are no rows of the file are `UnreadableTensor`.
    Argument namespaces are `Namespace`, element types `TorchDType`, sizes tuples, and any other listed object a
    `Record`.

    Args:
        path: The file.
        start: Byte at which the archive starts, for one among several in a `.distcp` file.
        length: Its length in bytes; by default it goes to the end of the file.

    Raises:
        InputError: The file is missing or damaged, or its pickle names something that no checkpoint needs.
        UnsupportedError: It was written before torch 1.6, by TorchScript, or on a big-endian machine.
        StorageError: The disk cannot be read.
    """
    _check_kind(Path(path), start, length)
    archive = open_archive(path, start, length)
    root = _root(archive)
    order = archive.read(f"{root}/byteorder")
    if order not in (None, b"little"):
        raise UnsupportedError(
            "its numbers are big-endian" if order == b"big" else "its byteorder record is not one that torch writes",
            where=path,
            hint="save it again on a little-endian machine",
        )
    data = archive.read(f"{root}/data.pkl") or b""
    return _evaluate(data, path, lambda key: _record_of(archive, f"{root}/data/{key}"))


def loads(data: bytes, where: object) -> object:
    """The content of a bare pickle (the `.metadata` of a distributed checkpoint), in the form of `read_torch_file`.

    Args:
        data: The pickle.
        where: Its name in errors.

    Raises:
        InputError: It is damaged, refers to a storage, or names something that no checkpoint needs.
    """
    return _evaluate(data, where, None)


def dumps(obj: object) -> bytes:
    """The pickle (protocol 2) of an object without tensors; `Record`s become the objects that they name.

    Raises:
        TypeError: A part of it cannot be written.
    """
    data, storages = write_pickle(obj)
    if storages:
        raise TypeError(f"tensor {storages[0].label or 'alone'} has no place in a bare pickle")
    return data


def lay_out_torch_file(path: str, obj: object, archive_name: str | None = None) -> OutputFile:
    """A file that torch.load (weights-only and mapped, too) gives back as `obj`.

    The bytes are those of torch.save, except for the record `.data/serialization_id`: torch derives it from the
    contents, which are not known here, so it is derived from the pickle instead (torch only logs it).

    Args:
        path: Relative to the destination.
        obj: Made of dict, OrderedDict, list, tuple, str, bytes, int, float, bool, None, `Tensor` (casts are honoured),
            `Namespace`, `TorchDType` and `Record`. A tensor that occurs twice (the same object) is stored once.
        archive_name: First component of the record names, by default what torch makes of the path.

    Raises:
        TypeError: A part of `obj` has another type.
    """
    root = _archive_name(path) if archive_name is None else archive_name
    pickle, storages = write_pickle(obj)
    identity = int.from_bytes(hashlib.sha256(pickle).digest(), "big") % 10**40
    records: list[tuple[str, bytes | Tensor, str]] = [
        (f"{root}/data.pkl", pickle, ""),
        (f"{root}/.format_version", b"1", ""),
        (f"{root}/.storage_alignment", str(ALIGNMENT).encode(), ""),
        (f"{root}/byteorder", b"little", ""),
        *((f"{root}/data/{key}", storage.tensor, storage.label) for key, storage in enumerate(storages)),
        (f"{root}/version", b"3\n", ""),
        (f"{root}/.data/serialization_id", f"{identity:040d}".encode(), ""),
    ]
    layout = lay_out_archive(records)
    return OutputFile(path, layout.size, layout.segments, layout.checksums, tensors=len(storages))


def _archive_name(path: str) -> str:
    """The stem of the file name; torch writes `archive` where it cannot hand the path to its C++ writer."""
    name = PurePosixPath(path).name
    stem = name.rpartition(".")[0] if "." in name else name
    return stem if stem and path.isascii() else "archive"


def _check_kind(path: Path, start: int, length: int | None) -> None:
    """Refuses files that are recognisably something else."""
    head = read_start(path, start, length, 64)
    if head.startswith(_ZIP):
        return
    if head.startswith(_LEGACY):
        raise UnsupportedError("written by torch.save before torch 1.6", where=path, hint=_SAVE_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise InputError("a Git LFS pointer instead of the file", where=path, hint="run git lfs pull")
    reason = "the file is empty" if not head else "not a file that torch.save wrote"
    raise InputError(reason, where=path, hint="fetch or copy it again" if not head else None)


def _root(archive: Archive) -> str:
    """The first component of the record names."""
    names = archive.members
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise InputError("a zip archive, but not one of torch.save: it needs one record data.pkl", where=archive.path)
    if f"{roots[0]}/constants.pkl" in names:
        raise UnsupportedError("a TorchScript archive", where=archive.path, hint="torch.save its state_dict() instead")
    return roots[0]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a storage lies."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage as a tensor sees it."""

    place: _Place
    dtype_name: str


def _record_of(archive: Archive, name: str) -> _Place:
    member = archive.find(name)
    if member is None:
        raise InputError(f"record {name} is missing", where=archive.path, hint="fetch or copy it again")
    return _Place(str(archive.path), member.offset, member.size)


def _evaluate(data: bytes, where: object, find: Callable[[str], _Place] | None) -> object:
    value = run_pickle(data, _Meaning(where, find), where)
    with collection_paused():
        check_tree(value, len(data), "its pickle", where)
    return value


class _Meaning:
    """The meaning of the names in a checkpoint (an `unpickling.Meaning`)."""

    def __init__(self, where: object, find: Callable[[str], _Place] | None) -> None:
        self._where = where
        self._find = find

    def resolve(self, module: str, name: str) -> object:
        if module == "torch" and name in LISTED_DTYPES:
            return TorchDType(name)
        if module in PYTHON2_MODULES:
            module, name = PYTHON2_MODULES[module], PYTHON2_NAMES.get(name, name)
        found = ClassName(module, name)
        if (module, name) not in LISTED_NAMES and found != _GETATTR:
            raise self._unlisted(found)
        return found

    def _unlisted(self, found: ClassName) -> InputError:
        shown = f"{found.module}.{found.name}"
        shown = shown if len(shown) <= 120 and shown.isprintable() else ascii(shown[:120])
        return InputError(
            f"its pickle names {shown}, which is not on the list of things a checkpoint needs; nothing was run",
            where=self._where,
        )

    def call(self, target: object, args: tuple[object, ...]) -> object:
        if not isinstance(target, ClassName):
            raise Damage(f"a call of a {type(target).__name__}")
        if target == _GETATTR:
            return self._nested_class(args)
        if target == _REBUILD_FROM_TYPE:
            return self._rebuild_from_type(args)
        make = _MAKERS.get((target.module, target.name))
        return Record(target.module, target.name, args) if make is None else make(args)

    def build(self, target: object, state: object) -> None:
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, Namespace):
            target.fields.update(_attributes(state))
        elif not isinstance(target, dict):
            # A checkpoint does not need the attributes of an OrderedDict (the `_metadata` of a state dict).
            raise Damage(f"a state for a {type(target).__name__}")

    def persistent(self, pid: object) -> object:
        match pid:
            case ("storage", ClassName(name=kind), str(key), _, int(elements)):
                return self._storage(kind, key, elements)
        raise Damage("a persistent id that is not a storage")

    def _storage(self, kind: str, key: str, elements: int) -> _Storage:
        if self._find is None:
            raise Damage("it refers to a storage, but there is none beside it")
        dtype_name = "uint8" if kind == "UntypedStorage" else STORAGE_DTYPE_NAMES.get(kind)
        if dtype_name is None or not 0 <= elements < 1 << 63:
            raise Damage("a persistent id that is not a storage")
        place = self._find(key)
        dtype = DTYPES_BY_TORCH_NAME.get(dtype_name)
        if dtype is not None and elements * dtype.itemsize > place.nbytes:
            raise InputError(
                f"storage {key} has {place.nbytes:,} bytes instead of {elements * dtype.itemsize:,}",
                where=self._where,
                hint="fetch or copy it again",
            )
        return _Storage(place, dtype_name)

    def _nested_class(self, args: tuple[object, ...]) -> ClassName:
        """`getattr(class, name)`, as long as it is one of the classes inside others that are listed."""
        match args:
            case (ClassName(module, outer), str(inner)) if (f"{module}.{outer}", inner) in NESTED_CLASSES:
                return ClassName(module, f"{outer}.{inner}")
        raise self._unlisted(_GETATTR)

    def _rebuild_from_type(self, args: tuple[object, ...]) -> object:
        """`(function, type, arguments, state)`: a tensor subclass, or a tensor with attributes."""
        match args:
            case (ClassName() as function, ClassName() as kind, tuple(inner), state) if function != _REBUILD_FROM_TYPE:
                made = self.call(function, inner)
                plain = (kind.module, kind.name) in _PLAIN_TENSORS
                return made if plain else Record(kind.module, kind.name, inner, state)
        raise Damage("a tensor that is not rebuilt as torch does")


_GETATTR = ClassName("builtins", "getattr")
_REBUILD_FROM_TYPE = ClassName("torch._tensor", "_rebuild_from_type_v2")
_PLAIN_TENSORS = {
    ("torch", "Tensor"),
    ("torch._tensor", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
}


def _attributes(state: object) -> dict[str, object]:
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise Damage("a namespace whose attributes have no names")
    return state


def _sizes(value: Any) -> tuple[int, ...]:
    """Sizes or strides: a tuple of counts."""
    sound = isinstance(value, tuple) and len(value) <= MAX_AXES
    if not sound or not all(type(size) is int and 0 <= size < 1 << 63 for size in value):
        raise Damage("a tensor without proper sizes")
    sizes: tuple[int, ...] = value
    return sizes


def _make_tensor_v2(args: tuple[object, ...]) -> object:
    match args:
        case (_Storage() as storage, int(offset), size, stride, _, _, *metadata):
            return _tensor(storage, storage.dtype_name, offset, _sizes(size), _sizes(stride), metadata)
        case (Record(), _, size, *_):
            return UnreadableTensor("lies in bytes inside the pickle", _sizes(size))
    raise Damage("a tensor that is not rebuilt as torch does")


def _make_tensor_v3(args: tuple[object, ...]) -> object:
    match args:
        case (_Storage() as storage, int(offset), size, stride, _, _, TorchDType(name=name), *metadata):
            return _tensor(storage, name, offset, _sizes(size), _sizes(stride), metadata)
    raise Damage("a tensor that is not rebuilt as torch does")


def _make_tensor_v1(args: tuple[object, ...]) -> object:
    return _make_tensor_v2((*args, False, {}))


def _tensor(
    storage: _Storage,
    dtype_name: str,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    metadata: list[object],
) -> Tensor | UnreadableTensor:
    """The elements at `offset + sum(index * stride)` of a storage, all counted in elements."""
    dtype = DTYPES_BY_TORCH_NAME.get(dtype_name)
    if dtype is None:
        return UnreadableTensor(f"has elements of type torch.{dtype_name}, which nothing here converts", shape)
    if len(shape) != len(strides):
        raise Damage("a tensor with more or fewer strides than sizes")
    if 0 in shape:
        return Tensor(dtype, shape, ())
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if offset < 0 or (last + 1) * dtype.itemsize > storage.place.nbytes:
        raise Damage(f"a tensor {list(shape)} reaches beyond its storage")
    if any(metadata):
        return UnreadableTensor("is a conjugate or negated view", shape)
    pitch = _pitch(shape, strides)
    if pitch is None:
        return UnreadableTensor(f"does not lie row by row in the file (strides {list(strides)})", shape)
    start = storage.place.offset + offset * dtype.itemsize
    return Tensor.from_file(storage.place.file, start, dtype, shape, pitch * dtype.itemsize)


def _pitch(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Elements from one row to the next (as `Tensor` folds rows), or None where that is not one number."""
    leading = len(shape) if len(shape) < 2 else len(shape) - 1
    width = 1 if len(shape) < 2 else shape[-1]
    if width > 1 and strides[-1] != 1:
        return None
    pitch, rows = 0, 1
    for size, stride in zip(shape[:leading][::-1], strides[:leading][::-1], strict=True):
        if size == 1:
            continue
        if rows == 1:
            pitch = stride
        elif stride != pitch * rows:
            return None
        rows *= size
    if rows == 1:
        return width
    return pitch if pitch >= width else None


def _first(args: tuple[object, ...]) -> object:
    """A parameter is its data."""
    if not args or not isinstance(args[0], Tensor | UnreadableTensor | Record):
        raise Damage("a parameter without data")
    return args[0]


def _unreadable(reason: str) -> Callable[[tuple[object, ...]], object]:
    return lambda args: UnreadableTensor(reason)


def _make_container(kind: type) -> Callable[[tuple[object, ...]], object]:
    """`kind()` or `kind(items)`, with items that were listed."""

    def make(args: tuple[object, ...]) -> object:
        match args:
            case ():
                return kind()
            case (list() | tuple() | set() | frozenset() as items,):
                return kind(map(check_key, items) if kind in (set, frozenset) else items)
        raise Damage(f"a {kind.__name__} that is made of something else")

    return make


def _make_dict(args: tuple[object, ...]) -> object:
    """A dict, or a relative of it: from nothing, a dict, or pairs."""
    match args:
        case ():
            return {}
        case (dict() as items,):
            return dict(items)
        case (list() as pairs,) if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            return {check_key(key): value for key, value in pairs}
    raise Damage("a dict that is made of something else")


def _make_default_dict(args: tuple[object, ...]) -> object:
    return _make_dict(args[1:])


def _make_deque(args: tuple[object, ...]) -> object:
    return list(args[0]) if args and isinstance(args[0], list | tuple) else []


def _make_bytes(args: tuple[object, ...]) -> object:
    """Bytes, which protocol 2 spells as text to encode."""
    match args:
        case ():
            return b""
        case (bytes() as data,):
            return data
        case (str() as text, "latin1" | "latin-1"):
            return text.encode("latin1")
    raise Damage("bytes that are made of something else")


def _make_complex(args: tuple[object, ...]) -> object:
    match args:
        case (int() | float() as real, int() | float() as imaginary):
            return complex(float(real), float(imaginary))
    raise Damage("a complex number that is made of something else")


def _make_size(args: tuple[object, ...]) -> object:
    match args:
        case (list() | tuple() as sizes,):
            return _sizes(tuple(sizes))
    raise Damage("a torch.Size that is made of something else")


def _make_namespace(args: tuple[object, ...]) -> object:
    if args:
        raise Damage("a namespace that is made of something else")
    return Namespace()


_MAKERS: Mapping[tuple[str, str], Callable[[tuple[object, ...]], object]] = {
    ("builtins", "set"): _make_container(set),
    ("builtins", "frozenset"): _make_container(frozenset),
    ("builtins", "list"): _make_container(list),
    ("builtins", "tuple"): _make_container(tuple),
    ("builtins", "dict"): _make_dict,
    ("builtins", "bytes"): _make_bytes,
    ("builtins", "bytearray"): _make_bytes,
    ("builtins", "complex"): _make_complex,
    ("_codecs", "encode"): _make_bytes,
    ("collections", "OrderedDict"): _make_dict,
    ("collections", "Counter"): _make_dict,
    ("collections", "defaultdict"): _make_default_dict,
    ("collections", "deque"): _make_deque,
    ("argparse", "Namespace"): _make_namespace,
    ("types", "SimpleNamespace"): _make_namespace,
    ("torch", "Size"): _make_size,
    ("torch._utils", "_rebuild_tensor"): _make_tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _make_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _make_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _first,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unreadable("is a NumPy array inside the pickle"),
    ("torch._utils", "_rebuild_qtensor"): _unreadable("is quantized"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("is sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _unreadable("is a nested tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("was saved from the meta device, without data"),
}
