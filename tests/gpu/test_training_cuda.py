"""Gradients, steps of training, and adapters on CUDA ranks, against transformers and peft.

A grid of n ranks uses NCCL where the machine has n GPUs; with fewer, gloo ranks share them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.big_models import released, shrink, write_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.adapters.verify import verify_adapter
from ckptkit.verification.logits import Side
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import VerificationReport
from ckptkit.verification.tokens import default_rows
from ckptkit.verification.training.level import verify_gradients
from tests.gpu.test_cuda import EXACT
from tests.lora import save_adapter
from tests.models import save_model
from tests.precision import MANY_ROWS
from tests.verification.adapters.test_against_peft import QUIET
from tests.verification.training.conftest import Sources
from tests.verification.training.test_gradients import PACKED, RECOMPUTE, SP, Way, gradients_of, named, record, rows
from tests.verification.training.test_training import steps_of

pytestmark = pytest.mark.gpu

CUDA = {"device": "cuda"}
GRADIENTS = 1e-4
WIDE_VOCABULARY = 32_768
TWO_RANKS: list[tuple[str, Way]] = [
    ("gqa", (Parallelism(2), SP)),
    ("gqa", (Parallelism(1, 2), PACKED)),
    ("qwen3", (Parallelism(1, 2, 2), RECOMPUTE)),
    ("qwen3_moe", (Parallelism(ep=2), {})),
    ("gemma3_text", (Parallelism(2), {**SP, **RECOMPUTE})),
    ("split-mlp", (Parallelism(1, 2), RECOMPUTE)),
]
REPLICAS: list[tuple[str, Way]] = [("gqa", (Parallelism(), {"dp": 2}))]
SHARDED: list[tuple[str, Way]] = [
    ("gqa", (Parallelism(), {"dp": 2, "dp_kind": "fsdp2", **RECOMPUTE})),
    ("qwen3_moe", (Parallelism(), {"dp": 2, "dp_kind": "fsdp2", **PACKED})),
]
VALUES: list[tuple[str, Way]] = [
    ("gqa-value", (Parallelism(2), {**SP, **RECOMPUTE})),
    ("gemma3_text-value", (Parallelism(1, 2), PACKED)),
    ("mistral-value", (Parallelism(), {"cp": 2, **PACKED})),
]
LATENT: list[tuple[str, Way]] = [
    ("deepseek_v3", (Parallelism(1, 2), PACKED)),
    ("deepseek_v3-moonlight", (Parallelism(2), SP)),
    ("glm4_moe", (Parallelism(ep=2), RECOMPUTE)),
    ("glm4_moe_lite", (Parallelism(ep=2), PACKED)),
]
SINKS: list[tuple[str, Way]] = [
    ("gpt_oss", (Parallelism(ep=2), PACKED)),
    ("gpt_oss", (Parallelism(1, 2), RECOMPUTE)),
    ("gpt_oss", (Parallelism(2), SP)),
]
FOUR_RANKS: list[tuple[str, Way]] = [("mixtral", (Parallelism(2, ep=2), {**SP, **PACKED}))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    from transformers import GptOssConfig

    found = Sources(tmp_path_factory.mktemp("training"))
    if not hasattr(
        GptOssConfig(), "swiglu_limit"
    ):  # then 7 is what transformers computes with, whatever config.json has
        found["gpt_oss"] = save_model(found.folder / "gpt_oss", "gpt_oss", swiglu_limit=7.0, swiglu_alpha=1.702)
    return found


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    """Stages send to each other over NCCL alone, which wants a GPU for each rank."""
    import torch

    given = getattr(getattr(request.node, "callspec", None), "params", {})
    grid = given.get("grid") or given.get("way", (Parallelism(),))[0]
    adapters_alone = request.node.name.startswith("test_adapters")
    if grid.pp > 1 and not adapters_alone and torch.cuda.device_count() < grid.tp * grid.pp:
        pytest.skip(f"training over {grid.pp} stages needs {grid.tp * grid.pp} GPUs")


def ran_on_cuda(details: dict[str, Any]) -> bool:
    """What the ranks said of themselves."""
    devices = details["candidate_ran"]["devices"]
    return bool(devices) and "cpu" not in devices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "way"), [*TWO_RANKS, *REPLICAS, *SHARDED, *VALUES, *LATENT, *SINKS, *FOUR_RANKS], ids=named
)
def test_gradients(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way, dtype: str) -> None:
    answer = gradients_of(sources[kind], tmp_path, pool, way, dtype=dtype, **CUDA)
    record(kind, way, answer)
    assert answer.passed, answer.summary
    assert answer.details["missing"] == answer.details["surplus"] == []
    assert ran_on_cuda(answer.details)


def test_a_fault_in_gradients_is_seen(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    """Heads of another order in one layer: what passes above could fail."""
    other = shutil.copytree(sources["gqa"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].roll(1, 0)}, other / "model.safetensors", {"format": "pt"})
    convert(other, tmp_path / "meg", to="torch", spec="local", grid=Parallelism(2))
    sides = Side(sources["gqa"], "hf"), Side(tmp_path / "meg", "megatron")
    answer = verify_gradients(*sides, pool=pool, tolerance=EXACT, tokens=rows(), device="cuda")
    assert not answer.passed


STEPS = [
    ("gqa", Parallelism(2), {"optimizer": "sgd", **SP}),
    ("tied", Parallelism(1, 2), {"optimizer": "adamw", **PACKED}),
    ("split-mlp", Parallelism(1, 2), {"optimizer": "sgd", "train_only": "*adapter*"}),
]


@pytest.mark.parametrize(("kind", "grid", "how"), STEPS, ids=str)
def test_steps(
    sources: Sources, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, how: dict[str, Any]
) -> None:
    answer = steps_of(sources[kind], tmp_path, pool, grid, **how, **CUDA)
    assert answer.passed, answer.summary
    assert ran_on_cuda(answer.details)
    losses = answer.details["losses"]["candidate"]
    assert losses[-1] < losses[0]


def adapted(base: Path, folder: Path, pool: RankPool, grid: Parallelism, **how: Any) -> VerificationReport:
    """An adapter of a base, converted for a grid, and verified."""
    adapter = save_adapter(folder / "adapter", base, **QUIET)
    layout = how.pop("layout", "canonical")
    convert(adapter, folder / "meg", to="torch", adapter_layout=layout, grid=grid, hf_reference=base)
    given = {"tokens": MANY_ROWS, "tolerance": EXACT, "pool": pool, **CUDA}
    return verify_adapter(base, folder / "meg", adapter, **{**given, **how})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "grid", "how"),
    [
        ("gqa", Parallelism(2), {"layout": "fused", **SP}),
        ("gqa", Parallelism(1, 2), {"layout": "peft"}),
        ("qwen3", Parallelism(2, 2), {}),
        ("qwen3_moe", Parallelism(ep=2), {}),
    ],
    ids=str,
)
def test_adapters(
    sources: Sources, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, how: dict[str, Any], dtype: str
) -> None:
    report = adapted(sources[kind], tmp_path, pool, grid, dtype=dtype, **how)
    assert [level.name for level in report.levels] == ["structure", "weights", "logits"], report.levels[-1].summary
    assert report.passed, report.levels[-1].summary
    assert report.levels[-1].details["candidate_ran"]["devices"] != ["cpu"]


@pytest.mark.parametrize(
    ("kind", "grid", "how"),
    [
        ("gqa", Parallelism(2), {"layout": "peft", **SP}),
        ("tied", Parallelism(1, 2), {"layout": "fused", **RECOMPUTE}),
        ("qwen3_moe", Parallelism(ep=2), {"layout": "fused", **PACKED}),
        ("mixtral", Parallelism(2, ep=2, etp=2), {"layout": "fused", **SP}),
    ],
    ids=str,
)
def test_gradients_of_adapters(
    sources: Sources, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, how: dict[str, Any]
) -> None:
    report = adapted(sources[kind], tmp_path, pool, grid, level="gradients", tolerance=GRADIENTS, **how)
    answer = report.levels[-1]
    assert answer.name == "gradients" and answer.passed, answer.summary
    assert all(".lora_" in tensor["name"] for tensor in answer.details["worst"]) and ran_on_cuda(answer.details)


def true_width(folder: Path, name: str, layers: int, device: str, **changes: Any) -> Path:
    """The first layers of a released model with random weights; `changes` are stated."""
    write_checkpoint(folder, shrink(released(name), layers, changes), device)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "way",
    [(Parallelism(2), {"cp": 1, **SP}), (Parallelism(1, 2), {"cp": 1}), (Parallelism(), {"cp": 2})],
    ids=named,
)
def test_a_model_of_true_width_past_its_window(tmp_path: Path, pool: RankPool, way: Way, dtype: str) -> None:
    """Six of the 34 layers of Gemma 3 4B, one of them without a window, and a vocabulary of 32,768 of 262,208."""
    source = true_width(tmp_path / "hf", "gemma-3-4b", 6, "cuda", vocab_size=WIDE_VOCABULARY)
    lengths = [1536, 1200, 400]
    tokens = [row[:length] for row, length in zip(default_rows(WIDE_VOCABULARY, 3, 1536), lengths, strict=True)]
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=way[0])
    sides, how = (Side(source, "hf"), Side(tmp_path / "meg", "megatron")), {"packed": True, **way[1]}
    answer = verify_gradients(*sides, pool=pool, tokens=tokens, dtype=dtype, capacity=1600, **how, **CUDA)
    record("gemma-3-4b, 6 layers", (way[0], how), answer)
    assert answer.passed, answer.summary
    assert ran_on_cuda(answer.details)


def test_another_scale_of_an_adapter_is_seen(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    adapter = save_adapter(tmp_path / "adapter", sources["gqa"], **QUIET)
    half = shutil.copytree(adapter, tmp_path / "half")
    tensors = load_file(half / "adapter_model.safetensors")
    scaled = {name: value / 2 if "lora_B" in name else value for name, value in tensors.items()}
    save_file(scaled, half / "adapter_model.safetensors", {"format": "pt"})
    convert(half, tmp_path / "meg", to="torch", grid=Parallelism(2), hf_reference=sources["gqa"])
    given: dict[str, Any] = {"tokens": MANY_ROWS, "tolerance": EXACT, "pool": pool, "keep_going": True, **CUDA}
    report = verify_adapter(sources["gqa"], tmp_path / "meg", adapter, **given)
    assert not report.levels[-1].passed and report.levels[-1].name == "logits"
