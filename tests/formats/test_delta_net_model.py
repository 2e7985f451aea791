"""megatron-core's own DeltaNets load what `convert` writes, save the same keys, and compute what transformers does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert
from tests.formats.delta_net_model import LENGTH
from tests.models import files_of, model_classes, save_model

pytest.importorskip("megatron.core")

NORM_STATES = re.compile(r"missing .*(_layernorm|\.out_norm)\._extra_state")
"""States of Transformer Engine's norms, in whose place the model here has norms of ours."""


def ranks(kind: str, folder: Path, tp: int = 1, pp: int = 1, ep: int = 1) -> list[str]:
    """Runs the ranks of `delta_net_model`, and returns what the model and the checkpoint do not have in common."""
    command = [sys.executable, "-m", "tests.formats.delta_net_model", kind, str(folder)]
    sizes = [str(size) for size in (tp, pp, ep)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*command, str(rank), *sizes], **pipes, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
        for rank in range(tp * pp * ep)
    ]
    told = [process.communicate(timeout=600) for process in started]
    assert all(process.returncode == 0 for process in started), [error[-3000:] for _, error in told]
    return [line for line in told[0][0].splitlines() if line and not NORM_STATES.fullmatch(line)]


def boxes(path: Path) -> dict[str, Any]:
    """Key -> shape of the whole tensor, and places and sizes of its chunks."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    return {
        key: (tuple(tensor.size), sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks))
        for key, tensor in metadata.items()
        if hasattr(tensor, "chunks")
    }


def written(tmp_path: Path, kind: str, grid: Parallelism) -> Path:
    source = save_model(tmp_path / "hf", kind)
    options: dict[str, Any] = {"make_vocab_size_divisible_by": 256 // grid.tp}
    convert(source, tmp_path / "ours", to="torch_dist", grid=grid, **options)
    return source


KIND = "qwen3_next"
GRIDS = [
    Parallelism(),
    Parallelism(2),
    Parallelism(4),
    Parallelism(2, 2),
    Parallelism(1, 2, ep=2),
    Parallelism(2, ep=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_model_of_megatron_core_loads_and_saves(tmp_path: Path, grid: Parallelism) -> None:
    source = written(tmp_path, KIND, grid)
    assert ranks(KIND, tmp_path, grid.tp, grid.pp, grid.ep) == []
    assert boxes(tmp_path / "ours" / "release") == boxes(tmp_path / "theirs")
    shutil.copytree(tmp_path / "ours" / "ckptkit", tmp_path / "theirs" / "ckptkit")
    convert(tmp_path / "theirs", tmp_path / "back", to="hf", hf_reference=source)
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KIND])
def test_logits_of_megatron_core(tmp_path: Path, kind: str) -> None:
    """Every head, gate, beta and decay is where megatron-core's own code looks for it."""
    import torch

    tokens = torch.randint(0, 250, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    source = written(tmp_path, kind, Parallelism())
    torch.save(tokens, tmp_path / "tokens.pt")
    assert ranks(kind, tmp_path) == []
    with torch.no_grad():
        expected = model_classes(kind)[1].from_pretrained(source, dtype="float32").eval()(tokens).logits
    found = torch.load(tmp_path / "logits.pt")[..., : expected.shape[-1]]
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, error
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.99
