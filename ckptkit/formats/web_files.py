"""The files of a checkpoint on a web server, which lists none: found by their usual names, and by what names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count, takewhile
from pathlib import PurePosixPath
from typing import Any

from ckptkit.errors import InputError, StorageError
from ckptkit.formats import peft, sidecar, torch_dist, torch_legacy
from ckptkit.formats.dcp.reading import METADATA, open_dcp
from ckptkit.formats.hf import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE
from ckptkit.formats.json_files import LARGEST, parse_object
from ckptkit.formats.packed import ARGS
from ckptkit.formats.run_config import RUN_CONFIG
from ckptkit.io.stores.mirror import mirror_of
from ckptkit.io.stores.objects import MOST_OBJECTS, Object
from ckptkit.io.stores.web import Web

_DESCRIBING = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Small files of a Hugging Face directory that transformers looks for."""
_WEIGHTS = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX, ARGS, peft.CONFIG, peft.SAFETENSORS, peft.BIN)
_OF_ITERATION = (METADATA, torch_dist.CONFIG, torch_dist.COMMON, RUN_CONFIG, "tokenizer/tokenizer.json")
_TRACKED = re.compile(r"release|[0-9]{1,18}")
_MODULE = re.compile(r"[A-Za-z_]\w{0,100}")
_MOST_RANKS = 1024
_LONGEST_TRACKER = 64


class _Finder:
    """The files that are there, of those that were asked for."""

    def __init__(self, web: Web) -> None:
        self._web = web
        self.found: dict[str, Object] = {}

    def ask(self, names: Iterable[str]) -> list[Object]:
        """Those of some names that are there."""
        new = [name for name in dict.fromkeys(names) if name not in self.found]
        if len(new) + len(self.found) > MOST_OBJECTS:
            raise InputError(f"names more than {MOST_OBJECTS:,} files", where=self._web.address)
        there = [file for file in self._web.found(new) if file is not None]
        self.found.update({file.name: file for file in there})
        return there

    def json(self, name: str) -> dict[str, Any]:
        """The object in a file, or an empty one where there is no such file."""
        file = self.found.get(name)
        return {} if file is None else parse_object(self.read(file, LARGEST), f"{self._web.address}/{name}")

    def read(self, file: Object, limit: int) -> bytes:
        """All bytes of a small file."""
        if file.size > limit:
            where = f"{self._web.address}/{file.name}"
            raise InputError(f"larger than {limit:,} bytes, the most that such a file may have", where=where)
        data = bytearray(file.size)
        if data:
            self._web.read(file, 0, memoryview(data))
        return bytes(data)


def find_files(web: Web) -> list[Object]:
    """The files of the checkpoint in a folder of a web server.

    Raises:
        InputError: None is there, or a file that names others is damaged.
        StorageError: The server does not answer, or not with this.
    """
    finder = _Finder(web)
    finder.ask((*_DESCRIBING, *_WEIGHTS, *_OF_ITERATION, torch_legacy.TRACKER, _in_sidecar(sidecar.MANIFEST)))
    _described(finder, "")
    folder = _iteration(finder)
    if folder:
        finder.ask(f"{folder}/{name}" for name in _OF_ITERATION)
    _ranks(finder, folder)
    if _in_sidecar(sidecar.MANIFEST) in finder.found:
        _sidecar(finder)
    _distributed(finder, web, folder)
    if not finder.found and web.denied:
        raise StorageError("the server does not allow it", where=web.address, hint="it must be readable by everybody")
    if not finder.found:
        hint = "give the folder that config.json, the tracker file or .metadata is in"
        raise InputError("none of the files that name the others is there", where=web.address, hint=hint)
    web.names = sorted(finder.found)
    return [finder.found[name] for name in web.names]


def _in_sidecar(name: str) -> str:
    return f"{sidecar.FOLDER}/{name}"


def _described(finder: _Finder, start: str) -> list[str]:
    """Finds the weights that an index names, and the code that config.json names; gives the names of the shards."""
    shards: set[str] = set()
    for index in (INDEX, BIN_INDEX):
        named = finder.json(start + index).get("weight_map")
        if isinstance(named, dict):
            shards.update(name for name in named.values() if isinstance(name, str) and _is_plain(name))
    modules = finder.json(f"{start}config.json").get("auto_map")
    texts = [text for text in modules.values() if isinstance(text, str)] if isinstance(modules, dict) else []
    code = {text.partition(".")[0] for text in texts if "--" not in text}
    finder.ask(f"{start}{name}.py" for name in sorted(code) if _MODULE.fullmatch(name))
    if not start:
        finder.ask(sorted(shards))
    return sorted(shards)


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return path.as_posix() == name and not path.is_absolute() and ".." not in path.parts and name.isprintable()


def _iteration(finder: _Finder) -> str:
    """The folder that the tracker file names, or nothing."""
    tracker = finder.found.get(torch_legacy.TRACKER)
    if tracker is None:
        return ""
    text = finder.read(tracker, _LONGEST_TRACKER).decode("utf-8", "replace").strip()
    if not _TRACKED.fullmatch(text):
        return ""  # its reader says so
    return text if text == "release" else f"iter_{int(text):07d}"


def _ranks(finder: _Finder, folder: str) -> None:
    """Finds `mp_rank_*` folders: each number is counted up until there is none."""
    start = f"{folder}/" if folder else ""

    def there(name: str) -> bool:
        return bool(finder.ask([f"{start}mp_rank_{name}/{torch_legacy.FILE}"]))

    forms = ("00", "00_000", "00_000_000")
    form = next((form for form in forms if there(form)), None)
    if form is None:
        return
    axes = form.count("_") + 1
    sizes = [_counted(partial(_named, axes, axis), there) for axis in range(axes)]
    total = 1
    for size in sizes:
        total *= size
    if total > _MOST_RANKS:
        raise InputError(f"more than {_MOST_RANKS:,} ranks", where=start or "the folder")
    tensor, pipeline, expert = (*sizes, 1, 1)[:3]
    names = [(t, p, e)[:axes] for t in range(tensor) for p in range(pipeline) for e in range(expert)]
    finder.ask(f"{start}mp_rank_{_rank(name)}/{torch_legacy.FILE}" for name in names)


def _counted(name: Callable[[int], str], there: Callable[[str], bool]) -> int:
    return 1 + sum(1 for _ in takewhile(lambda number: number < _MOST_RANKS and there(name(number)), count(1)))


def _named(axes: int, axis: int, number: int) -> str:
    return _rank(tuple(number if at == axis else 0 for at in range(axes)))


def _rank(numbers: tuple[int, ...]) -> str:
    return "_".join([f"{numbers[0]:02d}", *(f"{number:03d}" for number in numbers[1:])])


def _sidecar(finder: _Finder) -> None:
    inside = _in_sidecar(f"{sidecar.SMALL}/")
    finder.ask(inside + name for name in (*_DESCRIBING, INDEX, BIN_INDEX))
    shards = _described(finder, inside) or [SINGLE]
    finder.ask(_in_sidecar(f"{sidecar.HEADERS}/{name}.header") for name in shards)
    finder.ask(map(_in_sidecar, (sidecar.EXTRAS, sidecar.ORIGINALS)))


def _distributed(finder: _Finder, web: Web, folder: str) -> None:
    """Finds the files that `.metadata` names."""
    start = f"{folder}/" if folder else ""
    metadata = finder.found.get(start + METADATA)
    if metadata is None:
        return
    with mirror_of(web, [metadata]) as mirror:
        described = open_dcp(mirror.folder / folder)
    named = {chunk.span.file for stored in described.tensors.values() for chunk in stored.chunks}
    named.update(span.file for span in described.objects.values())
    finder.ask(start + name for name in sorted(named) if _is_plain(name))
