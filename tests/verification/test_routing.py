"""Replayed routing: near-ties are forgiven, wrong routers are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import convert
from ckptkit.errors import UnsupportedError
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.double_precision import double_precision
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.jobs import LogitsJob
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reference import run_reference
from ckptkit.verification.reports.report import LogitsReport
from ckptkit.verification.routing import Record, hf_routers, hf_routing, judge_routing, read_experts
from ckptkit.verification.runs import Run
from ckptkit.verification.tokens import default_rows
from tests.models import MODELS, save_model
from tests.precision import MANY_ROWS, relative_error
from tests.verification.conftest import DEVICE

WITH_EXPERTS = [kind for kind, (_, changes) in MODELS.items() if any("experts" in key for key in changes)]
ONE_EACH = ("qwen3_moe", "mixtral", "gemma4_text-moe", "glm4_moe", "deepseek_v3")
"""A kind for each router of transformers."""
ROWS = [[1, 2, 3], [4, 5, 6]]
EXACT = 1e-5


def test_there_are_families_with_experts() -> None:
    assert {"mixtral", "qwen3_moe", "qwen3_moe-mixed"} <= set(WITH_EXPERTS)


def recorded(folder: Path, logits: torch.Tensor, experts_per_token: int = 2, ranks: int = 1) -> Run:
    """A run whose layer 1 had these router logits [rows, length, experts]."""
    for rank in range(ranks):
        record = Record()
        chosen = {1: logits.topk(experts_per_token).indices}
        record.add({1: logits}, chosen, chosen)
        record.save(folder, rank)
    return Run(ROWS, folder / "absent", routing=folder)


@pytest.fixture
def sure() -> torch.Tensor:
    """Logits without near-ties: experts are 2 apart."""
    torch.manual_seed(0)
    return torch.stack([torch.stack([torch.randperm(5) * 2.0 for _ in range(3)]) for _ in range(2)])


def judged(tmp_path: Path, exact: torch.Tensor, found: torch.Tensor, low: torch.Tensor | None = None) -> Any:
    runs = [recorded(tmp_path / name, part) for name, part in (("exact", exact), ("found", found))]
    rough = None if low is None else recorded(tmp_path / "low", low)
    return judge_routing(runs[0], rough, runs[1], 1e-4)


def test_equal_routers_pass(tmp_path: Path, sure: torch.Tensor) -> None:
    report = judged(tmp_path, sure, sure)
    assert report.logits_passed and report.choice_passed
    assert (report.tokens, report.near_ties, report.disagreements) == (6, 0, 0)
    assert report.experts_per_token == {"reference": 2, "candidate": 2}


def test_a_near_tie_is_counted_and_let_pass(tmp_path: Path, sure: torch.Tensor) -> None:
    exact = sure.clone()
    exact[1, 2] = torch.tensor([8.0, 1.0, 3.0, 3.0001, 0.0])
    found = exact.clone()
    found[1, 2, 2] += 0.0002
    report = judged(tmp_path, exact, found)
    assert report.logits_passed and report.choice_passed
    assert (report.near_ties, report.disagreements) == (1, 0)
    assert report.layers[0].largest_margin == pytest.approx(1e-4 / 8, rel=0.02)
    assert "1 near-ties among them differ" in report.checks()[1].summary


def test_a_choice_beyond_the_noise_fails(tmp_path: Path, sure: torch.Tensor) -> None:
    found = sure.clone()
    found[0, 1] = found[0, 1].roll(1)
    report = judged(tmp_path, sure, found)
    assert not report.logits_passed and not report.choice_passed
    assert report.disagreements == 1
    assert "1 beyond the noise: in layer 1" in report.checks()[1].summary


def test_logits_fail_by_themselves(tmp_path: Path, sure: torch.Tensor) -> None:
    report = judged(tmp_path, sure, sure * 1.001)
    assert not report.logits_passed and report.choice_passed
    assert "off by 1.0e-03" in report.checks()[0].summary


def test_below_fp32_the_noise_is_the_reference_s_own(tmp_path: Path, sure: torch.Tensor) -> None:
    def noisy(seed: int, scale: float) -> torch.Tensor:
        return sure + scale * torch.randn(sure.shape, generator=torch.Generator().manual_seed(seed))

    assert judged(tmp_path / "a", sure, noisy(1, 0.01), noisy(2, 0.01)).logits_passed
    far = judged(tmp_path / "b", sure, noisy(1, 0.03), noisy(2, 0.01))
    assert not far.logits_passed and far.choice_passed
    assert far.layers[0].noise_ratio == pytest.approx(3, rel=0.5)
    swapped = noisy(1, 0.01)
    swapped[0, 0] = swapped[0, 0].roll(1)
    assert not judged(tmp_path / "c", sure, swapped, noisy(2, 0.01)).choice_passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(tmp_path: Path, sure: torch.Tensor, value: float) -> None:
    found = sure.clone()
    found[0, 0, 0] = value
    assert not judged(tmp_path / "a", sure, found).logits_passed
    assert not judged(tmp_path / "b", sure, found, sure + 0.01).logits_passed


def test_every_rank_must_agree_and_every_router_must_exist(tmp_path: Path, sure: torch.Tensor) -> None:
    exact, found = recorded(tmp_path / "exact", sure), recorded(tmp_path / "found", sure)
    other = recorded(tmp_path / "other", sure.roll(1, -1))
    (tmp_path / "other" / "0.routing").rename(tmp_path / "found" / "1.routing")
    report = judge_routing(exact, None, found, 1e-4)
    assert report is not None and report.disagreements == 6
    missing = judge_routing(exact, None, other, 1e-4)
    assert missing is not None and not missing.logits_passed and not missing.choice_passed
    assert judge_routing(other, None, other, 1e-4) is None


def test_another_number_of_experts_fails(tmp_path: Path, sure: torch.Tensor) -> None:
    exact, found = recorded(tmp_path / "exact", sure), recorded(tmp_path / "found", sure, experts_per_token=3)
    report = judge_routing(exact, None, found, 1e-4)
    assert report is not None and report.logits_passed and not report.choice_passed
    assert "2 in the reference and 3 in the candidate" in report.checks()[1].summary


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ONE_EACH else pytest.mark.slow) for kind in WITH_EXPERTS]
)
def test_transformers_goes_where_it_is_sent(tmp_path: Path, kind: str) -> None:
    source = save_model(tmp_path / "hf", kind)
    job = LogitsJob(str(source), RunConfig(), default_rows(250), str(tmp_path / "a"))
    own = run_reference(LogitsJob(**{**vars(job), "routing": str(tmp_path / "own")}))
    chosen = read_experts(tmp_path / "own")
    again = run_reference(LogitsJob(**{**vars(job), "output": str(tmp_path / "b"), "replay": str(tmp_path / "own")}))
    assert relative_error(logits_of(again), logits_of(own)) < EXACT
    record = Record()
    for group in chosen.values():
        record.add({}, {layer: (experts + 1) % 4 for layer, experts in group.items()}, {})
    record.save(tmp_path / "others")
    sent = {**vars(job), "output": str(tmp_path / "c"), "replay": str(tmp_path / "others")}
    elsewhere = run_reference(LogitsJob(**{**sent, "routing": str(tmp_path / "there")}))
    assert relative_error(logits_of(elsewhere), logits_of(own)) > 0.1
    for length, group in read_experts(tmp_path / "there").items():
        for layer, experts in group.items():
            assert experts.equal((chosen[length][layer] + 1) % 4)


@pytest.mark.parametrize("in_float64", [False, True])
@pytest.mark.parametrize("call", [torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax])
def test_routers_are_recorded_however_they_call_torch(call: Any, in_float64: bool) -> None:
    """In float64 other functions stand in for torch's."""
    name = call.__name__
    places = {torch.softmax: torch, torch.nn.functional.softmax: torch.nn.functional, torch.Tensor.softmax: None}

    class SomeRouter(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            place = places[call] or logits
            given = () if place is logits else (logits,)
            return getattr(place, name)(*given, -1, dtype=torch.float32).topk(2).indices

    logits, record = torch.randn(3, 5, dtype=torch.float64 if in_float64 else torch.float32), Record()
    router, chosen = SomeRouter(), torch.tensor([[[0, 1], [2, 3], [4, 0]]])
    with double_precision(in_float64), hf_routing({0: router}, 1, 3, record, {0: chosen}):
        assert torch.equal(router(logits), chosen[0])
    assert torch.equal(record.tensors["logits.0.3"][0], logits)
    assert torch.equal(record.tensors["own.0.3"][0], logits.topk(2).indices)


def logits_of(run: Run) -> torch.Tensor:
    from safetensors.torch import load_file

    (logits,) = load_file(run.logits).values()
    return logits


def test_experts_without_a_router_are_said() -> None:
    class SomeExperts(torch.nn.Module):
        pass

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([SomeExperts()])

    class Model(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return Decoder()

    with pytest.raises(UnsupportedError, match=r"0 routers in layer 0 of Model.*--no-replay"):
        hf_routers(Model())


Rewrite = Callable[[dict[str, Any]], None]


def converted(tmp_path: Path, kind: str, grid: Parallelism, change: Rewrite | None = None) -> tuple[Path, Path]:
    """A model and its conversion, whose last file is changed."""
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=grid)
    if change is not None:
        file = sorted((tmp_path / "meg").glob("release/*/model_optim_rng.pt"))[-1]
        content = torch.load(file, weights_only=False)
        change(content["model"])
        torch.save(content, file)
    return source, tmp_path / "meg"


def compared(sides: tuple[Path, Path], pool: RankPool, **options: Any) -> LogitsReport:
    pair = Side(sides[0], "hf"), Side(sides[1], "megatron")
    return verify_logits(*pair, pool=pool, device=DEVICE, greedy=0, **options)


CASES = [
    ("mixtral", Parallelism(2, ep=2)),
    pytest.param("qwen3_moe", Parallelism(1, 2, ep=2), marks=pytest.mark.slow),
    pytest.param("qwen3_moe-mixed", Parallelism(1, 2, 2), marks=pytest.mark.slow),
    pytest.param("gemma4_text-moe", Parallelism(2, ep=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "grid"), CASES, ids=str)
def test_routers_are_judged_in_both_precisions(tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism) -> None:
    sides = converted(tmp_path, kind, grid)
    exact = compared(sides, pool, tolerance=1e-5)
    assert exact.passed and exact.routing is not None, exact.summary
    assert len(exact.routing.layers) == (3 if kind.endswith("mixed") else 4)
    low = compared(sides, pool, dtype="bfloat16", tokens=MANY_ROWS)
    assert low.passed and low.routing is not None, low.summary
    assert all(layer.noise_ratio is not None for layer in low.routing.layers)
    free = compared(sides, pool, replay=False)
    assert free.passed and free.routing is None


def test_either_side_may_be_the_reference(tmp_path: Path, pool: RankPool) -> None:
    source, candidate = converted(tmp_path, "mixtral", Parallelism(2))
    report = verify_logits(Side(candidate, "megatron"), Side(source, "hf"), pool=pool, device=DEVICE, tolerance=1e-5)
    assert report.passed and report.routing is not None and report.routing.tokens > 90, report.summary


ROUTER = "decoder.layers.1.mlp.router.weight"
NEAR = 1e-5
"""How far the logits of two experts are apart that are near: ten times a rounding error, a tenth of the tolerance."""
FAULTS: dict[str, Rewrite] = {
    "rows rolled": lambda model: model.update({ROUTER: model[ROUTER].roll(1, 0)}),
    "two experts exchanged": lambda model: model.update({ROUTER: model[ROUTER][[1, 0, 2, 3]]}),
    "one per cent larger": lambda model: model.update({ROUTER: model[ROUTER] * 1.01}),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name == "rows rolled" else pytest.mark.slow) for name in FAULTS]
)
def test_a_wrong_router_fails_although_its_choice_is_replaced(tmp_path: Path, pool: RankPool, fault: str) -> None:
    sides = converted(tmp_path, "qwen3_moe", Parallelism(), FAULTS[fault])
    report = compared(sides, pool)
    assert not report.passed and report.routing is not None and not report.routing.logits_passed
    assert report.location is not None and report.location.place == "layer 1 router", report.messages
    assert report.location.tensors == [ROUTER]
    if fault != "one per cent larger":
        assert not report.routing.choice_passed
        low = compared(sides, pool, dtype="bfloat16", tokens=MANY_ROWS)
        assert low.routing is not None and not low.routing.logits_passed and not low.routing.choice_passed


def test_a_near_tie_between_the_libraries_is_no_difference(tmp_path: Path, pool: RankPool) -> None:
    """Two experts that the router all but cannot tell apart: the candidate prefers the other one of them."""
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "hf", "mixtral")
    tensors = load_file(source / "model.safetensors")
    gate = tensors["model.layers.2.block_sparse_moe.gate.weight"]
    gate[0] *= 2  # both are often among the best, and often one of them only
    gate[1] = gate[0] * (1 + NEAR)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=Parallelism(2))
    router = "decoder.layers.2.mlp.router.weight"
    for file in (tmp_path / "meg").glob("release/*/model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        content["model"][router] = content["model"][router][[1, 0, 2, 3]]
        torch.save(content, file)
    report = compared((source, tmp_path / "meg"), pool)
    assert report.passed and report.routing is not None, report.summary
    assert report.routing.near_ties > 0
    free = compared((source, tmp_path / "meg"), pool, replay=False)
    assert not free.passed, "without replay, tokens that went elsewhere are errors"


GROUPED = [[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.1]]
"""Scores of four groups of two: the groups' are 1.7, 1.3, 0.9 and 0.3."""


@pytest.mark.parametrize(
    ("own", "gap", "equal"),
    [
        ([0, 1, 4, 5], 1e-3, True),  # the third group in place of the second, which is as good
        ([0, 1, 4, 5], 0.4, False),  # which is better
        ([0, 1, 4, 6], 1e-3, False),  # a third group beside the two
        ([0, 1, 6, 7], 1e-3, False),  # the fourth group
        ([0, 1, 2, 3], 1e-3, True),  # its own choice
    ],
)
def test_groups_that_a_router_holds_equal(own: list[int], gap: float, equal: bool) -> None:
    """A choice of two groups and four experts; groups and experts count as equal up to 0.01."""
    import torch

    from ckptkit.verification.routing import Groups, Order

    whole = torch.tensor(GROUPED)
    scores = torch.tensor([[1.7, 0.9 + gap, 0.9, 0.3]])
    exact = whole.masked_fill(torch.tensor([[False] * 4 + [True] * 4]), -torch.inf)
    order = Order(exact, None, torch.tensor([[0, 1, 2, 3]]), Groups(whole, scores, None, 0.005 / 1.7))
    (margin,) = order.margins(torch.tensor([own]), 0.01).tolist()
    assert (margin <= 0.01) == equal, margin


def test_experts_among_groups_that_are_held_equal_count() -> None:
    """Of the right groups, and not the best ones."""
    import torch

    from ckptkit.verification.routing import Groups, Order

    whole = torch.tensor(GROUPED)
    exact = whole.masked_fill(torch.tensor([[False] * 4 + [True] * 4]), -torch.inf)
    order = Order(
        exact, None, torch.tensor([[0, 1]]), Groups(whole, torch.tensor([[1.7, 0.9, 0.9, 0.3]]), None, 0.005 / 1.7)
    )
    margins = [float(order.margins(torch.tensor([own]), 0.01)) for own in ([0, 1], [0, 4], [4, 5])]
    assert margins[0] < 0 and margins[1] == pytest.approx(0.3 / 0.9) and margins[2] == pytest.approx(0.5 / 0.9)
