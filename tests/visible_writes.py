"""`ckptkit` with its writes made visible to ckpt-chaos: `python -m tests.visible_writes convert ...`.

ckpt-chaos watches Python's `open` and `os.fsync`. ckptkit writes through `os.open`, `os.pwrite` and `os.fdatasync`, of
which it sees that a file is opened, and nothing else: it could neither tear such a file nor tell what was synced.
Here it learns both. A torn file is cut in half where it would be synced or closed; what is not synced is lost, also
under the new name of a directory that was renamed.

With `CHAOS_NO_SYNC=1` nothing is ever synced: then ckpt-chaos must find fault, or it sees nothing.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def make_visible(inject: Any) -> None:
    """Wraps the calls of `os` that ckptkit writes with."""
    state = inject._state
    torn: set[str] = set()
    count, plain = inject._event, {name: getattr(os, name) for name in ("open", "close", "rename", "fsync")}

    def event(kind: str, path: Any, tornable: bool) -> bool:
        tear = bool(count(kind, path, tornable or kind == "open"))
        if tear:
            torn.add(inject._norm(path))
        return tear

    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        watched = isinstance(path, (str, os.PathLike)) and inject._under(path)
        if watched and state["unsynced"] and flags & _WRITES:
            inject._note_open_for_write(inject._norm(path))
        fd: int = plain["open"](path, flags, *arguments, **options)
        state["fd_path"][fd] = inject._norm(path) if watched and stat.S_ISREG(os.fstat(fd).st_mode) else None
        return fd

    def tear(fd: int) -> None:
        if state["fd_path"].get(fd) in torn:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os._exit(137)

    def closed(fd: int) -> None:
        tear(fd)
        plain["close"](fd)

    def synced(fd: int) -> None:
        tear(fd)
        if not os.environ.get("CHAOS_NO_SYNC"):
            plain["fsync"](fd)

    def renamed(source: Any, target: Any, *arguments: Any, **options: Any) -> None:
        plain["rename"](source, target, *arguments, **options)
        old, new = inject._norm(source) + os.sep, inject._norm(target) + os.sep
        for path in [path for path in state["dirty"] if path.startswith(old)]:
            state["dirty"].discard(path)
            state["dirty"].add(new + path.removeprefix(old))

    inject._event = event
    replacements: dict[str, Callable[..., Any]] = {"open": opened, "close": closed, "rename": renamed}
    for name, function in {**replacements, "fsync": synced, "fdatasync": synced}.items():
        setattr(os, name, function)


if __name__ == "__main__":
    armed = sys.modules.get("ckpt_chaos.inject")
    if armed is not None and armed._state["watch"]:
        make_visible(armed)
    from ckptkit.cli.app import app

    app()
