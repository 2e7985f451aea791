"""A process of its own that imports packages and looks for devices: a package that crashes ends it and nothing else.

It gets module names as arguments, and prints one JSON object in its last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from typing import Any

PATIENCE = 180.0  # seconds


def probe(modules: list[str]) -> dict[str, Any]:
    """Imports modules in another process.

    Args:
        modules: Their names.

    Returns:
        `errors`, module -> why it cannot be imported; `devices`, those that torch sees; `cuda`, the CUDA release that
        torch was built for, or None.
    """
    nothing: dict[str, Any] = {"errors": {}, "devices": [], "cuda": None}
    if not modules:
        return nothing
    command = [sys.executable, "-m", __name__, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, errors="replace")
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {**nothing, "errors": dict.fromkeys(modules, f"importing it took more than {PATIENCE:.0f} s")}
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**nothing, "errors": dict.fromkeys(modules, f"importing ended with code {done.returncode}: {last}")}
    return {**nothing, **found}


def _imported(modules: list[str]) -> dict[str, Any]:
    """The same in this process."""
    errors = {}
    for module in modules:
        try:
            import_module(module)
        except Exception as error:
            errors[module] = f"{type(error).__name__}: {error}".splitlines()[0]
    found: dict[str, Any] = {"errors": errors}
    if "torch" in modules and "torch" not in errors:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
        found["devices"] = [{"name": str(device.name), "memory": int(device.total_memory)} for device in devices]
        found["cuda"] = torch.version.cuda
    return found


if __name__ == "__main__":
    print("\n" + json.dumps(_imported(sys.argv[1:])))
