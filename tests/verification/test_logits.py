from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.errors import InputError, UnsupportedError, UsageError, VerificationError
from ckptkit.sharding.grid import Parallelism
from ckptkit.steps import Step
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LogitsReport
from tests.precision import MANY_ROWS
from tests.verification.conftest import DEVICE
from tests.verification.stand_in import OPENER, edit_config, edit_shard, with_rope, write_stand_in

GRIDS = [Parallelism(), Parallelism(2), Parallelism(1, 2), Parallelism(2, 2), Parallelism(1, 2, 2)]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("gqa", {}),
    "mqa": ("mqa", {}),
    "explicit head_dim": ("mha", {}),
    "tied": ("tied", {}),
    "biased": ("biased", {}),
    "linear rope": ("gqa", {"rope_parameters": LINEAR}),
    "llama3 rope, other constants": ("gqa", {"rope_parameters": LLAMA3}),
}
EXACT = 1e-5

Saved = Callable[..., Path]


def verify(source: Path, candidate: Path, pool: RankPool, **options: Any) -> LogitsReport:
    values: dict[str, Any] = {"pool": pool, "opener": OPENER, "device": DEVICE, **options}
    return verify_logits(Side(source, "hf"), Side(candidate, "megatron"), **values)


def pairs() -> list[Any]:
    """Every kind on two grids, which take turns; on the others it is slow."""
    quick = {(at, (2 * at + turn) % len(GRIDS)) for at in range(len(KINDS)) for turn in (0, 1)}
    return [
        pytest.param(kind, grid, marks=() if (at, number) in quick else pytest.mark.slow)
        for at, kind in enumerate(KINDS)
        for number, grid in enumerate(GRIDS)
    ]


@pytest.mark.parametrize(("kind", "grid"), pairs(), ids=str)
def test_every_kind_on_every_grid(pool: RankPool, llama: Saved, tmp_path: Path, kind: str, grid: Parallelism) -> None:
    name, changes = KINDS[kind]
    source = llama(name, **changes)
    report = verify(source, write_stand_in(source, tmp_path / "meg", grid), pool, tolerance=EXACT, greedy=1)
    assert report.passed, report.summary
    assert report.agreement is not None and report.greedy is not None
    assert 10 < report.agreement.max_abs_logit < 100
    assert report.greedy.passed and report.greedy.steps == 2
    layers = 4 * grid.tp
    assert report.own_modules["ckptkit.megatron.attention.ExactAttention"] == layers
    assert report.megatron_modules["megatron.core.transformer.mlp.MLP"] == layers
    assert report.megatron_modules["megatron.core.tensor_parallel.layers.RowParallelLinear"] == 2 * layers


@pytest.mark.parametrize(("options", "passes"), [({}, 1), ({"dtype": "bfloat16"}, 2), ({"packed": True}, 1)])
def test_what_runs_is_told(pool: RankPool, llama: Saved, tmp_path: Path, options: dict[str, Any], passes: int) -> None:
    """Every token that goes through a model is counted, and no other."""
    source, told = llama("gqa"), list[Step]()
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism(1, 2))
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10]]
    assert verify(source, candidate, pool, tokens=rows, greedy=2, tell=told.append, **options).passed
    dtype = options.get("dtype", "float32")
    runs: dict[str, list[Step]] = {}
    for step in told:
        if step.total:
            runs.setdefault(step.what, []).append(step)
    names = ["reference (transformers, float32)", "reference (transformers, bfloat16)", f"candidate (2 ranks, {dtype})"]
    assert list(runs) == [f"{name}: running" for name in names if passes == 2 or "bfloat16" not in name]
    length, greedy = 10 + 3 * 2, 10 + (10 + 3) + (10 + 3 * 2)
    totals = {"float32": greedy, "bfloat16": 2 * length}
    for what, steps in runs.items():
        counts = [step.done for step in steps]
        total = (1 + ("packed" in options)) * length if "candidate" in what else totals[what.split()[2][:-2]]
        assert counts[0] == 0 and counts == sorted(counts)
        assert counts[-1] == steps[-1].total == total, what
    whats = [step.what for step in told]
    for phase in ("reference (transformers, float32): loading", f"candidate (2 ranks, {dtype}): loading"):
        assert phase in whats
    assert whats[-1] == "comparing the logits"


UNEVEN = {
    "first and last stage": (4, Parallelism(1, 3, first_stage_layers=1, last_stage_layers=1)),
    "embedding counted": (5, Parallelism(1, 2, embedding_in_split=True)),
    "both counted, virtual stages": (6, Parallelism(1, 2, 2, embedding_in_split=True, loss_in_split=True)),
    "a custom layout": (4, Parallelism(1, 3, pipeline_layout="Et|t*2|tL")),
    "a custom layout with empty and virtual stages": (4, Parallelism(1, 2, pipeline_layout="Et||ttt|L")),
    "stage with the embedding only": (2, Parallelism(1, 3, embedding_in_split=True)),
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, marks=() if (at + number) % 2 == 0 else pytest.mark.slow)
        for at, case in enumerate(UNEVEN)
        for number, kind in enumerate(["gqa", "tied"])
    ],
)
def test_uneven_pipelines(pool: RankPool, llama: Saved, tmp_path: Path, case: str, kind: str) -> None:
    layers, grid = UNEVEN[case]
    source = llama(kind, num_hidden_layers=layers)
    report = verify(source, write_stand_in(source, tmp_path / "meg", grid), pool, tolerance=EXACT, greedy=1)
    assert report.passed, report.summary


@pytest.mark.parametrize("groups", [1, 2])
def test_more_tensor_ranks_than_query_groups(pool: RankPool, llama: Saved, tmp_path: Path, groups: int) -> None:
    source = llama("gqa", num_key_value_heads=groups, num_hidden_layers=2)
    report = verify(source, write_stand_in(source, tmp_path / "meg", Parallelism(4)), pool, tolerance=EXACT)
    assert report.passed, report.summary


def test_bfloat16_is_judged_by_the_noise_floor(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism(2, 2))
    good = verify(source, candidate, pool, dtype="bfloat16", tokens=MANY_ROWS)
    assert good.passed and good.noise is not None, good.summary

    def coarser(tensors: dict[str, Any]) -> None:
        import torch

        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = tensor.to(torch.float8_e4m3fn).float()

    edit_shard(candidate, coarser, pp_rank=1, tp_rank=1)
    bad = verify(source, candidate, pool, dtype="bfloat16", tokens=MANY_ROWS)
    assert not bad.passed and bad.noise is not None and bad.noise.median > bad.noise.median_limit
    assert bad.location is not None and bad.location.place == "layer 1 self_attention"


def test_rows_of_different_lengths_from_a_file(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = llama("gqa", num_hidden_layers=2)
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([[7, 3, 249], [1], [4, 4, 9], [0, 1, 2, 3, 5, 8, 13, 21]]))
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism(1, 2))
    report = verify(source, candidate, pool, tokens=tokens, greedy=3, save_logits=tmp_path / "kept.safetensors")
    assert report.passed, report.summary
    assert [len(row) for row in report.rows] == [6, 4, 6, 11]
    assert report.agreement is not None and [len(row) for row in report.agreement.per_position] == [6, 4, 6, 11]
    kept = load_file(tmp_path / "kept.safetensors")
    assert [tuple(kept[name].shape) for name in ("reference", "candidate")] == 2 * [(4, 8, 250)]
    assert kept["candidate"].isnan().any(-1).sum(1).tolist() == [5, 7, 5, 0]
    json.dumps(report.to_dict(), allow_nan=False)


def test_any_pair_of_sides(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source = llama("tied", num_hidden_layers=2)
    other = llama("tied", num_hidden_layers=2, rms_norm_eps=1e-3)
    megatron = Side(write_stand_in(source, tmp_path / "meg", Parallelism(2, 2)), "megatron")
    single = Side(write_stand_in(source, tmp_path / "one", Parallelism()), "megatron")
    for pair in [(megatron, single), (single, (source, "hf")), ((source, "hf"), (source, "hf"))]:
        report = verify_logits(*pair, pool=pool, opener=OPENER, tolerance=EXACT, greedy=3, device=DEVICE)
        assert report.passed, report.summary
    wrong = verify_logits(megatron, (other, "hf"), pool=pool, opener=OPENER, device=DEVICE)
    assert not wrong.passed and wrong.location is not None
    assert wrong.location.tensors[0].startswith("model.layers.0.")


def swap_halves(name: str) -> Callable[[dict[str, Any]], None]:
    """Gate for up."""
    return lambda tensors: tensors.update({name: tensors[name].roll(tensors[name].shape[0] // 2, 0)})


def swap_key_and_value(name: str) -> Callable[[dict[str, Any]], None]:
    """In every group of 3 query heads, one key and one value head of width 8."""

    def change(tensors: dict[str, Any]) -> None:
        tensor = tensors[name]
        groups = tensor.reshape(-1, 5, 8, tensor.shape[-1])
        tensors[name] = groups[:, [0, 1, 2, 4, 3]].reshape(tensor.shape)

    return change


def swap_layers(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("decoder.layers.1.")]:
        other = name.replace("layers.1.", "layers.0.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def swap_rows(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensors[name].roll(1, 0)})


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensors[name] * factor})


LAYER = "decoder.layers.1."
SHARD_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], int, str, str]] = {
    # what -> change, pipeline rank, place, tensor
    "gate and up swapped": (swap_halves(LAYER + "mlp.linear_fc1.weight"), 1, "layer 3 mlp", "linear_fc1.weight"),
    "key and value swapped": (
        swap_key_and_value(LAYER + "self_attention.linear_qkv.weight"),
        0,
        "layer 1 self_attention",
        "linear_qkv.weight",
    ),
    "layers swapped": (swap_layers, 1, "layer 2 self_attention", "decoder.layers.2.input_layernorm.weight"),
    "norm scaled": (scaled(LAYER + "pre_mlp_layernorm.weight", 1.001), 0, "layer 1 mlp", "pre_mlp_layernorm.weight"),
    "projection of one rank lost": (
        scaled(LAYER + "self_attention.linear_proj.weight", 0.0),
        1,
        "layer 3 self_attention",
        "linear_proj.weight",
    ),
    "final norm scaled": (
        scaled("decoder.final_layernorm.weight", 0.99),
        1,
        "final norm",
        "decoder.final_layernorm.weight",
    ),
    "head shifted": (swap_rows("output_layer.weight"), 1, "head", "output_layer.weight"),
    "embedding shifted": (swap_rows("embedding.word_embeddings.weight"), 0, "embedding", "word_embeddings.weight"),
    "not a number": (scaled(LAYER + "mlp.linear_fc2.weight", float("nan")), 0, "layer 1 mlp", "linear_fc2.weight"),
}


QUICK_FAULTS = ("layers swapped", "projection of one rank lost", "embedding shifted", "not a number")
"""The others are slow: `test_mutations` has faults like them."""


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name in QUICK_FAULTS else pytest.mark.slow) for name in SHARD_FAULTS]
)
def test_faults_in_a_shard_are_found_and_located(pool: RankPool, llama: Saved, tmp_path: Path, fault: str) -> None:
    change, pp_rank, place, tensor = SHARD_FAULTS[fault]
    source = llama("gqa")
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism(2, 2))
    edit_shard(candidate, change, tp_rank=1, pp_rank=pp_rank)
    report = verify(source, candidate, pool, greedy=0)
    assert not report.passed
    assert report.location is not None, report.messages
    assert report.location.place == place
    assert any(name.endswith(tensor) for name in report.location.tensors), report.location.tensors
    assert ("not finite" in report.summary) == (fault == "not a number")
    json.dumps(report.to_dict(), allow_nan=False)


CONFIG_FAULTS: dict[str, Callable[[Any], Any]] = {
    "rope theta": lambda config: with_rope(config, theta=20000.0),
    "rope scaling": lambda config: with_rope(config, kind="linear", factor=1.01),
    "norm eps": lambda config: replace(config, norm_eps=1e-3),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_faults_in_the_config_are_found_and_located(pool: RankPool, llama: Saved, tmp_path: Path, fault: str) -> None:
    source = llama("gqa")
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism(1, 2))
    edit_config(candidate, CONFIG_FAULTS[fault])
    report = verify(source, candidate, pool)
    assert not report.passed
    assert report.location is not None and report.location.place == "layer 0 self_attention"


def test_a_wrong_activation_is_located_in_the_mlp(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", hidden_act="gelu")
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism())
    assert verify(source, candidate, pool, tolerance=EXACT).passed
    edit_config(candidate, lambda config: replace(config, activation="gelu_pytorch_tanh"))
    report = verify(source, candidate, pool)
    assert not report.passed
    assert report.location is not None and report.location.place == "layer 0 mlp"


def test_the_greedy_text_decides_where_the_tolerance_does_not(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism())
    edit_shard(candidate, scaled("decoder.layers.1.mlp.linear_fc2.weight", 2.0))
    report = verify(source, candidate, pool, tolerance=10.0)
    assert not report.passed and report.greedy is not None and report.greedy.equal < report.greedy.steps
    assert report.location is not None and report.location.place == "layer 1 mlp"


def test_the_tolerance_is_a_bound(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism())
    edit_shard(candidate, scaled("output_layer.weight", 1.0 + 3e-5))
    assert verify(source, candidate, pool).passed
    assert not verify(source, candidate, pool, tolerance=1e-5).passed


def test_shards_that_do_not_fit_are_named(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism(2))

    def damage(tensors: dict[str, Any]) -> None:
        del tensors["decoder.layers.0.mlp.linear_fc2.weight"]
        tensors["decoder.layers.0.mlp.extra"] = tensors["decoder.final_layernorm.weight"].clone()
        tensors["decoder.layers.1.input_layernorm.weight"] = tensors["decoder.final_layernorm.weight"][:-1].clone()

    edit_shard(candidate, damage, tp_rank=1)
    with pytest.raises(InputError) as caught:
        verify(source, candidate, pool)
    text = str(caught.value)
    assert "tensor rank 1" in text
    assert "missing: decoder.layers.0.mlp.linear_fc2.weight" in text
    assert "unexpected: decoder.layers.0.mlp.extra" in text
    assert "decoder.layers.1.input_layernorm.weight is [95], the model has [96]" in text


def test_what_the_runtime_lacks_is_said(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    candidate = write_stand_in(source, tmp_path / "meg", Parallelism())
    edit_config(candidate, lambda config: with_rope(config, kind="longrope"))
    with pytest.raises(UnsupportedError, match="longrope"):
        verify(source, candidate, pool)
    edit_config(candidate, lambda config: replace(with_rope(config, kind="default"), activation="relu9"))
    with pytest.raises(UnsupportedError, match="relu9"):
        verify(source, candidate, pool)


def test_vocabularies_must_be_equal(pool: RankPool, llama: Saved, tmp_path: Path) -> None:
    source, other = llama("gqa", num_hidden_layers=2), llama("gqa", num_hidden_layers=2, vocab_size=240)
    report = verify(source, write_stand_in(other, tmp_path / "meg", Parallelism()), pool)
    assert not report.passed and "250 and 240" in report.summary


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tokens": [[0, 250]]}, "token id 250 in row 0"),
        ({"tokens": [[0], [-1]]}, "token id -1 in row 1"),
        ({"tokens": [[]]}, "row 0 of the token ids is empty"),
        ({"tokens": []}, "no token ids"),
        ({"dtype": "int8"}, "no logits in int8"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_requests_that_make_no_sense(llama: Saved, options: dict[str, Any], text: str) -> None:
    source = llama("gqa", num_hidden_layers=2)
    with pytest.raises(UsageError, match=text):
        verify_logits((source, "hf"), (source, "hf"), **options)
    with pytest.raises(UsageError, match="'hf' or 'megatron'"):
        verify_logits((source, "hf"), (source, "gguf"))


def test_a_missing_device_is_not_a_difference(monkeypatch: pytest.MonkeyPatch, llama: Saved) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = llama("gqa", num_hidden_layers=2)
    with pytest.raises(VerificationError, match="no CUDA device"):
        verify_logits((source, "hf"), (source, "hf"), device="cuda")
