"""Which layer lives on which pipeline stage, as Megatron-Core counts them."""

from __future__ import annotations

from dataclasses import dataclass

from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.pipeline_layout import PREDICTION, layers_on, stages_of


@dataclass(frozen=True, slots=True)
class Stage:
    """One model chunk: what pipeline rank `pp_rank` holds in its virtual stage `vp_stage`.

    Attributes:
        layers: Global layer numbers, in order; locally they count from 0.
        first: Whether it holds the embedding.
        last: Whether it holds the final norm and the head.
    """

    pp_rank: int
    vp_stage: int
    layers: range
    first: bool
    last: bool


def split_layers(num_layers: int, grid: Parallelism) -> list[Stage]:
    """All stages of a model, ordered by (pp_rank, vp_stage).

    Source: `get_num_layers_to_build` and `get_transformer_layer_offset` of Megatron-Core. Virtual stages interleave:
    chunk v of rank p follows chunk v of rank p-1, and chunk v+1 of rank 0 follows chunk v of the last rank.

    Raises:
        UsageError: The layers do not divide over the grid.
    """
    layers = (
        _by_size(num_layers, grid) if grid.pipeline_layout is None else _by_layout(num_layers, grid.pipeline_layout)
    )
    stages = [
        Stage(
            number % grid.pp,
            number // grid.pp,
            held,
            first=number == 0,
            last=number == grid.pp * grid.vpp - 1,
        )
        for number, held in enumerate(layers)
    ]
    return sorted(stages, key=lambda stage: (stage.pp_rank, stage.vp_stage))


def _by_layout(num_layers: int, layout: str) -> list[range]:
    """The layers of every stage of a custom layout, in the order in which data passes them."""
    stages = stages_of(layout)
    layers = layers_on(stages)
    if layers[-1].stop != num_layers:
        raise UsageError(
            f"the pipeline layout {layout!r} has {layers[-1].stop} layers, the model has {num_layers}",
            hint=f"write t {num_layers} times in all",
        )
    if any(PREDICTION in stage for stage in stages):
        raise UsageError(
            f"the pipeline layout {layout!r} has multi-token prediction ({PREDICTION}), the model has none",
            hint=f"leave out {PREDICTION}",
        )
    return layers


def _by_size(num_layers: int, grid: Parallelism) -> list[range]:
    """The layers of every stage by sizes, in the order in which data passes them."""
    sizes = _chunk_sizes(num_layers, grid)
    layers = []
    at = -int(
        grid.embedding_in_split
    )  # a counted embedding takes the slot before layer 0, a counted loss the one after
    for number in range(grid.pp * grid.vpp):
        start, at = at, at + sizes[number % grid.pp]
        layers.append(range(max(start, 0), min(at, num_layers)))
    return layers


def holds_cut(stage: Stage, cut: int, grid: Parallelism) -> bool:
    """Whether a stage holds the adapter that stands before layer `cut`: it lives beside a layer of its side."""
    return cut - int(grid.adapter_first) in stage.layers


def stage_of_layer(stages: list[Stage]) -> dict[int, tuple[Stage, int]]:
    """Global layer number -> the stage that holds it and its number there."""
    return {layer: (stage, local) for stage in stages for local, layer in enumerate(stage.layers)}


def _chunk_sizes(num_layers: int, grid: Parallelism) -> list[int]:
    """Slots of one model chunk on each pipeline rank."""
    per_rank = _rank_sizes(num_layers, grid)
    for pp_rank, size in enumerate(per_rank):
        if size % grid.vpp:
            raise UsageError(
                f"{size} layers on pipeline rank {pp_rank} do not divide over --vpp {grid.vpp}",
                hint=f"choose a --vpp that divides {size}",
            )
    return [size // grid.vpp for size in per_rank]


def _rank_sizes(num_layers: int, grid: Parallelism) -> list[int]:
    """Slots on each pipeline rank."""
    asked = [(0, grid.first_stage_layers), (grid.pp - 1, grid.last_stage_layers)]
    fixed = {rank: size for rank, size in asked if size is not None}
    counted = int(grid.embedding_in_split) + int(grid.loss_in_split)
    if fixed and counted:
        raise UsageError(
            "first/last stage sizes cannot be combined with accounting for the embedding or the loss in the split"
        )
    if fixed and grid.pp == 1:
        raise UsageError("first/last stage sizes need --pp above 1")
    rest, stages = num_layers + counted - sum(fixed.values()), grid.pp - len(fixed)
    if rest < 0 or (rest % stages if stages else rest) or (fixed and stages and not rest):
        raise UsageError(
            f"{num_layers} layers do not divide over {grid}"
            + (f" ({rest} layers left for {stages} stages)" if fixed else ""),
            hint=_suggest(num_layers + counted, grid.pp),
        )
    if not stages and grid.vpp > 1:
        raise UsageError(
            "Megatron-Core cannot interleave two stages that are both uneven", hint="drop one of the two sizes"
        )
    share = rest // stages if stages else 0
    return [fixed.get(rank, share) for rank in range(grid.pp)]


def _suggest(slots: int, pp: int) -> str:
    sizes = [size for size in range(1, slots + 1) if slots % size == 0]
    nearest = sorted(sizes, key=lambda size: abs(size - pp))[:2]
    return (
        f"--pp {' or '.join(str(size) for size in sorted(nearest))} would, or set the sizes of the first and last stage"
        " (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers), or of all of them"
        " (--pipeline-model-parallel-layout)"
    )
