"""Gradients of layers of multi-token prediction on CUDA ranks, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.training.level import PREDICTION_LOSS
from tests.gpu.test_training_cuda import enough_gpus, ran_on_cuda  # noqa: F401  a fixture
from tests.precision import MANY_ROWS
from tests.verification.training import test_prediction as on_cpu
from tests.verification.training.test_gradients import PACKED, RECOMPUTE, SP, Way, record

pytestmark = [pytest.mark.gpu, on_cpu.pytestmark]

source = on_cpu.source
CASES: list[tuple[str, int, Way]] = [
    ("deepseek_v3", 2, (Parallelism(1, 2), PACKED)),
    ("deepseek_v3", 1, (Parallelism(), {"cp": 2, **PACKED})),
    ("glm4_moe", 2, (Parallelism(2), {**SP, **RECOMPUTE})),
    ("glm4_moe", 1, (Parallelism(ep=2), {"cp": 2})),
    ("glm4_moe_lite", 1, (Parallelism(ep=2), PACKED)),
    ("glm4_moe_lite", 1, (Parallelism(), {"cp": 2, **RECOMPUTE})),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "count", "way"), CASES, ids=on_cpu.named_case)
def test_gradients(
    source: Callable[..., Path],
    tmp_path: Path,
    pool: RankPool,
    kind: str,
    count: int,
    way: Way,
    dtype: str,
) -> None:
    options = {"dtype": dtype, "device": "cuda", **({"tokens": MANY_ROWS} if dtype == "bfloat16" else {})}
    answer = on_cpu.gradients_of(source(kind, count), tmp_path, pool, way, count, **options)
    record(kind, way, answer)
    assert answer.passed, answer.summary
    assert answer.details["missing"] == answer.details["surplus"] == []
    assert PREDICTION_LOSS in answer.details["messages"]
    assert ran_on_cuda(answer.details)
