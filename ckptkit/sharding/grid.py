"""The parallel grid: how many ways a model is split, and the ranks that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from ckptkit.errors import UsageError
from ckptkit.sharding.pipeline_layout import stages_of


class Rank(NamedTuple):
    """A rank's places in the grid.

    Attributes:
        pp: Pipeline rank.
        tp: Tensor parallel rank of everything but experts.
        ep: Expert parallel rank.
        etp: Tensor parallel rank of experts.
    """

    pp: int
    tp: int
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of a Megatron grid.

    Attributes:
        tp: Tensor model parallel size.
        pp: Pipeline model parallel size.
        vpp: Virtual pipeline size: model chunks on each pipeline rank.
        first_stage_layers: Layers on the first pipeline stage, or None for an even share.
        last_stage_layers: Layers on the last pipeline stage, or None for an even share.
        embedding_in_split: Count the embedding as a layer when splitting (`--account-for-embedding-in-pipeline-split`).
        loss_in_split: Count the loss as a layer when splitting (`--account-for-loss-in-pipeline-split`).
        ep: Expert model parallel size.
        etp: Expert tensor parallel size, or None for `tp`.
        adapter_first: Where two stages part at an adapter between layers of two widths, whether it ends the first one
            (and the wide stream is sent) or begins the second (and the narrow one is).
        pipeline_layout: Which part of the model is on which stage, as `--pipeline-model-parallel-layout` has it (see
            `pipeline_layout`), or None. It gives `vpp`, and takes the place of the four fields about uneven stages.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    embedding_in_split: bool = False
    loss_in_split: bool = False
    ep: int = 1
    etp: int | None = None
    adapter_first: bool = False
    pipeline_layout: str | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        optional = {"--etp": self.etp, "layers of the first stage": self.first_stage_layers}
        for name, value in {**optional, "layers of the last stage": self.last_stage_layers}.items():
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.pipeline_layout is not None:
            self._check_layout(self.pipeline_layout)
        if self.tp % self._expert_ranks and self._expert_ranks % self.tp:
            raise UsageError(
                f"--tp {self.tp} and {self._expert_ranks} expert ranks (--ep times --etp): one must be a multiple of"
                " the other"
            )
        if self.vpp > 1 and self.pp == 1:
            raise UsageError("--vpp needs --pp above 1", hint="virtual stages exist only inside a pipeline")

    def _check_layout(self, layout: str) -> None:
        """Whether a layout fits the rest of the grid; its number of stages gives `vpp`."""
        stages = len(stages_of(layout))
        if self.pp == 1 < stages:
            raise UsageError(
                f"a pipeline layout of {stages} stages needs --pp above 1", hint=f"--pp {stages} has one each"
            )
        if stages % self.pp:
            raise UsageError(
                f"a pipeline layout of {stages} stages does not divide over --pp {self.pp}",
                hint="a multiple of --pp is needed: one stage for each virtual stage of each pipeline rank",
            )
        if self.vpp not in (1, stages // self.pp):
            raise UsageError(
                f"a pipeline layout of {stages} stages on --pp {self.pp} makes --vpp {stages // self.pp}, not"
                f" {self.vpp}",
                hint="drop --vpp",
            )
        uneven = (self.first_stage_layers, self.last_stage_layers) != (None, None)
        if uneven or self.embedding_in_split or self.loss_in_split:
            raise UsageError(
                "a pipeline layout cannot be combined with sizes of the first and last stage, or with accounting for"
                " the embedding or the loss in the split",
                hint="the layout alone says it all",
            )
        object.__setattr__(self, "vpp", stages // self.pp)

    @property
    def expert_tp(self) -> int:
        """Ways that an expert's tensors are split."""
        return self.tp if self.etp is None else self.etp

    @property
    def _expert_ranks(self) -> int:
        return self.ep * self.expert_tp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: enough for one copy of its experts and of everything else."""
        return max(self.tp, self._expert_ranks)

    @property
    def world_size(self) -> int:
        """Ranks that hold the model."""
        return self.stage_size * self.pp

    def ranks(self) -> Iterator[Rank]:
        """All ranks in the order of Megatron's global ranks.

        Source: `RankGenerator` of Megatron-Core, order `tp-cp-ep-dp-pp`: within a stage tensor parallel ranks are
        neighbours; counted for experts, first their tensor parallel ranks, then the expert parallel ones.
        """
        for pp_rank in range(self.pp):
            for rank in range(self.stage_size):
                yield Rank(pp_rank, rank % self.tp, rank // self.expert_tp % self.ep, rank % self.expert_tp)

    def __str__(self) -> str:
        sizes = [("VPP", self.vpp), ("EP", self.ep), ("ETP", self.etp or 1)]
        grid = " x ".join([f"TP{self.tp}", f"PP{self.pp}", *(f"{name}{size}" for name, size in sizes if size > 1)])
        return grid if self.pipeline_layout is None else f"{grid} ({self.pipeline_layout})"


@dataclass(frozen=True, slots=True)
class StatedGrid:
    """Fields of a `Parallelism` that the user gives for a stored grid without `args`. None: not given."""

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    ep: int | None = None
    etp: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    pipeline_layout: str | None = None

    def sizes(self) -> dict[str, int | str]:
        """The given fields: name in `Parallelism` -> value."""
        return {field.name: size for field in fields(self) if (size := getattr(self, field.name)) is not None}
