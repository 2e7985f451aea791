"""Context parallelism on CUDA: logits and gradients on ranks, and attention that never waits for the device.

TP2 and CP2 are two ranks each, over NCCL where there are two GPUs; TP2 x CP2 and CP4 are four gloo ranks that share
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification import verify
from ckptkit.verification.ranks.pool import RankPool
from tests.gpu.test_cuda import has_experts
from tests.gpu.test_packed_cuda import attention, one_gpu  # noqa: F401  a fixture
from tests.models import LLAMAS, save_llama, save_model
from tests.precision import relative_error
from tests.verification.training.test_context_parallel import check
from tests.verification.training.test_gradients import PACKED, RECOMPUTE, SP, Way, named, rows

pytestmark = pytest.mark.gpu

EXACT = 2e-5
KINDS = [
    "gqa",
    "mistral",
    "gemma3_text",
    "gemma4_text-dense",
    "gemma4_text-e2b",
    "gemma4_text-moe",
    "mixtral-windowed",
    "deepseek_v3",
    "glm4_moe_lite",
]
TWO_RANKS: list[Way] = [
    (Parallelism(2), {"cp": 1, **SP, **PACKED}),
    (Parallelism(), {"cp": 2}),
    (Parallelism(), {"cp": 2, **PACKED, **RECOMPUTE}),
]
FOUR_RANKS: list[Way] = [
    (Parallelism(2), {"cp": 2, **SP, **PACKED}),
    (Parallelism(), {"cp": 4, **PACKED}),
    (Parallelism(2), {"cp": 2}),
]
EXPERT_WAYS: list[Way] = [(Parallelism(ep=2), {"cp": 2, **PACKED}), (Parallelism(2, ep=2), {"cp": 2, **SP, **PACKED})]


def cases() -> list[tuple[str, Way, str]]:
    """Every kind in every way in float32; in bfloat16 in two."""
    found = []
    for number, kind in enumerate(KINDS):
        ways = [*TWO_RANKS, *FOUR_RANKS]
        if has_experts(kind):  # megatron-core trains them on several tensor ranks only if it splits sequences
            ways = [way for way in [*ways, *EXPERT_WAYS] if way[0].tp == 1 or "sequence_parallel" in way[1]]
        found += [(kind, way, "float32") for way in ways]
        found += [(kind, (TWO_RANKS[1:], FOUR_RANKS)[place][number % 2], "bfloat16") for place in range(2)]
    return found


@pytest.mark.parametrize(("kind", "way", "dtype"), cases(), ids=lambda value: named(value))
def test_logits_and_gradients(pool: RankPool, tmp_path: Path, kind: str, way: Way, dtype: str) -> None:
    grid, how = way
    source = (save_llama if kind in LLAMAS else save_model)(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    options: dict[str, Any] = {"tokens": rows(), "tolerance": EXACT, "device": "cuda", "dtype": dtype, **how}
    check(kind, way, verify(source, tmp_path / "meg", level="gradients", pool=pool, **options))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_never_waits_for_the_device(one_gpu: None, packed: bool, window: int | None) -> None:  # noqa: F811
    """CUDA refuses whatever would; forwards and backwards."""
    import torch
    from megatron.core.transformer.enums import AttnMaskType

    from ckptkit.megatron.context_parallel.attention import ContextParallelAttention
    from ckptkit.megatron.context_parallel.cut import Cut
    from ckptkit.megatron.context_parallel.plan import Plan, planned
    from ckptkit.megatron.packed_inputs.batch import PackedBatch
    from tests.gpu.test_packed_cuda import _Config

    device, bounds = torch.device("cuda"), (0, 16, 24)
    batch = PackedBatch.of_rows([[0] * 16, [0] * 8], device)
    core: Any = ContextParallelAttention(_Config(16, window), attn_mask_type=AttnMaskType.causal)  # type: ignore[arg-type]
    plan = Plan.of(Cut(bounds if packed else (0, 24), 1), 0, [window], device)
    params = planned(batch if packed else None, plan)
    shape = (24,) if packed else (24, 2)
    parts = [torch.randn(*shape, heads, 16, device=device, requires_grad=True) for heads in (4, 2, 2)]
    core(*parts, packed_seq_params=params).sum().backward()  # libraries make themselves at home
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = core(*parts, packed_seq_params=params)
        found.sum().backward()
        with pytest.raises(RuntimeError):
            found.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = attention(16, window)(*parts, packed_seq_params=batch.params() if packed else None)
    assert relative_error(found, expected) < 1e-5
