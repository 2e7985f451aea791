"""megatron-core's own models with latent attention and multi-token prediction load what `convert` writes."""

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


LAST_NORM = tuple(f"missing decoder.{norm}._extra_state" for norm in ("final_layernorm", "final_norm"))
"""See `LAST_NORMS` of `megatron_ranks`."""


def loaded(kind: str, to: str, folder: Path, *more: str) -> list[str]:
    """What the model of megatron-core and a checkpoint do not have in common."""
    command = [sys.executable, "-m", "tests.formats.prediction_model", kind, to, str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line and line not in LAST_NORM]


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


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_a_hybrid_model(tmp_path: Path, to: str) -> None:
    """0.19 has latent attention in it, under a symbol of its own; plain attention there is another model."""
    pytest.importorskip(
        "megatron.core.models.hybrid", reason="MambaModel of megatron-core 0.16 has no latent attention"
    )
    source = save_model(tmp_path / "hf", "deepseek_v3")
    grid: dict[str, Any] = {"grid": Parallelism(1, 2)} if to == "torch_dist" else {}
    options = {"spec": "local", "make_vocab_size_divisible_by": 256, "megatron_model": "hybrid"}
    convert(source, tmp_path / "meg", to=to, **options, **grid)
    assert loaded("deepseek_v3", to, tmp_path / "meg" / "release", "hybrid") == []
    if to == "torch":
        convert(source, tmp_path / "gpt", to=to, **{**options, "megatron_model": "gpt"})
        assert loaded("deepseek_v3", to, tmp_path / "gpt" / "release", "hybrid") != []
