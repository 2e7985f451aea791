"""Reading from a folder of a web server: it has no list, so files are found by asking for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from ckptkit.io.crew import Crew
from ckptkit.io.stores.address import Address
from ckptkit.io.stores.answers import is_denied, one_line_errors
from ckptkit.io.stores.objects import Object, checked, nanoseconds
from ckptkit.io.stores.ranged import CLIENT, RETRIES, read_range

_THREADS = 8


class Web:
    """A folder of a web server.

    Attributes:
        names: The files that were found; `list` asks for them again.
        denied: Whether the server has forbidden a file.
    """

    def __init__(self, address: Address) -> None:
        from obstore.store import HTTPStore

        self.address = address
        self.names: list[str] = []
        self.denied = False
        make: Any = HTTPStore.from_url
        with one_line_errors(address):
            url = f"https://{address.place}/{quote(address.prefix)}".rstrip("/")
            self._store: Any = make(url, client_options=CLIENT, retry_config=RETRIES)

    def found(self, names: Sequence[str]) -> list[Object | None]:
        """Files by their names, several at a time, see `find`."""
        crew = Crew(min(_THREADS, len(names)), "ckptkit-find")
        try:
            return list(crew.map(self.find, names))
        finally:
            crew.close()

    def list(self) -> list[Object]:
        """The files that were found, as they are now; errors as `Store` has them."""
        return [file for file in self.found(self.names) if file is not None]

    def find(self, name: str) -> Object | None:
        """A file by its name, or None where the server has none.

        A bucket whose list is private says of what is not there that it is forbidden.

        Raises:
            StorageError: The server does not answer, or not with this.
        """
        import obstore

        where = f"{self.address}/{name}"
        with one_line_errors(where):
            try:
                about = obstore.head(self._store, name)
            except FileNotFoundError:
                return None
            except Exception as error:
                if not is_denied(error):
                    raise
                self.denied = True
                return None
        found = Object(name, about["size"], about["e_tag"] or "", nanoseconds(about["last_modified"]))
        return checked([found], self.address)[0]

    def read(self, file: Object, start: int, view: memoryview) -> int:
        """Fills `view`, see `Store`."""
        return read_range(lambda new: self._store, file.name, file, start, view, f"{self.address}/{file.name}")
