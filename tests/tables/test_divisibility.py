"""One check for conversion and Megatron-Core: every size that does not divide is named, with its layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ckptkit.checkpoints.checkpoint import check_grid
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.divisibility import check_divides
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope

LAYER = LayerConfig(12, 4, 8, 144, Rope(10000.0))
DENSE = ModelConfig("llama", "LlamaForCausalLM", 96, 250, (LAYER,) * 4, False, 1e-5, 512)
MOE = replace(
    DENSE,
    layers=(replace(LAYER, moe=True, ffn_hidden_size=145),) * 4,
    num_experts=4,
    experts_per_token=2,
    moe_ffn_hidden_size=48,
)


def changed(**sizes: Any) -> ModelConfig:
    """The dense model with its third layer changed."""
    return replace(DENSE, layers=(LAYER, LAYER, replace(LAYER, **sizes), LAYER))


def test_what_divides() -> None:
    for config, grid in ((DENSE, Parallelism(4, 2, 2)), (DENSE, Parallelism(12)), (MOE, Parallelism(2, ep=4, etp=1))):
        check_divides(config, grid, 264 // grid.tp * grid.tp)
        check_grid(config, grid)


@pytest.mark.parametrize(
    ("config", "grid", "text"),
    [
        (changed(num_heads=5, num_kv_heads=5), Parallelism(2), "layer 2: 5 attention heads do not .*--tp 1, 5 would"),
        (changed(num_kv_heads=3), Parallelism(2), "layer 2: 3 key/value heads and --tp 2: one must be a multiple"),
        (changed(ffn_hidden_size=145), Parallelism(2), "layer 2: an MLP of width 145 does not divide over --tp 2"),
        (DENSE, Parallelism(1, 3), "4 layers do not divide over TP1 x PP3"),
        (DENSE, Parallelism(2, ep=2), "--ep needs a model with experts"),
        (MOE, Parallelism(ep=3), "4 experts do not divide over --ep 3"),
        (MOE, Parallelism(1, ep=1, etp=5), "experts of width 48 do not divide over 5 ranks"),
        (replace(MOE, parallel_dense=True), Parallelism(2), "layer 0: an MLP of width 145"),
    ],
)
def test_what_does_not(config: ModelConfig, grid: Parallelism, text: str) -> None:
    for check in (check_divides, check_grid):
        with pytest.raises(UsageError, match=text):
            check(config, grid)


def test_the_vocabulary_where_it_is_known() -> None:
    with pytest.raises(UsageError, match="padded vocabulary of 251 does not divide over --tp 2"):
        check_divides(DENSE, Parallelism(2), 251)


def test_expert_tensor_parallelism_needs_experts() -> None:
    with pytest.raises(UsageError, match="--etp needs a model with experts"):
        check_grid(DENSE, Parallelism(2, etp=1))
    check_divides(DENSE, Parallelism(2, etp=1))  # what args of a dense model say is no request
