"""Two ranks of Megatron-LM with Transformer Engine; skipped, visibly, where there is none.

Transformer Engine's modules compute on CUDA devices alone. Without one, they are built and loaded on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.formats.rank_pool import RankProcesses


@pytest.fixture(scope="session")
def te_ranks() -> Iterator[RankProcesses]:
    """One rank for each of up to two GPUs, or two on the CPU, which start with the first job."""
    missing = [name for name in ("megatron.training", "transformer_engine") if not is_there(name)]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}")
    import torch

    from tests.te.ranks import MODULE

    with RankProcesses(1 if torch.cuda.device_count() == 1 else 2, MODULE) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def computing() -> None:
    """For tests of what modules compute."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def is_there(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, float]]:
    """Kind -> (Hugging Face model, file with its tokens and logits, its noise floor in bf16)."""
    from tests.te.models import save, save_expected

    folder, done = tmp_path_factory.mktemp("te"), {}

    def get(kind: str) -> tuple[Path, Path, float]:
        if kind not in done:
            source = save(folder / kind, kind)
            done[kind] = (source, folder / f"{kind}.safetensors", save_expected(source, folder / f"{kind}.safetensors"))
        return done[kind]

    return get


@pytest.fixture(scope="session")
def where() -> dict[str, Any]:
    """What a line of the report says of the machine: versions and devices."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from ckptkit.verification.reports.report import installed_versions

    versions = installed_versions()
    with contextlib.suppress(PackageNotFoundError):
        versions["transformer-engine"] = version("transformer-engine")
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"versions": versions, "devices": devices or ["cpu"]}


@pytest.fixture
def report(request: pytest.FixtureRequest, where: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Appends a line of figures to the file that CKPTKIT_TE_REPORT names; `benchmarks/te_table.py` prints a table."""

    def append(line: dict[str, Any]) -> None:
        if target := os.environ.get("CKPTKIT_TE_REPORT"):
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": request.node.name, **line, **where}) + "\n")

    return append
