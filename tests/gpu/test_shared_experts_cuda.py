"""Shared experts that overlap with the exchange of tokens compute what they compute without.

megatron-core overlaps the two on streams of CUDA, with the dispatcher that sends each token to its experts. `verify`
itself runs the dispatcher that runs everywhere; here an opener exchanges it in the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert, open_checkpoint
from ckptkit.verification.logits import verify_logits
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.sides import Side
from tests.checkpoints.args_files import set_args
from tests.models import save_model

MODULE = "tests.gpu.test_shared_experts_cuda:"
DISPATCHERS: dict[str, dict[str, Any]] = {
    "sound": {},
    "sent": {"moe_token_dispatcher_type": "alltoall"},
    "overlapped": {"moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": True},
}


def _opener(changes: dict[str, Any]) -> Callable[..., Any]:
    """An opener that changes how experts run in this rank."""

    def opened(path: str, **options: Any) -> Any:
        from ckptkit.megatron import config

        if not hasattr(config, "_own_expert_fields"):
            config._own_expert_fields = config._expert_fields  # type: ignore[attr-defined]
        own = config._own_expert_fields  # type: ignore[attr-defined]
        config._expert_fields = lambda model: {**own(model), **(changes if own(model) else {})}
        return open_checkpoint(path, **options)

    return opened


sound, sent, overlapped = (_opener(changes) for changes in DISPATCHERS.values())


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [Parallelism(), Parallelism(ep=2), Parallelism(2, ep=2)], ids=str)
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_overlap_changes_nothing(tmp_path: Path, kind: str, grid: Parallelism) -> None:
    import torch

    if torch.cuda.device_count() < grid.world_size:
        pytest.skip("a GPU for each rank: gloo does not send CUDA tensors to single ranks")
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=grid)
    sides = Side(source, "hf"), Side(tmp_path / "meg", "megatron")
    errors = {}
    with RankPool(grid.world_size, start_timeout=300.0) as pool:
        for name in DISPATCHERS:
            report = verify_logits(*sides, greedy=0, device="cuda", tolerance=2e-5, pool=pool, opener=MODULE + name)
            assert report.passed and report.agreement is not None, (name, report.summary)
            errors[name] = report.agreement.max_abs_error
    assert set(errors) == set(DISPATCHERS)


def test_args_may_say_so(tmp_path: Path) -> None:
    """It is a setting of a run: the model and its tensors are the same."""
    source = save_model(tmp_path / "hf", "deepseek_v3")
    convert(source, tmp_path / "meg", to="packed")
    before = open_checkpoint(tmp_path / "meg")
    set_args(tmp_path / "meg", moe_shared_expert_overlap=True)
    after = open_checkpoint(tmp_path / "meg")
    assert after.args["moe_shared_expert_overlap"] and after.config == before.config
    assert not after.disagreements
