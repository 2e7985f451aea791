"""One conversion in this process, with the time of each phase as JSON on stdout: what the copying alone takes.

    python -m benchmarks.phases SRC DST --to torch --tp 2 --pp 2

The steps are those of `ckptkit.conversion.convert.convert`. `move` writes and syncs every file, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTED = time.perf_counter()


def main() -> None:
    """Converts, and prints seconds by phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("dst", type=Path)
    parser.add_argument("--to", required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--hash", action="store_true")
    parser.add_argument("--plan-only", action="store_true")
    arguments = parser.parse_args()
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with phase("import"):
        from ckptkit.checkpoints.opening import open_checkpoint
        from ckptkit.conversion.options import Options
        from ckptkit.conversion.planning import make_plan
        from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
        from ckptkit.io.commit import Destination
        from ckptkit.io.engine import run
        from ckptkit.sharding.grid import Parallelism
    with phase("open"):
        source = open_checkpoint(arguments.src)
    with phase("plan"):
        dtype = DTYPES_BY_TORCH_NAME[arguments.dtype] if arguments.dtype else None
        grid = Parallelism(tp=arguments.tp, pp=arguments.pp, ep=arguments.ep)
        plan = make_plan(source, arguments.to, Options(grid=grid, dtype=dtype))
    with phase("check"):
        destination = Destination(arguments.dst, plan, sources=[source.path])
    if not arguments.plan_only:
        with ExitStack() as stack:
            with phase("prepare"):
                stack.enter_context(destination)
            with phase("move"):
                how = {"threads": arguments.threads, "hash": arguments.hash}
                run(plan, destination.directory, journal=destination.journal, **how)
            with phase("commit"):
                destination.commit()
    tensors = sum(file.tensors for file in plan.files)
    print(json.dumps({"seconds": seconds, "bytes": plan.nbytes, "files": len(plan.files), "tensors": tensors}))


if __name__ == "__main__":
    main()
