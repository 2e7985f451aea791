"""The lock of a destination in a store: an object that one run can make, because a store can put on a condition.

The owner writes it anew every minute, as a sign of life. A lock is dead when its owner was a process of this machine
that is gone, or when it was not renewed for a quarter of an hour by the store's own clock. Only then another run takes
it, again on a condition, so that of two runs that find it dead one gets it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress

from ckptkit.errors import CkptkitError, UsageError
from ckptkit.io.meeting import machine
from ckptkit.io.regular import read_bounded
from ckptkit.io.stores.client import Bucket, NoConditionsError, Stored, TakenError
from ckptkit.printable import printable

_RENEWAL, _DEAD = 60.0, 900.0
"""Seconds between two signs of life, and without one until a lock counts as dead."""
_LARGEST = 1 << 12
NO_CONDITIONS = "the store has no conditional writes, so no lock: see to it that no other run writes here"


class Lock:
    """The lock of one destination.

    Attributes:
        note: What the user is to know about it, or None.
    """

    def __init__(self, bucket: Bucket, key: str, where: str) -> None:
        self._bucket = bucket
        self._key = key
        self._where = where
        self._tag: str | None = None
        self._run = os.urandom(8).hex()
        self._owner = _owner()
        self._beats = 0
        self._seen = 0.0  # when it was last known to be ours
        self._over = threading.Event()
        self._watch: threading.Thread | None = None
        self.lost: CkptkitError | None = None
        self.note: str | None = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            UsageError: Another run has it.
            StorageError: The store does not answer.
        """
        try:
            try:
                self._hold(self._bucket.put(self._key, self._content(), new=True))
            except TakenError:
                self._take_over()
                return
            self._try_condition()
        except NoConditionsError:
            self.note = NO_CONDITIONS

    def keep(self) -> None:
        """Gives signs of life from now on, in a thread."""
        if self._tag is not None:
            self._watch = threading.Thread(target=self._renew, name="ckptkit-lock", daemon=True)
            self._watch.start()

    def release(self) -> None:
        """Gives the lock up; whether the store answers does not matter, as it dies by itself."""
        self._over.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        with suppress(CkptkitError):
            if self._tag is not None and _now() - self._seen > _DEAD / 2:  # this process stood still: is it ours yet?
                self.check()
            if self._tag is not None and self.lost is None:
                self._bucket.delete([self._key])
        self._tag = None

    def _try_condition(self) -> None:
        """Whether the store heeds conditions: some ignore what they do not know."""
        with suppress(TakenError):
            self._hold(self._bucket.put(self._key, self._content(), new=True))
            self.note = NO_CONDITIONS

    def _take_over(self) -> None:
        found = self._bucket.head(self._key)
        content = self._bucket.get(self._key, _LARGEST) if found is not None else None
        if found is None or content is None:
            raise self._busy("another conversion just ended")
        if self._is_ours(content):  # the store took it, and the answer was lost
            self._hold(found.tag)
            return
        whose = _whose(content)
        if not _dead(found, whose):
            who = f"process {whose['pid']} on {printable(str(whose['host']))}" if whose else "an unknown process"
            raise self._busy(f"another conversion is writing to this destination ({who}, {found.age:.0f} s ago)")
        try:
            self._hold(self._bucket.put(self._key, self._content(), instead_of=found.tag))
        except TakenError:
            raise self._busy("another conversion has just begun to write to this destination") from None

    def _busy(self, what: str) -> UsageError:
        place = self._bucket.url(self._key)
        hint = f"wait for it; if it is dead, its lock dies {_DEAD / 60:.0f} minutes after its last sign of life"
        return UsageError(what, where=self._where, hint=f"{hint}, or remove {place}")

    def _renew(self) -> None:
        while not self._over.wait(_RENEWAL):
            try:
                self._hold(self._bucket.put(self._key, self._content(), instead_of=self._tag))
            except TakenError:
                with suppress(CkptkitError):
                    self.check()
                if self.lost is not None:
                    return
            except CkptkitError:
                continue  # a store that answers again before the lock is dead has missed nothing

    def check(self) -> None:
        """Checks that the lock is still ours.

        Raises:
            UsageError: Another run took it.
        """
        if self.lost is not None:
            raise self.lost
        if self._tag is None:
            return
        found = self._bucket.head(self._key)
        content = self._bucket.get(self._key, _LARGEST) if found is not None else None
        if found is None or content is None or not self._is_ours(content):
            self.lost = UsageError("another run took the lock of this destination", where=self._where)
            raise self.lost
        self._hold(found.tag)

    def _hold(self, tag: str) -> None:
        self._tag, self._seen = tag, _now()

    def _content(self) -> bytes:
        """What the lock holds: its owner, and a number that changes."""
        self._beats += 1
        return json.dumps({"run": self._run, "beat": self._beats, **self._owner}).encode()

    def _is_ours(self, content: bytes) -> bool:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and found.get("run") == self._run


def _now() -> float:
    """Seconds that also count while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _owner() -> dict[str, str | int]:
    """This process."""
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}


def _machine() -> str:
    """What only processes have in common that can see each other: a running kernel, and a space of process numbers."""
    with suppress(OSError):
        return f"{machine()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _born(pid: int) -> str:
    """When a process began, so that a number that was given again is noticed; empty if there is none."""
    try:
        status = read_bounded(f"/proc/{pid}/stat", _LARGEST).decode(errors="replace")
    except CkptkitError:
        return ""
    words = status.rpartition(")")[2].split()
    return "" if len(words) < 20 or words[0] in ("Z", "X") else words[19]


def _whose(content: bytes) -> dict[str, str | int] | None:
    """The owner in a lock; None if it is none of ours."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    match found:
        case {"host": str(), "machine": str(), "pid": int(), "born": str()} if found["pid"] > 0:
            return {key: found[key] for key in ("host", "machine", "pid", "born")}
    return None


def _dead(found: Stored, whose: dict[str, str | int] | None) -> bool:
    if found.age > _DEAD:
        return True
    here = whose is not None and whose["machine"] == _machine() != ""
    return here and whose is not None and _born(int(whose["pid"])) != whose["born"]
