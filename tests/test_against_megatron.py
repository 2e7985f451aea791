"""A checkpoint that megatron-core itself trained and saved, without a sidecar, becomes a Hugging Face model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import UnsupportedError
from tests.models import save_llama
from tests.ranks import own_environment

TRAINER = """
import os, sys
from argparse import Namespace
import torch
import torch.multiprocessing as mp

TP = 2

def train(rank, source, target):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE=str(TP))
    torch.set_num_threads(1)
    torch.manual_seed(1)
    from ckptkit import open_checkpoint
    from ckptkit.megatron_args.writing import to_args
    from ckptkit.megatron import parallel
    from ckptkit.megatron.model import build_chunks, load_strict
    from ckptkit.sharding.grid import Parallelism
    from pathlib import Path
    grid = Parallelism(TP)
    store = torch.distributed.FileStore(os.path.join(target, "store"), TP)
    parallel.initialize(grid, rank, store=store, device=torch.device("cpu"))
    checkpoint = open_checkpoint(source)
    (model,) = build_chunks(checkpoint.config, grid, 256, dtype=torch.float32, device=torch.device("cpu"))
    load_strict(model, checkpoint.shard(grid=grid, tp_rank=rank, spec="local"), where="start")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(24).view(2, 12) * 7 % 250
    position_ids = torch.arange(12).expand(2, -1)
    loss = model(tokens, position_ids, None, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    optimizer.step()
    args = Namespace(**to_args(checkpoint.family, checkpoint.config, grid, 256, 128))
    del args.vocab_size
    args.params_dtype = torch.float32
    folder = Path(target) / "iter_0000001" / f"mp_rank_{rank:02d}"
    folder.mkdir(parents=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 1,
             "model": model.state_dict_for_save_checkpoint(), "optimizer": optimizer.state_dict(),
             "rng_state": [{"torch_rng_state": torch.get_rng_state()}]}
    torch.save(state, folder / "model_optim_rng.pt")
    (Path(target) / "latest_checkpointed_iteration.txt").write_text("1")

if __name__ == "__main__":
    mp.spawn(train, args=(sys.argv[1], sys.argv[2]), nprocs=TP)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the Hugging Face model that training began with, what Megatron saved after a step)."""
    folder = tmp_path_factory.mktemp("trained")
    source = save_llama(folder / "hf")
    (folder / "meg").mkdir()
    script = folder / "train.py"
    script.write_text(TRAINER, encoding="utf-8")
    command = [sys.executable, str(script), str(source), str(folder / "meg")]
    subprocess.run(command, check=True, env=own_environment(), capture_output=True, text=True)
    return source, folder / "meg"


def logits(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


@pytest.mark.parametrize("with_reference", [True, False])
def test_trained_checkpoint_becomes_a_hugging_face_model(
    trained: tuple[Path, Path], tmp_path: Path, with_reference: bool
) -> None:
    import torch
    from safetensors.torch import load_file

    source, megatron = trained
    result = convert(megatron, tmp_path / "hf", to="hf", hf_reference=source if with_reference else None)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    rows = 250 if with_reference else 256
    assert after["lm_head.weight"].shape[0] == rows
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])

    shards = [
        torch.load(megatron / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=False)[
            "model"
        ]
        for rank in range(2)
    ]
    for layer in range(4):
        parts = [shard[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] for shard in shards]
        groups = torch.cat(parts).view(4, 5, 8, 96)  # 4 groups of 3 query heads, a key and a value, 8 wide
        expected = {"q": groups[:, :3], "k": groups[:, 3], "v": groups[:, 4]}
        for name, value in expected.items():
            stored = after[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            assert torch.equal(stored, value.reshape(-1, 96))
    assert logits(tmp_path / "hf").isfinite().all()
    notes = " ".join(result.notes)
    assert ("true vocabulary size is unknown" in notes) == ("config.json is built" in notes) == (not with_reference)


def test_without_anything_to_go_by(trained: tuple[Path, Path], tmp_path: Path) -> None:
    import torch

    _, megatron = trained
    copy = tmp_path / "meg"
    for rank in range(2):
        folder = copy / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        name = Path("iter_0000001") / folder.name / "model_optim_rng.pt"
        content = torch.load(megatron / name, weights_only=False)
        content["model"]["decoder.layers.0.self_attention.linear_gate.weight"] = torch.zeros(3)
        torch.save(content, folder / "model_optim_rng.pt")
    with pytest.raises(UnsupportedError, match="no family fits the tensor names"):
        convert(copy, tmp_path / "hf", to="hf")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["meg"]'
