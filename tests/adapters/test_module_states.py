"""Adapters in the states of modules that PEFT has wrapped, saved by real ranks of FSDP as verl does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import convert, open_checkpoint
from ckptkit.adapters.commands import export_adapter, merge_adapters
from ckptkit.checkpoints.lora.megatron import MODEL
from ckptkit.checkpoints.lora.module_state import choose_part_of_state
from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.trainer_states.module_state import ModuleState
from ckptkit.inspection.differences import diff
from ckptkit.inspection.summary import inspect
from ckptkit.io.source import Sources
from ckptkit.sharding.grid import Parallelism
from ckptkit.tensors import Tensor
from tests.formats.rank_pool import RankProcesses
from tests.formats.trainer_states.fsdp_ranks import MODULE
from tests.lora import LINEARS, save_adapter, tensors_of
from tests.models import save_llama, save_model

PACKED: dict[str, Any] = {
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
META = "lora_train_meta.json"
Saved = Callable[..., tuple[Path, Path, Path]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2, MODULE) as pool:
        yield pool


@pytest.fixture(scope="module")
def saved(ranks: RankProcesses, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(sharding, kind, options of the job) -> base, adapter as PEFT saves it, and the folder that the ranks wrote."""
    folder = tmp_path_factory.mktemp("saved")
    models: dict[str, tuple[Path, Path]] = {}

    def get(sharding: str, kind: str = "gqa", save: str = "verl", **options: Any) -> tuple[Path, Path, Path]:
        if kind not in models:
            experts = kind == "qwen3_moe"
            sizes = {"moe_intermediate_size": 40} if experts else {}
            base = (save_model if experts else save_llama)(folder / kind, kind, dtype="bfloat16", **sizes)
            config = PACKED if experts else {}
            models[kind] = base, save_adapter(folder / f"{kind}-adapter", base, dtype="bfloat16", **config)
        base, adapter = models[kind]
        out = folder / f"{sharding}-{kind}-{save}-{len(list(folder.iterdir()))}" / "actor"
        job = {"hf": str(base), "adapter": str(adapter), "out": str(out), "sharding": sharding, "save": save}
        assert ranks.run(2, {**job, "world_size": 2, **options}) == ""
        return base, adapter, out

    return get


def same_tensors(found: Path, expected: Path) -> bool:
    """Whether two folders hold the same names with the same bytes."""
    one, other = tensors_of(found), tensors_of(expected)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("sharding", "kind", "options"),
    [
        ("flat", "gqa", {}),
        ("fsdp1 sharded", "gqa", {"use_orig_params": True}),
        ("hybrid", "qwen3_moe", {"lora_only": True}),
    ],
    ids=str,
)
def test_the_adapter_of_an_actor(saved: Saved, tmp_path: Path, sharding: str, kind: str, options: Any) -> None:
    """What is exported is what PEFT had saved: names, bytes, ranks, alpha; with weights beside it, and without."""
    base, adapter, actor = saved(sharding, kind, **options)
    result = export_adapter(actor, tmp_path / "out")
    assert result.source["format"] == "fsdp"
    assert same_tensors(tmp_path / "out", adapter)
    assert diff(adapter, tmp_path / "out", hf_reference=base).same
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    convert(tmp_path / "out", tmp_path / "meg", to="torch", grid=Parallelism(2), hf_reference=base)
    if options.get("lora_only"):
        assert inspect(actor).adapter["modules"] > 0
        convert(actor, tmp_path / "direct", to="torch", grid=Parallelism(2))
        assert not diff(tmp_path / "direct", tmp_path / "meg").tensors
        convert(tmp_path / "direct", tmp_path / "back", to="peft")
        assert same_tensors(tmp_path / "back", adapter), "the parts of a stacked A are taken apart"


def test_peft_loads_what_is_exported(saved: Saved, tmp_path: Path) -> None:
    """The model that PEFT makes of it gives the logits of the model that was saved."""
    from peft import PeftModel

    from tests.lora import load

    base, adapter, actor = saved("hybrid", "qwen3_moe", lora_only=True)
    export_adapter(actor, tmp_path / "out")
    ids = torch.arange(1, 13).reshape(2, 6)
    logits = [PeftModel.from_pretrained(load(base), path)(ids).logits for path in (adapter, tmp_path / "out")]
    assert torch.equal(*logits)


def test_merging_an_actor(saved: Saved, tmp_path: Path) -> None:
    """Its weights with its own adapter: those of the base with the adapter."""
    base, adapter, actor = saved("flat")
    merge_adapters(actor, [(actor, 1.0)], tmp_path / "one", to="hf")
    merge_adapters(base, [(adapter, 1.0)], tmp_path / "other", to="hf")
    assert same_tensors(tmp_path / "one", tmp_path / "other")


def test_both_parts_of_an_actor(saved: Saved, tmp_path: Path) -> None:
    """They go into a Megatron checkpoint that holds both, and each comes out alone."""
    base, adapter, actor = saved("flat")
    convert(actor, tmp_path / "both", to="torch_dist", grid=Parallelism(2), adapter=actor)
    for number, path in enumerate((actor, tmp_path / "both")):
        convert(path, tmp_path / f"model{number}", to="hf", part="model")
        convert(path, tmp_path / f"adapter{number}", to="peft", part="adapter")
        assert same_tensors(tmp_path / f"model{number}", base)
        assert same_tensors(tmp_path / f"adapter{number}", adapter)


def test_nothing_is_read_of_the_weights(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter, actor = saved("hybrid")
    read, original = 0, Sources.read

    def counted(self: Sources, path: str, view: memoryview, offset: int) -> None:
        nonlocal read
        read += len(view)
        original(self, path, view, offset)

    monkeypatch.setattr(Sources, "read", counted)
    export_adapter(actor, tmp_path / "out")
    size = sum(tensor.nbytes for tensor in tensors_of(adapter).values())
    assert size <= read <= 4 * size, "copies on two rows of ranks are compared, and each byte is written once"


def test_distributed_checkpoint(saved: Saved, tmp_path: Path) -> None:
    """Other trainers than verl: alpha comes from the option, or from an adapter_config.json beside the weights."""
    base, adapter, folder = saved("flat", save="dcp", under=["app", "model"])
    with pytest.raises(InputError, match="nothing says the alpha of the adapter"):
        export_adapter(folder, tmp_path / "out", hf_reference=base)
    export_adapter(folder, tmp_path / "out", hf_reference=base, lora_alpha=8)
    assert same_tensors(tmp_path / "out", adapter)
    shutil.copy(adapter / "adapter_config.json", folder)
    export_adapter(folder, tmp_path / "again", hf_reference=base)
    assert diff(adapter, tmp_path / "again", hf_reference=base).same


class TestFaults:
    @pytest.fixture
    def actor(self, saved: Saved, tmp_path: Path) -> Path:
        return Path(shutil.copytree(saved("flat")[2], tmp_path / "actor"))

    def test_alpha(self, actor: Path, tmp_path: Path) -> None:
        """verl writes 0 where it knows none, and its merger goes on with 0: here both are errors."""
        meta = json.loads((actor / META).read_text())
        (actor / META).unlink()
        with pytest.raises(InputError, match="nothing says the alpha of the adapter"):
            export_adapter(actor, tmp_path / "other")
        (actor / META).write_text(json.dumps({**meta, "lora_alpha": 0}))
        export_adapter(actor, tmp_path / "out", lora_alpha=8)
        for content, text in (
            ({**meta, "lora_alpha": 0}, "lora_alpha is 0, which is no alpha; give --lora-alpha"),
            ({"r": 4}, "nothing says the alpha of the adapter"),
            ({"r": 8, "lora_alpha": 8}, r"q_proj have rank 4, and .*lora_train_meta\.json says 8"),
            ({"r": -1, "lora_alpha": 8}, "r is -1, which is no rank"),
            ({"r": 4, "lora_alpha": "8"}, "lora_alpha is 8, which is no alpha"),
        ):
            (actor / META).write_text(json.dumps(content))
            with pytest.raises(InputError, match=text):
                export_adapter(actor, tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_names(self, actor: Path, tmp_path: Path) -> None:
        states = {path: torch.load(path, weights_only=False) for path in actor.glob("model_*.pt")}
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        with pytest.raises(
            UnsupportedError, match=r"LoRA adapters beside the weights .* `ckptkit adapter export` takes them out"
        ):
            open_checkpoint(actor)
        for old, new, kind, text in (
            (name, name.replace("q_proj", "r_proj"), InputError, "lora_B has no|has no lora_B"),
            (name, name.replace("default", "other"), InputError, "several adapters: default, other"),
            (name, name.replace("lora_A", "lora_magnitude_vector"), UnsupportedError, "is no factor of a linear layer"),
        ):
            for path, state in states.items():
                torch.save({new if key == old else key: value for key, value in state.items()}, path)
            with pytest.raises(kind, match=text):
                export_adapter(actor, tmp_path / "out")
        for path, state in states.items():
            torch.save({key: value for key, value in state.items() if "lora_" not in key}, path)
        with pytest.raises(InputError, match="no adapter in it"):
            export_adapter(actor, tmp_path / "out")
        assert LINEARS and not (tmp_path / "out").exists()


def test_a_weight_under_two_names(tmp_path: Path) -> None:
    tensors = {name: Tensor.full(DTYPES["F32"], (1,)) for name in ("q.weight", "q.base_layer.weight")}
    with pytest.raises(InputError, match=r"q\.base_layer\.weight and q\.weight name one weight"):
        choose_part_of_state(ModuleState(tmp_path, "fsdp", tensors), MODEL)
