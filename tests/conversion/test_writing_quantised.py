"""`--quantise`: new codes, those of a reference, and who reads them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from tests.conversion.test_reading_quantised import KINDS, tensors_of
from tests.models import add_prediction, files_of, save_llama, save_model
from tests.quantised import Array, quantise_fp8, quantise_int4

Quantise = Callable[[Path, Path], dict[str, Array]]
GATE = "model.layers.1.mlp.experts.3.gate_proj"
GRID = Parallelism(2, 2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain") / "hf", "deepseek_v3", dtype="bfloat16", num_hidden_layers=2)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes tensors of a directory in place; names, shapes and types stay."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        before = set(tensors)
        edit(tensors)
        assert set(tensors) == before
        save_file(tensors, file, metadata={"format": "pt"})


def with_odd_values(tensors: dict[str, Any]) -> None:
    """NaN of both signs among codes, and scales that are zero, infinite, and no numbers."""
    if f"{GATE}.weight" in tensors:
        codes = tensors[f"{GATE}.weight"].view(torch.uint8)
        codes[0, :4] = torch.tensor([127, 255, 0, 128], dtype=torch.uint8)
        tensors[f"{GATE}.weight_scale_inv"][0, 1:] = torch.tensor([0.0, torch.inf])
        tensors[f"{GATE}.weight_scale_inv"][1, 0] = torch.nan


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_touched_comes_back_byte_for_byte(plain: Path, tmp_path: Path, kind: str) -> None:
    reference = tmp_path / "reference"
    KINDS[kind](plain, reference)
    convert(reference, tmp_path / "meg", to="torch_dist", grid=GRID)
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise=f"like:{reference}")
    assert files_of(tmp_path / "back") == files_of(reference)
    assert result.likeness == {"same": result.target["quantised"]["tensors"], "old_scales": [], "new_scales": []}


@pytest.mark.parametrize("stated", ["bfloat16", "float32", None])
def test_without_a_sidecar_too(plain: Path, tmp_path: Path, stated: str | None) -> None:
    """Also where config.json states no type of the numbers, or another one."""
    reference = tmp_path / "reference"
    quantise_fp8(plain, reference)
    config = json.loads((reference / "config.json").read_text(encoding="utf-8"))
    del config["dtype"]
    (reference / "config.json").write_text(json.dumps({**config, **({"dtype": stated} if stated else {})}))
    convert(reference, tmp_path / "meg", to="torch", grid=Parallelism(2, 1, ep=2))
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise=f"like:{reference}", hf_reference=reference)
    assert files_of(tmp_path / "back") == files_of(reference)


def test_codes_that_no_number_gives_back(plain: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    quantise_fp8(plain, reference)
    change(reference, with_odd_values)
    convert(reference, tmp_path / "meg", to="torch_dist", grid=GRID)
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise=f"like:{reference}")
    assert files_of(tmp_path / "back") == files_of(reference)
    assert result.likeness is not None and not result.likeness["new_scales"]


@pytest.mark.parametrize(("quantise", "parts"), [(quantise_fp8, 2), (quantise_int4, 2)])
def test_one_weight_that_was_trained(plain: Path, tmp_path: Path, quantise: Quantise, parts: int) -> None:
    reference, weight = tmp_path / "reference", f"{GATE}.weight"
    quantise(plain, reference)
    convert(reference, tmp_path / "trained", to="hf")
    before = tensors_of(tmp_path / "trained")[weight].float()

    def train(tensors: dict[str, Any]) -> None:
        if weight in tensors:
            tensors[weight][5, 7] = 0.12345

    change(tmp_path / "trained", train)
    convert(tmp_path / "trained", tmp_path / "meg", to="torch_dist", grid=GRID)
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise=f"like:{reference}")
    old, new = tensors_of(reference), tensors_of(tmp_path / "back")
    differ = [name for name in old if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))]
    assert old.keys() == new.keys() and len(differ) <= parts and all(name.startswith(GATE) for name in differ)
    assert result.likeness is not None and result.likeness["old_scales"] == []
    (moved,) = result.likeness["new_scales"]
    after = before.clone()
    after[5, 7] = torch.tensor(0.12345).bfloat16()
    assert moved["tensor"] == weight
    assert moved["max_abs_difference"] == pytest.approx((after - before).abs().max().item())
    assert moved["relative_rms"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5)
    convert(tmp_path / "back", tmp_path / "plain", to="hf")
    found = tensors_of(tmp_path / "plain")[weight].float()
    assert (found - after).abs().max() <= after.abs().max() * (2**-4 if quantise is quantise_fp8 else 0.54 / 7.5)


def test_a_weight_that_old_scales_represent(plain: Path, tmp_path: Path) -> None:
    reference, weight = tmp_path / "reference", f"{GATE}.weight"
    quantise_fp8(plain, reference)
    convert(reference, tmp_path / "trained", to="hf")

    def swap(tensors: dict[str, Any]) -> None:
        if weight in tensors:
            tensors[weight][:32, :32] = tensors[weight][:32, :32].T.clone()

    change(tmp_path / "trained", swap)
    result = convert(tmp_path / "trained", tmp_path / "back", to="hf", quantise=f"like:{reference}")
    assert result.likeness is not None
    assert result.likeness["old_scales"] == [weight] and result.likeness["new_scales"] == []
    old, new = tensors_of(reference), tensors_of(tmp_path / "back")
    assert torch.equal(new[weight][:32, :32].view(torch.uint8), old[weight][:32, :32].T.view(torch.uint8))
    assert torch.equal(new[f"{weight}_scale_inv"], old[f"{weight}_scale_inv"])


@pytest.mark.parametrize("kind", ["rows and tensors", "blocks, uint8"])
def test_new_scales_of_every_kind(plain: Path, tmp_path: Path, kind: str) -> None:
    """A model whose weights are all others than the reference's keeps its scheme and types."""
    reference = tmp_path / "reference"
    KINDS[kind](plain, reference)
    result = convert(plain, tmp_path / "out", to="hf", quantise=f"like:{reference}")
    old, new = tensors_of(reference), tensors_of(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    assert result.likeness is not None and len(result.likeness["new_scales"]) == result.target["quantised"]["tensors"]
    convert(tmp_path / "out", tmp_path / "again", to="hf")
    found, exact = tensors_of(tmp_path / "again"), tensors_of(plain)
    for name in exact:
        if f"{name}_scale_inv" in new:
            error = (found[name].float() - exact[name].float()).abs()
            assert error.max() <= exact[name].float().abs().max() * 2**-4


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_make_no_difference(plain: Path, tmp_path: Path, threads: int) -> None:
    reference = tmp_path / "reference"
    quantise_fp8(plain, reference, seed=1)
    for number in (1, 2):
        convert(plain, tmp_path / f"{number}", to="hf", quantise=f"like:{reference}", threads=number * threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_a_dry_run_reads_no_weights(plain: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    quantise_fp8(plain, reference)
    result = convert(plain, tmp_path / "out", to="hf", quantise=f"like:{reference}", dry_run=True)
    assert result.likeness is None and "FP8, blocks of 32 x 32" in result.lossy[-1]
    planned = {file["path"]: file["bytes"] for file in result.files}
    for file in reference.glob("model*"):
        assert planned[file.name] == file.stat().st_size


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices consist of whole blocks: transformers dequantises no others."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "head_dim": 32}
    return save_llama(tmp_path_factory.mktemp("llama") / "hf", dtype="bfloat16", num_hidden_layers=2, **sizes)


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-block-ue8m0"])
def test_transformers_reads_new_fp8(llama: Path, tmp_path: Path, scheme: str) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    convert(llama, tmp_path / "fp8", to="hf", quantise=scheme)
    convert(tmp_path / "fp8", tmp_path / "plain", to="hf")
    config = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=config, dtype=torch.bfloat16)
    theirs, ours = model.state_dict(), tensors_of(tmp_path / "plain")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    exact = tensors_of(llama)
    for name, tensor in tensors_of(tmp_path / "fp8").items():
        if name.endswith("_scale_inv"):
            weight = exact[name.removesuffix("_scale_inv")].float()
            blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax(dim=(1, 3))
            expected = blocks / 448
            assert torch.equal(tensor, 2 ** expected.log2().ceil() if scheme.endswith("ue8m0") else expected)
        elif tensor.dtype == torch.float8_e4m3fn:
            scale = tensors_of(tmp_path / "fp8")[f"{name}_scale_inv"]
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected = (exact[name].float() / scale).to(tensor.dtype)
            assert torch.equal(expected.view(torch.uint8), tensor.view(torch.uint8))


def test_transformers_and_compressed_tensors_read_new_int4(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    convert(llama, tmp_path / "int4", to="hf", quantise="int4")
    convert(tmp_path / "int4", tmp_path / "plain", to="hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.bfloat16)
    with torch.no_grad():
        model(torch.arange(8)[None])  # which decompresses the weights
    theirs, ours = model.state_dict(), tensors_of(tmp_path / "plain")
    quantised = {name for name in ours if name.endswith("_proj.weight")}
    assert len(quantised) == 14 and all(torch.equal(ours[name], theirs[name]) for name in quantised)


def test_heads_routers_and_tables_are_left_out(plain: Path, tmp_path: Path) -> None:
    result = convert(plain, tmp_path / "fp8", to="hf", quantise="fp8-block")
    left = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert sorted(left) == ["lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"]
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv" in tensors_of(tmp_path / "fp8")
    # Five matrices of attention in each layer, three of the dense one, of eight experts, and of the shared one.
    assert result.target["quantised"] == {"scheme": "fp8-block", "tensors": 2 * 5 + 3 + 8 * 3 + 3}


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe"])
def test_delta_nets_as_they_are_published(tmp_path: Path, kind: str) -> None:
    """FP8 but for betas and decays, routers, gates of shared experts, tables, heads, and the vision tower."""
    source, fp8 = add_prediction(save_model(tmp_path / "hf", kind, dtype="bfloat16")), tmp_path / "published"
    quantise_fp8(source, fp8)
    names = tensors_of(fp8).keys()
    convert(fp8, tmp_path / "meg", to="torch_dist", grid=GRID)
    assert {tensor.dtype.name for tensor in open_checkpoint(tmp_path / "meg").tensors.values()} == {"BF16"}
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise=f"like:{fp8}")
    assert files_of(tmp_path / "back") == files_of(fp8) and result.likeness is not None
    assert result.likeness["same"] == sum(name.endswith("_scale_inv") for name in names) > 80
    convert(source, tmp_path / "new", to="hf", quantise="fp8-block")
    assert tensors_of(tmp_path / "new").keys() == names
    stated = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    left = {re.sub(r"\d+", "N", name).rpartition("layers.N.")[2] for name in stated["modules_to_not_convert"]}
    rates = {f"linear_attn.in_proj_{part}" for part in (("ba",) if kind == "qwen3_next" else "ba")}
    assert {name for name in left if "embed" not in name and "visual" not in name} == {
        *rates, "lm_head", "mlp.gate", "mlp.shared_expert_gate", "mtp.fc"
    }  # fmt: skip


def test_rows_that_are_no_whole_groups_are_counted(plain: Path, tmp_path: Path) -> None:
    result = convert(plain, tmp_path / "int4", to="hf", quantise="int4")
    kept = {name for name, tensor in tensors_of(tmp_path / "int4").items() if name.endswith("_proj.weight")}
    assert any(note.startswith(f"{len(kept)} matrices stay as they are: int4") for note in result.notes)
    assert result.target["quantised"]["tensors"] + len(kept) == 2 * 5 + 3 + 8 * 3 + 3


@pytest.mark.parametrize("quantise", ["fp8", "like:", "FP8-BLOCK"])
def test_unknown_schemes(plain: Path, tmp_path: Path, quantise: str) -> None:
    with pytest.raises(UsageError, match=f"--quantise {quantise}"):
        convert(plain, tmp_path / "out", to="hf", quantise=quantise)


def test_what_cannot_be_quantised(plain: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--quantise applies only to Hugging Face outputs"):
        convert(plain, tmp_path / "out", to="torch", quantise="int4")
    with pytest.raises(UnsupportedError, match="mxfp4: no library reads it for DeepseekV3ForCausalLM"):
        convert(plain, tmp_path / "out", to="hf", quantise="mxfp4")
    with pytest.raises(InputError, match="no tensor is quantised in it"):
        convert(plain, tmp_path / "out", to="hf", quantise=f"like:{plain}")
    quantise_fp8(llama, tmp_path / "llama")
    with pytest.raises(InputError, match=r"o_proj.weight is BF16.*, and in the reference \[256, 256\]"):
        convert(plain, tmp_path / "out", to="hf", quantise=f"like:{tmp_path / 'llama'}")


@pytest.mark.parametrize(("quantise", "factor"), [(quantise_fp8, 1e-9), (quantise_fp8, 1e9), (quantise_int4, 1e9)])
def test_numbers_beyond_the_scales_of_a_reference(
    llama: Path, tmp_path: Path, quantise: Callable[..., object], factor: float
) -> None:
    """A scale in float16 that becomes zero or infinite would lose all numbers of its block."""
    quantise(llama, tmp_path / "reference")

    def narrow(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "_scale" in name]:
            tensors[name] = tensors[name].half()

    change(tmp_path / "reference", narrow)
    shutil.copytree(llama, tmp_path / "trained")

    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= factor

    change(tmp_path / "trained", edit)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight has numbers for which F16 has no scale"):
        convert(tmp_path / "trained", tmp_path / "out", to="hf", quantise=f"like:{tmp_path / 'reference'}")
    assert not (tmp_path / "out").exists()


def test_scales_of_a_reference_that_are_no_numbers_do_not_reach_the_report(plain: Path, tmp_path: Path) -> None:
    quantise_fp8(plain, tmp_path / "reference")
    change(tmp_path / "reference", with_odd_values)
    result = convert(plain, tmp_path / "out", to="hf", quantise=f"like:{tmp_path / 'reference'}")
    assert result.likeness is not None and GATE in str(result.likeness["new_scales"])
    json.dumps(result.likeness, allow_nan=False)


def test_numbers_that_are_not_finite(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "broken")

    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf

    change(tmp_path / "broken", edit)
    with pytest.raises(InputError, match=r"up_proj.weight has numbers for which F32 has no scale: not finite"):
        convert(tmp_path / "broken", tmp_path / "out", to="hf", quantise="fp8-block")
    assert not (tmp_path / "out").exists()
