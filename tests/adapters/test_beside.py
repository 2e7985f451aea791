"""An adapter written beside the weights of its model, as training with an adapter saves both, and taken apart again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ckptkit.adapters.commands import export_adapter, merge_adapters
from ckptkit.cli import app as cli
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.dcp.reading import open_dcp
from ckptkit.formats.run_config import read_section
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.lora import LAYOUTS
from tests.adapters.test_conversion import ranks_of
from tests.lora import save_adapter
from tests.models import files_of, save_llama, save_model

GRID, EXPERTS = Parallelism(2, 2), Parallelism(2, ep=2)
Saved = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A dense model with adapters of some layers, and one with experts and adapters of all layers."""
    folder = tmp_path_factory.mktemp("beside")
    dense = save_llama(folder / "dense", "biased", dtype="bfloat16")
    experts = save_model(folder / "experts", "qwen3_moe")
    some = {"layers_to_transform": [1, 2], "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}
    return {
        "dense": (dense, save_adapter(folder / "adapter", dense, dtype="float32", **some)),
        "experts": (experts, save_adapter(folder / "of-experts", experts, target_modules="all-linear")),
    }


@pytest.mark.parametrize(
    ("kind", "to", "layout", "spec"),
    [
        ("dense", "torch", "fused", "te"),
        ("dense", "torch_dist", "peft", "local"),
        ("experts", "torch_dist", "canonical", "te"),
        ("experts", "torch", "peft", "local"),
        *(
            pytest.param(kind, to, layout, spec, marks=pytest.mark.slow)
            for kind in ("dense", "experts")
            for to in ("torch", "torch_dist")
            for layout in LAYOUTS
            for spec in ("te", "local")
        ),
    ],
)
def test_both_come_back(tmp_path: Path, saved: Saved, kind: str, to: str, layout: str, spec: str) -> None:
    """Both parts as the files that they were, also from another grid."""
    base, adapter = saved[kind]
    grid = EXPERTS if kind == "experts" else GRID
    both, again = tmp_path / "both", tmp_path / "again"
    convert(base, both, to=to, grid=grid, spec=spec, adapter=adapter, adapter_layout=layout)
    convert(both, again, to="torch_dist", grid=Parallelism(4), adapter=both)
    for path in (both, again):
        export_adapter(path, tmp_path / "adapter", overwrite=True)
        assert files_of(tmp_path / "adapter") == files_of(adapter)
        convert(path, tmp_path / "model", to="hf", part="model", overwrite=True)
        assert files_of(tmp_path / "model") == files_of(base)
    convert(both, tmp_path / "alone", to="torch", part="adapter")
    convert(tmp_path / "alone", tmp_path / "adapter", to="peft", overwrite=True)
    assert files_of(tmp_path / "adapter") == files_of(adapter)


@pytest.mark.parametrize(("kind", "layout"), [("dense", "fused"), ("dense", "peft"), ("experts", "peft")])
def test_names_and_tensors_are_those_of_the_two_alone(tmp_path: Path, saved: Saved, kind: str, layout: str) -> None:
    """Megatron-Bridge leaves the weights' names as they are; modules of PEFT hold the layer that they adapt."""
    base, adapter = saved[kind]
    grid = EXPERTS if kind == "experts" else GRID
    convert(base, tmp_path / "both", to="torch", grid=grid, adapter=adapter, adapter_layout=layout)
    convert(base, tmp_path / "model", to="torch", grid=grid)
    convert(adapter, tmp_path / "adapter", to="torch", grid=grid, adapter_layout=layout, hf_reference=base)
    both, model, factors = (ranks_of(tmp_path / name, grid) for name in ("both", "model", "adapter"))
    for rank, found in both.items():
        adapted = {re.sub(r"\.(adapter|lora_[AB])\..*", "", name) for name in factors[rank]}
        expected = dict(factors[rank])
        for name, tensor in model[rank].items():
            module, _, last = name.rpartition(".")
            expected[f"{module}.base_layer.{last}" if layout == "peft" and module in adapted else name] = tensor
        assert found.keys() == expected.keys() and len(factors[rank]) > 4
        assert all(
            torch.equal(found[name], tensor) if isinstance(tensor, torch.Tensor) else found[name] is None
            for name, tensor in expected.items()
        )


def test_distributed_names(tmp_path: Path, saved: Saved) -> None:
    base, adapter = saved["experts"]
    convert(base, tmp_path / "both", to="torch_dist", grid=EXPERTS, adapter=adapter)
    convert(base, tmp_path / "model", to="torch_dist", grid=EXPERTS)
    convert(adapter, tmp_path / "adapter", to="torch_dist", grid=EXPERTS, hf_reference=base)
    both, model, factors = (open_dcp(tmp_path / name / "release") for name in ("both", "model", "adapter"))
    assert both.tensors.keys() == model.tensors.keys() | factors.tensors.keys()
    assert both.objects.keys() == model.objects.keys() | factors.objects.keys()
    assert read_section(tmp_path / "both/release", "peft") == read_section(tmp_path / "adapter/release", "peft")
    assert read_section(tmp_path / "both/release", "model") == read_section(tmp_path / "model/release", "model")
    convert(base, tmp_path / "peft", to="torch_dist", adapter=adapter, adapter_layout="peft")
    names = open_dcp(tmp_path / "peft/release").tensors
    for name in ("self_attention.linear_qkv.base_layer.weight", "mlp.experts.experts.linear_fc2.base_layer.weight"):
        assert any(key.endswith(name) for key in names)


def test_a_change_in_either_part_stays_there(tmp_path: Path, saved: Saved) -> None:
    base, adapter = saved["dense"]
    convert(base, tmp_path / "both", to="torch", adapter=adapter)
    file = tmp_path / "both/release/mp_rank_00/model_optim_rng.pt"
    content: dict[str, Any] = torch.load(file, weights_only=False)
    assert content["args"].params_dtype == torch.bfloat16  # that of the model, whatever the factors have
    content["model"]["decoder.layers.1.self_attention.linear_proj.adapter.linear_out.weight"][0, 0] += 1
    content["model"]["decoder.layers.0.self_attention.linear_proj.weight"][0, 0] += 1
    torch.save(content, file)
    export_adapter(tmp_path / "both", tmp_path / "adapter")
    convert(tmp_path / "both", tmp_path / "model", to="hf", part="model")
    for left, right in ((tmp_path / "adapter", adapter), (tmp_path / "model", base)):
        changed = [name for name, data in files_of(left).items() if files_of(right)[name] != data]
        assert changed == [next(name for name in files_of(right) if name.endswith(".safetensors"))]
    merge_adapters(tmp_path / "both", [(tmp_path / "both", 1.0)], tmp_path / "merged", to="hf")


def test_what_cannot_be_is_refused(tmp_path: Path, saved: Saved) -> None:
    base, adapter = saved["dense"]
    other, out = saved["experts"][1], tmp_path / "out"
    for options, error, match in (
        ({"to": "hf"}, UsageError, "no form for a model with an adapter beside it"),
        ({"to": "torch", "head": "value"}, UsageError, "--head and --adapter exclude each other"),
        ({"to": "torch", "spec": "verl"}, UsageError, "--spec verl has no names for an adapter"),
        ({"to": "torch", "part": "adapter"}, UsageError, "--part adapter and --adapter"),
        ({"to": "torch", "grid": Parallelism(8)}, UsageError, "do not divide"),
        ({"to": "torch", "adapter": other}, InputError, "no factors|missing|unknown|unexpected|has no"),
        ({"to": "torch", "adapter": base}, UsageError, "no adapter in it"),
    ):
        with pytest.raises(error, match=match):
            convert(base, out, **{"adapter": adapter, **options})
        assert not out.exists()
    convert(base, tmp_path / "both", to="torch", adapter=adapter)
    with pytest.raises(UnsupportedError, match=r"beside the weights.*--part model"):
        convert(tmp_path / "both", out, to="hf")
    with pytest.raises(UsageError, match="no adapter in it"):
        convert(base, out, to="torch", part="adapter")


def test_on_the_command_line(tmp_path: Path, saved: Saved) -> None:
    base, adapter = map(str, saved["dense"])
    run, both, out = CliRunner(), str(tmp_path / "both"), str(tmp_path / "out")
    words = ["convert", base, both, "--to", "torch_dist", "--tp", "2", "--adapter", adapter, "--json"]
    result = run.invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["coverage"]["of the adapter"] == 16 and found["target"]["megatron_flags"] is not None
    assert "8 linear layers have adapter beside them, in the layout fused" in found["notes"]
    assert run.invoke(cli.app, ["adapter", "export", both, "-o", out]).exit_code == 0
    assert files_of(Path(out)) == files_of(Path(adapter))
    words = ["convert", both, str(tmp_path / "model"), "--to", "hf", "--part", "model"]
    assert run.invoke(cli.app, words).exit_code == 0
    assert files_of(tmp_path / "model") == files_of(Path(base))
