"""Training over pipeline stages with megatron-core's own schedules, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.formats.rank_pool import RankProcesses
from tests.surgery.pairs import KINDS, NARROW, WIDE, build_split, load_remote, save_pair
from tests.surgery.stage_training import LENGTHS, MODULE, RATE, VOCABULARY, Job, loss_of, run

EXACT = 2e-5
Prepared = Callable[..., dict[str, Path]]


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(4, MODULE) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Kind of adapter -> a split Llama, its gradients, its weights after a step, and the losses before and after."""
    folder = tmp_path_factory.mktemp("stages")
    pair = save_pair(folder / "pair", dtype="float32", vocab_size=VOCABULARY)

    def get(kind: str, num_last: int = 2) -> dict[str, Path]:
        own = folder / f"{kind}-{num_last}"
        where = {name: own / name for name in ("model", "gradients", "after", "losses.json")}
        if not own.exists():
            own.mkdir()
            build_split(where["model"], pair, kind, num_last=num_last)
            step_of_transformers(where)
        return where

    return get


def step_of_transformers(where: dict[str, Path]) -> None:
    """One step of gradient descent of the whole model by itself."""
    import torch
    from safetensors.torch import save_file

    model = load_remote(where["model"], dtype=torch.float32)
    loss = loss_of(model)
    loss.backward()
    named = dict(model.named_parameters())
    after = {name: parameter.detach() - RATE * parameter.grad for name, parameter in named.items()}
    gradients = {name: parameter.grad for name, parameter in named.items()}
    for name, tensors in (("gradients", gradients), ("after", after)):
        where[name].mkdir()
        shutil.copy(where["model"] / "config.json", where[name])
        save_file(tensors, where[name] / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(after[name])
        where["losses.json"].write_text(json.dumps([loss.item(), loss_of(model).item()]))


def answers_of(
    ranks: RankProcesses, where: dict[str, Path], folder: Path, grid: dict[str, Any], **how: Any
) -> list[dict[str, Any]]:
    return run(ranks, Job(grid, *(str(where[name]) for name in ("model", "gradients", "after")), str(folder), **how))


def check(answers: list[dict[str, Any]], where: dict[str, Path]) -> None:
    """Every gradient, every weight after the step, and both losses are those of transformers."""
    before, after = json.loads(where["losses.json"].read_text())
    for answer in answers:
        assert max(answer["gradients"].values()) < EXACT, answer["gradients"]
        assert answer["after"] < EXACT
    losses = [answer for answer in answers if answer["losses"]]
    assert losses and all(len(answer["losses"]) == len(LENGTHS) for answer in losses)
    for answer in losses:
        assert sum(answer["losses"]) / len(LENGTHS) == pytest.approx(before, rel=EXACT)
        assert sum(answer["losses after"]) / len(LENGTHS) == pytest.approx(after, rel=EXACT)
    assert after < 0.999 * before


NARROW_CUT = {"pp": 2, "first_stage_layers": 2}
WIDE_CUT = {**NARROW_CUT, "adapter_first": True}


@pytest.mark.parametrize(
    ("kind", "grid", "width"),
    [
        ("linear", NARROW_CUT, NARROW),
        ("mlp", WIDE_CUT, WIDE),
        ("two-linear", {"pp": 2, "first_stage_layers": 1}, NARROW),
        ("linear", {"pp": 2, "first_stage_layers": 3}, WIDE),
    ],
    ids=str,
)
def test_two_stages(
    two_ranks: RankProcesses, prepared: Prepared, tmp_path: Path, kind: str, grid: dict[str, Any], width: int
) -> None:
    """The adapter begins the second stage, ends the first one, or is within one of them."""
    where = prepared(kind)
    answers = answers_of(two_ranks, where, tmp_path, grid)
    check(answers, where)
    assert answers[1]["widths"] == [[width, WIDE]]
    on_first = width == WIDE
    assert [bool(answer["adapters"]) for answer in answers] == [on_first, not on_first]


def test_recomputed_activations(two_ranks: RankProcesses, prepared: Prepared, tmp_path: Path) -> None:
    where = prepared("mlp")
    check(answers_of(two_ranks, where, tmp_path, NARROW_CUT, recompute=True), where)


def test_virtual_stages(two_ranks: RankProcesses, prepared: Prepared, tmp_path: Path) -> None:
    """The interleaved schedule; the adapter begins the second chunk of the first rank."""
    where = prepared("mlp")
    answers = answers_of(two_ranks, where, tmp_path, {"pp": 2, "vpp": 2})
    check(answers, where)
    assert [answer["widths"] for answer in answers] == [[[NARROW, WIDE]] * 2, [[NARROW, WIDE], [WIDE, WIDE]]]


def test_another_model_is_noticed(two_ranks: RankProcesses, prepared: Prepared, tmp_path: Path) -> None:
    """The same tensors without the ReLU between the adapter's matrices: the gradients of both stages differ."""
    where = prepared("mlp")
    shutil.copytree(where["model"], tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "adapter": "two-linear", "mlp": False}))
    for answer in answers_of(two_ranks, {**where, "model": tmp_path / "other"}, tmp_path, NARROW_CUT):
        assert min(answer["gradients"].values()) > 1e-2


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.parametrize("grid", [NARROW_CUT, {"pp": 2, "vpp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus(
    two_ranks: RankProcesses, prepared: Prepared, tmp_path: Path, kind: str, grid: dict[str, Any]
) -> None:
    """The same over NCCL."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    where = prepared(kind)
    check(answers_of(two_ranks, where, tmp_path, grid, sequence_parallel="tp" in grid, device="cuda"), where)


@pytest.mark.slow
def test_virtual_stages_of_three_ranks(four_ranks: RankProcesses, prepared: Prepared, tmp_path: Path) -> None:
    where = prepared("linear", num_last=4)
    check(answers_of(four_ranks, where, tmp_path, {"pp": 3, "vpp": 2, "adapter_first": True}), where)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "sequence_parallel"),
    [
        ({"pp": 3, "first_stage_layers": 2}, False),
        ({"pp": 3, "first_stage_layers": 1, "last_stage_layers": 2, "adapter_first": True}, False),
        ({"pp": 3, "first_stage_layers": 1, "last_stage_layers": 1}, False),
        ({**NARROW_CUT, "tp": 2}, True),
        ({**WIDE_CUT, "tp": 2}, True),
        ({**NARROW_CUT, "tp": 2}, False),
        ({"tp": 2, "pp": 2, "vpp": 2}, True),
    ],
    ids=str,
)
def test_more_stages(
    four_ranks: RankProcesses,
    prepared: Prepared,
    tmp_path: Path,
    kind: str,
    grid: dict[str, Any],
    sequence_parallel: bool,
) -> None:
    where = prepared(kind)
    check(answers_of(four_ranks, where, tmp_path, grid, sequence_parallel=sequence_parallel), where)
