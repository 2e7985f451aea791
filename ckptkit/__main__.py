"""`python -m ckptkit` is the command `ckptkit`."""

from __future__ import annotations

import sys

EXIT_INTERNAL = 70


def main() -> None:
    """Runs the command line. A package that cannot be imported must not look like a difference, exit code 1."""
    try:
        from ckptkit.cli.app import app
        from ckptkit.io.system import keep_freed_memory
    except Exception as error:
        print(f"error: ckptkit is not installed completely ({error}); install it again", file=sys.stderr)
        sys.exit(EXIT_INTERNAL)
    keep_freed_memory()
    app(prog_name="ckptkit")


if __name__ == "__main__":
    main()
