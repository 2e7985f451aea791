"""Packed inputs on CUDA: the kernel against the exact path, families on ranks, replicas, value models, transformers.

A grid of n ranks uses NCCL where the machine has n GPUs; with fewer, gloo ranks share them. FSDP2 needs NCCL.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification import verify
from ckptkit.verification.ranks.pool import RankPool
from tests.gpu.test_cuda import EXPERT_GRIDS, GRIDS, KINDS, has_experts, record
from tests.models import LLAMAS, llama_config, model_classes, model_config, randomise, save_llama, save_model
from tests.precision import MANY_ROWS, relative_error

pytestmark = pytest.mark.gpu

TOKENS = [[(7 * i + 3 * i * i + 5 * n) % 250 for i in range(n)] for n in (40, 3, 17, 1, *[64] * 5)]


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    """A process group of this process alone, on the first GPU."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from ckptkit.megatron import compat

    compat.import_megatron()
    from ckptkit.megatron import parallel

    parallel.initialize(Parallelism(), 0, store=dist.HashStore(), device=torch.device("cuda", 0))
    yield
    parallel.finalize()


def cases() -> list[tuple[str, Parallelism, str, bool]]:
    """Each kind on every grid in fp32 and in bf16, sequence parallel wherever there are tensor parallel ranks."""
    found = []
    for kind, dtype in itertools.product(KINDS, ("float32", "bfloat16")):
        for grid in [*GRIDS, *(EXPERT_GRIDS if has_experts(kind) else [])]:
            found.append((kind, grid, dtype, grid.tp > 1))
    return found


@pytest.mark.parametrize(("kind", "grid", "dtype", "sequence_parallel"), cases(), ids=str)
def test_packed_rows(
    pool: RankPool, tmp_path: Path, kind: str, grid: Parallelism, dtype: str, sequence_parallel: bool
) -> None:
    source = (save_llama if kind in LLAMAS else save_model)(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    report = verify(
        source,
        tmp_path / "meg",
        device="cuda",
        dtype=dtype,
        tokens=TOKENS,
        tolerance=1e-4 if has_experts(kind) else 2e-5,
        packed=True,
        sequence_parallel=sequence_parallel,
        pool=pool,
    )
    logits = report.levels[-1]
    record(f"{kind} packed{' SP' if sequence_parallel else ''}", grid, dtype, logits.details, report.passed)
    assert report.passed, logits.summary


@pytest.mark.te  # where there are two GPUs, FSDP2 runs, too
@pytest.mark.parametrize("by", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("kind", "grid"),
    [("gqa", Parallelism()), ("gqa", Parallelism(2)), ("qwen3_moe", Parallelism(ep=2))],
    ids=str,
)
def test_replicas(pool: RankPool, tmp_path: Path, kind: str, grid: Parallelism, by: str) -> None:
    import torch

    ranks = 2 * grid.world_size
    if by == "fsdp2" and torch.cuda.device_count() < ranks:
        pytest.skip(f"FSDP2 on CUDA needs NCCL, and that a GPU for each of {ranks} ranks")
    source = (save_llama if kind in LLAMAS else save_model)(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    report = verify(source, tmp_path / "meg", device="cuda", tokens=TOKENS, packed=True, dp=2, dp_kind=by, pool=pool)
    assert report.passed, report.levels[-1].summary


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gqa", "gemma3_text"])
def test_value_models(pool: RankPool, tmp_path: Path, kind: str, dtype: str) -> None:
    source = (save_llama if kind in LLAMAS else save_model)(tmp_path / "lm", kind)
    convert(source, tmp_path / "hf", to="hf", head="value", head_init="normal")
    convert(tmp_path / "hf", tmp_path / "meg", to="torch", grid=Parallelism(2), spec="local")
    report = verify(
        tmp_path / "hf",
        tmp_path / "meg",
        device="cuda",
        dtype=dtype,
        tokens=TOKENS if dtype == "float32" else MANY_ROWS,  # in bf16 the error of a row is one figure
        packed=True,
        sequence_parallel=True,
        pool=pool,
    )
    assert report.passed, report.levels[-1].summary


class _Config:
    def __init__(self, head_dim: int, window: int | None) -> None:
        self.kv_channels = head_dim
        self.window_size = None if window is None else (window - 1, 0)


def attention(head_dim: int, window: int | None) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from ckptkit.megatron.attention import ExactAttention

    return ExactAttention(_Config(head_dim, window), attn_mask_type=AttnMaskType.causal)


@pytest.mark.parametrize("through", ["public", "operator"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_attention_is_the_exact_path(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, dtype: str, head_dim: int, window: int | None, through: str
) -> None:
    """Outputs and gradients: no further from fp32 than twice what the exact path in half precision is.

    Where that has no error by luck, one rounding is let pass.
    """
    import torch

    from ckptkit.megatron import attention as module
    from ckptkit.megatron.packed_inputs import kernels
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    if through == "operator":
        monkeypatch.setattr(kernels, "_varlen", lambda: kernels._operator)
    torch.manual_seed(0)
    batch = PackedBatch.of_rows([[0] * 130, [], [0], [0] * 7, [0] * 64], torch.device("cuda"))
    shape, core, half = (batch.total, 1, head_dim), attention(head_dim, window), getattr(torch, dtype)
    parts = [torch.randn(batch.total, heads, head_dim, device="cuda").to(half) for heads in (8, 2, 2)]
    direction = torch.randn(batch.total, 8 * head_dim, device="cuda").to(half)
    assert kernels.flash_serves(parts[0], None) and not kernels.flash_serves(parts[0], 30.0), shape

    def run(kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [part.to(kind).requires_grad_() for part in parts]
        output = core(*inputs, packed_seq_params=batch.params())
        (output * direction.to(kind)).sum().backward()
        return [value.detach().float() for value in (output, *(part.grad for part in inputs))]

    served: list[torch.dtype] = []

    def watched(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        served.append(query.dtype)
        return kernels.flash_attention(query, *arguments, **options)

    monkeypatch.setattr(module, "flash_attention", watched)
    exact, flash = run(torch.float32), run(half)
    assert served == [half]
    monkeypatch.setattr(module, "flash_serves", lambda query, softcap: False)
    noisy = run(half)
    assert served == [half]
    for expected, found, own in zip(exact, flash, noisy, strict=True):
        size, noise, error = (x.square().mean().sqrt() for x in (expected, own - expected, found - expected))
        assert error <= 2 * noise + torch.finfo(half).eps * size


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("bfloat16", 512), ("bfloat16", 12)])
def test_what_flash_attention_does_not_take_is_exact(one_gpu: None, dtype: str, head_dim: int) -> None:
    import torch

    from ckptkit.megatron.packed_inputs import kernels
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    batch = PackedBatch.of_rows([[0] * 20, [0] * 3], torch.device("cuda"))
    parts = [torch.randn(23, heads, head_dim, device="cuda").to(getattr(torch, dtype)) for heads in (4, 2, 2)]
    assert not kernels.flash_serves(parts[0], None)
    core = attention(head_dim, 4)
    found = core(*parts, packed_seq_params=batch.params())
    apart = [core(*(part[a:b, None] for part in parts)).squeeze(1) for a, b in ((0, 20), (20, 23))]
    assert relative_error(found, torch.cat(apart)) < (1e-5 if dtype == "float32" else 2.0**-6)
    assert relative_error(core(*(part[:, None] for part in parts)).squeeze(1), found) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_converted_models(one_gpu: None, kind: str) -> None:
    """fp32 as transformers; in bf16 no further from that than twice as far as transformers; the weights come back."""
    import torch
    import transformers

    from ckptkit import convert_to_packed

    torch.manual_seed(0)
    if kind in LLAMAS:
        model = transformers.LlamaForCausalLM(llama_config(kind))
    else:
        model = model_classes(kind)[1](model_config(kind))
    randomise(model)
    model.set_attn_implementation("eager")
    model.eval().cuda()
    ids = torch.tensor([token for row in TOKENS for token in row], device="cuda")
    bounds = torch.tensor([0, *itertools.accumulate(map(len, TOKENS))], dtype=torch.int32, device="cuda")

    def alone() -> torch.Tensor:
        rows = [torch.tensor([row], device="cuda") for row in TOKENS]
        return torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in rows])

    with torch.no_grad():
        expected, found = alone(), convert_to_packed(model)(ids, bounds, 64)
        assert relative_error(found, expected) < (1e-4 if has_experts(kind) else 2e-5)
        model.bfloat16()
        runtime, noisy = convert_to_packed(model), alone()
        low = runtime(ids, bounds, 64).float()
    if not has_experts(kind):  # their routing is replayed where ranks are compared
        assert (low - expected).square().mean() <= 2**2 * (noisy - expected).square().mean()
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in runtime.to_hf_state_dict().items())


def test_sequences_do_not_leak_through_the_kernel(one_gpu: None) -> None:
    """Another first sequence changes nothing behind its end; without the boundary it would."""
    import torch
    import transformers

    from ckptkit import convert_to_packed

    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(model_config("mistral"))
    randomise(model)
    runtime = convert_to_packed(model.eval().cuda().bfloat16())
    ids = torch.randint(0, 250, (40,), device="cuda")
    other = torch.cat(((ids[:10] + 1) % 250, ids[10:]))
    apart, joined = (torch.tensor(bounds, dtype=torch.int32, device="cuda") for bounds in ([0, 10, 40], [0, 40]))
    with torch.no_grad():
        assert relative_error(runtime(ids, apart)[10:], runtime(other, apart)[10:]) < 2.0**-6
        assert relative_error(runtime(ids, joined)[10:], runtime(other, joined)[10:]) > 2.0**-3
