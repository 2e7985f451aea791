"""Hub references, `org/model@revision`: only the files that a conversion needs, or for a plan only their headers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from ckptkit.errors import CkptkitError, InputError, StorageError, UnsupportedError
from ckptkit.formats.hf import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, is_weights
from ckptkit.formats.safetensors import MAX_HEADER

_REFERENCE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FIRST_READ = 1 << 17


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
    """A local directory for a path or a hub reference, as long as the context lives.

    Args:
        text: A directory, or `org/model` with an optional `@revision` (branch, tag or commit).
        headers_only: Fetch config, index and safetensors headers only; the directory then holds sparse files of the
            true sizes, all that a plan needs.

    Raises:
        InputError: There is no such model or revision, or it is gated.
        StorageError: The hub cannot be reached.
    """
    if not is_reference(text):
        yield Located(Path(text), {})
        return
    repository, _, revision = str(text).partition("@")
    with _one_line_errors(str(text)):
        hub = _Hub(repository, revision or None)
    if not headers_only:
        with _one_line_errors(str(text)):
            path = hub.download()
        yield Located(path, hub.origin)
        return
    with TemporaryDirectory(prefix="ckptkit-headers-") as folder:
        with _one_line_errors(str(text)):
            hub.mirror(Path(folder))
        yield Located(Path(folder), hub.origin)


class _Hub:
    """One revision of one model repository."""

    def __init__(self, repository: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        self.repository = repository
        self.commit = str(info.sha)
        self.sizes = {item.rfilename: int(item.size or 0) for item in info.siblings or ()}

    @property
    def origin(self) -> dict[str, str]:
        return {"repository": self.repository, "revision": self.commit}

    def download(self) -> Path:
        """The needed files, in the hub's cache."""
        from huggingface_hub import snapshot_download

        files = self._needed(self._index())
        return Path(snapshot_download(self.repository, revision=self.commit, allow_patterns=sorted(files)))

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
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts:
                raise InputError(f"the repository holds a file outside its folder ({name})", where=self.repository)
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
            return {"weight_map": {"": name}}
        index = json.loads(self._read(name, 0, self.sizes[name]))
        return index if isinstance(index, dict) else {}

    def _needed(self, index: Mapping[str, Any]) -> set[str]:
        shards = set((index.get("weight_map") or {}).values())
        return {name for name in self.sizes if name in shards or not is_weights(name)}

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
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if start >= stop:
            return b""
        url = hf_hub_url(self.repository, name, revision=self.commit)
        headers = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}"}
        response = get_session().get(url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        content: bytes = response.content
        return content[start:stop] if response.status_code == 200 else content[: stop - start]


@contextmanager
def _one_line_errors(where: str) -> Iterator[None]:
    """Turns the hub library's errors into ours."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    try:
        yield
    except CkptkitError:
        raise
    except errors.GatedRepoError:
        raise InputError("the model is gated", where=where, hint="accept its terms on the hub and log in") from None
    except errors.RevisionNotFoundError:
        raise InputError("no such revision", where=where) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            "no such local path and no such model on the hub", where=where, hint="or it is private"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise StorageError("the hub is switched off (HF_HUB_OFFLINE)", where=where, hint="give a local path") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(f"the hub did not answer ({reason})", where=where, hint="give a local path") from None
