"""Gated DeltaNets on CUDA ranks: the rule itself, multi-token prediction, gradients, and faults that must be seen.

`test_cuda` and `test_packed_cuda` have the logits of Qwen3-Next and Qwen3.5 among those of all families. Where
flash-linear-attention is installed, both sides run its kernel for logits in bfloat16, and else the rule in torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.pool import RankPool
from tests.gpu.test_training_cuda import ran_on_cuda
from tests.models import add_prediction, save_model
from tests.precision import relative_error
from tests.verification.mutants import FAULTS, OPENER
from tests.verification.training.conftest import Sources
from tests.verification.training.test_gradients import PACKED, RECOMPUTE, SP, Way, gradients_of, named, record

pytestmark = pytest.mark.gpu

TWO = Parallelism(2)
GRADIENTS: list[tuple[str, Way]] = [
    ("qwen3_next", (Parallelism(ep=2), PACKED)),
    ("qwen3_next", (Parallelism(2), {**SP, **RECOMPUTE})),
    ("qwen3_5_text", (TWO, {})),
    ("qwen3_5_text", (TWO, {**SP, **PACKED})),
    ("qwen3_5_moe_text", (Parallelism(2, ep=2), {**SP, **PACKED})),
    ("qwen3_5_text", (Parallelism(), {"cp": 2, **PACKED})),
    ("qwen3_next", (Parallelism(ep=2), {"cp": 2, **RECOMPUTE})),
]
SEEN = (
    "parts of a DeltaNet's projection cut flat",
    "parts of a DeltaNet's convolution cut flat",
    "gates of attention exchanged with queries",
    "norm of a DeltaNet one more",
    "convolutions see the packed sequence before",
    "DeltaNets remember the packed sequence before",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("delta"))


@pytest.mark.parametrize("length", [1, 64, 200, 4096])
def test_the_rule_is_that_of_the_cpu(length: int) -> None:
    """In fp64 of the released models' sizes, forwards and backwards; and fp32 is near it."""
    import torch
    import torch.nn.functional as F

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from ckptkit.megatron.delta_rule import gated_delta_rule
    from tests.megatron.double_precision import double_precision

    torch.manual_seed(length)
    query, key = (torch.randn(1, length, 2, 128, dtype=torch.float64) for _ in range(2))
    value, rate = torch.randn(1, length, 4, 128, dtype=torch.float64), torch.rand(1, length, 4, dtype=torch.float64)
    decay = -F.softplus(torch.randn(1, length, 4, dtype=torch.float64))
    found: dict[str, list[torch.Tensor]] = {}
    for device in ("cpu", "cuda"):
        parts = [part.detach().clone().to(device).requires_grad_() for part in (query, key, value, decay, rate)]
        with double_precision():
            output = gated_delta_rule(*parts)
            output.square().sum().backward()
        found[device] = [output.detach().cpu(), *(part.grad.cpu() for part in parts if part.grad is not None)]
    assert len(found["cuda"]) == 6 and all(tensor.isfinite().all() for tensor in found["cuda"])
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert relative_error(ours, theirs) < 1e-10 or not theirs.any()
    single = gated_delta_rule(*(part.float().cuda() for part in (query, key, value, decay, rate)))
    assert relative_error(single.cpu(), found["cpu"][0]) < 1e-4


@pytest.mark.parametrize("length", [1, 64, 200, 4096])
def test_the_kernel_is_the_rule(length: int) -> None:
    """In bfloat16 the kernel of flash-linear-attention; its error is not many times that of torch's rule."""
    import torch
    import torch.nn.functional as F

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("fla.ops.gated_delta_rule")
    from ckptkit.megatron.delta_kernel import rule_for
    from ckptkit.megatron.delta_rule import gated_delta_rule

    torch.manual_seed(length)
    heads = {"dtype": torch.bfloat16, "device": "cuda"}
    query, key = (torch.randn(1, length, 2, 128, **heads) for _ in range(2))
    value, rate = torch.randn(1, length, 4, 128, **heads), torch.rand(1, length, 4, **heads)
    decay = -F.softplus(torch.randn(1, length, 4, device="cuda"))
    parts = query, key, value, decay, rate
    assert rule_for(value) is gated_delta_rule, "backwards it may be wrong"
    with torch.no_grad():
        assert rule_for(value) is not gated_delta_rule
        assert rule_for(value.float()) is rule_for(value.cpu()) is gated_delta_rule
        kernel, plain = rule_for(value)(*parts), gated_delta_rule(*parts)
        exact = gated_delta_rule(*(part.float() for part in parts))
    assert kernel.dtype == plain.dtype == torch.bfloat16
    assert relative_error(kernel.float(), exact) < 4 * relative_error(plain.float(), exact) + 1e-2


CASES = [
    *((*case, "float64") for case in GRADIENTS),
    ("qwen3_5_text", GRADIENTS[3][1], "bfloat16"),
    ("qwen3_5_text", GRADIENTS[5][1], "bfloat16"),
]


@pytest.mark.parametrize(("kind", "way", "dtype"), CASES, ids=named)
def test_gradients(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way, dtype: str) -> None:
    answer = gradients_of(sources[kind], tmp_path, pool, way, dtype=dtype, device="cuda")
    record(kind, way, answer)
    assert answer.passed, answer.summary
    assert answer.details["missing"] == answer.details["surplus"] == []
    assert ran_on_cuda(answer.details)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_multi_token_prediction(tmp_path: Path, pool: RankPool, kind: str) -> None:
    from transformers import modeling_layers

    if not hasattr(getattr(modeling_layers, "MtpModel", None), "get_weight_conversions"):
        pytest.skip("this transformers runs no multi-token prediction")
    source = add_prediction(save_model(tmp_path / "hf", kind))
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=TWO)
    sides = Side(source, "hf", prediction=1), Side(tmp_path / "meg", "megatron", prediction=1)
    report = verify_logits(*sides, greedy=0, pool=pool, device="cuda", sequence_parallel=True)
    assert report.passed, report.summary


@pytest.mark.parametrize("name", SEEN)
def test_faults_are_seen(sources: Sources, tmp_path: Path, name: str) -> None:
    """What passes elsewhere could also pass because nothing is looked at."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    fault = FAULTS[name]
    convert(sources[fault.kind], tmp_path / "meg", to="torch", spec="local", grid=fault.grid)
    sides = Side(sources[fault.kind], "hf"), Side(tmp_path / "meg", "megatron")
    options: dict[str, Any] = {"greedy": 0, "device": "cuda", "packed": fault.packed}
    with RankPool(fault.grid.world_size, start_timeout=300.0) as own:
        assert verify_logits(*sides, pool=own, opener=f"{OPENER}sound", **options).passed
        report = verify_logits(*sides, pool=own, opener=OPENER + name, **options)
    place = None if report.location is None else report.location.place
    assert (report.passed, place) == (False, fault.place), report.summary
