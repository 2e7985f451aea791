"""A Hugging Face directory: config.json, the weights (one file, or shards with an index) and everything beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats import safetensors
from ckptkit.formats.foreign import refuse_foreign_files
from ckptkit.formats.format import Archive, Format
from ckptkit.formats.json_files import read_json
from ckptkit.formats.links import CACHES, check_link, is_linked_folder
from ckptkit.formats.safetensors import Header
from ckptkit.formats.torch_file.pickles import UnreadableTensor, read_torch_file
from ckptkit.io.plan import OutputFile
from ckptkit.io.regular import walk
from ckptkit.io.stores.mirror import prepare_starts
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.formats.quantised.archive import Quantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx", ".ot", ".distcp"}
_DISTRIBUTED = ".metadata"  # describes the .distcp files beside it
_SKIPPED_FOLDERS = {*CACHES, "ckptkit"}


@dataclass(frozen=True)
class HfFiles:
    """An opened Hugging Face directory.

    Attributes:
        path: The directory.
        config: config.json as parsed.
        tensors: Stored name -> tensor, in file order.
        headers: Shard file -> header, empty for pickled weights.
        small: Relative path -> absolute path of every file that is not weights, config.json included.
        ignored: Files and folders that are not part of the model: stale shards and indices, other formats, folders that
            are links.
        quantised: The quantised weights; `tensors` and `headers` are then what `formats/quantised/` makes of them.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    headers: dict[str, Header]
    small: dict[str, Path]
    ignored: list[str] = field(default_factory=list)
    quantised: Quantised | None = None


def is_weights(name: str) -> bool:
    """Whether a file name is that of weights, ours or another format's."""
    return PurePosixPath(name).suffix in _WEIGHTS or PurePosixPath(name).name == _DISTRIBUTED


def has_shards(path: Path) -> bool:
    """Whether a directory holds weights by the names that transformers gives them."""
    return any((path / name).is_file() for name in (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX))


class Shards(NamedTuple):
    """The weights of a directory: name -> tensor, file -> header of its safetensors files, and all their names."""

    tensors: dict[str, Tensor]
    headers: dict[str, Header]
    names: list[str]


def open_hf(path: Path, shards: Shards | None = None) -> HfFiles:
    """Opens a directory; only headers are read.

    Args:
        path: The directory.
        shards: The result of `read_shards`, if it is known already: large models have large headers.

    Raises:
        InputError: A file is missing or damaged, or index and shards disagree.
    """
    check_link(path / "config.json", path)
    config = read_json(path / "config.json")
    tensors, headers, names = shards or read_shards(path)
    small, unused = small_files(path)
    used = _index_in_use(path)
    for index in (INDEX, BIN_INDEX):
        # An index belongs to its weights, so it is kept only with them.
        if index in small and (index != used or not headers):
            del small[index]
            unused += [index] if index != used else []
    return HfFiles(path, config, tensors, headers, small, sorted(set(unused) - set(names)))


def open_reference(path: Path) -> HfFiles:
    """Opens a directory for its config, tokenizer and shard map; it need not hold weights.

    Without them (or without some, as when only the small files were fetched) there is no shard map.

    Raises:
        InputError: A file is missing or damaged, or index and shards disagree.
    """
    return open_hf(path, None if _holds_weights(path) else Shards({}, {}, []))


def _holds_weights(path: Path) -> bool:
    """Whether a directory has all weights that its index lists."""
    for index_name, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (path / single).is_file():
            return True
        if (path / index_name).is_file():
            shards = read_json(path / index_name).get("weight_map")
            return not isinstance(shards, dict) or all((path / str(name)).is_file() for name in shards.values())
    return False


def read_shards(path: Path) -> Shards:
    """The weights of a directory; the index decides what belongs to the model, or else the single file.

    Raises:
        InputError: A file is missing or damaged, or index and shards disagree.
    """
    names, index = weight_files(path)
    prepare_starts(path / name for name in names if not name.endswith(".bin"))
    headers: dict[str, Header] = {}
    tensors: dict[str, Tensor] = {}
    held: dict[str, str] = {}
    for name in names:
        shard = path / name
        found, header = read_shard(shard)
        if header is not None:
            headers[name] = header
        if twice := sorted(found.keys() & tensors.keys()):
            raise InputError(f"tensor {twice[0]} is in two shards", where=shard)
        tensors.update(found)
        held.update(dict.fromkeys(found, name))
    if index is not None:
        _check_index(path, index["weight_map"], held)
    return Shards(tensors, headers, names)


def read_shard(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    """The tensors of one file, and its header if it is safetensors.

    Raises:
        InputError: It is damaged.
        UnsupportedError: A tensor has a type that ckptkit does not know.
    """
    if path.suffix == ".bin":
        return _read_bin(path), None
    header = safetensors.read_header(path)
    return safetensors.tensors_of(path, header), header


def lay_out_shards(tensors: Mapping[str, Tensor], shard_size: int) -> list[OutputFile]:
    """New shards of at most `shard_size` bytes (a larger tensor gets its own), and their index if there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        return [safetensors.lay_out(SINGLE, shards[0])]
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = [safetensors.lay_out(name, shard) for name, shard in zip(names, shards, strict=True)]
    parameters, size = (sum(sizes) for sizes in zip(*((t.numel, t.nbytes) for t in tensors.values()), strict=True))
    return [*files, OutputFile.small(INDEX, _index(dict(zip(names, shards, strict=True)), parameters, size))]


def index_of(headers: Mapping[str, Header]) -> bytes:
    """An index of files with these headers."""
    entries = [entry for header in headers.values() for entry in header.entries.values()]
    shards = {name: header.entries for name, header in headers.items()}
    return _index(shards, sum(prod(entry.shape) for entry in entries), sum(e.stop - e.start for e in entries))


def _index(shards: Mapping[str, Mapping[str, object]], parameters: int, size: int) -> bytes:
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": {key: name for name, shard in shards.items() for key in shard},
    }
    return json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"


def lay_out_like(tensors: Mapping[str, Tensor], headers: Mapping[str, Header]) -> list[OutputFile] | None:
    """The very files that `headers` describe, or None if the tensors are not exactly those of the headers."""
    known = {name for header in headers.values() for name in header.entries}
    if not headers or known != tensors.keys():
        return None
    files = []
    for path, header in headers.items():
        shard = {name: tensors[name] for name in header.entries}
        if not header.matches(shard):
            return None
        files.append(safetensors.lay_out(path, shard, header))
    return files


def weight_files(path: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The names of the files that make up the model, and the index if there is one.

    Raises:
        InputError: There are none, the index is damaged, or names a file that is missing or outside the folder.
    """
    for index_name, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (path / single).is_file():
            check_link(path / single, path)
            return [single], None
        if (path / index_name).is_file():
            index = read_json(path / index_name)
            shards = index.get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
                raise InputError("the index has no weight_map", where=path / index_name)
            for name in sorted(set(shards.values())):
                _check_shard_name(path / index_name, name)
            usual = {name: PurePosixPath(name).as_posix() for name in set(shards.values())}
            index["weight_map"] = {key: usual[name] for key, name in shards.items()}
            return sorted(set(usual.values())), index
    refuse_foreign_files(path)
    found = sorted(item.name for item in path.glob("*.safetensors")) if path.is_dir() else []
    what = f"{', '.join(found[:3])} without {INDEX}" if found else f"no {SINGLE} and no {INDEX}"
    raise InputError(what, where=path, hint="is the download complete?")


def _index_in_use(path: Path) -> str | None:
    """The index that says which files make up the model, if one does."""
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (path / single).is_file():
            return None
        if (path / index).is_file():
            return index
    return None


def weight_sets(path: Path, read: list[str]) -> list[tuple[str, list[str]]]:
    """The weights that are whole in a directory: what describes them, and their files; those first that are read.

    An index without its files describes nothing; one of a single file that is known by itself describes no others.

    Args:
        path: The directory.
        read: The files that are read.
    """
    found: list[tuple[str, list[str]]] = []
    used = _index_in_use(path)
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (path / single).is_file():
            found.append((single, [single]))
        if index == used and read != [single]:
            found.append((index, read))
        elif (path / index).is_file():
            listed = read_json(path / index).get("weight_map")
            listed = listed if isinstance(listed, dict) else {}
            names = sorted({PurePosixPath(name).as_posix() for name in set(map(str, listed.values()))})
            if names and names != [single] and all((path / name).is_file() for name in names):
                for name in names:
                    _check_shard_name(path / index, name)
                found.append((index, names))
    return found


def _check_shard_name(index: Path, name: str) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in name or "\0" in name:
        raise InputError(f"the index points outside the folder ({name})", where=index)
    check_link(index.parent / name, index.parent)
    if not (index.parent / name).is_file():
        raise InputError(f"the index names {name}, which is missing", where=index, hint="fetch the missing shard")


def _check_index(path: Path, listed: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Whether the index lists every tensor in the file that holds it."""
    if listed == held:
        return
    if missing := sorted(listed.keys() - held.keys()):
        raise InputError(f"the index lists {missing[0]} in {listed[missing[0]]}, which does not hold it", where=path)
    if extra := sorted(held.keys() - listed.keys()):
        raise InputError(f"the shards hold {extra[0]}, which the index does not list", where=path)
    name = next(name for name, file in held.items() if listed[name] != file)
    raise InputError(f"the index lists {name} in {listed[name]}, it is in {held[name]}", where=path)


def _read_bin(path: Path) -> dict[str, Tensor]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise InputError("not a dictionary of tensors", where=path)
    for name, value in content.items():
        if not isinstance(name, str):
            raise InputError(f"a tensor whose name is a {type(name).__name__}", where=path)
        if isinstance(value, UnreadableTensor):
            raise value.error(name, path)
        if not isinstance(value, Tensor):
            raise InputError(f"entry {name!r} is not a tensor", where=path)
    return dict(content)


def small_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    """The small files below a folder (relative path -> file), and the names that are left out.

    Files of weights are left out, and so are links to folders: their content is listed at its own place in the folder.

    Raises:
        InputError: A link leads out of the folder, or nowhere.
        UnsupportedError: There is something that is neither a file nor a folder.
    """
    small: dict[str, Path] = {}
    others: list[str] = []
    for file in _walk(path):
        name = file.relative_to(path).as_posix()
        if is_weights(name) or is_linked_folder(file):
            others.append(name)
        else:
            small[name] = file
    return small, others


def _walk(root: Path) -> Iterator[Path]:
    for item in walk(root, _SKIPPED_FOLDERS, lambda path: check_link(path, root)):
        if not (item.is_file() or is_linked_folder(item)):
            raise UnsupportedError("neither a file nor a folder", where=item)
        yield item


def _checks(folder: Path) -> Iterator[Callable[[], object]]:
    names: list[str] = []
    yield lambda: names.extend(weight_files(folder)[0])
    for name in names:
        yield partial(read_shard, folder / name)


def _archives(folder: Path) -> Iterator[Archive]:
    return (Archive(folder / name) for name in weight_files(folder)[0] if name.endswith(".bin"))


HF = Format("hf", has_shards, _checks, _archives)
"""Also the container of `packed`, which differs in the names of its tensors alone."""
