"""Adapters of PEFT through Megatron's layouts and back: the same files, and factors that mean the same there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.errors import CkptkitError, InputError, UnsupportedError, UsageError
from ckptkit.formats.run_config import read_run_config, read_section
from ckptkit.inspection.differences import diff
from ckptkit.inspection.hashing import hash_checkpoint
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.lora import LAYOUTS
from tests.lora import LINEARS, save_adapter, tensors_of
from tests.models import MODELS, files_of, save_llama, save_model
from tests.precision import relative_error

Saved = tuple[Path, Path]
BRIDGE = Path(__file__).parents[2] / "fixtures" / "bridge_lora"
GRID = Parallelism(2, 2)
EXPERTS = Parallelism(2, 1, ep=2)
SAME_A = "same A"
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "some layers": {"layers_to_transform": [1, 3]},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, r"layers\.2\..*_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 12, "down_proj": 16, r"layers\.2\..*_proj": 4},
    },
    "rslora": {"use_rslora": True, "r": 6},
    SAME_A: {},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def adapters(llama: Path) -> dict[str, Path]:
    found = {name: save_adapter(llama.parent / name, llama, **config) for name, config in ADAPTERS.items()}
    share(found[SAME_A])
    return found


def share(adapter: Path) -> None:
    """Gives q, k and v the A of q, and gate and up that of gate, as Megatron's fused adapters have them."""
    tensors = tensors_of(adapter)
    for name in tensors:
        if name.endswith("lora_A.weight"):
            of = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            tensors[name] = tensors[of].clone()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_files_come_back(
    tmp_path: Path, llama: Path, adapters: dict[str, Path], name: str, layout: str
) -> None:
    for to, grid in (("torch", GRID), ("torch_dist", Parallelism(2)), ("torch", Parallelism(1, 2, 2))):
        out = tmp_path / f"{to}-{grid}"
        convert(adapters[name], out, to=to, adapter_layout=layout, grid=grid, hf_reference=llama)
        convert(out, tmp_path / "back", to="peft", overwrite=True)
        assert files_of(tmp_path / "back") == files_of(adapters[name])
    convert(out, tmp_path / "again", to="torch_dist", adapter_layout="canonical", grid=Parallelism(4))
    convert(tmp_path / "again", tmp_path / "back", to="peft", overwrite=True)
    assert files_of(tmp_path / "back") == files_of(adapters[name])


def test_distributed_factors_of_gate_and_up_under_the_names_of_peft(
    tmp_path: Path, llama: Path, adapters: dict[str, Path]
) -> None:
    """mcore-bridge stores B rank by rank: its `sharded_state_dict` halves the tensors of `base_layer` alone."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    grid = Parallelism(2)
    for to in ("torch", "torch_dist"):
        convert(adapters["all"], tmp_path / to, to=to, adapter_layout="peft", grid=grid, hf_reference=llama)
    dcp_to_torch_save(tmp_path / "torch_dist/release", tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "whole.pt", weights_only=False)
    ranks = ranks_of(tmp_path / "torch", grid).values()
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        parts = [tensors[f"decoder.layers.2.{name}.lora_B.default.weight"] for tensors in ranks]
        assert torch.equal(stored[f"decoder.layers.{name}.lora_B.default.weight"][2], torch.cat(parts))


FAST = ("qwen3_moe", "gemma3", "gemma4-moe", "gemma4_text-e2b")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_on_some_tensor_parallel_ranks(tmp_path: Path, layout: str) -> None:
    base = save_model(tmp_path / "base", "qwen3_moe")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    grid = Parallelism(2, ep=2, etp=1)
    convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, grid=grid, hf_reference=base)
    convert(tmp_path / "meg", tmp_path / "back", to="peft")
    assert files_of(tmp_path / "back") == files_of(adapter)


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_every_family(tmp_path: Path, kind: str) -> None:
    """No family has a line for adapters. PEFT targets what it calls all linear layers, packed experts included."""
    base = save_model(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    grid = EXPERTS if "experts" in json.dumps((adapter / "adapter_config.json").read_text()) else GRID
    for to, layout in (("torch", "fused"), ("torch_dist", "fused"), ("torch", "canonical"), ("torch_dist", "peft")):
        out = tmp_path / f"{to}-{layout}"
        try:
            convert(adapter, out, to=to, adapter_layout=layout, grid=grid, hf_reference=base)
        except (UnsupportedError, UsageError) as error:  # keys that are values, or fewer of them than ranks
            assert layout == "canonical" and kind.startswith("gemma4")
            assert "repeats another" in str(error) or "share key/value heads" in str(error)
            continue
        convert(out, tmp_path / "back", to="peft", overwrite=True)
        assert files_of(tmp_path / "back") == files_of(adapter)


# What the factors mean in Megatron. The judge: PEFT merges them, and the merged model is converted as models are.


def ranks_of(folder: Path, grid: Parallelism) -> dict[tuple[int, int, int], dict[str, torch.Tensor]]:
    """(pp, tp, ep) -> the tensors of a rank's file, as torch loads it."""
    found = {}
    for rank in grid.ranks():
        name = f"mp_rank_{rank.tp:02d}" + (f"_{rank.pp:03d}" if grid.pp > 1 else "")
        name += f"_{rank.ep:03d}" if grid.ep > 1 else ""
        content = torch.load(folder / "release" / name / "model_optim_rng.pt", weights_only=False)
        found[rank.pp, rank.tp, rank.ep] = content["model"]
    return found


def of_layout(layout: str) -> tuple[str, str]:
    """The names of A and B behind that of the linear layer."""
    return ("lora_A.default", "lora_B.default") if layout == "peft" else ("adapter.linear_in", "adapter.linear_out")


def interleaved(parts: list[torch.Tensor]) -> torch.Tensor:
    """What `LoRALinearSplitQKV` and `LoRALinearSplitFC1UpGate` make of the outputs of a rank's adapters."""
    if len(parts) == 2:
        return torch.cat(parts)
    q, k, v = parts
    groups = k.shape[0] // 8  # heads of width 8
    blocks = [[part.chunk(groups)[group] for part in (q, k, v)] for group in range(groups)]
    return torch.cat([block for group in blocks for block in group])


def delta(
    ranks: dict[Any, dict[str, torch.Tensor]], rank: tuple[int, int, int], module: str, layout: str
) -> torch.Tensor:
    """B A of one rank's weight as the modules of Megatron-Bridge and mcore-bridge compute it, without the scale."""
    pp, _, ep = rank
    peers = [ranks[key] for key in sorted(ranks) if (key[0], key[2]) == (pp, ep)]
    by_columns = module.endswith(("linear_proj", "linear_fc2"))
    words = {"linear_qkv": "qkv", "linear_fc1": ("gate", "up")}.get(module.rpartition(".")[2], "")
    if layout == "canonical" and words:
        names = [(f"adapter.adapter_{word}.linear_in", f"adapter.adapter_{word}.linear_out") for word in words]
    else:
        names = [of_layout(layout)]
    parts = []
    for first, second in names:
        own = ranks[rank]
        a, b = own[f"{module}.{first}.weight"].double(), own[f"{module}.{second}.weight"].double()
        all_a = [peer[f"{module}.{first}.weight"].double() for peer in peers]
        all_b = [peer[f"{module}.{second}.weight"].double() for peer in peers]
        if layout == "peft":
            assert all(torch.equal(one, (b if by_columns else a)) for one in (all_b if by_columns else all_a))
            parts.append(b @ a)
        elif by_columns:  # linear_in is row-parallel, linear_out column-parallel with its output gathered
            parts.append(torch.cat(all_b) @ a)
        else:  # linear_in is column-parallel with its output gathered
            parts.append(b @ torch.cat(all_a))
    return parts[0] if len(parts) == 1 else interleaved(parts)


@pytest.fixture(scope="module")
def merged(llama: Path, adapters: dict[str, Path]) -> Callable[[str], Path]:
    """The models that PEFT merges, in float32."""
    done: dict[str, Path] = {}

    def model(name: str) -> Path:
        from peft import PeftModel

        if name not in done:
            from tests.lora import load

            done[name] = llama.parent / f"{name}-merged"
            PeftModel.from_pretrained(load(llama), adapters[name]).merge_and_unload().save_pretrained(done[name])
        return done[name]

    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["all", "patterns", SAME_A])
def test_the_factors_mean_in_megatron_what_they_mean_in_peft(
    tmp_path: Path, llama: Path, adapters: dict[str, Path], merged: Any, name: str, layout: str
) -> None:
    convert(adapters[name], tmp_path / "adapter", to="torch", adapter_layout=layout, grid=GRID, hf_reference=llama)
    factors = ranks_of(tmp_path / "adapter", GRID)
    assert_means(tmp_path, factors, layout, llama, merged(name), scale_in(tmp_path / "adapter"))


def scale_in(folder: Path) -> float:
    record = json.loads((folder / "ckptkit" / "adapter.json").read_text())
    return float(record["alpha"] / record["rank"])


def assert_means(tmp_path: Path, factors: dict[Any, Any], layout: str, base: Path, merged: Path, scale: float) -> None:
    for path, name in ((base, "base"), (merged, "merged")):
        convert(path, tmp_path / name, to="torch", grid=GRID, overwrite=True)
    before, after = (ranks_of(tmp_path / name, GRID) for name in ("base", "merged"))
    touched = 0
    for rank, tensors in factors.items():
        modules = {name.partition(".adapter.")[0].partition(".lora_")[0] for name in tensors}
        for name, weight in after[rank].items():
            if name.endswith("_extra_state"):
                continue
            expected = before[rank][name].double()
            module = name.removesuffix(".weight")
            if module in modules:
                touched += 1
                expected = expected + scale * delta(factors, rank, module, layout)
            assert relative_error(weight, expected) < 1e-5, name
    assert touched >= 4 * len(factors) // 2


FAULTS = ["alpha lost", "A and B exchanged", "q's B under k", "rslora read as plain", "layers shifted"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(tmp_path: Path, llama: Path, adapters: dict[str, Path], merged: Any, fault: str) -> None:
    """The test above fails for each of these; some are refused before anything is written."""
    name, layout = ("rslora" if fault.startswith("rslora") else SAME_A), "canonical"
    adapter = Path(shutil.copytree(adapters[name], tmp_path / "faulty"))
    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), tensors_of(adapter)
    if fault == "alpha lost":
        del config["lora_alpha"]
    elif fault == "rslora read as plain":
        config["use_rslora"] = False
    elif fault == "A and B exchanged":
        swap = str.maketrans("AB", "BA")
        tensors = {re_sided(key, swap): value for key, value in tensors.items()}
    else:
        old, new = ("q_proj.lora_B", "k_proj.lora_B") if fault.startswith("q's") else ("layers.1.", "layers.2.")
        marked = {key.replace(old, "*").replace(new, old).replace("*", new): value for key, value in tensors.items()}
        tensors = marked
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises((CkptkitError, AssertionError)):
        convert(adapter, tmp_path / "adapter", to="torch", adapter_layout=layout, grid=GRID, hf_reference=llama)
        factors = ranks_of(tmp_path / "adapter", GRID)
        assert_means(tmp_path, factors, layout, llama, merged(name), scale_in(tmp_path / "adapter"))


def re_sided(key: str, swap: dict[int, int]) -> str:
    start, _, end = key.partition("lora_")
    return f"{start}lora_{end[0].translate(swap)}{end[1:]}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_element_comes_back_changed(
    tmp_path: Path, llama: Path, adapters: dict[str, Path], layout: str
) -> None:
    """One element of B of v, where its own ranks are: it is the only one that differs on the way back."""
    convert(adapters["all"], tmp_path / "meg", to="torch", adapter_layout=layout, hf_reference=llama)
    file = tmp_path / "meg/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    stem = "decoder.layers.2.self_attention.linear_qkv"
    names = {"canonical": "adapter.adapter_v.linear_out", "fused": "adapter.linear_out", "peft": "lora_B.default"}
    factor = content["model"][f"{stem}.{names[layout]}.weight"]
    # Of the interleaved rows, v's first are behind 3 heads of q and one of k; its ranks are behind those of q and k.
    row, column = (0, 1) if layout == "canonical" else (4 * 8, 9)
    assert factor[row, column] != 0
    factor[row, column] += 1
    torch.save(content, file)
    convert(tmp_path / "meg", tmp_path / "back", to="peft")
    before, after = tensors_of(adapters["all"]), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    changed = {name: (before[name] != after[name]).nonzero().tolist() for name in before}
    name = "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"
    assert {key: found for key, found in changed.items() if found} == {name: [[0, 1]]}
    assert after[name][0, 1] == before[name][0, 1] + 1


def test_what_training_mixes_is_exported_at_the_stacked_rank(
    tmp_path: Path, llama: Path, adapters: dict[str, Path]
) -> None:
    """A block that was zero is not any more: q, k and v get all ranks, the scale stays, and the report says so."""
    from peft import PeftModel

    from tests.lora import load

    convert(adapters["all"], tmp_path / "meg", to="torch", hf_reference=llama)
    file = tmp_path / "meg/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    torch.manual_seed(3)
    key = "decoder.layers.1.self_attention.linear_qkv.adapter.linear_out.weight"
    content["model"][key] += 0.1 * torch.randn_like(content["model"][key])
    torch.save(content, file)
    result = convert(tmp_path / "meg", tmp_path / "back", to="peft")
    assert any("training has mixed" in note and "3 modules" in note for note in result.notes)
    tensors = tensors_of(tmp_path / "back")
    name = "base_model.model.model.layers.{}.self_attn.k_proj.lora_A.weight"
    assert (tensors[name.format(1)].shape[0], tensors[name.format(2)].shape[0]) == (12, 4)
    model = PeftModel.from_pretrained(load(llama), tmp_path / "back")  # it accepts the ranks
    model.merge_and_unload().save_pretrained(tmp_path / "merged-by-peft")
    factors = ranks_of(tmp_path / "meg", Parallelism())
    convert(tmp_path / "meg", tmp_path / "regrid", to="torch", grid=GRID)
    assert_means(
        tmp_path,
        ranks_of(tmp_path / "regrid", GRID),
        "fused",
        llama,
        tmp_path / "merged-by-peft",
        scale_in(tmp_path / "regrid"),
    )
    assert factors[0, 0, 0][key].shape == (160, 12)


# Megatron's own adapters: no sidecar, and the names, cuts and files of those who write them.


def without_sidecar(path: Path) -> Path:
    shutil.rmtree(path / "ckptkit")
    return path


@pytest.mark.parametrize("layout", ["fused", "canonical"])
@pytest.mark.parametrize("tp", [1, 2])
def test_adapters_of_megatron_bridge(
    tmp_path: Path, llama: Path, adapters: dict[str, Path], layout: str, tp: int
) -> None:
    """run_config.yaml says alpha; A is repeated for q, k and v; PEFT reads the result."""
    meg = tmp_path / "meg"
    convert(adapters[SAME_A], meg, to="torch_dist", adapter_layout=layout, grid=Parallelism(tp), hf_reference=llama)
    section = read_section(meg / "release", "peft")
    assert (section["dim"], section["alpha"], section["share_expert_adapters"]) == (4, 8, False)
    canonical = ["linear_fc1_gate", "linear_fc1_up", "linear_fc2", "linear_k", "linear_proj", "linear_q", "linear_v"]
    fused = ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    assert section["target_modules"] == (canonical if layout == "canonical" else fused)
    assert read_run_config(meg / "release")["tensor_model_parallel_size"] == tp
    convert(without_sidecar(meg), tmp_path / "back", to="peft", hf_reference=llama)
    before, after = tensors_of(adapters[SAME_A]), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, sorted(LINEARS))
    from peft import LoraConfig

    LoraConfig.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize(("written", "layout"), [("LoRA", "fused"), ("CanonicalLoRA", "canonical"), ("DoRA", "fused")])
def test_checkpoints_that_megatron_bridge_wrote(tmp_path: Path, written: str, layout: str) -> None:
    """Its distributed checkpoint, read and cut again, gives each rank the factors that it had there."""
    folder = BRIDGE / written
    convert(folder, tmp_path / "peft", to="peft", hf_reference=BRIDGE)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    dora = written == "DoRA"
    linears = [name for name in LINEARS if not dora or name not in ("o_proj", "down_proj")]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, sorted(linears))
    assert config["use_dora"] == dora
    for source in (folder, tmp_path / "peft"):
        out = tmp_path / f"from-{source.name}"
        convert(source, out, to="torch", grid=Parallelism(2), adapter_layout=layout, hf_reference=BRIDGE)
        for (_, rank, _), tensors in ranks_of(out, Parallelism(2)).items():
            theirs = torch.load(folder / f"rank{rank}.pt", weights_only=True)
            assert tensors.keys() == theirs.keys()
            assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    write_again_and_compare(tmp_path, folder)


def write_again_and_compare(tmp_path: Path, folder: Path) -> None:
    """Written again as a distributed checkpoint, it holds the tensors that Megatron-Bridge wrote."""
    layout = "canonical" if folder.name == "CanonicalLoRA" else "fused"
    convert(folder, tmp_path / "dist", to="torch_dist", grid=Parallelism(2), adapter_layout=layout, hf_reference=BRIDGE)
    ours, theirs = (whole(path, tmp_path / "whole.pt") for path in (tmp_path / "dist/release", folder / "iter_0000001"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def whole(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a distributed checkpoint, as torch reads them."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, file)
    found = torch.load(file, weights_only=False)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def test_gate_and_up_of_canonical_adapters_in_distributed_checkpoints(
    tmp_path: Path, llama: Path, adapters: dict[str, Path]
) -> None:
    """Megatron-Bridge stores B of gate as if it were gate and up: the first halves of all ranks come first."""
    convert(
        adapters["all"],
        tmp_path / "meg",
        to="torch_dist",
        adapter_layout="canonical",
        grid=Parallelism(2),
        hf_reference=llama,
    )
    stored = whole(tmp_path / "meg/release", tmp_path / "whole.pt")
    b = stored["decoder.layers.mlp.linear_fc1.adapter.adapter_gate.linear_out.weight"][0]
    expected = tensors_of(adapters["all"])["base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"]
    first, second = expected.chunk(2)
    halves = [*(part.chunk(2)[0] for part in (first, second)), *(part.chunk(2)[1] for part in (first, second))]
    assert torch.equal(b, torch.cat(halves)) and not torch.equal(b, expected)
    assert not any("_extra_state" in key for key in stored)


def test_every_source_of_alpha(tmp_path: Path, llama: Path, adapters: dict[str, Path]) -> None:
    meg = tmp_path / "meg"
    convert(adapters[SAME_A], meg, to="torch", adapter_layout="peft", hf_reference=llama)
    without_sidecar(meg)
    (meg / "adapter_config.json").rename(tmp_path / "config")

    def scales(**options: Any) -> set[float]:
        lora = open_checkpoint(meg, hf_reference=llama, **options).lora
        assert lora is not None
        return set(lora.scales.values())

    with pytest.raises(InputError, match=r"nothing says the alpha.*--lora-alpha"):
        scales()
    assert scales(lora_alpha=20.0) == {5.0}
    for name, content, expected in (
        ("args.json", {"lora_alpha": 32, "lora_rank": 4, "use_rslora": False}, 8.0),
        ("args.json", {"lora_alpha": 32, "use_rslora": True}, 16.0),
        ("lora_train_meta.json", {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}, 3.0),
        ("adapter_config.json", json.loads((tmp_path / "config").read_text()), 2.0),
    ):
        (meg / name).write_text(json.dumps(content))
        assert scales() == {expected}
        (meg / name).unlink()
    (meg / "args.json").write_text('{"lora_alpha": 32}')
    (meg / "lora_train_meta.json").write_text('{"lora_alpha": 0}')
    with pytest.raises(InputError, match="lora_alpha is 0"):
        scales()
    (meg / "lora_train_meta.json").write_text('{"lora_alpha": 16}')
    with pytest.raises(InputError, match=r"two alphas: .*args\.json says 32; .*lora_train_meta\.json says 16"):
        scales()
    assert scales(lora_alpha=16.0) == {4.0}


# What Megatron cannot express, and what is damaged.


def test_scales_that_are_no_powers_of_two(tmp_path: Path, llama: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama, alpha_pattern={"v_proj": 12})
    for layout in LAYOUTS:
        with pytest.raises(UsageError, match=r"one scale.*v_proj is 1\.5 times.*--lossy"):
            convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, hf_reference=llama)
    result = convert(adapter, tmp_path / "meg", to="torch", hf_reference=llama, lossy=True)
    assert any("4 modules is rounded" in text for text in result.lossy)
    convert(tmp_path / "meg", tmp_path / "back", to="peft")
    before, after = tensors_of(adapter), tensors_of(tmp_path / "back")
    assert all(relative_error(after[name], before[name]) < 1e-6 for name in before)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"modules_to_save": ["lm_head"]}, r"no place for lm_head\.weight.*adapter merge"),
        ({"target_modules": [*LINEARS, "embed_tokens"]}, "no place for .*embed_tokens"),
    ],
)
def test_what_megatron_has_no_place_for(tmp_path: Path, llama: Path, config: Any, match: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama, **config)
    with pytest.raises(UnsupportedError, match=match):
        convert(adapter, tmp_path / "meg", to="torch", hf_reference=llama)
    assert not (tmp_path / "meg").exists()
    convert(adapter, tmp_path / "same", to="peft", hf_reference=llama)
    assert files_of(tmp_path / "same") == files_of(adapter)


def test_options_and_formats_that_do_not_fit(tmp_path: Path, llama: Path, adapters: dict[str, Path]) -> None:
    for source, options, match in (
        (adapters["all"], {"to": "hf"}, "for models, and the source is an adapter.*adapter merge"),
        (adapters["all"], {"to": "packed"}, "no form for an adapter"),
        (adapters["all"], {"to": "torch", "megatron_model": "hybrid"}, "about models"),
        (adapters["all"], {"to": "torch", "head": "value"}, "about models"),
        (adapters["all"], {"to": "torch", "lora_alpha": 8.0}, "drop --lora-alpha"),
        (adapters["all"], {"to": "torch", "adapter_layout": "other"}, "one of fused, canonical, peft"),
        (llama, {"to": "peft"}, "the source is a model"),
        (llama, {"to": "torch", "adapter_layout": "fused"}, "the source is a model"),
        (llama, {"to": "torch", "lossy": True}, "the source is a model"),
        (llama, {"to": "torch", "lora_alpha": 8.0}, "no adapter in it"),
    ):
        reference = None if source == llama else llama
        with pytest.raises(UsageError, match=match):
            convert(source, tmp_path / "out", hf_reference=reference, **options)
    with pytest.raises(UsageError, match="--hf-reference"):
        convert(adapters["all"], tmp_path / "out", to="torch")
    with pytest.raises(UsageError, match=r"canonical.*--tp 12 ranks share"):
        layout = {"adapter_layout": "canonical", "grid": Parallelism(12)}
        convert(adapters["all"], tmp_path / "out", to="torch", hf_reference=llama, **layout)


def test_damaged_adapters(tmp_path: Path, llama: Path, adapters: dict[str, Path]) -> None:
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda t: t.pop(a), "has no lora_A beside it"),
        (lambda t: t.update({a: t[a][:, :-1].clone()}), "of the wrong shape.*q_proj"),
        (lambda t: t.update({a: t[a][:2].clone()}), "lora_B"),
        (lambda t: t.update({a: t[a].double()}), "F64.*F32"),
        (lambda t: t.update({a.replace("layers.0", "layers.9"): t[a]}), "has no lora_B"),
        (
            lambda t: t.update({a.replace("q_proj", "x_proj").replace("A", s): t.pop(a.replace("A", s)) for s in "AB"}),
            "unknown to this family.*x_proj",
        ),
        (lambda t: t.update({a.removeprefix("base_model."): t[a]}), "does not begin with base_model"),
        (
            lambda t: t.update({a.replace("lora_A.weight", "lora_magnitude_vector"): t[a][0].clone()}),
            "says nothing of use_dora",
        ),
    ]
    for number, (change, match) in enumerate(changes):
        adapter = Path(shutil.copytree(adapters["all"], tmp_path / str(number)))
        tensors = tensors_of(adapter)
        change(tensors)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(CkptkitError, match=match) as caught:
            convert(adapter, tmp_path / "out", to="torch", hf_reference=llama)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_sidecar_that_does_not_fit(tmp_path: Path, llama: Path, adapters: dict[str, Path]) -> None:
    meg = tmp_path / "meg"
    convert(adapters["all"], meg, to="torch", hf_reference=llama)
    file = meg / "ckptkit/adapter.json"
    record = json.loads(file.read_text())
    module = next(iter(record["modules"]))
    for change, match in (
        ({"rank": 11}, "its modules have no ranks"),
        ({"rank": 13}, "of rank 13, the checkpoint has"),
        ({"layout": "other"}, "no layout, rank and alpha"),
        ({"alpha": 0}, "no layout, rank and alpha"),
        ({"modules": {**record["modules"], "model.layers.9.mlp.up_proj": [4, 0, 2.0]}}, "which are not there"),
        ({"modules": {module: [4, 10, 2.0]}}, "its modules have no ranks"),
        ({"modules": {module: [4, 0, 0]}}, "its modules have no ranks"),
    ):
        file.write_text(json.dumps({**record, **change}))
        with pytest.raises(InputError, match=match):
            convert(meg, tmp_path / "back", to="peft")


# An adapter is a checkpoint like any other.


def test_verify_says_what_to_do_instead(tmp_path: Path, llama: Path, adapters: dict[str, Path]) -> None:
    from ckptkit.verification.levels import verify

    convert(adapters["all"], tmp_path / "meg", to="torch", hf_reference=llama)
    with pytest.raises(UnsupportedError, match=r"an adapter is no model that runs.*ckptkit diff"):
        verify(llama, tmp_path / "meg")


def test_inspect_diff_validate_hash(tmp_path: Path, llama: Path, adapters: dict[str, Path]) -> None:
    adapter, meg = adapters["patterns"], tmp_path / "meg"
    convert(adapter, meg, to="torch_dist", grid=GRID, hf_reference=llama)
    found = inspect(adapter, hf_reference=llama)
    assert found.adapter is not None and found.adapter["modules"] == 28
    assert found.adapter["ranks"] == {"2": 7, "4": 20, "6": 1} and found.adapter["scales"] == {"2": 24, "4": 3, "8": 1}
    assert inspect(meg).adapter == {**found.adapter, "layout": "fused"}
    assert found.parameters == sum(tensor.numel() for tensor in tensors_of(adapter).values())
    same = diff(adapter, meg, hf_reference=llama)
    assert same.same and same.compared == 56
    other = diff(adapter, adapters["all"], hf_reference=llama)
    assert not other.same and len(other.structure.shapes) == 16
    assert validate(meg, values=True).passed and validate(adapter, values=True, hf_reference=llama).passed
    assert hash_checkpoint(meg, only="tensors").model == hash_checkpoint(adapter, hf_reference=llama).model
    shutil.copytree(adapter, tmp_path / "zero")
    tensors = tensors_of(adapter)
    next(iter(tensors.values())).zero_()
    save_file(tensors, tmp_path / "zero/adapter_model.safetensors")
    assert not validate(tmp_path / "zero", values=True, hf_reference=llama).passed
    assert not diff(adapter, tmp_path / "zero", hf_reference=llama).same


def test_another_alpha_is_a_difference(tmp_path: Path, llama: Path, adapters: dict[str, Path]) -> None:
    other = Path(shutil.copytree(adapters["all"], tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    found = diff(adapters["all"], other, hf_reference=llama)
    assert not found.same and found.equal == found.compared
    assert any("scale" in text and "is 2 in A, 4 in B (28 such layers)" in text for text in found.structure.config)


def test_bin_files(tmp_path: Path, llama: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama)
    torch.save(tensors_of(adapter), adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="two sets of weights"):
        inspect(adapter, hf_reference=llama)
    tensors = tensors_of(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    convert(adapter, tmp_path / "meg", to="torch", hf_reference=llama)
    convert(tmp_path / "meg", tmp_path / "back", to="peft")
    back = tensors_of(tmp_path / "back")
    assert list(back) == sorted(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)
