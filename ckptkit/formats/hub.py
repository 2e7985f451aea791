"""Hub references, `org/model@revision`: only the files that a conversion needs, or for a plan only their headers.

The answers of a hub are input. Their size is bounded, they are checked before use, and they cannot cause a write
outside the cache.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from ckptkit.errors import CkptkitError, InputError, StorageError, UnsupportedError, UsageError
from ckptkit.formats.hf import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, is_weights
from ckptkit.formats.json_files import LARGEST, parse_object
from ckptkit.formats.safetensors import MAX_HEADER
from ckptkit.formats.stores import mirrored_folder
from ckptkit.io.crew import Crew
from ckptkit.io.stores.address import is_address

_REFERENCE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TAG = re.compile(r'(W/)?"?[\w+=-][\w.+=-]{0,255}"?')  # of a file; the library makes a file name of it
_FIRST_READ = 1 << 17
_LARGEST_ANSWER, _LARGEST_READ = 32_000_000, 128_000_000
_LARGEST_FILE = 1 << 42
_LONGEST_NAME = 1024
_THREADS = 4
_PATIENCE = 120.0  # seconds for an answer that is read into memory


@dataclass(frozen=True)
class Located:
    """Where a model is.

    Attributes:
        path: A local directory.
        origin: For a hub model `{"repository": ..., "revision": <commit>}`, else empty.
    """

    path: Path
    origin: dict[str, str]


def is_reference(text: str | Path) -> bool:
    """Whether `text` names a hub model; a local path of that name wins."""
    return not Path(text).exists() and _REFERENCE.fullmatch(str(text)) is not None


@contextmanager
def locate(text: str | Path, *, headers_only: bool = False) -> Iterator[Located]:
    """A local directory for a path, a hub reference or a folder in a store, as long as the context lives.

    Args:
        text: A directory, `s3://bucket/prefix`, `https://host/folder`, or `org/model` with an optional `@revision`
            (branch, tag or commit).
        headers_only: Fetch config, index and safetensors headers only; the directory then holds sparse files of the
            true sizes, all that a plan needs.

    Raises:
        UsageError: `text` is empty.
        InputError: There is no such model or revision, it is gated, or the hub's answer makes no sense.
        StorageError: The hub cannot be reached.
    """
    if not str(text):
        raise UsageError("no checkpoint is named", hint="name a directory (is a variable of the shell unset?)")
    if is_address(text):
        with mirrored_folder(text) as folder:
            yield Located(folder, {})
        return
    if not is_reference(text):
        yield Located(Path(text), {})
        return
    repository, _, revision = str(text).partition("@")
    if not headers_only:
        with _one_line_errors(str(text)), _Watch() as watch:
            hub = _Hub(repository, revision or None, watch)
            path = hub.download()
        yield Located(path, hub.origin)
        return
    with TemporaryDirectory(prefix="ckptkit-headers-") as folder:
        with _one_line_errors(str(text)), _Watch() as watch:
            hub = _Hub(repository, revision or None, watch)
            hub.mirror(Path(folder))
        yield Located(Path(folder), hub.origin)


class _Hub:
    """One revision of one model repository."""

    def __init__(self, repository: str, revision: str | None, watch: _Watch) -> None:
        from huggingface_hub import constants

        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        url = f"{constants.ENDPOINT}/api/models/{repository}{at}?blobs=true"
        info = _parsed(_get(url, _LARGEST_ANSWER, {}))
        commit, files = info.get("sha"), info.get("siblings")
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise InputError("names no commit of 40 hexadecimal digits", where=_ANSWER)
        if not isinstance(files, list):
            raise InputError("lists no files", where=_ANSWER)
        self.repository = repository
        self.commit = watch.commit = commit
        self._watch = watch
        self.sizes = dict(map(_listed, files))

    @property
    def origin(self) -> dict[str, str]:
        return {"repository": self.repository, "revision": self.commit}

    def download(self) -> Path:
        """The needed files, in the hub's cache."""
        from huggingface_hub import hf_hub_download

        needed = sorted(self._needed(self._index()))

        stopped = threading.Event()

        def fetch(name: str) -> Path | None:
            if stopped.is_set():
                return None
            with self._watch.expecting(self.sizes[name]):
                return Path(hf_hub_download(self.repository, name, revision=self.commit))

        crew = Crew(min(_THREADS, len(needed)), "ckptkit-fetch")
        try:
            found = list(crew.map(fetch, needed))
        finally:
            stopped.set()
            crew.close()
        paths = {name: path for name, path in zip(needed, found, strict=True) if path is not None}
        for name, path in paths.items():
            if (size := path.stat().st_size) != self.sizes[name]:
                raise StorageError(
                    f"{name} came with {size:,} bytes, the hub lists {self.sizes[name]:,}",
                    where=self.repository,
                    hint=f"remove {path} and fetch it again",
                )
        return _folder(paths)

    def mirror(self, folder: Path) -> None:
        """Sparse files of the true sizes that hold real headers, and the real config and index."""
        index = self._index()
        if not self.sizes.keys() & {SINGLE, INDEX}:
            raise UnsupportedError(
                "a plan needs the headers of safetensors files, and this model is in pytorch_model*.bin",
                where=f"{self.repository}@{self.commit}",
                hint="without --dry-run it is fetched first",
            )
        for name in sorted(self._needed(index)):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(self._head(name))
                file.truncate(self.sizes[name])

    def _index(self) -> Mapping[str, Any]:
        name = next((name for name in (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX) if name in self.sizes), None)
        if name is None:
            raise InputError(f"no {SINGLE} and no {INDEX}", where=f"{self.repository}@{self.commit}")
        if name in (SINGLE, BIN_SINGLE):
            return {"": name}
        index = parse_object(self._read(name, 0, self.sizes[name]), f"{self.repository}/{name}")
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError("the index has no weight_map", where=f"{self.repository}/{name}")
        return shards

    def _needed(self, shards: Mapping[str, str]) -> set[str]:
        """Names of the files to fetch.

        Raises:
            InputError: One would lie outside of its folder, or cannot be the name of a file.
        """
        weights = {PurePosixPath(name).as_posix() for name in shards.values()}
        names = {name for name in self.sizes if name in weights or not is_weights(name)}
        for name in sorted(names):
            path = PurePosixPath(name)
            odd = path.is_absolute() or ".." in path.parts or path.as_posix() != name or len(name) > _LONGEST_NAME
            if odd or "\\" in name or not name.isprintable():
                raise InputError(f"the repository holds a file outside its folder ({name[:80]})", where=self.repository)
        return names

    def _head(self, name: str) -> bytes:
        """The bytes of a file that a plan reads: the header of weights, all of config and index."""
        size = self.sizes[name]
        if name in ("config.json", INDEX):
            return self._read(name, 0, size)
        if not name.endswith(".safetensors"):
            return b""
        head = self._read(name, 0, min(_FIRST_READ, size))
        needed = 8 + int.from_bytes(head[:8], "little")
        if len(head) < needed <= min(size, MAX_HEADER + 8):
            head += self._read(name, len(head), needed)
        return head[:needed]

    def _read(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url

        if start >= stop:
            return b""
        if stop - start > LARGEST:
            raise InputError(
                f"{name} has {stop - start:,} bytes to read, at most {LARGEST:,} are", where=self.repository
            )
        url = hf_hub_url(self.repository, name, revision=self.commit)
        content = _get(url, stop - start, {"range": f"bytes={start}-{stop - 1}"}, start)
        if len(content) < stop - start:
            raise StorageError(f"{name} is cut short on its way", where=self.repository, hint="try again")
        return content


_ANSWER = "the hub's answer"


def _parsed(answer: bytes) -> dict[str, Any]:
    try:
        return parse_object(answer, _ANSWER)
    except InputError as error:
        page = answer.lstrip()[:1] == b"<"
        raise InputError("is a web page" if page else f"is {error.what}", where=_ANSWER) from None


def _listed(entry: object) -> tuple[str, int]:
    """Name and size of a file in the hub's list."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    name, size = fields.get("rfilename"), fields.get("size")
    size = 0 if size is None else size
    if not isinstance(name, str) or not name or type(size) is not int or not 0 <= size <= _LARGEST_FILE:
        raise InputError("lists a file without a name or a size that it can have", where=_ANSWER)
    return name, size


def _folder(paths: Mapping[str, Path]) -> Path:
    """The folder in which fetched files have their names."""
    name, path = next(iter(paths.items()))
    return path.parents[len(PurePosixPath(name).parts) - 1]


def _get(url: str, size: int, headers: Mapping[str, str], skip: int = 0) -> bytes:
    """At most `size` bytes of an answer, from byte `skip` on where all of a file comes in place of the range asked for.

    Raises:
        InputError: An answer that is no range has more, or it takes too long.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

    try:
        asked = {**build_hf_headers(), **headers, "accept-encoding": "identity"}
    except (AttributeError, TypeError):  # the library asks the hub something by itself
        raise InputError("has another form than the library expects", where=_ANSWER) from None
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=asked, follow_redirects=True, timeout=timeout) as response:
        wanted = size if response.status_code == 206 else skip + size
        content = bytearray()
        for part in response.iter_raw(1 << 16):
            content += part
            if len(content) > wanted:
                break
        failure = httpx.Response(
            response.status_code,
            headers={key: value for key, value in response.headers.items() if key.lower().startswith("x-")},
            content=bytes(content[: 1 << 16]),
            request=response.request,
        )
    hf_raise_for_status(failure)
    if not headers and len(content) > size:
        raise InputError(f"has more than {size:,} bytes", where=_ANSWER)
    return bytes(content[wanted - size : wanted])


class _Watch:
    """Checks every answer that the hub library gets, because it turns tags and commits into file names.

    Attributes:
        commit: The commit that answers must belong to, once it is known.
    """

    def __init__(self) -> None:
        self.commit: str | None = None
        self._expected = threading.local()
        self._hooks: list[Any] = []

    @contextmanager
    def expecting(self, size: int) -> Iterator[None]:
        """In here, answers to this thread have at most `size` bytes."""
        self._expected.size = size
        try:
            yield
        finally:
            del self._expected.size

    def __enter__(self) -> _Watch:
        from huggingface_hub.utils import get_session

        self._hooks = get_session().event_hooks["response"]
        self._hooks.append(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.remove(self._look)

    def _look(self, response: Any) -> None:
        commit = response.headers.get("x-repo-commit")
        if None not in (commit, self.commit) and commit != self.commit:
            raise InputError("is about another commit than the one asked for", where=_ANSWER)
        for name in ("etag", "x-linked-etag"):
            if response.request.method == "HEAD" and not _TAG.fullmatch(response.headers.get(name, "-")):
                raise InputError(f"has a tag that cannot name a file ({name})", where=_ANSWER)
        if response.request.method == "GET":
            response.stream = _bounded(response.stream, getattr(self._expected, "size", None))


def _bounded(stream: Any, size: int | None) -> Any:
    """A stream of an answer that ends with an error where it has too many bytes.

    Args:
        stream: The stream.
        size: Bytes of the file that is expected; None for what is read into memory, which may not take long either.
    """
    from huggingface_hub.utils import httpx

    class Bounded(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            most, patience = _LARGEST_READ if size is None else size, time.monotonic() + _PATIENCE
            left = most + _FIRST_READ  # what is compressed may be a little larger
            for part in stream:
                left -= len(part)
                if left < 0:
                    raise InputError(f"has more than the {most:,} bytes that it may have", where=_ANSWER)
                if size is None and time.monotonic() > patience:
                    raise InputError("takes too long", where=_ANSWER)
                yield part

        def close(self) -> None:
            stream.close()

    return Bounded()


@contextmanager
def _one_line_errors(where: str) -> Iterator[None]:
    """Turns the hub library's errors, and those about a hub's answers, into one line about what was asked for."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    local, hint = "no such local path, and", "give a local path"
    try:
        yield
    except InputError as error:
        if error.where != _ANSWER:
            raise
        raise InputError(f"{local} {_ANSWER} is no good: it {error.what}", where=where, hint=hint) from None
    except CkptkitError:
        raise
    except errors.GatedRepoError:
        raise InputError("the model is gated", where=where, hint="accept its terms on the hub and log in") from None
    except errors.RevisionNotFoundError:
        raise InputError("no such revision", where=where) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            "no such local path and no such model on the hub", where=where, hint="or it is private"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise StorageError(f"{local} the hub is switched off (HF_HUB_OFFLINE)", where=where, hint=hint) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        reason = _first_line(error)
        raise StorageError(f"{local} the hub did not answer ({reason})", where=where, hint=hint) from None
    except (httpx.InvalidURL, ValueError, RuntimeError) as error:
        reason = _first_line(error)
        raise InputError(f"{local} {_ANSWER} makes no sense ({reason})", where=where, hint=hint) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
