"""`adapter export`: the adapter of a Megatron checkpoint, of which nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ckptkit.adapters.commands import export_adapter
from ckptkit.cli import app as cli
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.dcp.reading import open_dcp
from ckptkit.io.source import Sources
from ckptkit.sharding.grid import Parallelism
from tests.lora import save_adapter, tensors_of
from tests.models import files_of, save_llama, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    base = save_llama(folder / "base")
    return base, save_adapter(folder / "adapter", base)


def with_weights(tmp_path: Path, base: Path, adapter: Path, **options: Any) -> Path:
    """A distributed checkpoint of torch with the model and its adapter, as a training run saves them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state: dict[str, Any] = {}
    for name, path in (("model", base), ("adapter", adapter)):
        given = options if name == "adapter" else {}
        reference = {"hf_reference": base} if name == "adapter" else {}
        convert(path, tmp_path / name, to="torch_dist", **given, **reference)
        dcp_to_torch_save(tmp_path / name / "release", tmp_path / "whole.pt")
        state.update(torch.load(tmp_path / "whole.pt", weights_only=False))
    both = tmp_path / "both"
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    dcp.save(state, checkpoint_id=both / "release", no_dist=True)
    for name in ("common.pt", "metadata.json", "run_config.yaml"):
        (both / "release" / name).write_bytes((tmp_path / "adapter/release" / name).read_bytes())
    (both / "latest_checkpointed_iteration.txt").write_text("release")
    return both


def test_only_the_adapter_is_read(tmp_path: Path, saved: tuple[Path, Path], monkeypatch: Any) -> None:
    base, adapter = saved
    both = with_weights(tmp_path, base, adapter)
    read = 0
    original = Sources.read

    def counted(self: Sources, path: str, view: memoryview, offset: int) -> None:
        nonlocal read
        read += len(view)
        original(self, path, view, offset)

    monkeypatch.setattr(Sources, "read", counted)
    result = export_adapter(both, tmp_path / "out", hf_reference=base)
    factors = tensors_of(tmp_path / "out")
    size = sum(tensor.nbytes for tensor in factors.values())
    stored = open_dcp(both / "release").tensors
    assert len(stored) == 17 and read < 8 * size  # a stacked A is read for q, for k and for v
    assert result.target["format"] == "peft"
    with pytest.raises(InputError, match="no adapter in it"):
        export_adapter(tmp_path / "model", tmp_path / "other", hf_reference=base)


def test_a_checkpoint_that_was_only_the_adapter(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    convert(adapter, tmp_path / "meg", to="torch", grid=Parallelism(2, 2), hf_reference=base)
    export_adapter(tmp_path / "meg", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(adapter)
    export_adapter(tmp_path / "meg", tmp_path / "half", dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}


def test_shared_adapters_of_experts(tmp_path: Path) -> None:
    """Megatron-Bridge shares one adapter among the experts of a rank unless it is told not to."""
    base = save_model(tmp_path / "base", "qwen3_moe")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear", rank_pattern={})
    grid = Parallelism(1, 1, ep=2)
    convert(adapter, tmp_path / "meg", to="torch", grid=grid, hf_reference=base)
    for file in (tmp_path / "meg").glob("release/*/*.pt"):
        content = torch.load(file, weights_only=False)
        for name, tensor in content["model"].items():
            if tensor.dim() == 3:
                content["model"][name] = tensor[0].clone()
        torch.save(content, file)
    export_adapter(tmp_path / "meg", tmp_path / "out", hf_reference=base, lora_alpha=8.0)
    factors = tensors_of(tmp_path / "out")
    stem = "base_model.model.model.layers.2.mlp.experts.{}.down_proj.lora_{}.weight"
    for side in "AB":
        each = [factors[stem.format(expert, side)] for expert in range(4)]
        assert torch.equal(each[0], each[1]) and torch.equal(each[2], each[3])
        assert not torch.equal(each[0], each[2])


def test_on_the_command_line(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    base, adapter = map(str, saved)
    run, meg, out = CliRunner(), str(tmp_path / "meg"), str(tmp_path / "out")
    words = ["convert", adapter, meg, "--to", "torch", "--tp", "2", "--hf-reference", base]
    assert run.invoke(cli.app, [*words, "--adapter-layout", "canonical"]).exit_code == 0
    assert "rank" in run.invoke(cli.app, ["inspect", meg]).stdout
    exported = run.invoke(cli.app, ["adapter", "export", meg, "-o", out, "--json"])
    assert exported.exit_code == 0 and json.loads(exported.stdout)["target"]["format"] == "peft"
    merged = str(tmp_path / "merged")
    words = ["adapter", "merge", base, f"{out}:0.5", "-o", merged, "--to", "torch", "--tp", "2", "--json"]
    found = run.invoke(cli.app, words)
    assert found.exit_code == 0 and any("times 0.5" in note for note in json.loads(found.stdout)["notes"])
    assert run.invoke(cli.app, ["adapter", "export", base, "-o", str(tmp_path / "no")]).exit_code != 0
    wrong = run.invoke(cli.app, ["adapter", "merge", base, f"{out}:x", "-o", str(tmp_path / "no"), "--to", "hf"])
    assert wrong.exit_code == UsageError.exit_code and "no weight" in wrong.stderr
