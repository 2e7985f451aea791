"""Modules of Transformer Engine load what `convert` writes, with the flags that it prints: `make test-te`.

Megatron-LM's own parser, `load_checkpoint` and schedules run, on one rank and on two GPUs over NCCL. Logits are those
of transformers. Without a GPU the modules are loaded on the CPU, over gloo, and compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.formats.rank_pool import RankProcesses
from tests.te.models import EXPERTS, KINDS
from tests.te.ranks import Job, run

pytestmark = pytest.mark.te

EXACT = 1e-5
"""Of the largest logit, in fp32."""

FLOORS = 1.25
"""Of the noise that transformers has in bf16."""

Prepared = Callable[[str], tuple[Path, Path, float]]
Report = Callable[[dict[str, Any]], None]
GRIDS = {
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "PP2 x VPP2": {"pp": 2, "vpp": 2},
    "EP2": {"ep": 2},
}
STRICT = ["--dist-ckpt-strictness", "raise_all"]


def two(ranks: RankProcesses) -> None:
    """Skips what two ranks are needed for."""
    if ranks.size < 2:
        pytest.skip("needs two CUDA devices")


def strict_files(path: Path, grid: Parallelism) -> list[str]:
    """The one file of a checkpoint of one rank, for each of its chunks."""
    return [str(path / "release" / "mp_rank_00" / "model_optim_rng.pt")] * grid.vpp if grid.world_size == 1 else []


def grid_words(grid: dict[str, int]) -> list[str]:
    """The flags of a grid, for a checkpoint that any grid loads."""
    options = {
        "tp": "--tensor-model-parallel-size",
        "pp": "--pipeline-model-parallel-size",
        "vpp": "--num-virtual-stages-per-pipeline-rank",
        "ep": "--expert-model-parallel-size",
    }
    return [word for name, size in grid.items() for word in (options[name], str(size))]


def cases(kinds: tuple[str, ...], grids: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    """Each kind on each grid that fits it: experts are what EP2 divides, and TP2 wants the sequence split for them."""
    return [
        (kind, name)
        for kind in kinds
        for name, grid in grids.items()
        if (kind in EXPERTS or "ep" not in grid) and not (kind in EXPERTS and "tp" in grid)
    ]


def in_types(found: list[tuple[str, ...]], in_bf16: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Each case in fp32; distributed checkpoints of some kinds in bf16, too."""
    return [
        (*case, bf16)
        for case in found
        for bf16 in (False, True)
        if not bf16 or (case[0] in in_bf16 and case[-1] == "torch_dist")
    ]


FORMATS = ("torch", "torch_dist")
ONE_RANK = in_types([(kind, to) for kind in KINDS for to in FORMATS], KINDS)
TWO_GPUS = in_types(
    [
        (kind, name, to)
        for kind, name in cases(("llama3", "qwen3", "qwen3_moe", "mistral", "mixtral"), GRIDS)
        for to in FORMATS
    ],
    ("qwen3", "qwen3_moe"),
)


def check(report: Report, answers: list[dict[str, Any]], floor: float, bf16: bool, **about: Any) -> None:
    """Every parameter is loaded, and the logits of the last stage are transformers'."""
    assert all(answer["iteration"] == 0 and answer["unloaded"] == [] for answer in answers), answers
    import torch

    found = [answer for answer in answers if "max" in answer]
    if not found and not torch.cuda.is_available():
        report({**about, "loaded": True, "modules": answers[0]["modules"]})
        return
    assert found
    figures = {"max": max(one["max"] for one in found), "floors": max(one["rms"] for one in found) / floor}
    passed = (figures["floors"] <= FLOORS) if bf16 else (figures["max"] <= EXACT)
    about |= {"dtype": "bf16" if bf16 else "fp32", **figures, "passed": passed}
    report({**about, "modules": answers[0]["modules"]})
    assert passed, figures


@pytest.mark.parametrize(("kind", "to", "bf16"), ONE_RANK, ids=str)
def test_one_rank(
    te_ranks: RankProcesses, prepared: Prepared, report: Report, tmp_path: Path, kind: str, to: str, bf16: bool
) -> None:
    """A distributed checkpoint comes from a grid of four; files of ranks load with torch's own strictness, too."""
    source, expected, floor = prepared(kind)
    grid = Parallelism() if to == "torch" else Parallelism(2, 2)
    flags = convert(source, tmp_path / "m", to=to, grid=grid).target["megatron_flags"]
    flags = [*flags, *(["--bf16"] if bf16 else []), *(STRICT if to == "torch_dist" else [])]
    strict = strict_files(tmp_path / "m", grid) if to == "torch" else []
    job = Job(flags, str(tmp_path), load=str(tmp_path / "m"), expected=str(expected), strict=strict)
    check(report, run(te_ranks, job), floor, bf16, kind=kind, to=to, grid="TP1", written=str(grid))


@pytest.mark.parametrize(
    ("kind", "strictness"),
    [
        *((kind, strictness) for kind in ("gqa", "qwen3") for strictness in ("assume_ok_unexpected", "raise_all")),
        ("qwen3_moe", "assume_ok_unexpected"),  # see `LAST_NORM` in tests/formats/test_te_keys.py
    ],
)
def test_local_spec(
    te_ranks: RankProcesses, prepared: Prepared, report: Report, tmp_path: Path, kind: str, strictness: str
) -> None:
    """The last norm is Transformer Engine's in the local spec, too."""
    source, expected, floor = prepared(kind)
    flags = convert(source, tmp_path / "m", to="torch_dist", spec="local").target["megatron_flags"]
    assert flags[-2:] == ["--transformer-impl", "local"]
    flags = [*flags, "--dist-ckpt-strictness", strictness]
    answers = run(te_ranks, Job(flags, str(tmp_path), load=str(tmp_path / "m"), expected=str(expected)))
    check(report, answers, floor, False, kind=f"{kind} local {strictness}", to="torch_dist", grid="TP1", written="TP1")


@pytest.mark.parametrize(("kind", "name", "to", "bf16"), TWO_GPUS, ids=str)
def test_two_gpus(
    te_ranks: RankProcesses,
    prepared: Prepared,
    report: Report,
    tmp_path: Path,
    kind: str,
    name: str,
    to: str,
    bf16: bool,
) -> None:
    """Over NCCL, which needs a GPU for each rank; a distributed checkpoint is written for another grid."""
    two(te_ranks)
    source, expected, floor = prepared(kind)
    own = Parallelism(**GRIDS[name])
    written = own if to == "torch" else Parallelism(2, 2) if "tp" not in GRIDS[name] else Parallelism()
    flags = convert(source, tmp_path / "m", to=to, grid=written).target["megatron_flags"]
    flags = [*flags, *(["--bf16"] if bf16 else [])]
    if to == "torch_dist":
        flags = [*flags, *STRICT, *grid_words(GRIDS[name])]
    job = Job(flags, str(tmp_path), 2, load=str(tmp_path / "m"), expected=str(expected))
    check(report, run(te_ranks, job), floor, bf16, kind=kind, to=to, grid=name, written=str(written))


def test_local_files_of_ranks(te_ranks: RankProcesses, prepared: Prepared, tmp_path: Path) -> None:
    """They lack the state of that norm: Megatron-LM falls back to loading without strictness, and loads everything."""
    source, _, _ = prepared("qwen3")
    flags = convert(source, tmp_path / "m", to="torch", spec="local").target["megatron_flags"]
    (answer,) = run(te_ranks, Job(flags, str(tmp_path), load=str(tmp_path / "m")))
    assert answer["iteration"] == 0 and answer["unloaded"] == []


def test_without_the_flags_it_is_another_model(
    te_ranks: RankProcesses, computing: None, prepared: Prepared, report: Report, tmp_path: Path
) -> None:
    """What `--use-checkpoint-args` alone leaves out changes the logits, and nothing says so."""
    source, expected, floor = prepared("mistral")
    convert(source, tmp_path / "m", to="torch_dist")
    flags = ["--use-checkpoint-args"]
    (answer,) = run(te_ranks, Job(flags, str(tmp_path), load=str(tmp_path / "m"), expected=str(expected)))
    report({"kind": "mistral without the flags", "max": answer["max"], "floors": answer["rms"] / floor})
    assert answer["unloaded"] == [] and answer["max"] > 1e-3


def test_names_of_the_other_spec_are_not_loaded(te_ranks: RankProcesses, prepared: Prepared, tmp_path: Path) -> None:
    """`te` files of ranks with the local spec: Megatron-LM reports success, and the norms keep their values."""
    source, _, _ = prepared("gqa")
    flags = convert(source, tmp_path / "m", to="torch").target["megatron_flags"]
    flags = [*flags, "--transformer-impl", "local"]
    (answer,) = run(te_ranks, Job(flags, str(tmp_path), load=str(tmp_path / "m")))
    assert answer["iteration"] == 0
    assert {name.split(".")[-2] for name in answer["unloaded"]} == {"input_layernorm", "pre_mlp_layernorm"}


def test_a_changed_weight_is_seen(
    te_ranks: RankProcesses, computing: None, prepared: Prepared, report: Report, tmp_path: Path
) -> None:
    """What passes above could fail."""
    from safetensors.torch import load_file, save_file

    source, expected, floor = prepared("qwen3")
    other = tmp_path / "hf"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.self_attn.q_norm.weight"
    save_file({**tensors, name: tensors[name].roll(1, 0)}, other / "model.safetensors", {"format": "pt"})
    flags = convert(other, tmp_path / "m", to="torch_dist").target["megatron_flags"]
    (answer,) = run(te_ranks, Job(flags, str(tmp_path), load=str(tmp_path / "m"), expected=str(expected)))
    report({"kind": "qwen3 with a changed weight", "max": answer["max"], "floors": answer["rms"] / floor})
    assert answer["max"] > 1e-4


def test_an_older_output_is_refused_by_raise_all(te_ranks: RankProcesses, prepared: Prepared, tmp_path: Path) -> None:
    """Strictness is what it says: a key of attention, which older outputs have, is one too many."""
    import ckptkit.conversion.targets.torch_dist as target

    source, _, _ = prepared("gqa")
    before = target.distributed_states

    def older(name: str, spec: str, quirks: Any) -> list[str]:
        core = name.replace("linear_qkv.weight", "core_attention._extra_state")
        return [*before(name, spec, quirks), *([core] if core != name else [])]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(target, "distributed_states", older)
        flags = convert(source, tmp_path / "m", to="torch_dist").target["megatron_flags"]
    with pytest.raises(AssertionError, match="core_attention"):
        run(te_ranks, Job([*flags, *STRICT], str(tmp_path), load=str(tmp_path / "m")))
