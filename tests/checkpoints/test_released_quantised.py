"""DeepSeek-V3 as it is published, in FP8, at full size: headers over sparse files, planned and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.dtypes import DTYPES
from ckptkit.families import family_of
from ckptkit.formats.safetensors import build_header
from ckptkit.inspection.summary import inspect
from ckptkit.sharding.grid import Parallelism
from ckptkit.tensors import Tensor

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_nextn_predict_layers": 0,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "torch_dtype": "bfloat16",
}
PLAIN = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "bias")
"""What names of tensors have in them that are not quantised there."""


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory: all other sizes of config.json are the defaults of its class."""
    path = tmp_path_factory.mktemp("sparse") / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    raw = {name: value for name, value in CONFIG.items() if name != "quantization_config"}
    family = family_of(raw, path)
    tensors: dict[str, Tensor] = {}
    for item in family.items(family.parse(raw)):
        for name, shape in item.parts.items():
            plain = any(word in name for word in PLAIN)
            kind = "F32" if name.endswith("e_score_correction_bias") else "BF16" if plain else "F8_E4M3"
            tensors[name] = Tensor.full(DTYPES[kind], shape)
            if not plain:
                tensors[f"{name}_scale_inv"] = Tensor.full(DTYPES["F32"], [-(-size // 128) for size in shape])
    header = build_header(tensors, {"format": "pt"})
    with (path / "model.safetensors").open("wb") as file:
        file.write(header.raw)
        file.truncate(len(header.raw) + header.data_size)
    return path


def test_what_is_quantised(sparse: Path) -> None:
    facts = inspect(sparse).quantised
    assert facts is not None and facts["scheme"] == "FP8, blocks of 128 x 128"
    numbers = facts["bytes_read"] // 2
    assert facts["tensors"] == 61 * 5 + 3 * 3 + 58 * 3 * 257
    scales = facts["bytes_stored"] - numbers
    assert 0.9998 < scales * 4096 / numbers < 1.01  # four bytes for 128 x 128 numbers, and partial blocks
    assert 650e9 < numbers < 671e9


@pytest.mark.slow
def test_dry_run_at_full_size(sparse: Path, tmp_path: Path) -> None:
    grid = Parallelism(8, 8, ep=8, etp=1, first_stage_layers=5)
    result = convert(sparse, tmp_path / "meg", to="torch_dist", grid=grid, dry_run=True)
    weights = sum(file["bytes"] for file in result.files if file["path"].endswith(".distcp"))
    assert abs(weights - 2 * inspect(sparse).parameters) < 0.01 * weights
    assert result.bytes_rearranged > 0.9 * weights and result.memory_needed < 1 << 30
    assert not (tmp_path / "meg").exists()
