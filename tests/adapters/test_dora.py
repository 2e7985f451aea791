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
from ckptkit.formats.run_config import read_section
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.lora import LAYOUTS
from ckptkit.verification.adapters.verify import verify_adapter
from tests.adapters.test_conversion import delta, ranks_of
from tests.lora import load, save_adapter, tensors_of
from tests.models import files_of, save_llama, save_model
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


GRIDS = [("torch", Parallelism(1)), ("torch", Parallelism(2, 2)), ("torch_dist", Parallelism(4))]


def test_the_same_files_come_back(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    convert(adapter, tmp_path / "same", to="peft", hf_reference=base)
    assert files_of(tmp_path / "same") == files_of(adapter)
    for to, grid in GRIDS:
        convert(adapter, tmp_path / "meg", to=to, grid=grid, hf_reference=base, overwrite=True)
        export_adapter(tmp_path / "meg", tmp_path / "back", overwrite=True)
        assert files_of(tmp_path / "back") == files_of(adapter)
    convert(tmp_path / "meg", tmp_path / "again", to="torch", grid=Parallelism(1, 2))
    export_adapter(tmp_path / "again", tmp_path / "back", overwrite=True)
    assert files_of(tmp_path / "back") == files_of(adapter)
    convert(base, tmp_path / "both", to="torch_dist", grid=Parallelism(2), adapter=adapter)
    export_adapter(tmp_path / "both", tmp_path / "back", overwrite=True)
    assert files_of(tmp_path / "back") == files_of(adapter)


def test_ranks_hold_what_peft_computes(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    """Each rank's rows of W + scale * B A, with the lengths that it holds, are those of the merged model."""
    base, adapter = saved
    grid = Parallelism(2)
    convert(adapter, tmp_path / "meg", to="torch", grid=grid, hf_reference=base)
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "merged", to="torch", grid=grid, dtype="float32")
    convert(base, tmp_path / "model", to="torch", grid=grid)
    factors, model, merged = (ranks_of(tmp_path / name, grid) for name in ("meg", "model", "merged"))
    modules = {name.partition(".adapter.")[0] for name in factors[0, 0, 0]}
    assert len(modules) == 16
    scale = json.loads((tmp_path / "meg/ckptkit/adapter.json").read_text())
    for module in modules:
        totals = {
            rank: tensors[f"{module}.weight"].double()
            + scale["alpha"] / scale["rank"] * delta(factors, rank, module, "fused")
            for rank, tensors in model.items()
        }
        squares = {rank: total.square().sum(dim=1) for rank, total in totals.items()}
        if module.endswith(("linear_proj", "linear_fc2")):
            squares = dict.fromkeys(squares, sum(squares.values()))
        for rank, total in totals.items():
            lengths = factors[rank][f"{module}.adapter.weight_magnitude"].double()
            found = total * (lengths / squares[rank].sqrt())[:, None]
            assert relative_error(merged[rank][f"{module}.weight"], found) < 1e-5


def test_distributed_lengths_lie_rank_by_rank(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    """As `ParallelLinearDoRAAdapter.sharded_state_dict` has them: a rank's own vector is its part of the whole."""
    base, adapter = saved
    grid = Parallelism(2)
    convert(adapter, tmp_path / "meg", to="torch", grid=grid, hf_reference=base)
    convert(adapter, tmp_path / "dist", to="torch_dist", grid=grid, hf_reference=base)
    ranks = ranks_of(tmp_path / "meg", grid)
    stored = loaded(tmp_path / "dist/release")
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"):
        parts = [tensors[f"decoder.layers.1.{name}.adapter.weight_magnitude"] for tensors in ranks.values()]
        whole = torch.cat(parts) if name != "mlp.linear_fc2" else parts[0]
        assert torch.equal(stored[f"decoder.layers.{name}.adapter.weight_magnitude"][1], whole)
    section = read_section(tmp_path / "dist/release", "peft")
    assert section["_target_"].endswith(".DoRA") and "share_expert_adapters" not in section


def loaded(release: Path) -> dict[str, torch.Tensor]:
    """The tensors of a distributed checkpoint, as torch loads them."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(release, release.parent / "whole.pt")
    whole = torch.load(release.parent / "whole.pt", weights_only=False)
    return {key: value for key, value in whole.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_merged_from_megatron(tmp_path: Path, saved: tuple[Path, Path], to: str) -> None:
    base, adapter = saved
    convert(adapter, tmp_path / "meg", to=to, grid=Parallelism(2), hf_reference=base)
    for path in (adapter, tmp_path / "meg"):
        merge_adapters(base, [(path, 1.0)], tmp_path / f"merged-{path.name}", to="hf")
    assert files_of(tmp_path / "merged-meg") == files_of(tmp_path / "merged-adapter")


def test_an_adapter_that_megatron_trained(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    """Without a sidecar: what cannot be PEFT's DoRA is refused, and all else is exported with its lengths."""
    base, adapter = saved
    columns = save_adapter(
        tmp_path / "columns", base, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    )
    for source, grid in ((columns, Parallelism(2)), (adapter, Parallelism(1))):
        convert(source, tmp_path / "meg", to="torch_dist", grid=grid, hf_reference=base, overwrite=True)
        shutil.rmtree(tmp_path / "meg/ckptkit")
        export_adapter(tmp_path / "meg", tmp_path / "out", hf_reference=base, overwrite=True)
        assert verify_adapter(base, tmp_path / "out", source, level="weights").passed
        names = {name for name in tensors_of(source) if name.endswith("magnitude_vector")}
        found = tensors_of(tmp_path / "out")
        assert all(torch.equal(found[name], tensors_of(source)[name]) for name in names) and names
    result = convert(adapter, tmp_path / "meg", to="torch_dist", grid=Parallelism(2), hf_reference=base, overwrite=True)
    assert any("at TP 2 Megatron-Bridge takes the lengths of the rows" in note for note in result.notes)
    shutil.rmtree(tmp_path / "meg/ckptkit")
    with pytest.raises(UnsupportedError, match=r"not the DoRA of peft: at TP 2 .*linear_proj.weight from each rank"):
        export_adapter(tmp_path / "meg", tmp_path / "no", hf_reference=base)


def test_what_megatron_cannot_express(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    some = save_adapter(tmp_path / "some", base, use_dora=True, target_modules=["q_proj", "v_proj"])
    for layout in LAYOUTS[1:]:
        with pytest.raises(UnsupportedError, match="no form for the lengths of rows"):
            convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, hf_reference=base)
    with pytest.raises(UnsupportedError, match=r"the adapter has none for model.layers.0.self_attn.k_proj.weight"):
        convert(some, tmp_path / "meg", to="torch", hf_reference=base)


def test_experts_and_biases(tmp_path: Path) -> None:
    biased = save_llama(tmp_path / "biased", "biased")
    adapter = save_adapter(tmp_path / "adapter", biased, use_dora=True)
    result = convert(adapter, tmp_path / "meg", to="torch", hf_reference=biased)
    assert any("scales the bias beside" in note for note in result.notes)
    shutil.rmtree(tmp_path / "meg/ckptkit")
    with pytest.raises(UnsupportedError, match=r"scales the bias beside decoder.layers.0.self_attention.linear_qkv"):
        export_adapter(tmp_path / "meg", tmp_path / "out", hf_reference=biased, lora_alpha=6)
    base = save_model(tmp_path / "experts", "qwen3_moe-mixed")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    plain = save_adapter(tmp_path / "plain", base, use_dora=True, target_modules=attention)
    convert(plain, tmp_path / "meg", to="torch", hf_reference=base, overwrite=True)

    def add_an_expert(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["target_modules"].append("down_proj")
        name = "base_model.model.model.layers.0.mlp.experts.0.down_proj"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = torch.ones(4, 48), torch.ones(96, 4)
        tensors[f"{name}.lora_magnitude_vector"] = torch.ones(96)

    with pytest.raises(UnsupportedError, match=r"no form for decoder.layers.0.mlp.experts.linear_fc2.weight0, an exp"):
        convert(altered(tmp_path / "of-expert", plain, add_an_expert), tmp_path / "no", to="torch", hf_reference=base)


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_lengths_in_megatron_are_all_there_or_none(tmp_path: Path, saved: tuple[Path, Path], to: str) -> None:
    base, adapter = saved
    plain = save_adapter(tmp_path / "plain", base)
    name = "decoder.layers.0.self_attention.linear_proj.adapter.weight_magnitude"
    for source, change, match in (
        (adapter, lambda tensors: tensors.pop(name), r"linear_proj.weight has no adapter.weight_magnitude"),
        (adapter, _without_lengths, "says DoRA, and there is no adapter.weight_magnitude"),
        (plain, lambda tensors: tensors.update({name: torch.ones(96)}), "says nothing of DoRA"),
    ):
        convert(source, tmp_path / "meg", to="torch", hf_reference=base, overwrite=True)
        folder, file = tmp_path / "meg", tmp_path / "meg/release/mp_rank_00/model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        change(content["model"])
        torch.save(content, file)
        if to == "torch_dist":
            folder = as_distributed(tmp_path / "dist", content["model"], source, base)
        with pytest.raises(InputError, match=match):
            export_adapter(folder, tmp_path / "out")


def _without_lengths(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("weight_magnitude")]:
        del tensors[name]


def as_distributed(out: Path, tensors: dict[str, torch.Tensor], adapter: Path, base: Path) -> Path:
    """A distributed checkpoint with these tensors, beside the other files that ckptkit writes for the adapter."""
    import torch.distributed.checkpoint as dcp

    convert(adapter, out, to="torch_dist", hf_reference=base, overwrite=True)
    release = out / "release"
    kept = {path.name: path.read_bytes() for path in release.iterdir() if path.suffix in (".pt", ".json", ".yaml")}
    shutil.rmtree(release)
    dcp.save(tensors, checkpoint_id=release, no_dist=True)
    for key, data in kept.items():
        (release / key).write_bytes(data)
    return out


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
