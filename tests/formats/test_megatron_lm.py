"""Megatron-LM itself loads what we write: `pytest -m gpu` where megatron-core 0.19.2 and a CUDA device are."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptkit.formats.torch_dist import StageRanks, lay_out_torch_dist
from tests.formats.megatron_lm import stored_arguments
from tests.formats.megatron_ranks import Job, run
from tests.formats.test_torch_dist import items
from tests.formats.torch_files import write_out

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.training", reason="the wheel of megatron-core 0.16.1 has no megatron.training")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="Megatron-LM asks for CUDA")]

FROM_CHECKPOINT = {"use_checkpoint_args": True}
JOBS = {
    1: [
        Job("megatron_lm", "dense"),
        Job("megatron_lm", "dense", metadata=FROM_CHECKPOINT),
        Job("megatron_lm", "tied", "tied", metadata=FROM_CHECKPOINT),
        Job("megatron_lm", "moe", "moe"),
        Job("megatron_lm", "moe", "moe", metadata=FROM_CHECKPOINT),
        Job("megatron_lm", "te", strict="assume_ok_unexpected", metadata=FROM_CHECKPOINT),
    ],
    4: [
        Job("megatron_lm", "dense", tp=2, pp=2, metadata=FROM_CHECKPOINT),
        Job("megatron_lm", "moe", "moe", tp=2, ep=2, metadata=FROM_CHECKPOINT),
    ],
}


@pytest.mark.parametrize("size", JOBS)
def test_load_checkpoint_of_megatron_lm(tmp_path: Path, size: int) -> None:
    for name, model, spec in (
        ("dense", "dense", "local"),
        ("tied", "tied", "local"),
        ("moe", "moe", "local"),
        ("te", "dense", "te"),
    ):
        ranks = StageRanks(2, 2 if model == "moe" else 1)
        args = stored_arguments(model, 2, 1, ranks.ep)
        for file in lay_out_torch_dist(items(model), args, dtype="float32", ranks=ranks, spec=spec):
            write_out(file, tmp_path / name)
    jobs = [Job(**{**vars(job), "folder": str(tmp_path / job.folder)}) for job in JOBS[size]]
    assert [problem for problem in run(jobs, tmp_path) if problem] == []
