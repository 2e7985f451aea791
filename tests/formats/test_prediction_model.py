"""megatron-core's own GPTModel with latent attention and multi-token prediction loads what `convert` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert
from tests.models import add_prediction, files_of, save_model

pytest.importorskip("megatron.core")


def version(package: str) -> tuple[int, ...]:
    """Major and minor version."""
    from importlib.metadata import version as stated

    return tuple(map(int, stated(package.replace(".", "-")).split(".")[:2]))


LAST_NORM = "missing decoder.final_layernorm._extra_state"
"""See `LAST_NORMS` of `megatron_ranks`."""


def loaded(kind: str, to: str, folder: Path) -> list[str]:
    """What the model of megatron-core and a checkpoint do not have in common."""
    command = [sys.executable, "-m", "tests.formats.prediction_model", kind, to, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line and line != LAST_NORM]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_loads(tmp_path: Path, kind: str, to: str) -> None:
    source = add_prediction(save_model(tmp_path / "hf", kind))
    release = "0.19" if version("megatron.core") >= (0, 19) else "0.16"
    grid: dict[str, Any] = {"grid": Parallelism(1, 2)} if to == "torch_dist" else {"megatron_core": release}
    convert(source, tmp_path / "meg", to=to, spec="local", make_vocab_size_divisible_by=256, **grid)
    assert loaded(kind, to, tmp_path / "meg" / "release") == []


@pytest.mark.slow
def test_a_model_without_it_lacks_tensors(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "glm4_moe")
    convert(source, tmp_path / "meg", to="torch", spec="local", make_vocab_size_divisible_by=256)
    assert "missing mtp.layers.0.eh_proj.weight" in loaded("glm4_moe", "torch", tmp_path / "meg" / "release")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_running_models(tmp_path: Path, kind: str) -> None:
    """Under the names of whichever release is installed."""
    source = add_prediction(save_model(tmp_path / "hf", kind))
    assert loaded(kind, "live", tmp_path) == []
    assert files_of(tmp_path / "back") == files_of(source)
