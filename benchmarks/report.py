"""The results as Markdown, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from benchmarks.cases import Result

MIB = 1 << 20
_PACKAGES = ("numpy", "isal", "torch", "safetensors", "transformers", "mergekit")


def machine(place: Path, module: str = "benchmarks") -> dict[str, str]:
    """What the figures depend on; `module` was run."""
    kind = _output("stat", "-f", "-c", "%T", str(place))
    versions = [f"{name} {_version(name)}" for name in _PACKAGES]
    return {
        "date": date.today().isoformat(),
        "processor": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "file system": "RAM (tmpfs)" if kind == "tmpfs" else f"{kind} on a disk",
        "load average before": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "versions": ", ".join([f"Python {platform.python_version()}", _ckptkit(), *versions, _cp()]),
        "command": f"python -m {module} {' '.join(sys.argv[1:])}".rstrip(),
    }


def conversions_table(results: Iterable[Result], *, sync: bool) -> str:
    """One row for each conversion."""
    head = (
        "conversion",
        "GB in",
        "GB out",
        "cp + sync, s" if sync else "cp, s",
        "whole command, s",
        "x cp",
        "copying alone, s",
        "x cp",
        "core seconds (cp)",
        "anonymous MiB",
    )
    return table(head, [_conversion(result) for result in results])


def alternatives_table(results: Iterable[Result | tuple[str, str]]) -> str:
    """One row for each of today's ways."""
    head = ("today", "GB in", "GB out", "cp, s", "whole command, s", "x cp", "core seconds (cp)", "anonymous MiB")
    rows = []
    for result in results:
        if isinstance(result, tuple):
            rows.append([result[0], result[1], *[""] * (len(head) - 2)])
        else:
            rows.append([cell for index, cell in enumerate(_conversion(result)) if index not in (6, 7)])
    return table(head, rows)


def phases_table(results: Iterable[Result]) -> str:
    """Where the time goes: medians in seconds."""
    measured = [result for result in results if result.phases]
    names = list(measured[0].phases) if measured else []
    rows = [[r.name, *(f"{r.phases[name]:.3f}" for name in names)] for r in measured]
    return table(("seconds", *names), rows)


def _conversion(result: Result) -> list[str]:
    moving = ["", ""]
    if result.moving:
        moving = [f"{median(result.moving):.2f} / {min(result.moving):.2f}", _ratio(result, result.moving)]
    return [
        result.name,
        f"{result.source_bytes / 1e9:.2f}",
        f"{result.output_bytes / 1e9:.2f}",
        f"{result.cp.median:.2f} / {result.cp.best:.2f}",
        f"{result.whole.median:.2f} / {result.whole.best:.2f}",
        _ratio(result, [run.clock for run in result.whole.runs]),
        *moving,
        f"{result.whole.cores:.1f} ({result.cp.cores:.1f})",
        f"{result.whole.anonymous / MIB:.0f}",
    ]


def _ratio(result: Result, clocks: Sequence[float]) -> str:
    return f"{median(clocks) / result.cp.median:.2f} / {min(clocks) / result.cp.best:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _ckptkit() -> str:
    from ckptkit.version import __version__

    return f"ckptkit {__version__}"


def _cp() -> str:
    return _output("cp", "--version").splitlines()[0]


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.machine()
