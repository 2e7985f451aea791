"""A split Llama on real megatron-core modules, against its Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import convert, verify
from ckptkit.errors import InputError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LogitsReport
from tests.surgery.pairs import KINDS, WIDE, build_split

EXACT = 1e-5
TOKENS = [[(7 * i + 3 * i * i + 5 * n) % 250 for i in range(n)] for n in (24, 3, 17, 1, 24)]

# 2 of 5 layers are narrow: with as many on the first stage, two stages part at the adapter.
CASES = [
    ("linear", Parallelism(2)),
    ("two-linear", Parallelism(2)),
    ("mlp", Parallelism(2)),
    ("linear", Parallelism(1, 2, first_stage_layers=2)),
    ("mlp", Parallelism(1, 2, first_stage_layers=2, adapter_first=True)),
    ("two-linear", Parallelism(1, 3, first_stage_layers=1, last_stage_layers=2)),
    ("linear", Parallelism(1, 3, first_stage_layers=1, last_stage_layers=3, adapter_first=True)),
    ("mlp", Parallelism(2, 2, first_stage_layers=2)),
    ("linear", Parallelism(2, 2, first_stage_layers=2, adapter_first=True)),
    ("two-linear", Parallelism(2, 2, first_stage_layers=1)),
]
MORE = [
    *((kind, Parallelism()) for kind in KINDS),
    *((kind, Parallelism(1, 2, first_stage_layers=number)) for kind in KINDS for number in (1, 3)),
    *(
        (kind, Parallelism(2, 2, first_stage_layers=2, adapter_first=first))
        for kind in KINDS
        for first in (False, True)
    ),
    *((kind, Parallelism(4)) for kind in KINDS),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in CASES]


@pytest.mark.parametrize(("kind", "grid"), [*CASES, *SLOW], ids=str)
def test_logits(wide_splits: dict[str, Path], tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism) -> None:
    convert(wide_splits[kind], tmp_path / "meg", to="torch", spec="local", grid=grid)
    report = verify(wide_splits[kind], tmp_path / "meg", tokens=TOKENS, tolerance=EXACT, pool=pool)
    assert [level.passed for level in report.levels] == [True] * 3, report.levels[-1].summary
    ours = report.levels[-1].details["own_modules"]
    assert ours["ckptkit.megatron.adapter.ParallelAdapter"] == grid.tp


def test_virtual_stages(wide_pair: tuple[Path, Path], tmp_path: Path, pool: RankPool) -> None:
    """Four chunks of one layer: rank 0 has layers 0 and 2, and the adapter before 2 on its second chunk."""
    source = build_split(tmp_path / "split", wide_pair, "mlp", num_first=2, num_last=2)
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=Parallelism(1, 2, 2))
    assert verify(source, tmp_path / "meg", tokens=TOKENS, tolerance=EXACT, pool=pool).passed


@pytest.mark.parametrize(
    ("kind", "grid"), [("linear", Parallelism(2)), ("mlp", Parallelism(2, 2, first_stage_layers=2))], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_sequence_parallelism(
    wide_splits: dict[str, Path], tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, packed: bool
) -> None:
    convert(wide_splits[kind], tmp_path / "meg", to="torch", spec="local", grid=grid)
    how: dict[str, Any] = {"packed": packed, "sequence_parallel": True, "pool": pool}
    report = verify(wide_splits[kind], tmp_path / "meg", tokens=TOKENS, tolerance=2 * EXACT, **how)
    assert report.passed, report.levels[-1].summary


def test_halves_with_epsilons_of_their_own(wide_pair: tuple[Path, Path], tmp_path: Path, pool: RankPool) -> None:
    source = build_split(tmp_path / "split", wide_pair, "linear")
    file = source / "config.json"
    raw = json.loads(file.read_text())
    raw["first_config"]["rms_norm_eps"] = 0.5
    file.write_text(json.dumps(raw))
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=Parallelism())
    assert verify(source, tmp_path / "meg", tokens=TOKENS, tolerance=EXACT, pool=pool).passed


def logits_of(source: Path, candidate: Path, pool: RankPool) -> LogitsReport:
    """The logits level by itself: without the cheaper ones, which would have noticed already."""
    sides = Side(source, "hf"), Side(candidate, "megatron")
    return verify_logits(*sides, tokens=TOKENS, tolerance=EXACT, greedy=0, pool=pool)


def first_block_transposed(tensors: dict[str, Any]) -> None:
    name = "decoder.adapter.linear_2.weight"
    side = min(tensors[name].shape)
    tensors[name][:side, :side] = tensors[name][:side, :side].T.clone()


def halves_swapped(tensors: dict[str, Any]) -> None:
    name = "decoder.adapter.linear_1.weight"
    tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)


@pytest.mark.parametrize("fault", [first_block_transposed, halves_swapped])
def test_faults_in_the_adapter_are_found(
    wide_splits: dict[str, Path],
    tmp_path: Path,
    pool: RankPool,
    fault: Callable[[dict[str, Any]], None],
) -> None:
    convert(wide_splits["mlp"], tmp_path / "meg", to="torch", spec="local", grid=Parallelism(2))
    file = tmp_path / "meg" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    fault(content["model"])
    torch.save(content, file)
    report = logits_of(wide_splits["mlp"], tmp_path / "meg", pool)
    assert not report.passed and report.location is not None
    assert report.location.place == f"layer {2} adapter"
    assert set(report.location.tensors) == {f"decoder.adapter.linear_{number}.weight" for number in (1, 2)}


def test_a_dropped_relu_is_found(wide_splits: dict[str, Path], tmp_path: Path, pool: RankPool) -> None:
    """The same matrices without what stands between them."""
    convert(
        wide_splits["mlp"], tmp_path / "meg", to="torch", spec="local", grid=Parallelism(1, 2, first_stage_layers=2)
    )
    for path in sorted(tmp_path.glob("meg/release/*/model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        content["args"].adapter_kind = "two-linear"
        torch.save(content, path)
    file = tmp_path / "meg" / "ckptkit" / "hf" / "config.json"
    raw = {**json.loads(file.read_text()), "adapter": "two-linear", "mlp": False}
    file.write_text(json.dumps(raw))
    report = logits_of(wide_splits["mlp"], tmp_path / "meg", pool)
    assert not report.passed and report.location is not None
    assert report.location.place == "layer 2 adapter"


def test_the_reference_is_strict(wide_splits: dict[str, Path], tmp_path: Path, pool: RankPool) -> None:
    """Code in the directory is not run, a missing tensor is an error, and so is a layout that does not load."""
    convert(wide_splits["linear"], tmp_path / "meg", to="torch", spec="local")
    convert(wide_splits["linear"], tmp_path / "hf", to="hf")
    code = tmp_path / "hf" / "modeling_custom_split_llama.py"
    code.write_text("raise SystemExit('this must not run')")
    assert logits_of(tmp_path / "hf", tmp_path / "meg", pool).passed
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    adapter = tensors.pop("model.adapter.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys: model\.adapter\.weight"):
        logits_of(tmp_path / "hf", tmp_path / "meg", pool)
    assert adapter.shape[0] == WIDE
    convert(wide_splits["linear"], tmp_path / "legacy", to="hf", layout="legacy")
    with pytest.raises(InputError, match=r"legacy layout .* does not load by itself"):
        logits_of(tmp_path / "legacy", tmp_path / "meg", pool)
