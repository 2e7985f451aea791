"""Attention by a plan: the same as without one, refused without one, and no waiting for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckptkit.errors import VerificationError
from ckptkit.sharding.grid import Parallelism

CPU = torch.device("cpu")
BOUNDS = (0, 16, 24)
READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
)
"""What waits for a device: its values are read."""


class NothingIsRead(TorchDispatchMode):
    """Refuses to let a tensor's values reach Python; where there is a GPU, CUDA itself is asked (tests/gpu)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, func
        return func(*args, **(kwargs or {}))


def attention(window: int | None, *, planned: bool = True, softcap: float | None = None) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from ckptkit.megatron.attention import ExactAttention
    from ckptkit.megatron.context_parallel.attention import ContextParallelAttention

    config = SimpleNamespace(kv_channels=8, window_size=None if window is None else (window - 1, 0))
    kind = ContextParallelAttention if planned else ExactAttention
    return kind(config, attn_mask_type=AttnMaskType.causal, softcap=softcap)  # type: ignore[arg-type]


def inputs(packed: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = (BOUNDS[-1],) if packed else (BOUNDS[-1], 2)
    return [torch.randn(*shape, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]


def params(packed: bool, window: int | None) -> Any:
    from ckptkit.megatron.context_parallel.cut import Cut
    from ckptkit.megatron.context_parallel.plan import Plan, planned
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    bounds = BOUNDS if packed else (0, BOUNDS[-1])
    batch = PackedBatch(torch.zeros(24, dtype=torch.int64), torch.tensor(BOUNDS), 16) if packed else None
    return planned(batch, Plan.of(Cut(bounds, 1), 0, [window], CPU))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_of_one_rank_it_is_the_attention_without_a_plan(
    one_rank: Parallelism, packed: bool, window: int | None
) -> None:
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    batch = PackedBatch(torch.zeros(24, dtype=torch.int64), torch.tensor(BOUNDS), 16)
    expected = attention(window, planned=False, softcap=2.0)(
        *inputs(packed), packed_seq_params=batch.params() if packed else None
    )
    core, given, own = attention(window, softcap=2.0), params(packed, window), inputs(packed)
    with NothingIsRead():
        found = core(*own, packed_seq_params=given)
    assert found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-6)  # fp32 in the softmax


def test_reading_a_value_is_noticed() -> None:
    with NothingIsRead(), pytest.raises(AssertionError):
        torch.ones(3).sum().item()


def test_without_a_plan_it_refuses(one_rank: Parallelism) -> None:
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    batch = PackedBatch(torch.zeros(24, dtype=torch.int64), torch.tensor(BOUNDS), 16)
    for packed, given in ((False, None), (True, batch.params())):
        with pytest.raises(VerificationError, match="has no plan of the batch"):
            attention(5)(*inputs(packed), packed_seq_params=given)


def test_the_plan_of_another_batch_or_window_is_refused(one_rank: Parallelism) -> None:
    query, key, value = inputs(False)
    with pytest.raises(VerificationError, match=r"24 tokens and windows \[5\], .* asked for 20 and 5"):
        attention(5)(query[:20], key[:20], value[:20], packed_seq_params=params(False, 5))
    with pytest.raises(VerificationError, match=r"windows \[6\]"):
        attention(5)(query, key, value, packed_seq_params=params(False, 6))
