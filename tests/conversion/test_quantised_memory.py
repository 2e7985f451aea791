"""Memory stays flat: quantised tensors larger than the limit are read and written, tall and wide ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import run
from ckptkit.dtypes import DTYPES
from ckptkit.families import family_of
from ckptkit.formats.safetensors import build_header
from ckptkit.tensors import Tensor
from tests.quantised import FP8_BLOCK

LIMIT = 256 << 20
WIDE = 600_000
"""Width of the MLP: a matrix of it takes 293 MiB in bf16."""
CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 256},
    **{"hidden_size": 256, "intermediate_size": WIDE, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 64},
    "quantization_config": {**FP8_BLOCK, "weight_block_size": [128, 128]},
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of random codes, with scales around one."""
    folder = tmp_path_factory.mktemp("archive")
    plain = {name: value for name, value in CONFIG.items() if name != "quantization_config"}
    family, tensors = family_of(plain, folder), {}
    for item in family.items(family.parse(plain)):
        for name, shape in item.parts.items():
            quantised = name.endswith("_proj.weight")
            tensors[name] = Tensor.full(DTYPES["F8_E4M3" if quantised else "BF16"], shape)
            if quantised:
                tensors[f"{name}_scale_inv"] = Tensor.full(DTYPES["F32"], [-(-size // 128) for size in shape])
    header = build_header(tensors, {"format": "pt"})
    drawn = np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header.raw)
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                file.write(drawn.uniform(0.5, 1, tensor.numel).astype(np.float32).tobytes())
                continue
            for start in range(0, tensor.nbytes, 1 << 22):
                file.write(drawn.integers(0, 0x40, min(1 << 22, tensor.nbytes - start), np.uint8).tobytes())
    return folder


@pytest.mark.slow
def test_memory_does_not_grow_with_quantised_tensors(archive: Path, tmp_path: Path) -> None:
    assert WIDE * 256 * 2 > LIMIT
    convert = [sys.executable, "-m", "ckptkit", "convert"]
    plain = tmp_path / "plain"
    commands = {
        "read": [str(archive), str(plain)],
        "sharded": [str(archive), str(tmp_path / "meg"), "--tp", "4"],
        "like": [str(plain), str(tmp_path / "like"), "--quantise", f"like:{archive}"],
        "fp8-block": [str(plain), str(tmp_path / "fp8"), "--quantise", "fp8-block"],
        "int4": [str(plain), str(tmp_path / "int4"), "--quantise", "int4"],
    }
    for name, words in commands.items():
        to = "torch" if name == "sharded" else "hf"
        found = run([*convert, *words, "--to", to, "--threads", "2"])
        assert found.anonymous < LIMIT, f"{name}: {found.anonymous >> 20} MiB"
    like, stored = (folder / "model.safetensors" for folder in (tmp_path / "like", archive))
    assert like.read_bytes() == stored.read_bytes()
