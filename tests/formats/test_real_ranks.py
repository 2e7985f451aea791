"""GPTModel of the real Megatron-Core on grids other than the writer's: it loads strictly what `convert` writes.

What it saves comes back to Hugging Face byte for byte, with both formats. `pytest -m slow` where megatron-core 0.16.1
or 0.19.2 is; ranks are gloo processes, on CUDA devices where there are any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.formats.megatron_ranks import Job
from tests.formats.rank_pool import RankProcesses
from tests.formats.round_trip import check, label

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow

GRIDS: dict[str, list[dict[str, Any]]] = {
    "qwen3": [
        {},
        {"pp": 2, "layout": "Et|tttL"},
        {"tp": 2, "pp": 2, "vpp": 2, "layout": "Et||tt|tL"},
        {"tp": 2, "pp": 2, "vpp": 2},
        {"tp": 4},
        {"pp": 4},
        {"tp": 2, "pp": 2},
    ],
    "qwen3_tied": [{}, {"tp": 2, "pp": 2}, {"pp": 4, "layout": "E||ttt|tL"}],
    "qwen3_moe": [{}, {"ep": 2}, {"tp": 2, "ep": 2}, {"pp": 2, "ep": 2}, {"ep": 4}],
}
JOBS = [
    Job(action, "", model, **grid)
    for model, grids in GRIDS.items()
    for grid in grids
    for action in ("load", "load_torch", "save", "save_torch")
]


@pytest.mark.parametrize("job", JOBS, ids=label)
def test_grid(megatron_ranks: RankProcesses, tmp_path: Path, job: Job) -> None:
    check(megatron_ranks, tmp_path, job)


def test_a_changed_byte_is_seen(megatron_ranks: RankProcesses, tmp_path: Path) -> None:
    """What passes above could fail: one bit of one weight."""
    from ckptkit.conversion.convert import convert
    from tests.formats.golden_hf import save_hf
    from tests.formats.megatron_ranks import run

    source = save_hf(tmp_path / "hf", "qwen3")
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 0x40
    (source / "model.safetensors").write_bytes(bytes(data))
    convert(source, tmp_path / "megatron", to="torch_dist", spec="local", make_vocab_size_divisible_by=8)
    (problem,) = run(megatron_ranks, [Job("load", str(tmp_path / "megatron" / "release"), "qwen3")])
    assert "AssertionError: rank 0 of Job" in problem
