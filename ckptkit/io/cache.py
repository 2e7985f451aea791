"""Values that several threads need for a while: each is made once, and the latest stay in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Values by key, the latest of them up to a total size. Two threads never make the same value."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self._limit, self._size = limit, size
        self._found: OrderedDict[object, Future[Value]] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def makes(self, key: object) -> bool:
        """Whether a thread is making the value of a key at this moment."""
        with self._lock:
            found = self._found.get(key)
        return found is not None and not found.done()

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        """The value of a key, made by `make` if it is not at hand. An error of `make` reaches all who wait for it."""
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
            else:
                mine = self._found[key] = Future()
        if found is not None:
            return found.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._found[key]
            mine.set_exception(error)
            raise
        mine.set_result(value)
        with self._lock:
            self._total += self._size(value)
            for old in list(self._found):
                if self._total <= self._limit or old == key:
                    break
                if self._found[old].done():
                    self._total -= self._size(self._found.pop(old).result())
        return value
