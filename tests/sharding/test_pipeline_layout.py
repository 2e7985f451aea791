"""Custom pipeline layouts, judged by Megatron-Core's own reader of them."""

from __future__ import annotations

import random
import time
from itertools import product

import pytest

from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.pipeline_layout import in_letters, layers_on, stages_of
from ckptkit.sharding.stages import split_layers

SOUND = [
    ("Et|tttL", 2),
    ("Et*3|t||ttL", 4),
    ("E|t|t|tL", 2),
    ("E|(t|)*4L", 3),
    ("E|(t|)*4L", 2),
    ("Ett,(|t)*3,|L", 5),
    ("Etttt|L", 2),
    ("E|ttttL", 2),
    ("Et*2|(tt|)*2,t*0|tL", 5),
    ("EttttL", 1),
    ("|Ett|ttL", 3),
    ("Et|tL|", 3),
    ("Et|*2ttL", 3),
    ("Ettt|(tt|)*29,m|L", 16),
    ("Ett|ttmL", 2),
]
UNSOUND = [
    "",
    "Et|t",
    "t|EtL",
    "Et|EtL",
    "Et|tLL",
    "EtL|t",
    "Et|xL",
    "Et|((t|)*2)*2L",
    "E t|tL",
    "Em|tL",
    "et|tl",
    "Et*|L",
    "E|(t|*2L",
]


def megatron_stages(layout: str | list[list[str]], pp: int) -> tuple[int, dict[tuple[int, int], range]] | None:
    """Virtual stages, and (pp_rank, vp_stage) -> layers as Megatron-Core reads a layout, or None where it refuses."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        read = PipelineParallelLayerLayout(layout, pp)
        layers = read.flatten_layout.count(LayerType.decoder)
        mtp = read.flatten_layout.count(LayerType.mtp)
        read.validate_layer_layout(layers, mtp)
    except (AssertionError, IndexError, ValueError):
        return None
    vpp, found, at = read.virtual_pipeline_model_parallel_size, {}, 0
    for vp_stage, pp_rank in product(range(vpp), range(pp)):
        start, at = at, at + read.layout[pp_rank][vp_stage].count(LayerType.decoder)
        found[pp_rank, vp_stage] = range(start, at)
    return vpp, found


@pytest.mark.parametrize(("layout", "pp"), SOUND)
def test_against_megatron_core(layout: str, pp: int) -> None:
    judged = megatron_stages(layout, pp)
    assert judged is not None
    vpp, layers = judged
    grid = Parallelism(1, pp, pipeline_layout=layout)
    assert grid.vpp == vpp
    assert layers_on(stages_of(layout)) == [layers[pp_rank, vp] for vp, pp_rank in product(range(vpp), range(pp))]
    if "m" in layout:
        with pytest.raises(UsageError, match="multi-token prediction"):
            split_layers(sum(map(len, layers.values())), grid)
        return
    stages = split_layers(sum(map(len, layers.values())), grid)
    assert {(stage.pp_rank, stage.vp_stage): stage.layers for stage in stages} == layers
    assert [(s.pp_rank, s.vp_stage) for s in stages if s.first] == [(0, 0)]
    assert [(s.pp_rank, s.vp_stage) for s in stages if s.last] == [(pp - 1, vpp - 1)]


@pytest.mark.parametrize("layout", UNSOUND)
def test_what_megatron_core_refuses(layout: str) -> None:
    assert megatron_stages(layout, 1) is None
    with pytest.raises(UsageError, match="pipeline layout"):
        stages_of(layout)


def test_many_against_megatron_core() -> None:
    chance, sound = random.Random(0), 0
    for _ in range(3000):
        body = "".join(chance.choice(["t", "t", "|", "|", "tt|", "(t|)*2", "t*2", ",", "m", "*3"]) for _ in range(6))
        layout = f"{chance.choice(['E', 'E', 'E', '|E', 't'])}{body}{chance.choice(['L', 'L', 'L', 'L|', 't'])}"
        judged = megatron_stages(layout, 1)
        try:
            stages = stages_of(layout)
        except UsageError:
            assert judged is None, layout
            continue
        if judged is None:  # Megatron-Core has rules about where multi-token prediction may be
            assert "m" in layout, layout
            continue
        assert [judged[1][0, vp] for vp in range(len(stages))] == layers_on(stages), layout
        sound += 1
    assert sound > 500


def test_a_list_of_names_is_the_same() -> None:
    layout = [["embedding", " Decoder "], [], ["decoder", "decoder", "loss"]]
    assert in_letters(layout) == "Et||ttL"
    assert megatron_stages(layout, 3) == megatron_stages("Et||ttL", 3)
    for wrong in ([["embedding", 3]], ["Et"], [["embedding", "encoder", "loss"]]):
        with pytest.raises(UsageError, match="must be a list of"):
            in_letters(wrong)


@pytest.mark.parametrize(
    "layout", ["E" + "t*999999999" + "L", "E(t|)*99999999999L", "E" + "(t*9999|)*9999" + "L", "t" * 99999]
)
def test_endless_ones_are_refused_at_once(layout: str) -> None:
    start = time.process_time()
    with pytest.raises(UsageError, match="pipeline layout"):
        stages_of(layout)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pp": 3}, "4 stages does not divide over --pp 3"),
        ({"pp": 1}, "needs --pp above 1"),
        ({"pp": 2, "vpp": 4}, "makes --vpp 2, not 4"),
        ({"pp": 2, "first_stage_layers": 1}, "cannot be combined"),
        ({"pp": 2, "last_stage_layers": 1}, "cannot be combined"),
        ({"pp": 2, "embedding_in_split": True}, "cannot be combined"),
        ({"pp": 2, "loss_in_split": True}, "cannot be combined"),
    ],
)
def test_what_a_grid_cannot_have_besides(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Parallelism(**{"pp": 2, **changes}, pipeline_layout="Et|t||ttL")


def test_layers_must_be_those_of_the_model() -> None:
    with pytest.raises(UsageError, match="has 4 layers, the model has 5"):
        split_layers(5, Parallelism(1, 2, pipeline_layout="Et|tttL"))
