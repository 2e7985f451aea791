"""`verify --adapter` from checkpoints to a report, for every kind of candidate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from ckptkit import convert
from ckptkit.adapters.commands import merge_adapters
from ckptkit.cli import app as cli
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.adapters.verify import verify_adapter
from ckptkit.verification.levels import verify
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import VerificationReport
from tests.adapters.test_merging import put_beside
from tests.lora import load, save_adapter, tensors_of
from tests.models import save_llama, save_model
from tests.precision import MANY_ROWS
from tests.verification.adapters.test_against_peft import QUIET
from tests.verification.conftest import DEVICE

Saved = tuple[Path, Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("llama")
    base = save_llama(folder / "base")
    return base, save_adapter(folder / "adapter", base, **QUIET)


def verified(saved: Saved, candidate: Path, pool: RankPool, **options: Any) -> VerificationReport:
    return verify_adapter(saved[0], candidate, saved[1], pool=pool, device=DEVICE, **options)


def passes(report: VerificationReport) -> bool:
    assert [level.name for level in report.levels] == ["structure", "weights", "logits"], report.levels[-1].summary
    return report.passed


@pytest.mark.parametrize("layout", ["fused", "canonical", "peft"])
def test_layouts_and_sequence_parallelism(tmp_path: Path, saved: Saved, pool: RankPool, layout: str) -> None:
    base, adapter = saved
    convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, grid=Parallelism(2), hf_reference=base)
    report = verified(saved, tmp_path / "meg", pool, sequence_parallel=True)
    assert passes(report)
    assert any(f"in the layout {layout}" in message for message in report.messages)
    own = report.levels[-1].details["own_modules"]
    assert (own.get("ckptkit.megatron.lora.Pair") is None) == (layout == "peft")


def test_experts_under_sequence_parallelism(tmp_path: Path, pool: RankPool) -> None:
    base = save_model(tmp_path / "base", "qwen3_moe")
    adapter = save_adapter(tmp_path / "adapter", base, **QUIET)
    grid = Parallelism(2, ep=2, etp=2)
    convert(adapter, tmp_path / "meg", to="torch", grid=grid, hf_reference=base)
    assert passes(verified((base, adapter), tmp_path / "meg", pool, sequence_parallel=True))


def test_a_peft_directory_on_a_grid(saved: Saved, pool: RankPool) -> None:
    report = verified(saved, saved[1], pool, tp=2, pp=2)
    assert passes(report) and report.levels[-1].details["megatron_modules"]
    alone = verified(saved, saved[1], pool)
    assert passes(alone) and not alone.levels[-1].details["megatron_modules"]
    assert any("nothing is loaded into megatron-core" in message for message in alone.messages)


def test_weights_and_adapter_in_one_checkpoint(tmp_path: Path, saved: Saved, pool: RankPool) -> None:
    base, adapter = saved
    grid = Parallelism(2)
    convert(base, tmp_path / "model", to="torch", grid=grid)
    convert(adapter, tmp_path / "both", to="torch", grid=grid, adapter_layout="peft", hf_reference=base)
    put_beside(tmp_path / "model", tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "ckptkit")  # as a training run saves it; adapter_config.json states alpha
    report = verified(saved, tmp_path / "both", pool)
    assert passes(report) and any("its own weights" in message for message in report.messages)
    for file in (tmp_path / "both").glob("release/*/*.pt"):  # a weight of the model itself
        content = torch.load(file, weights_only=False)
        content["model"]["decoder.layers.1.mlp.linear_fc2.base_layer.weight"][3, 5] += 1
        torch.save(content, file)
    wrong = verified(saved, tmp_path / "both", pool, level="weights")
    assert not wrong.passed and "decoder.layers.1.mlp.linear_fc2.weight" in wrong.levels[-1].summary


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights(tmp_path: Path, pool: RankPool, dtype: str) -> None:
    from peft import PeftModel

    base = save_llama(tmp_path / "base", dtype=dtype)
    pair = base, save_adapter(tmp_path / "adapter", base, **QUIET)
    merge_adapters(base, [(pair[1], 1.0)], tmp_path / "merged", to="torch", grid=Parallelism(2))
    assert passes(verified(pair, tmp_path / "merged", pool))
    PeftModel.from_pretrained(load(base), pair[1]).merge_and_unload().save_pretrained(tmp_path / "by-peft")
    by_peft = verified(pair, tmp_path / "by-peft", pool, level="weights")
    assert by_peft.passed, by_peft.levels[-1].summary
    for weight, said in ((0.5, "about 0.5 times the adapter"), (None, "about 0 times the adapter")):
        if weight is not None:
            merge_adapters(base, [(pair[1], weight)], tmp_path / "other", to="hf", overwrite=True)
        report = verified(pair, tmp_path / "other" if weight else base, pool, keep_going=True)
        assert [level.passed for level in report.levels] == [True, False, False]
        assert said in report.levels[1].summary


def test_what_an_adapter_does_not_change(tmp_path: Path, saved: Saved, pool: RankPool) -> None:
    base, adapter = saved
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    tensors = tensors_of(tmp_path / "merged")
    tensors["model.layers.2.input_layernorm.weight"][7] += 0.5
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})
    report = verified(saved, tmp_path / "merged", pool, level="weights")
    assert not report.passed
    assert "model.layers.2.input_layernorm.weight, which the adapter does not change" in report.levels[-1].summary


def test_layers_without_factors_are_named(tmp_path: Path, saved: Saved, pool: RankPool) -> None:
    base, adapter = saved
    fewer = save_adapter(tmp_path / "fewer", base, **{**QUIET, "target_modules": ["q_proj"]})
    report = verified(saved, fewer, pool)
    assert not report.passed and [level.name for level in report.levels] == ["structure"]
    assert "model.layers.0.mlp.down_proj has factors in the adapter alone" in report.levels[0].details["problems"]
    other = verify_adapter(base, adapter, fewer, level="structure")
    assert "has factors in the candidate alone" in other.levels[0].summary


def test_trained_ranks_are_no_difference(tmp_path: Path, saved: Saved, pool: RankPool) -> None:
    """Without the sidecar, q, k and v get all stacked ranks, with zeros; what they add is the same."""
    base, adapter = saved
    convert(adapter, tmp_path / "meg", to="torch", hf_reference=base)
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    (tmp_path / "meg/release/args.json").write_text(json.dumps({"lora_alpha": 6}))  # of rank 12
    assert verified(saved, tmp_path / "meg", pool, level="weights").passed
    (tmp_path / "meg/release/args.json").write_text(json.dumps({"lora_alpha": 12}))
    report = verified(saved, tmp_path / "meg", pool, level="weights")
    assert "the scale is 1, and should be 0.5" in report.levels[-1].summary


def test_bfloat16(tmp_path: Path, pool: RankPool) -> None:
    base = save_llama(tmp_path / "base", dtype="bfloat16")
    adapter = save_adapter(tmp_path / "adapter", base, **QUIET)
    convert(adapter, tmp_path / "meg", to="torch_dist", grid=Parallelism(2), hf_reference=base)
    report = verified((base, adapter), tmp_path / "meg", pool, dtype="bfloat16", tokens=MANY_ROWS)
    assert passes(report)


def test_what_cannot_be_asked(tmp_path: Path, saved: Saved) -> None:
    base, adapter = saved
    meg = tmp_path / "meg"
    convert(base, tmp_path / "model", to="torch")
    convert(adapter, meg, to="torch", hf_reference=base)
    small = save_llama(tmp_path / "small", hidden_size=48, intermediate_size=96)
    incomplete = Path(shutil.copytree(adapter, tmp_path / "incomplete"))
    tensors = tensors_of(adapter)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    save_file(tensors, incomplete / "adapter_model.safetensors")
    for arguments, error, match in (
        ((tmp_path / "model", meg, adapter), UsageError, "run by transformers and peft"),
        ((base, meg, meg), UsageError, "takes a PEFT directory"),
        ((base, adapter, base), UsageError, "takes a PEFT directory"),
        ((small, adapter, adapter), InputError, "of the wrong shape"),
        ((base, meg, incomplete), InputError, "no lora_A beside it"),
        ((base, tmp_path / "nothing", adapter), InputError, "nothing"),
    ):
        with pytest.raises(error, match=match):
            verify_adapter(*arguments, level="structure")
    with pytest.raises(UsageError, match="no level"):
        verify_adapter(base, meg, adapter, level="rollouts")
    with pytest.raises(UsageError, match="--tp, --pp and --ep"):
        verify_adapter(base, meg, adapter, tp=2)
    with pytest.raises(UnsupportedError, match="an adapter is no model"):
        verify(base, meg)


def test_what_peft_leaves_out_is_an_error(tmp_path: Path, saved: Saved) -> None:
    """peft fills missing factors with random values; ckptkit has read the file before, so this is about its names."""
    from ckptkit.verification.ranks.adapters import with_peft
    from ckptkit.verification.ranks.jobs import AdapterJob

    base, adapter = saved
    incomplete = Path(shutil.copytree(adapter, tmp_path / "incomplete"))
    tensors = tensors_of(adapter)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, incomplete / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"does not find all of it.*q_proj"):
        with_peft(load(base), AdapterJob(str(incomplete)), torch.float32)


def test_types_of_the_model_are_left_alone(saved: Saved) -> None:
    """Only the factors get the type of the run: frequencies of a rope in bfloat16 would be other frequencies."""
    from ckptkit.verification.ranks.adapters import with_peft
    from ckptkit.verification.ranks.jobs import AdapterJob

    base, adapter = saved
    model = load(base).to(torch.bfloat16)
    rope = model.model.rotary_emb
    rope.inv_freq = rope.inv_freq.float()
    found = with_peft(model, AdapterJob(str(adapter)), torch.bfloat16)
    assert found.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {value.dtype for name, value in found.named_parameters() if "lora_" in name} == {torch.bfloat16}


def test_on_the_command_line(tmp_path: Path, saved: Saved) -> None:
    base, adapter = map(str, saved)
    words = ["verify", base, adapter, "--adapter", adapter, "--level", "weights", "--json", "-"]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 0 and json.loads(found.stdout)["verdict"] == "same"
    words = ["verify", base, base, "--adapter", adapter, "--level", "weights"]
    differs = CliRunner().invoke(cli.app, words)
    assert differs.exit_code == 1 and "times the adapter is in it" in differs.stdout
