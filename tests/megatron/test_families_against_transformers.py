"""Every family on real megatron-core modules, against transformers; and the faults that must not go unseen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.errors import InputError
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.jobs import LogitsJob
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LogitsReport
from ckptkit.verification.tokens import default_rows
from tests.models import MODELS, save_model
from tests.precision import MANY_ROWS
from tests.verification.conftest import DEVICE

EXACT = 1e-5
"""Also for experts: a token that is routed elsewhere is off by far more."""

GRIDS = [Parallelism(2), Parallelism(1, 2), Parallelism(2, 2)]
MORE_GRIDS = [Parallelism(), Parallelism(1, 2, 2), Parallelism(4)]
EXPERT_GRIDS = [
    Parallelism(ep=2),
    Parallelism(ep=4),
    Parallelism(2, ep=2),
    Parallelism(2, ep=2, etp=1),
    Parallelism(1, 2, ep=2),
    Parallelism(4, ep=2, etp=2),
]
EXPERTS = [kind for kind, (_, changes) in MODELS.items() if any("experts" in key for key in changes)]

Saved = Callable[[str], Path]
Case = tuple[str, Parallelism]


def cases() -> list[Any]:
    """Each family on two of the grids, its kinds and the grids taking turns; each kind on each grid is slow."""
    kinds: dict[str, list[str]] = {}
    for kind in MODELS:
        kinds.setdefault(kind.split("-")[0], []).append(kind)
    quick = [
        (turns[turn % len(turns)], GRIDS[(2 * at + turn) % len(GRIDS)])
        for at, turns in enumerate(kinds.values())
        for turn in range(2)
    ]
    quick += [(kind, EXPERT_GRIDS[at % len(EXPERT_GRIDS)]) for at, kind in enumerate([*EXPERTS, EXPERTS[0]])]
    quick += [("mixtral", EXPERT_GRIDS[0]), ("gemma3_text", MORE_GRIDS[1])]
    every = [*itertools.product(MODELS, GRIDS + MORE_GRIDS), *itertools.product(EXPERTS, EXPERT_GRIDS)]
    slow = [case for case in every if case not in quick]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny model of a kind, saved once."""
    saved: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in saved:
            saved[kind] = save_model(tmp_path_factory.mktemp("hf") / kind, kind)
        return saved[kind]

    return get


@pytest.mark.parametrize(("kind", "grid"), cases(), ids=str)
def test_logits(model: Saved, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism) -> None:
    source = model(kind)
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=grid)
    report = verify(source, tmp_path / "meg", tolerance=EXACT, pool=pool, device=DEVICE)
    assert [level.passed for level in report.levels] == [True] * 3, report.levels[-1].summary
    modules = report.levels[-1].details["megatron_modules"]
    assert "megatron.core.tensor_parallel.layers.ColumnParallelLinear" in modules
    assert ("megatron.core.transformer.moe.experts.SequentialMLP" in modules) == (kind in EXPERTS)


def test_the_tokens_reach_beyond_every_window() -> None:
    windows = {changes["sliding_window"] for _, changes in MODELS.values() if changes.get("sliding_window")}
    assert windows and all(len(row) > 2 * max(windows) for row in default_rows(250))


BFLOAT16: list[Any] = [
    ("mixtral", Parallelism(2, ep=2)),
    ("gemma3", Parallelism(2, 2)),
    ("deepseek_v3", Parallelism(2)),
    ("qwen3_next", Parallelism(2, ep=2)),
    pytest.param("qwen3_next", Parallelism(1, 2, 2), marks=pytest.mark.slow),
    pytest.param("gpt_oss", Parallelism(2, ep=2), marks=pytest.mark.slow),
    pytest.param("gpt_oss-plain", Parallelism(1, 2, 2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "grid"), BFLOAT16, ids=str)
def test_bfloat16(model: Saved, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism) -> None:
    source = model(kind)
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=grid)
    report = verify(source, tmp_path / "meg", dtype="bfloat16", tokens=MANY_ROWS, pool=pool, device=DEVICE)
    assert report.passed, report.levels[-1].summary


SPLIT = [
    ("mixtral", Parallelism(2, ep=2)),
    ("gemma3_text", Parallelism(2)),
    ("apertus", Parallelism(2)),
    ("qwen3_next", Parallelism(2, ep=2)),
]


@pytest.mark.parametrize(("kind", "grid"), SPLIT, ids=str)
def test_sequence_parallelism(model: Saved, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism) -> None:
    from safetensors.torch import load_file

    convert(model(kind), tmp_path / "meg", to="torch", spec="local", grid=grid)
    output = str(tmp_path / "whole.safetensors")
    rows = [[*row, 3] for row in default_rows(250)]  # an odd length, which needs padding
    job = LogitsJob(str(tmp_path / "meg"), RunConfig(grid, device=DEVICE), rows, output)
    split = replace(job, output=str(tmp_path / "split.safetensors"), run=replace(job.run, sequence_parallel=True))
    pool.run(job)
    pool.run(split)
    for name, expected in load_file(job.output).items():
        assert (load_file(split.output)[name] - expected).abs().max() < EXACT * expected.abs().max()


def shards(candidate: Path) -> list[Path]:
    """The files of all ranks, in order."""
    return sorted(candidate.glob("release/*/model_optim_rng.pt"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the content of one rank's file."""
    import torch

    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def lie(candidate: Path, args: dict[str, Any], config: dict[str, Any]) -> None:
    """Changes what the checkpoint says of its model: every rank's `args`, and the config.json beside them."""
    for path in shards(candidate):
        rewrite(path, lambda content: vars(content["args"]).update(args))
    file = candidate / "ckptkit" / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def logits_of(source: Path, candidate: Path, pool: RankPool) -> LogitsReport:
    """The logits level by itself: without the cheaper ones, which would have noticed already."""
    sides = Side(source, "hf"), Side(candidate, "megatron")
    return verify_logits(*sides, tolerance=EXACT, greedy=0, pool=pool, device=DEVICE)


SWAPPED_THETAS = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
LIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # what -> kind, args, config.json, where it must show
    "window one wider": ("mistral", {"window_size": (16, 0)}, {}, "layer 0 self_attention"),
    "window one narrower": ("mixtral-windowed", {"window_size": (14, 0)}, {}, "layer 0 self_attention"),
    "window on another layer": ("ministral", {"window_attn_skip_freq": [0, 1, 1, 0]}, {}, "layer 3 self_attention"),
    "weights of norms not zero-centred": ("gemma3_text", {"apply_layernorm_1p": False}, {}, "layer 0 self_attention"),
    "thetas of local and global layers swapped": (
        "gemma3_text",
        {"rotary_base": 10000, "rotary_seq_len_interpolation_factor": None},
        {"rope_parameters": SWAPPED_THETAS},
        "layer 0 self_attention",
    ),
    "attention scale": ("gemma3_text", {"softmax_scale": None}, {}, "layer 0 self_attention"),
    "erf for tanh": ("gemma3_text", {}, {"hidden_activation": "gelu"}, "layer 0 mlp"),
    "no cap on the logits": ("gemma3_text-capped", {}, {"final_logit_softcapping": None}, "head"),
    "weights of experts not renormalised": ("qwen3_moe", {"moe_router_pre_softmax": True}, {}, "layer 0 mlp"),
    "weights of experts renormalised": ("qwen3_moe-mixed", {"moe_router_pre_softmax": False}, {}, "layer 0 mlp"),
    "factor on the weights of experts lost": (
        "glm4_moe",
        {"moe_router_topk_scaling_factor": None},
        {"routed_scaling_factor": 1.0},
        "layer 2 mlp",
    ),
    "mscale forgotten": (
        "deepseek_v3",
        {"mscale_all_dim": 0.0},
        {"rope_parameters": {**MODELS["deepseek_v3"][1]["rope_parameters"], "mscale_all_dim": 0.0}},
        "layer 0 self_attention",
    ),
    "windows on the other layers": ("gpt_oss", {"window_attn_skip_freq": [0, 1, 0, 1]}, {}, "layer 0 self_attention"),
    "bounds of yarn rounded": (
        "gpt_oss",
        {},
        {"rope_parameters": {**MODELS["gpt_oss"][1]["rope_parameters"], "truncate": True}},
        "layer 0 self_attention",
    ),
    "cosines and sines of yarn not scaled": (
        "gpt_oss",
        {},
        {"rope_parameters": {**MODELS["gpt_oss"][1]["rope_parameters"], "attention_factor": 1.0}},
        "layer 0 self_attention",
    ),
    "clamp forgotten": ("gpt_oss", {"activation_func_clamp_value": 100.0}, {"swiglu_limit": 100.0}, "layer 0 mlp"),
    "nothing added to the up projection": ("gpt_oss", {"glu_linear_offset": 0.0}, {}, "layer 0 mlp"),
    "one expert more": ("mixtral", {"moe_router_topk": 3}, {}, "layer 0 mlp"),
}


def some(faults: Iterable[str], quick: Collection[str]) -> list[Any]:
    """The others are slow: `test_mutations` has faults like them."""
    return [pytest.param(fault, marks=() if fault in quick else pytest.mark.slow) for fault in faults]


QUICK_LIES = ("window on another layer", "thetas of local and global layers swapped", "no cap on the logits")


@pytest.mark.parametrize("fault", some(LIES, QUICK_LIES))
def test_lies_about_the_model_are_seen(model: Saved, tmp_path: Path, pool: RankPool, fault: str) -> None:
    kind, args, config, place = LIES[fault]
    source, candidate = model(kind), tmp_path / "meg"
    convert(source, candidate, to="torch", spec="local")
    lie(candidate, args, config)
    assert not verify(source, candidate, level="structure").passed
    report = logits_of(source, candidate, pool)
    assert not report.passed, report.summary
    assert report.location is not None and report.location.place == place, report.messages


def swap(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        model[first], model[second] = model[second], model[first]

    return change


def put(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda model: model.update({name: change(model[name])})


ATTENTION, MLP = "decoder.layers.1.self_attention.", "decoder.layers.1.mlp."
EXPERT = MLP + "experts.local_experts.0."
HALVES = [16 + channel for pair in zip(range(4), range(4, 8), strict=True) for channel in pair]
"""The eight channels behind a latent vector of 16, as if those of a pair stood half of them apart."""
DAMAGE: dict[str, tuple[str, Parallelism, Callable[[dict[str, Any]], None], str, str]] = {
    # what -> kind, grid, change to the last rank's file, where it must show, tensor that must be named
    "norms after attention and MLP swapped": (
        "gemma3_text",
        Parallelism(),
        swap(ATTENTION + "linear_proj.post_layernorm.weight", MLP + "linear_fc2.post_layernorm.weight"),
        "layer 1 self_attention",
        "linear_proj.post_layernorm.weight",
    ),
    "norm after the MLP without effect": (
        "gemma3",
        Parallelism(1, 2),
        put("language_model." + MLP + "linear_fc2.post_layernorm.weight", lambda weight: weight * 0),
        "layer 3 mlp",
        "linear_fc2.post_layernorm.weight",
    ),
    "norms of q and k swapped": (
        "qwen3",
        Parallelism(),
        swap(ATTENTION + "q_layernorm.weight", ATTENTION + "k_layernorm.weight"),
        "layer 1 self_attention",
        "q_layernorm.weight",
    ),
    "bias of q, k and v rolled": (
        "qwen2",
        Parallelism(2),
        put(ATTENTION + "linear_qkv.bias", lambda bias: bias.roll(1)),
        "layer 1 self_attention",
        "linear_qkv.bias",
    ),
    "the two steepnesses swapped": (
        "apertus",
        Parallelism(),
        swap(MLP + "activation_func.alpha_p", MLP + "activation_func.alpha_n"),
        "layer 1 mlp",
        "activation_func.alpha_p",
    ),
    "rows of the router rolled": (
        "mixtral",
        Parallelism(),
        put(MLP + "router.weight", lambda weight: weight.roll(1, 0)),
        "layer 1 router",
        "router.weight",
    ),
    "shared expert without effect": (
        "deepseek_v3",
        Parallelism(),
        put(MLP + "shared_experts.linear_fc2.weight", lambda weight: weight * 0),
        "layer 1 mlp",
        "shared_experts.linear_fc2.weight",
    ),
    "rotating channels paired as halves": (
        "deepseek_v3",
        Parallelism(),
        put(ATTENTION + "linear_kv_down_proj.weight", lambda weight: weight[[*range(16), *HALVES]]),
        "layer 1 self_attention",
        "linear_kv_down_proj.weight",
    ),
    "sinks without effect": (
        "gpt_oss",
        Parallelism(2),
        put(ATTENTION + "core_attention.softmax_offset", lambda sinks: sinks - 1e4),
        "layer 1 self_attention",
        "core_attention.softmax_offset",
    ),
    "sinks of other heads": (
        "gpt_oss-plain",
        Parallelism(),
        put(ATTENTION + "core_attention.softmax_offset", lambda sinks: sinks.roll(1)),
        "layer 1 self_attention",
        "core_attention.softmax_offset",
    ),
    "gate and up rows taken for halves": (
        "gpt_oss",
        Parallelism(),
        put(EXPERT + "linear_fc1.weight", lambda weight: weight.view(2, 96, 96).transpose(0, 1).reshape(192, 96)),
        "layer 1 mlp",
        "experts.local_experts.0.linear_fc1.weight",
    ),
    "a square matrix the other way round": (
        "gpt_oss",
        Parallelism(ep=2),
        put(EXPERT + "linear_fc2.weight", lambda weight: weight.t().contiguous()),
        "layer 1 mlp",
        "experts.local_experts.0.linear_fc2.weight",
    ),
    "bias behind experts lost": (
        "gpt_oss-plain",
        Parallelism(2, ep=2, etp=1),
        put(EXPERT + "linear_fc2.bias", lambda bias: bias * 0),
        "layer 1 mlp",
        "experts.local_experts.0.linear_fc2.bias",
    ),
    "bias in front of experts in turns": (
        "gpt_oss",
        Parallelism(),
        put(EXPERT + "linear_fc1.bias", lambda bias: bias.view(2, 96).t().reshape(-1)),
        "layer 1 mlp",
        "experts.local_experts.0.linear_fc1.bias",
    ),
    "bias of the router lost": (
        "gpt_oss",
        Parallelism(),
        put(MLP + "router.bias", lambda bias: bias * 0),
        "layer 1 router",
        "router.bias",
    ),
    "experts of one rank swapped": (
        "qwen3_moe",
        Parallelism(ep=2),
        swap(MLP + "experts.local_experts.0.linear_fc1.weight", MLP + "experts.local_experts.1.linear_fc1.weight"),
        "layer 1 mlp",
        "experts.local_experts.0.linear_fc1.weight",
    ),
}


QUICK_DAMAGE = ("norm after the MLP without effect", "the two steepnesses swapped", "experts of one rank swapped")


@pytest.mark.parametrize("fault", some(DAMAGE, QUICK_DAMAGE))
def test_damage_is_seen_and_located(model: Saved, tmp_path: Path, pool: RankPool, fault: str) -> None:
    kind, grid, change, place, tensor = DAMAGE[fault]
    source, candidate = model(kind), tmp_path / "meg"
    convert(source, candidate, to="torch", spec="local", grid=grid)
    rewrite(shards(candidate)[-1], lambda content: change(content["model"]))
    assert not verify(source, candidate, level="weights").passed
    report = logits_of(source, candidate, pool)
    assert not report.passed, report.summary
    assert report.location is not None and report.location.place == place, report.messages
    assert any(name.endswith(tensor) for name in report.location.tensors), report.location.tensors


def test_a_missing_norm_is_named(model: Saved, tmp_path: Path, pool: RankPool) -> None:
    source, candidate, name = model("gemma3_text"), tmp_path / "meg", MLP + "linear_fc2.post_layernorm.weight"
    convert(source, candidate, to="torch", spec="local")
    rewrite(shards(candidate)[0], lambda content: content["model"].pop(name))
    with pytest.raises(InputError, match=name):
        verify(source, candidate, pool=pool)


def test_norms_that_the_model_is_said_not_to_have_are_named(model: Saved, tmp_path: Path, pool: RankPool) -> None:
    source, candidate = model("qwen3"), tmp_path / "meg"
    convert(source, candidate, to="torch", spec="local", grid=Parallelism(2))
    lie(candidate, {"qk_layernorm": False}, {})
    with pytest.raises(InputError, match=r"unexpected: decoder\.layers\.0\.self_attention\.k_layernorm\.weight"):
        logits_of(source, candidate, pool)


def without_bias(content: dict[str, Any]) -> None:
    content["model"].update({name: value * 0 for name, value in content["model"].items() if "expert_bias" in name})


@pytest.mark.parametrize("fault", ["bias of experts left out", "groups ignored"])
def test_another_choice_of_experts_is_seen(model: Saved, tmp_path: Path, pool: RankPool, fault: str) -> None:
    """Ranks run the experts that the reference chose, so that only their own choice tells."""
    source, candidate = model("deepseek_v3"), tmp_path / "meg"
    convert(source, candidate, to="torch", spec="local")
    if fault == "groups ignored":
        lie(candidate, {"moe_router_num_groups": None, "moe_router_group_topk": None}, {"n_group": 1, "topk_group": 1})
        assert not verify(source, candidate, level="structure").passed
    else:
        rewrite(shards(candidate)[0], without_bias)
        assert not verify(source, candidate, level="weights").passed
    report = logits_of(source, candidate, pool)
    assert not report.passed and "beyond the noise" in report.summary, report.summary


@pytest.mark.parametrize("fault", ["sinks denied", "sinks lost"])
def test_sinks_are_missed_by_name(model: Saved, tmp_path: Path, pool: RankPool, fault: str) -> None:
    source, candidate, name = model("gpt_oss"), tmp_path / "meg", ATTENTION + "core_attention.softmax_offset"
    convert(source, candidate, to="torch", spec="local", grid=Parallelism(2))
    if fault == "sinks denied":
        lie(candidate, {"softmax_type": "vanilla"}, {})
        with pytest.raises(InputError, match=r"unexpected: decoder\.layers\.0\.self_attention\.core_attention"):
            logits_of(source, candidate, pool)
    else:
        rewrite(shards(candidate)[0], lambda content: content["model"].pop(name))
        with pytest.raises(InputError, match=name):
            verify(source, candidate, pool=pool)
