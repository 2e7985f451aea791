"""Gradients of exactly an adapter's factors, by megatron-core's means, against peft on transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, open_checkpoint
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.lora import LAYOUTS
from ckptkit.verification.adapters.verify import verify_adapter
from ckptkit.verification.ranks.jobs import AdapterJob
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.run_options import LEVELS
from ckptkit.verification.sides import Side
from ckptkit.verification.training.level import verify_gradients
from tests.lora import save_adapter
from tests.models import files_of, save_model
from tests.verification.adapters.test_against_peft import EXPERTS, QUIET
from tests.verification.conftest import DEVICE
from tests.verification.training.conftest import Sources
from tests.verification.training.test_gradients import EXACT, PACKED, RECOMPUTE, SP, record, rows
from tests.verification.training.test_training import in_this_job

Case = tuple[str, str, Parallelism, dict[str, Any]]
"""Kind of model, layout of the adapter, and how it runs."""
QUICK: list[Case] = [
    ("gqa", "fused", Parallelism(2), SP),
    ("tied", "canonical", Parallelism(1, 2), {**PACKED, **RECOMPUTE}),
    ("mixtral", "peft", Parallelism(2, ep=2, etp=2), {**SP, **RECOMPUTE}),
    ("gemma4_text-moe", "fused", Parallelism(ep=2), {"dp": 2}),
]
WAYS: list[tuple[Parallelism, dict[str, Any]]] = [
    (Parallelism(2), {**SP, **RECOMPUTE}),
    (Parallelism(2, 2), {**SP, **PACKED}),
    (Parallelism(1, 2, 2), {}),
    (Parallelism(2), {}),
]
EXPERT_WAYS: list[tuple[Parallelism, dict[str, Any]]] = [
    (Parallelism(2, ep=2, etp=2), SP),
    (Parallelism(2, ep=2, etp=1), {**SP, **PACKED}),
    (Parallelism(ep=2), {"dp": 2, **RECOMPUTE}),
    (Parallelism(1, 2, ep=2), PACKED),
]


DELTA = ("qwen3_5_text", "qwen3_next")
"""Kinds with DeltaNets: pairs for the parts of their projection exist nowhere, and float64 takes their rounding out."""


def slow() -> Iterator[Case]:
    """Every family in every layout, in ways that take turns; experts in two of them."""
    for at, kind in enumerate(
        ("gqa", "tied", "qwen2", "gemma3", "apertus", "gemma4_text-e2b", "mixtral", "qwen3_moe", "gpt_oss", *DELTA)
    ):
        experts = kind in EXPERTS
        ways = EXPERT_WAYS if experts else WAYS
        for number, layout in enumerate(LAYOUTS):
            if layout == "canonical" and (kind.startswith("gemma4") or kind in DELTA):
                continue  # it has no form for keys that are values, too
            for turn in (0, 2) if experts else (0,):
                yield (kind, layout, *ways[(at + number + turn) % len(ways)])


MORE: list[Case] = [
    ("gqa", "peft", Parallelism(2), {**SP, **PACKED}),
    ("qwen3_moe", "fused", Parallelism(2, ep=2, etp=2), SP),
    ("gqa", "fused", Parallelism(2), {"dp": 2, "dp_kind": "fsdp2", **SP}),
    ("mixtral", "peft", Parallelism(ep=2), {"dp": 2, "dp_kind": "fsdp2", **PACKED}),
]
SLOW = [case for case in [*slow(), *MORE] if case not in QUICK]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


class Adapters(dict[str, Path]):
    """Kind -> a random adapter for all that PEFT calls linear layers of such a model, saved once."""

    def __init__(self, folder: Path, sources: Sources) -> None:
        super().__init__()
        self.folder, self.sources = folder, sources

    def __missing__(self, kind: str) -> Path:
        self[kind] = save_adapter(self.folder / kind, self.sources[kind], **QUIET)
        return self[kind]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, sources: Sources) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"), sources)


def sides_of(base: Path, adapter: Path, candidate: Path, grid: Parallelism) -> tuple[Side, Side]:
    reference = Side(base, "hf", adapter=AdapterJob(str(adapter)))
    return reference, Side(base, "megatron", grid=grid, adapter=AdapterJob(str(candidate)))


@pytest.mark.parametrize(("kind", "layout", "grid", "how"), CASES, ids=str)
def test_gradients_of_factors(
    sources: Sources,
    adapters: Adapters,
    tmp_path: Path,
    pool: RankPool,
    kind: str,
    layout: str,
    grid: Parallelism,
    how: dict[str, Any],
) -> None:
    base, adapter = sources[kind], adapters[kind]
    convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, grid=grid, hf_reference=base)
    sides = sides_of(base, adapter, tmp_path / "meg", grid)
    exact = {"dtype": "float64"} if kind in DELTA else {}
    answer = verify_gradients(*sides, pool=pool, tokens=rows(), device=DEVICE, **{"tolerance": EXACT, **exact, **how})
    record(f"{kind} adapter, {layout}", (grid, how), answer)
    assert answer.passed, answer.summary
    names = [name for tensor in answer.details["worst"] for name in tensor["name"].split(" + ")]
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert answer.details["missing"] == answer.details["surplus"] == []
    told = any("zeros in this layout" in line for line in answer.details["messages"])
    assert told == (layout != "canonical")


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory, sources: Sources, adapters: Adapters) -> Path:
    path = tmp_path_factory.mktemp("canonical") / "meg"
    convert(
        adapters["gqa"],
        path,
        to="torch",
        adapter_layout="canonical",
        grid=Parallelism(2),
        hf_reference=sources["gqa"],
    )
    return path


def test_steps_move_the_factors_alone(sources: Sources, adapters: Adapters, pool: RankPool, canonical: Path) -> None:
    report = verify_adapter(
        sources["gqa"],
        canonical,
        adapters["gqa"],
        pool=pool,
        device=DEVICE,
        tokens=rows(),
        train_steps=3,
        optimizer="sgd",
        lr=1e-4,
        sequence_parallel=True,
    )
    assert [level.name for level in report.levels] == list(LEVELS), report.levels[-1].summary
    assert report.passed, [level.summary for level in report.levels]
    training = report.levels[-1]
    assert training.details["tensors"] == 2 * 7 * 4
    assert any(check.name == "frozen" and check.passed for check in training.checks)


def test_a_peft_directory_on_a_grid(sources: Sources, adapters: Adapters, pool: RankPool) -> None:
    report = verify_adapter(
        sources["tied"],
        adapters["tied"],
        adapters["tied"],
        pool=pool,
        device=DEVICE,
        tokens=rows(),
        level="gradients",
        tp=2,
        pp=2,
    )
    assert report.passed and report.levels[-1].name == "gradients", report.levels[-1].summary


FAULTS = {
    # opener -> words of the answer
    "unsummed": "lora_A.weight",
    "thawed": "gradient: one for decoder.final_layernorm.weight",
    "summed_twice": "lora_A.weight",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(sources: Sources, adapters: Adapters, tmp_path: Path, pool: RankPool, fault: str) -> None:
    """Each is a mistake of a runtime: the logits are right."""
    base, adapter = sources["gqa"], adapters["gqa"]
    layout, grid = ("fused" if fault == "summed_twice" else "peft"), Parallelism(2)
    convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, grid=grid, hf_reference=base)
    sides = sides_of(base, adapter, tmp_path / "meg", grid)
    answer = verify_gradients(
        *sides, pool=pool, tokens=rows(), device=DEVICE, opener=f"{__name__}:{fault}", sequence_parallel=True
    )
    assert not answer.passed
    assert FAULTS[fault] in answer.summary


def unsummed(path: str, **options: Any) -> Any:
    """Factors that every rank holds whole, of which each keeps the gradient of its own part of the sequence."""

    def stand_in(original: Any) -> Any:
        class Unmarked(original):  # type: ignore[misc]
            def __init__(self, pipeline: Any, *how: Any) -> None:
                for chunk in pipeline.chunks:
                    for name, parameter in chunk.named_parameters():
                        if ".lora_" in name:
                            parameter.sequence_parallel = False
                super().__init__(pipeline, *how)

        return Unmarked

    in_this_job("Training", stand_in)
    return open_checkpoint(path, **options)


def thawed(path: str, **options: Any) -> Any:
    """A model whose weights are trained, too."""
    in_this_job("Training", lambda original: lambda pipeline, trained, kind: original(pipeline, None, kind))
    return open_checkpoint(path, **options)


def summed_twice(path: str, **options: Any) -> Any:
    """Parts of the sequence whose gradients are summed over ranks that have summed them."""

    def stand_in(original: Any) -> Any:
        from ckptkit.megatron import lora

        gathered, about = lora.gather_from_sequence_parallel_region, lora._About
        correct = about.whole_sequence

        class Twice(original):  # type: ignore[misc]
            def run(self, *arguments: Any, **options: Any) -> Any:
                about.whole_sequence = lambda self, low: gathered(low, group=self.group)  # type: ignore[method-assign]
                try:
                    return super().run(*arguments, **options)
                finally:
                    about.whole_sequence = correct  # type: ignore[method-assign]

        return Twice

    in_this_job("Training", stand_in)
    return open_checkpoint(path, **options)


def test_what_cannot_be_trained(
    sources: Sources, adapters: Adapters, tmp_path: Path, pool: RankPool, canonical: Path
) -> None:
    base, adapter = sources["gqa"], adapters["gqa"]
    grid = Parallelism(2)
    convert(adapter, tmp_path / "fused", to="torch", grid=grid, hf_reference=base)
    other = save_adapter(tmp_path / "other", base, **QUIET, seed=2)
    for candidate, options, error, words in (
        (base, {"level": "gradients"}, UsageError, "a merged model has no factors"),
        (canonical, {"level": "gradients", "train_only": "*q_proj*"}, UsageError, "exactly the adapter is trained"),
        (tmp_path / "fused", {"train_steps": 1}, UnsupportedError, "ranks 4 to 11 of B of model.layers.0.self_attn"),
    ):
        with pytest.raises(error, match=words):
            verify_adapter(base, candidate, adapter, pool=pool, **options)
    with pytest.raises(UnsupportedError, match=r"other factors of model\.layers\.0\.mlp\.down_proj"):
        verify_gradients(*sides_of(base, other, canonical, grid), pool=pool)


def test_pairs_for_the_parts_of_a_delta_nets_projection_do_not_run(
    sources: Sources, adapters: Adapters, tmp_path: Path, pool: RankPool
) -> None:
    base, adapter = sources["qwen3_5_text"], adapters["qwen3_5_text"]
    convert(adapter, tmp_path / "meg", to="torch", adapter_layout="canonical", hf_reference=base)
    with pytest.raises(UnsupportedError, match=r"in_proj, which no library has.*adapter-layout fused"):
        verify_gradients(*sides_of(base, adapter, tmp_path / "meg", Parallelism()), pool=pool)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "grid", "how"),
    [
        ("peft", Parallelism(2, ep=2, etp=2), SP),
        ("fused", Parallelism(2, ep=2, etp=1), {**SP, **PACKED}),
        ("canonical", Parallelism(1, 2, ep=2), PACKED),
    ],
    ids=str,
)
def test_experts_with_columns_for_outputs(
    tmp_path: Path, pool: RankPool, layout: str, grid: Parallelism, how: dict[str, Any]
) -> None:
    """One parameter of all experts, in which gate and up outputs take turns; no matrix is square."""
    base = save_model(tmp_path / "base", "gpt_oss", intermediate_size=40)
    experts = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = save_adapter(tmp_path / "adapter", base, **{**QUIET, **experts})
    convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, grid=grid, hf_reference=base)
    convert(tmp_path / "meg", tmp_path / "back", to="peft")
    assert files_of(tmp_path / "back") == files_of(adapter)
    sides = sides_of(base, adapter, tmp_path / "meg", grid)
    answer = verify_gradients(*sides, pool=pool, tokens=rows(), device=DEVICE, **{"tolerance": EXACT, **how})
    assert answer.passed, answer.summary
