"""What conversions write is, byte for byte, what was recorded: see `fixtures/make_outputs.py`."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fixtures import make_outputs
from fixtures.make_outputs import SOURCES, Workshop, cases, differences, digests, read, values, write_source
from tests.models import LLAMAS, MODELS, files_of

CASES = cases()
FORMATS = ("hf", "packed", "torch", "torch_dist")
RECORD = "python -m fixtures.make_outputs"


@pytest.mark.parametrize("kind", CASES)
def test_outputs_are_what_was_recorded(kind: str, tmp_path: Path) -> None:
    workshop = Workshop(kind, tmp_path)
    lines = [
        f"{kind}: {case}: {line}"
        for case, expected in CASES[kind].items()
        for line in differences(expected, workshop.digests(case))
    ]
    assert not lines, "\n".join([*lines, f"if this is on purpose: {RECORD} '{kind}: CASE', and say why in CHANGELOG"])


def steps(case: str) -> list[str]:
    """What a case does, one after another, without the options."""
    return [step.split()[0] for step in case.split(" > ")]


def test_every_model_of_the_tests_is_there() -> None:
    assert {*LLAMAS, *MODELS, "split_llama"} <= CASES.keys()


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_is_written_in_every_format(kind: str) -> None:
    written = {steps(case)[-1].replace("build", "hf") for case in CASES[kind]}
    assert written == set(FORMATS)
    assert all(CASES[kind].values())


@pytest.mark.parametrize(
    "option",
    [
        *("tp", "pp", "vpp", "ep", "etp", "first_stage_layers", "last_stage_layers", "embedding_in_split"),
        *("loss_in_split", "adapter_first", "shard_size", "make_vocab_size_divisible_by", "hf_reference"),
        *("dtype=float32", "dtype=bfloat16", "dtype=float16", "layout=text", "layout=legacy"),
        *("experts=grouped", "experts=sequential", "spec=local", "spec=verl", "spec=mbridge", "spec=slime"),
        *("spec=slime_dense", "spec=slime_dense_fused", "megatron_model=hybrid", "head=value", "head_init=zeros"),
        *("head_init=file:head.safetensors", "init=identity-pad", "init=file:adapter.safetensors"),
        *("adapter=linear", "adapter=two-linear", "adapter=mlp"),
    ],
)
def test_every_option_is_used_twice(option: str) -> None:
    given = [
        {*case.split(), *(word.partition("=")[0] for word in case.split())} for kind in CASES.values() for case in kind
    ]
    assert sum(option in words for words in given) >= 2


def test_between_all_formats() -> None:
    pairs = {pair for kind in CASES.values() for case in kind for pair in pairwise(steps(case))}
    expected = {(one, other) for one in ("packed", "torch", "torch_dist") for other in ("hf", "torch_dist")}
    assert {*expected, ("torch", "torch"), ("torch_dist", "torch"), ("bare", "hf")} <= pairs


def test_a_byte_or_a_name_that_changes_is_noticed(tmp_path: Path) -> None:
    case = "torch tp=4 spec=verl"
    output = Workshop("qwen2", tmp_path).output(case)
    expected = CASES["qwen2"][case]
    assert differences(expected, digests(output)) == []
    file = "release/mp_rank_02/model_optim_rng.pt"
    data = bytearray((output / file).read_bytes())
    data[-1] ^= 1
    (output / file).write_bytes(data)
    assert differences(expected, digests(output)) == [f"{file} differs"]
    (output / file).rename(output / f"{file}.old")
    assert differences(expected, digests(output)) == [f"{file} is missing", f"{file}.old is new"]


def test_the_sidecar_and_the_version_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ckptkit").mkdir()
    (tmp_path / "ckptkit" / "manifest.json").write_text("{}")
    (tmp_path / "below" / "ckptkit").mkdir(parents=True)
    (tmp_path / "below" / "ckptkit" / "file").write_text("this is no sidecar")
    found = []
    for version in ("1.2", "1.3"):
        monkeypatch.setattr("ckptkit.__version__", version)
        (tmp_path / "config.json").write_text(json.dumps({"tool": f"ckptkit {version}"}))
        found.append(digests(tmp_path))
    assert found[0] == found[1]
    assert found[0].keys() == {"below/ckptkit/file", "config.json"}


def test_recording_replaces_only_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "digests.json"
    stale = {kind: {case: {"a": "b"} for case in CASES[kind]} for kind in ("mqa", "mistral")}
    file.write_text(json.dumps(stale))
    monkeypatch.setattr(make_outputs, "DIGESTS", file)
    case, other = list(CASES["mqa"])[:2]
    lines = make_outputs.record([f"mqa: {case}"])
    assert lines == [f"mqa: {case}: {line}" for line in differences({"a": "b"}, CASES["mqa"][case])]
    assert read(file) == {**stale, "mqa": {**stale["mqa"], case: CASES["mqa"][case]}}
    assert make_outputs.record([f"mqa: {case}"]) == []
    assert read(file)["mqa"][other] == {"a": "b"}
    with pytest.raises(SystemExit, match="no checkpoint is called 'mqb'"):
        make_outputs.record(["mqb"])


def test_sources_are_the_same_every_time(tmp_path: Path) -> None:
    source = read(SOURCES)["qwen3_moe"]
    for name in ("one", "other"):
        write_source(tmp_path / name, source)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    changed = {**source, "tensors": {f"{name}2": about for name, about in source["tensors"].items()}}
    write_source(tmp_path / "other", changed)
    assert files_of(tmp_path / "one") != files_of(tmp_path / "other")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_values_are_normal_numbers_in_every_type(dtype: str) -> None:
    data = values("name", dtype, (300, 40))
    wide = np.frombuffer(data, "<u4") if dtype == "F32" else np.frombuffer(data, "<u2").astype("<u4") << 16
    numbers = wide.view("<f4")
    assert numbers.shape == (12000,)
    assert abs(numbers).min() >= 1 / 8 and abs(numbers).max() < 2
    assert len(set(numbers)) > (1000 if dtype == "BF16" else 11000)
    assert values("name", dtype, (300, 40)) == data != values("other", dtype, (300, 40))
