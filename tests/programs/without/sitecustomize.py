"""Makes imports of the packages that CKPTKIT_TEST_WITHOUT names impossible, in every Python process that begins."""

import os
import sys

BLOCKED = set(filter(None, os.environ.get("CKPTKIT_TEST_WITHOUT", "").split(",")))


class Blocker:
    """A finder that finds nothing, loudly."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
