"""`diff`: nothing between layouts of one model; every change named, counted and measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ckptkit import Parallelism, convert
from ckptkit.cli import app as cli
from ckptkit.inspection.differences import TensorDifference, diff
from tests.inspection.conftest import LAYOUTS
from tests.models import save_llama

RANK = "release/mp_rank_01_001/model_optim_rng.pt"


def change_rank(root: Path, change: Callable[[dict[str, Any]], object], file: str = RANK) -> None:
    import torch

    content = torch.load(root / file, weights_only=False)
    change(content["model"])
    torch.save(content, root / file)


@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts_of_one_model_do_not_differ(tied: dict[str, Path], experts: dict[str, Path], other: str) -> None:
    for model in (tied, experts):
        for a, b in ((model["hf"], model[other]), (model[other], model["torch"])):
            found = diff(a, b, threads=2)
            assert found.same and found.tensors == [] and found.equal == found.compared > 30


def test_a_changed_shard_is_named_counted_and_measured(tied: dict[str, Path], changed: Callable[[str], Path]) -> None:
    """fc2 is cut by columns: the 72 of tensor parallel rank 1 start at column 72."""

    def change(model: dict[str, Any]) -> None:
        model["decoder.layers.0.mlp.linear_fc2.weight"][3, 5:8] += 0.25

    copy = changed("torch")
    change_rank(copy, change)
    found = diff(tied["hf"], copy)
    name, columns = "model.layers.2.mlp.down_proj.weight", 144
    (only,) = found.tensors
    assert (only.name, only.elements, only.differing, only.first) == (name, 96 * columns, 3, 3 * columns + 72 + 5)
    assert only.largest == pytest.approx(0.25, rel=1e-5) and not found.same
    assert (found.compared - found.equal, found.structure.same, found.inconsistent) == (1, True, [])


def test_what_is_not_finite_is_counted_on_each_side(tied: dict[str, Path], changed: Callable[[str], Path]) -> None:
    def change(model: dict[str, Any]) -> None:
        weight = model["decoder.layers.1.mlp.linear_fc2.weight"]
        weight[0, 0], weight[1, 1], weight[2, 2] = float("nan"), float("inf"), -float("inf")

    copy = changed("torch")
    change_rank(copy, change)
    (only,) = diff(tied["hf"], copy).tensors
    assert (only.nan, only.inf, only.differing, only.largest) == ((0, 1), (0, 2), 3, 0.0)
    same = diff(copy, copy)
    assert same.same and [(item.differing, item.nan, item.inf) for item in same.tensors] == [(0, (1, 1), (2, 2))]


def test_copies_that_diverge_inside_a_side(tied: dict[str, Path], changed: Callable[[str], Path]) -> None:
    copy = changed("torch")
    change_rank(copy, lambda model: model["decoder.final_layernorm.weight"].mul_(2))
    found = diff(tied["hf"], copy)
    assert not found.same and found.equal == found.compared
    assert [text.partition(" on ")[0] for text in found.inconsistent] == ["B: decoder.final_layernorm.weight"]


def test_another_model(tied: dict[str, Path], tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", "gqa", num_hidden_layers=3, vocab_size=260)
    found = diff(tied["torch"], other)
    structure = found.structure
    assert "vocab_size is 250 in A, 260 in B" in structure.config and "4 layers in A, 3 in B" in structure.config
    assert structure.only_in_b == ["lm_head.weight"] and len(structure.only_in_a) == 9
    assert structure.shapes == {"model.embed_tokens.weight": ([250, 96], [260, 96])}
    assert found.compared == 28 and not found.same


def test_types_differ_by_their_rounding(tied: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    convert(tied["hf"], tmp_path / "bf16", to="torch_dist", dtype="bfloat16")
    found = diff(tied["hf"], tmp_path / "bf16")
    assert len(found.structure.dtypes) == 38 and set(found.structure.dtypes.values()) == {("F32", "BF16")}
    expected = {}
    for shard in tied["hf"].glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            error = (tensor - tensor.to(torch.bfloat16).float()).abs()
            expected[name] = (int((error > 0).sum()), float(error.max()))
    assert {item.name: (item.differing, item.largest) for item in found.tensors} == {
        name: figures for name, figures in expected.items() if figures[0]
    }


def test_types_without_a_common_one_are_not_compared(tied: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    single = save_llama(tmp_path / "single", "tied")
    weights = load_file(single / "model.safetensors")
    weights["model.norm.weight"] = np.ones(96, np.int64)
    save_file(weights, single / "model.safetensors", {"format": "pt"})
    (only,) = [item for item in diff(tied["hf"], single).tensors if item.name == "model.norm.weight"]
    assert only == TensorDifference("model.norm.weight", 96, 96, None, None, (0, 0), (0, 0))


def test_structure_only_reads_no_weights(tied: dict[str, Path], changed: Callable[[str], Path]) -> None:
    copy = changed("hf")
    for shard in copy.glob("*.safetensors"):
        data = shard.read_bytes()
        shard.write_bytes(data[:-100] + b"\x01" * 100)
    assert not diff(tied["hf"], copy).same
    found = diff(tied["hf"], copy, values=False)
    assert found.same and (found.values_compared, found.compared, found.bytes) == (False, 0, 0)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["diff", *arguments], prog_name="ckptkit")
    return result.exit_code, result.stdout


def test_as_a_command(tied: dict[str, Path], experts: dict[str, Path], changed: Callable[[str], Path]) -> None:
    a, copy = str(tied["hf"]), changed("torch")
    code, text = run(a, str(tied["torch"]))
    assert code == 0 and "same: 38 of 38 tensors are equal" in text
    change_rank(copy, lambda model: model["decoder.layers.1.mlp.linear_fc2.weight"].mul_(1.5))
    code, text = run(a, str(copy))
    assert code == 1 and "model.layers.3.mlp.down_proj.weight" in text and "differs: 37 of 38" in text
    code, text = run(a, str(copy), "--json")
    told = json.loads(text)
    assert (code, told["same"], told["tensors"][0]["differing"]) == (1, False, 96 * 72)
    assert run(a, str(copy), "--structure-only")[0] == 0
    assert run(a, str(experts["hf"]), "--structure-only")[0] == 1
    assert run(a, a + "-missing")[0] == 3


def test_a_reference_describes_the_megatron_side(tied: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    convert(tied["hf"], tmp_path / "meg", to="torch", grid=Parallelism(2))
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    change_rank(tmp_path / "meg", lambda model: None, "release/mp_rank_00/model_optim_rng.pt")
    assert diff(tied["hf"], tmp_path / "meg", hf_reference=tied["hf"]).same
