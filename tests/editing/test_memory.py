"""Memory stays flat: tensors far larger than the limit pass through every operation that computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.measure import run
from ckptkit.dtypes import DTYPES
from ckptkit.families import family_of
from ckptkit.formats.safetensors import build_header
from ckptkit.tensors import Tensor

LIMIT = 256 << 20
ROWS, WIDTH = 600_000, 256
"""Of the embedding: 293 MiB in bf16, and twice as much in float32, for each of three models."""
CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": ROWS},
    **{"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of random bytes that are numbers around one."""
    folder = tmp_path_factory.mktemp("models")
    family = family_of(CONFIG, folder)
    shapes = {name: shape for item in family.items(family.parse(CONFIG)) for name, shape in item.parts.items()}
    header = build_header(
        {name: Tensor.full(DTYPES["BF16"], shape) for name, shape in shapes.items()}, {"format": "pt"}
    )
    for seed, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        drawn = np.random.default_rng(seed)
        with open(folder / name / "model.safetensors", "wb") as file:
            file.write(header.raw)
            for _ in range(0, sum(int(np.prod(shape)) for shape in shapes.values()), 1 << 20):
                file.write(drawn.integers(0x3F00, 0x4000, 1 << 20, np.uint16).tobytes())
            file.truncate(len(header.raw) + sum(2 * int(np.prod(shape)) for shape in shapes.values()))
    return folder


def tuned(**parameters: float) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": parameters} for name in ("a", "b")]


RECIPES: dict[str, dict[str, Any]] = {
    "ties": {"merge_method": "ties", "base_model": "base", "models": tuned(weight=0.5, density=0.5)},
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "models": tuned(weight=0.5, density=0.5)},
    "slerp": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}], "parameters": {"t": 0.4}},
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("a", "b")],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["average", *RECIPES])
def test_memory_does_not_grow_with_tensors(models: Path, tmp_path: Path, operation: str) -> None:
    assert ROWS * WIDTH * 2 > LIMIT
    command = [sys.executable, "-m", "ckptkit", "surgery"]
    if operation == "average":
        command += ["average", *(str(models / name) for name in ("base", "a", "b"))]
    else:
        (models / f"{operation}.yaml").write_text(yaml.safe_dump(RECIPES[operation]))
        command += ["merge", str(models / f"{operation}.yaml")]
    found = run([*command, "-o", str(tmp_path / "out"), "--threads", "2"])
    assert (tmp_path / "out/model.safetensors").stat().st_size > ROWS * WIDTH * 2
    assert found.anonymous < LIMIT
