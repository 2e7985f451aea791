"""From Hugging Face through a checkpoint that the real Megatron-Core loads or saves, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.formats.golden_hf import save_hf
from tests.formats.megatron_ranks import Job, run
from tests.formats.rank_pool import RankProcesses
from tests.models import files_of

WRITER = Parallelism(2, 2)
"""The grid of the `torch_dist` checkpoints that jobs load, whatever their own."""


def label(job: Job) -> str:
    layout = "" if job.layout is None else f"-{job.layout}"
    return f"{job.model}-{job.action}-tp{job.tp}-pp{job.pp}-vpp{job.vpp}-ep{job.ep}{layout}"


def check(ranks: RankProcesses, folder: Path, job: Job) -> None:
    """A job that loads gets what `convert` wrote; what one that saves wrote is converted back, byte for byte."""
    source, megatron = save_hf(folder / "hf", job.model), folder / "megatron"
    place = megatron
    if job.action in ("load", "load_torch"):
        distributed = job.action == "load"
        convert(
            source,
            megatron,
            to="torch_dist" if distributed else "torch",
            grid=WRITER if distributed else Parallelism(job.tp, job.pp, job.vpp, ep=job.ep, pipeline_layout=job.layout),
            spec="local",
            make_vocab_size_divisible_by=8,
            megatron_model=job.schema,
        )
        place = megatron / "release"
    (problem,) = run(ranks, [replace(job, folder=str(place))])
    assert not problem, problem
    if job.action.startswith("save"):
        convert(megatron, folder / "back", to="hf", hf_reference=source)
        assert files_of(folder / "back") == files_of(source)
