"""Pipeline stages, judged by Megatron-Core's own arithmetic."""

from __future__ import annotations

from itertools import product

import pytest

from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers, stage_of_layer


def megatron_stages(num_layers: int, grid: Parallelism) -> dict[tuple[int, int], range] | None:
    """(pp_rank, vp_stage) -> layers as Megatron-Core counts them, or None where it refuses."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=grid.pp,
            pipeline_dtype="bf16",
            virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
            num_layers_in_first_pipeline_stage=grid.first_stage_layers,
            num_layers_in_last_pipeline_stage=grid.last_stage_layers,
            account_for_embedding_in_pipeline_split=grid.embedding_in_split,
            account_for_loss_in_pipeline_split=grid.loss_in_split,
        )
        stages = {}
        for pp_rank, vp_stage in product(range(grid.pp), range(grid.vpp)):
            stage = vp_stage if grid.vpp > 1 else None
            count = get_num_layers_to_build(config, stage, pp_rank)
            start = get_transformer_layer_offset(config, stage, pp_rank)
            stages[pp_rank, vp_stage] = range(start, start + count)
    except (AssertionError, ValueError, ZeroDivisionError):
        return None
    return stages


@pytest.mark.parametrize("vpp", [1, 2, 3])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_against_megatron_core(pp: int, vpp: int) -> None:
    compared = 0
    for layers, first, last, embedding, loss in product(
        range(1, 15), (None, 1, 2, 3), (None, 1, 2, 4), (False, True), (False, True)
    ):
        if (vpp > 1 and pp == 1) or (pp == 1 and (first or last)):
            continue
        grid = Parallelism(1, pp, vpp, first, last, embedding, loss)
        try:
            ours = {(s.pp_rank, s.vp_stage): s.layers for s in split_layers(layers, grid)}
        except UsageError:
            continue
        assert ours == megatron_stages(layers, grid), (layers, grid)
        compared += 1
    assert compared >= 5 or (pp == 1 and vpp > 1)


def test_every_layer_has_one_home() -> None:
    stages = split_layers(12, Parallelism(1, 3, 2))
    homes = stage_of_layer(stages)
    assert sorted(homes) == list(range(12))
    assert [stage.first for stage in stages].count(True) == [stage.last for stage in stages].count(True) == 1


def test_what_cannot_be_split_is_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match=r"7 layers do not divide over TP1 x PP3; --pp 1 or 7 would"):
        split_layers(7, Parallelism(1, 3))
    with pytest.raises(UsageError, match="cannot be combined"):
        split_layers(8, Parallelism(1, 2, 1, 3, None, True))
    with pytest.raises(UsageError, match="--vpp needs --pp"):
        Parallelism(1, 1, 2)
