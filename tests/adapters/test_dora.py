"""DoRA: the rows of W + scale * B A get stored lengths. The judge is peft's merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.adapters.commands import export_adapter, merge_adapters
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.lora import LAYOUTS
from ckptkit.verification.adapters.verify import verify_adapter
from tests.lora import load, save_adapter, tensors_of
from tests.models import files_of, save_llama
from tests.precision import relative_error

Q = "base_model.model.model.layers.1.self_attn.q_proj"
MAGNITUDE = f"{Q}.lora_magnitude_vector"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with an adapter of DoRA, whose magnitudes are random, too."""
    folder = tmp_path_factory.mktemp("dora")
    base = save_llama(folder / "base", dtype=request.param)
    return base, save_adapter(folder / "adapter", base, use_dora=True, lora_alpha=2)


def exact(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The merged weights, float64."""
    weights, factors = tensors_of(base), tensors_of(adapter)
    found = {}
    for name, weight in weights.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            a, b, magnitude = (
                factors[f"{stem}.{part}"].double()
                for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            )
            total = weight.double() + 0.5 * (b @ a)
            found[name] = total * (magnitude / total.norm(dim=1))[:, None]
    return found


def test_merged_as_peft_merges(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    from peft import PeftModel

    base, adapter = saved
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "wide", to="hf", precision="float64")
    found, wide, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "wide"), exact(base, adapter)
    by_peft = PeftModel.from_pretrained(load(base).float(), adapter).merge_and_unload().state_dict()
    assert len(expected) == 28
    for name, value in expected.items():
        assert relative_error(by_peft[name], value) < 1e-5
        assert relative_error(found[name], value) < (1e-5 if found[name].dtype == torch.float32 else 2**-8)
        half_ulp = value.abs() * (2.0**-24 if wide[name].dtype == torch.float32 else 2.0**-8)
        assert bool(((wide[name].double() - value).abs() <= half_ulp * (1 + 1e-6) + 1e-30).all()), name
    report = verify_adapter(base, tmp_path / "merged", adapter, level="weights")
    assert report.passed, report.levels[-1].summary


def test_rows_are_whole_on_any_grid(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    """Row-parallel weights are cut through their rows: the lengths are those of the source's rows."""
    base, adapter = saved
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="hf")
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "meg", to="torch", grid=Parallelism(4), threads=3)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    left, right = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "back")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_same_files_come_back(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    convert(adapter, tmp_path / "same", to="peft", hf_reference=base)
    assert files_of(tmp_path / "same") == files_of(adapter)
    for layout in LAYOUTS:
        with pytest.raises(UnsupportedError, match="the magnitudes of DoRA"):
            convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, hf_reference=base)


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_magnitudes_in_megatron_are_never_left_out(tmp_path: Path, to: str) -> None:
    """An adapter of Megatron-Bridge's `DoRA`: without its magnitudes it would be another one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    base = save_llama(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    convert(adapter, tmp_path / "meg", to=to, hf_reference=base)
    release = tmp_path / "meg/release"
    name, lengths = "decoder.layers.0.self_attention.linear_proj.adapter.weight_magnitude", torch.ones(96)
    if to == "torch":
        file = release / "mp_rank_00/model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        content["model"][name] = lengths
        torch.save(content, file)
    else:
        dcp_to_torch_save(release, tmp_path / "whole.pt")
        whole = torch.load(tmp_path / "whole.pt", weights_only=False)
        tensors = {key: value for key, value in whole.items() if isinstance(value, torch.Tensor)}
        kept = {key: (release / key).read_bytes() for key in ("common.pt", "metadata.json")}
        shutil.rmtree(release)
        dcp.save({**tensors, name: lengths}, checkpoint_id=release, no_dist=True)
        for key, data in kept.items():
            (release / key).write_bytes(data)
    for run in (export_adapter, lambda source, out: convert(source, out, to="peft")):
        with pytest.raises(UnsupportedError, match=r"an adapter of DoRA .*weight_magnitude"):
            run(tmp_path / "meg", tmp_path / "out")


def altered(folder: Path, adapter: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
    out = Path(shutil.copytree(adapter, folder))
    config, tensors = json.loads((out / "adapter_config.json").read_text()), tensors_of(out)
    change(config, tensors)
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def test_faults_are_named(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    for number, (change, match) in enumerate(
        (
            (lambda config, tensors: tensors.pop(MAGNITUDE), "q_proj has no lora_magnitude_vector"),
            (lambda config, tensors: config.update(use_dora=False), "says nothing of use_dora"),
            (lambda config, tensors: tensors.update({MAGNITUDE: torch.ones(95)}), r"is \[95\], the weight has 96 rows"),
        )
    ):
        faulty = altered(tmp_path / f"faulty{number}", adapter, change)
        with pytest.raises(InputError, match=match):
            merge_adapters(base, [(faulty, 1.0)], tmp_path / "out", to="hf")
    plain = altered(
        tmp_path / "plain",
        adapter,
        lambda config, tensors: (
            config.update(use_dora=False),
            [tensors.pop(name) for name in list(tensors) if name.endswith("lora_magnitude_vector")],
        ),
    )
    merge_adapters(base, [(plain, 1.0)], tmp_path / "merged", to="hf")  # without the magnitudes
    report = verify_adapter(base, tmp_path / "merged", adapter, level="weights")
    assert not report.passed and "model.layers.0.self_attn.q_proj.weight" in report.levels[-1].summary
    doubled = altered(tmp_path / "doubled", adapter, lambda config, tensors: tensors[MAGNITUDE].mul_(2))
    differs = verify_adapter(base, doubled, adapter, level="weights")
    assert differs.levels[-1].details["problems"] == ["model.layers.1.self_attn.q_proj.lora_magnitude_vector differs"]
    with pytest.raises(UsageError, match="no part by weight"):
        merge_adapters(base, [(adapter, 0.5)], tmp_path / "out", to="hf")
    with pytest.raises(UnsupportedError, match="several adapters change"):
        merge_adapters(base, [(adapter, 1.0), (plain, 1.0)], tmp_path / "out", to="hf")
