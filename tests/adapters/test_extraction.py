"""`adapter extract`: what it writes loads in peft, and makes the tuned model of its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from ckptkit.adapters.decomposition import Wanted, decompose
from ckptkit.adapters.extraction import extract_adapter
from ckptkit.cli import app as cli
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.adapters import with_peft
from ckptkit.verification.ranks.jobs import AdapterJob
from tests.lora import adapted, load, tensors_of
from tests.models import files_of, save_llama, save_model
from tests.precision import relative_error

Change = Callable[[dict[str, torch.Tensor]], None]


def tune(base: Path, out: Path, change: Change) -> Path:
    """A copy of a model whose tensors are changed."""
    convert(base, out, to="hf")
    tensors = tensors_of(out)
    change(tensors)
    (file,) = out.glob("*.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})
    return out


def low_rank(rank: int, *endings: str) -> Change:
    """Adds a random matrix of a rank to the weights whose names end so."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(rank)
        for name, tensor in tensors.items():
            if name.endswith(endings):
                *_, rows, columns = tensor.shape
                tensor += 0.1 * torch.randn(*tensor.shape[:-2], rows, rank) @ torch.randn(rank, columns)

    return change


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(40)[None] * 5 % 250).logits
    return found


def in_peft(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of peft; that it loads every tensor is checked."""
    return logits_of(with_peft(load(base), AdapterJob(str(adapter)), torch.float32))


def test_a_merged_adapter_is_found_again(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapted(base, lora_alpha=2).merge_and_unload().save_pretrained(tmp_path / "tuned")
    result = extract_adapter(base, tmp_path / "tuned", tmp_path / "out", rank=4)
    modules = result.target["modules"]
    assert len(modules) == 28 and all(about["rank"] == 4 and about["energy"] > 0.9999 for about in modules.values())
    before, after, factors = tensors_of(base), tensors_of(tmp_path / "tuned"), tensors_of(tmp_path / "out")
    for module in modules:
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        assert relative_error(before[f"{module}.weight"] + b @ a, after[f"{module}.weight"]) < 1e-5
    assert relative_error(in_peft(base, tmp_path / "out"), logits_of(load(tmp_path / "tuned"))) < 1e-4
    convert(base, tmp_path / "meg", to="torch", grid=Parallelism(2, 2))  # any format, the same bytes
    extract_adapter(tmp_path / "meg", tmp_path / "tuned", tmp_path / "again", rank=4, threads=1)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_energy_gives_each_layer_the_smallest_rank(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    wide, narrow = low_rank(20, "q_proj.weight"), low_rank(3, "1.mlp.down_proj.weight")
    tuned = tune(base, tmp_path / "tuned", lambda tensors: (wide(tensors), narrow(tensors))[0])
    result = extract_adapter(base, tuned, tmp_path / "out", energy=0.9)
    before, after = tensors_of(base), tensors_of(tuned)
    assert set(result.target["modules"]) == {
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)),
        "model.layers.1.mlp.down_proj",
    }
    for module, about in result.target["modules"].items():
        change = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        squares = torch.linalg.svdvals(change).square()
        kept = squares.cumsum(0) / squares.sum()
        rank = about["rank"]
        assert about["energy"] == pytest.approx(float(kept[rank - 1]), abs=1e-4)
        assert kept[rank - 1] > 0.9 - 1e-4 and (rank == 1 or kept[rank - 2] < 0.9 + 1e-4)
    assert 1 <= result.target["modules"]["model.layers.1.mlp.down_proj"]["rank"] <= 3
    assert any("5 modules of rank" in note for note in result.notes)
    in_peft(base, tmp_path / "out")


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_and_routers(tmp_path: Path, kind: str) -> None:
    """All experts of a layer have one parameter in transformers: gate and up of an expert share A."""
    base = save_model(tmp_path / "base", kind)
    rows = load(base).state_dict()
    names = [name for name in rows if ".layers.1." in name and ("experts" in name or "q_proj" in name)]
    assert len(names) == 3
    tuned = tmp_path / "tuned"
    model = load(base)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                *experts, rows_, columns = parameter.shape
                parameter += 0.1 * torch.randn(*experts, rows_, 3) @ torch.randn(*experts, 3, columns)
            elif "layers.1.mlp.gate.weight" in name or name == "model.norm.weight":
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tuned)
    result = extract_adapter(base, tuned, tmp_path / "out", rank=3)
    assert sorted(result.target["modules"]) == sorted(name.removesuffix(".weight") for name in names)
    assert all(about["energy"] > 0.9999 for about in result.target["modules"].values())
    assert any("2 tensors are kept whole" in note for note in result.notes)
    assert relative_error(in_peft(base, tmp_path / "out"), logits_of(load(tuned))) < 1e-4
    convert(tmp_path / "out", tmp_path / "same", to="peft", hf_reference=base)
    assert files_of(tmp_path / "same") == files_of(tmp_path / "out")


def test_large_matrices_are_decomposed_on_a_subspace() -> None:
    rng = np.random.default_rng(7)
    shape, count = (900, 1100), 800
    left, right = (np.linalg.qr(rng.standard_normal((size, count)))[0] for size in shape)
    values = 2.0 ** -(np.arange(count) / 8)
    matrix = ((left * values) @ right.T).astype(np.float32)
    for wanted in (Wanted(rank=20), Wanted(energy=0.95)):
        found = decompose(matrix, wanted)
        assert not found.complete and len(found.values) < 100
        rank = wanted.rank or found.rank_for(0.95)
        assert rank is not None
        assert np.allclose(found.values[:rank], values[:rank], rtol=1e-4)
        factors = found.cut(rank)
        exact = float((values[:rank] ** 2).sum() / (values**2).sum())
        assert factors.energy == pytest.approx(exact, abs=1e-4)
        rest = matrix - factors.b @ factors.a
        assert 1 - (rest**2).sum() / (matrix**2).sum() == pytest.approx(exact, abs=1e-3)
        again = decompose(matrix, wanted).cut(rank)
        assert again.a.tobytes() == factors.a.tobytes() and again.b.tobytes() == factors.b.tobytes()
    flat = rng.standard_normal((800, 800)).astype(np.float32)  # no subspace holds most of it
    full = decompose(flat, Wanted(energy=0.99))
    assert full.complete and full.kept[-1] == pytest.approx(1, abs=1e-4)


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    biased, tied = save_llama(tmp_path / "biased", "biased"), save_llama(tmp_path / "tied", "tied")

    def shift(name: str, value: float = 1.0) -> Change:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name][0] += value

        return change

    bias, norm = "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"
    weight = "model.layers.1.self_attn.k_proj.weight"
    for number, (base, change, error, match) in enumerate(
        (
            (biased, shift(bias), UnsupportedError, f"{bias} differs"),
            (biased, shift(norm), UnsupportedError, "no linear layer differs"),
            (biased, shift(weight, float("nan")), InputError, f"{weight} has elements that are not finite"),
            (tied, shift("model.embed_tokens.weight"), UnsupportedError, "ties it to its head"),
            (tied, lambda tensors: None, UsageError, "the two models are equal"),
        )
    ):
        tuned = tune(base, tmp_path / f"tuned{number}", change)
        with pytest.raises(error, match=match):
            extract_adapter(base, tuned, tmp_path / "out", rank=2)
    with pytest.raises(InputError, match="not the same model"):
        extract_adapter(biased, tied, tmp_path / "out", rank=2)
    for wrong, match in (({}, "a rank or an energy"), ({"rank": 2, "energy": 0.5}, "a rank or an energy")):
        with pytest.raises(UsageError, match=match):
            extract_adapter(biased, biased, tmp_path / "out", **wrong)
    for wrong, match in (({"energy": 1.5}, "--energy"), ({"energy": 0.0}, "--energy"), ({"rank": 0}, "--rank")):
        with pytest.raises(UsageError, match=match):
            extract_adapter(biased, biased, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", low_rank(2, "q_proj.weight", "o_proj.weight"))
    words = ["adapter", "extract", str(base), str(tuned), "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(cli.app, [*words, "--energy", "0.99", "--dtype", "bfloat16", "--json"])
    assert found.exit_code == 0, found.stderr
    modules = json.loads(found.stdout)["target"]["modules"]
    assert len(modules) == 8 and all(about["rank"] <= 2 for about in modules.values())
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert CliRunner().invoke(cli.app, [*words, "--lora-alpha", "2", "--rank", "2"]).exit_code == UsageError.exit_code
