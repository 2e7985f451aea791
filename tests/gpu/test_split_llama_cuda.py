"""Split Llamas on CUDA: logits on ranks as transformers', and adapters fitted there as those fitted on the CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification import verify
from ckptkit.verification.ranks.pool import RankPool
from tests.gpu.test_cuda import EXACT, record
from tests.gpu.test_packed_cuda import TOKENS
from tests.precision import relative_error
from tests.surgery.pairs import KINDS, build_split, save_pair

pytestmark = pytest.mark.gpu

# 2 of 5 layers are narrow: the stages part at the adapter, or within the narrow half.
GRIDS = [Parallelism(2), Parallelism(1, 2, first_stage_layers=2), Parallelism(2, 2, first_stage_layers=1)]

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"), dtype="float32")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(
    pool: RankPool, pair: Pair, tmp_path: Path, kind: str, grid: Parallelism, dtype: str, packed: bool
) -> None:
    source = build_split(tmp_path / "hf", pair, kind)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    how: dict[str, Any] = {"packed": packed, "sequence_parallel": packed and grid.tp > 1, "pool": pool}
    given: dict[str, Any] = {"device": "cuda", "dtype": dtype, "tokens": TOKENS, "tolerance": EXACT}
    report = verify(source, tmp_path / "meg", **given, **how)
    logits = report.levels[-1]
    record(f"split_llama-{kind}{' packed' if packed else ''}", grid, dtype, logits.details, report.passed)
    assert report.passed, logits.summary


@pytest.mark.parametrize("init", ["lstsq", "procrustes"])
def test_fitted_as_on_the_cpu(pair: Pair, tmp_path: Path, init: str) -> None:
    import torch
    from safetensors.torch import load_file

    from ckptkit.surgery.activations import residual_stream

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    draw = random.Random(0)
    rows = [[draw.randrange(250) for _ in range(64)] for _ in range(40)]
    for model, count in zip(pair, (2, 2), strict=True):
        checkpoint = open_checkpoint(model)
        streams = [torch.cat(residual_stream(checkpoint, count, rows, device=name)) for name in ("cpu", "cuda")]
        assert relative_error(streams[1], streams[0]) < 1e-5
    calibration = tmp_path / "ids.json"
    calibration.write_text(json.dumps(rows))
    found = []
    for device in ("cpu", "cuda"):
        options = {"calibration": calibration, "tokens": 2560, "device": device}
        before = allocations()
        split = build_split(tmp_path / device, pair, init=init, options=options)
        assert (allocations() > before) == (device == "cuda")  # it runs where it was asked to
        found.append(load_file(split / "model.safetensors")["model.adapter.weight"])
    assert relative_error(found[1], found[0]) < 1e-4


def allocations() -> int:
    """How often memory of a GPU was asked for."""
    import torch

    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))
