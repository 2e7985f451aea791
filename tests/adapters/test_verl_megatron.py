"""verl's Megatron actors with adapters: checkpoints that Megatron-Bridge wrote, in the folders of verl."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import convert
from ckptkit.adapters.commands import export_adapter
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.inspection.differences import diff
from tests.lora import save_adapter, tensors_of
from tests.models import save_llama

BRIDGE = Path(__file__).parents[2] / "fixtures" / "bridge_lora"
META = "lora_train_meta.json"


def actor_of(tmp_path: Path, kind: str, *, layout: int) -> Path:
    """An `actor` folder whose `dist_ckpt` has neither arguments nor run_config.yaml, as verl writes it."""
    actor = tmp_path / "global_step_7" / "actor"
    inside = actor if layout == 1 else actor / "model"
    shutil.copytree(BRIDGE / kind / "iter_0000001", inside / "dist_ckpt")
    (inside / "dist_ckpt" / "run_config.yaml").unlink()
    (inside / "huggingface").mkdir()
    shutil.copy(BRIDGE / "config.json", inside / "huggingface")
    return actor


def stated() -> dict[str, Any]:
    """Rank and alpha of the fixture, as run_config.yaml has them."""
    import yaml

    section = yaml.safe_load((BRIDGE / "LoRA" / "iter_0000001" / "run_config.yaml").read_text())["peft"]
    return {"r": section["dim"], "lora_alpha": section["alpha"]}


@pytest.mark.parametrize("layout", [1, 2])
def test_alpha_of_an_actor(tmp_path: Path, layout: int) -> None:
    """From the file of fine-tuning runs, the exported adapter, or the user; they must agree, and one must be there."""
    actor = actor_of(tmp_path, "LoRA", layout=layout)
    export_adapter(BRIDGE / "LoRA", tmp_path / "expected", hf_reference=BRIDGE)
    with pytest.raises(InputError, match="nothing says the alpha of the adapter"):
        export_adapter(actor, tmp_path / "out")
    (actor / META).write_text(json.dumps({**stated(), "task_type": "CAUSAL_LM"}))
    for number, path in enumerate((actor, actor.parent)):
        export_adapter(path, tmp_path / f"out{number}")
        found = diff(tmp_path / "expected", tmp_path / f"out{number}", hf_reference=BRIDGE)
        assert found.same and tensors_of(tmp_path / "expected").keys() == tensors_of(tmp_path / f"out{number}").keys()
    exported = next(actor.rglob("huggingface")) / "adapter"
    exported.mkdir()
    config = json.loads((tmp_path / "expected" / "adapter_config.json").read_text())
    (exported / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1 + config["lora_alpha"]}))
    with pytest.raises(InputError, match=r"two alphas: .*lora_train_meta\.json says .*adapter_config\.json says"):
        export_adapter(actor, tmp_path / "out")
    (actor / META).unlink()
    (exported / "adapter_config.json").write_text(json.dumps(config))
    export_adapter(actor, tmp_path / "last")
    assert diff(tmp_path / "expected", tmp_path / "last", hf_reference=BRIDGE).same


@pytest.mark.parametrize("kind", ["CanonicalLoRA", "DoRA"])
def test_order_without_a_grid(tmp_path: Path, kind: str) -> None:
    """B of gate and of up, or their lengths, lie rank by rank; nothing says how many ranks there were."""
    actor = actor_of(tmp_path, kind, layout=2)
    with pytest.raises(UnsupportedError, match=r"linear_fc1.* in the order of the tensor parallel ranks that wrote it"):
        export_adapter(actor, tmp_path / "out", lora_alpha=8)
    assert not (tmp_path / "out").exists()


def test_lengths_without_a_grid(tmp_path: Path) -> None:
    """Whether lengths beside row-parallel layers are those of peft depends on how many ranks there were."""
    base = save_llama(tmp_path / "base", "gqa")
    attention = ["q_proj", "k_proj", "v_proj"]
    for modules in (attention, [*attention, "o_proj"]):
        adapter = save_adapter(tmp_path / f"adapter{len(modules)}", base, use_dora=True, target_modules=modules)
        meg, out = tmp_path / f"meg{len(modules)}", tmp_path / f"out{len(modules)}"
        convert(adapter, meg, to="torch_dist", hf_reference=base)
        shutil.rmtree(meg / "ckptkit")
        (meg / "release/run_config.yaml").unlink()
        common = torch.load(meg / "release/common.pt", weights_only=False)
        torch.save({key: value for key, value in common.items() if key != "args"}, meg / "release/common.pt")
        if "o_proj" not in modules:
            export_adapter(meg, out, hf_reference=base, lora_alpha=8)
            assert any(name.endswith("magnitude_vector") for name in tensors_of(out))
            continue
        with pytest.raises(UnsupportedError, match=r"at TP above 1 \(nothing says which this was\) .*linear_proj"):
            export_adapter(meg, out, hf_reference=base, lora_alpha=8)
