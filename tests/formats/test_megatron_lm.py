"""Megatron-LM itself loads what we convert: `pytest -m gpu` where megatron-core 0.19.2 is.

With a CUDA device everything runs there. Without one, the tensors by which ranks agree on an iteration are made on the
CPU, the question for the GPU's architecture is answered with one, and nothing else of Megatron-LM is replaced.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.formats.golden_hf import save_hf
from tests.formats.megatron_lm import DIVISIBLE_BY
from tests.formats.megatron_ranks import Job, run
from tests.formats.rank_pool import RankProcesses

pytest.importorskip("torch")
pytest.importorskip("megatron.training", reason="the wheel of megatron-core 0.16.1 has no megatron.training")
pytestmark = pytest.mark.gpu

STRICT, USUAL = "raise_unexpected", "assume_ok_unexpected"
"""`raise_all` sees one key too many: the state of the last norm, which the spec of a whole block does not have."""

FROM_CHECKPOINT = {"use_checkpoint_args": True}


def label(case: tuple[Job, str, Parallelism, str]) -> str:
    job, to, grid, spec = case
    flags = "args" if job.metadata else "flags"
    return f"{job.model}-{to}-{spec}-{str(grid).replace(' ', '')}-on-tp{job.tp}pp{job.pp}ep{job.ep}-{flags}"


def cases() -> list[tuple[Job, str, Parallelism, str]]:
    """The job, and what is converted for it: format, grid and spec. Only `torch_dist` may be of another grid."""
    found = []
    grids = {"qwen3": (2, 2, 1), "qwen3_tied": (1, 2, 1), "qwen3_moe": (2, 1, 2)}
    for model, (tp, pp, ep) in grids.items():
        one = Job("megatron_lm", "", model, strict=STRICT)
        grid = replace(one, tp=tp, pp=pp, ep=ep)
        for metadata in ({}, FROM_CHECKPOINT):
            for job in (replace(one, metadata=metadata), replace(grid, metadata=metadata)):
                own = Parallelism(job.tp, job.pp, ep=job.ep)
                other = Parallelism(2, 2) if job is one else Parallelism()
                found.append((job, "torch", own, "local"))
                found.append((job, "torch_dist", other, "local"))
    te = Job("megatron_lm", "", "qwen3", strict=USUAL, metadata=FROM_CHECKPOINT)
    return [*found, (te, "torch_dist", Parallelism(2), "te")]


@pytest.mark.parametrize("case", cases(), ids=label)
def test_load_checkpoint_of_megatron_lm(
    megatron_ranks: RankProcesses, tmp_path: Path, case: tuple[Job, str, Parallelism, str]
) -> None:
    job, to, grid, spec = case
    source = save_hf(tmp_path / "hf", job.model)
    convert(source, tmp_path / "megatron", to=to, grid=grid, spec=spec, make_vocab_size_divisible_by=DIVISIBLE_BY)
    (problem,) = run(megatron_ranks, [replace(job, folder=str(tmp_path / "megatron"))])
    assert not problem, problem


def test_a_checkpoint_of_another_model_is_refused(megatron_ranks: RankProcesses, tmp_path: Path) -> None:
    """What passes above could fail: the weights of another model, and arguments that contradict the command line."""
    source = save_hf(tmp_path / "hf", "qwen3_tied")
    convert(source, tmp_path / "megatron", to="torch_dist", spec="local", make_vocab_size_divisible_by=DIVISIBLE_BY)
    job = Job("megatron_lm", str(tmp_path / "megatron"), "qwen3", strict=STRICT)
    (problem,) = run(megatron_ranks, [job])
    assert "output_layer.weight" in problem
