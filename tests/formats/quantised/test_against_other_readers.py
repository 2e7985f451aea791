"""The numbers that other libraries read from the same codes: transformers, and compressed-tensors where it is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ckptkit.dtypes import DTYPES
from ckptkit.formats.hf import HfFiles, read_shard
from ckptkit.formats.quantised.archive import dequantised
from ckptkit.io.reading import read_tensor
from tests.quantised import FP8_BLOCK, INT4


def read(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, object], name: str) -> torch.Tensor:
    """What ckptkit reads for a name."""
    save_file(tensors, folder / "model.safetensors")
    stored, header = read_shard(folder / "model.safetensors")
    assert header is not None
    files = HfFiles(folder, {"quantization_config": quantization}, stored, {"model.safetensors": header}, {})
    found = dequantised(files, DTYPES["BF16"]).tensors[name]
    return torch.from_numpy(read_tensor(found).copy()).view(torch.bfloat16).reshape(found.shape)


def test_fp8_blocks_of_transformers(tmp_path: Path) -> None:
    """transformers reads whole blocks alone; partial ones are compared with a plain reading in `tests/io`."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 127, (256, 384), np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(rng.lognormal(-4, 2, (2, 3)).astype(np.float32))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    ours = read(tmp_path, tensors, {**FP8_BLOCK, "weight_block_size": [128, 128]}, "a.weight")
    assert torch.equal(ours, theirs.to(torch.bfloat16))


def test_mxfp4_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(1)
    blocks = torch.from_numpy(rng.integers(0, 256, (3, 40, 4, 16), np.uint8))
    scales = torch.from_numpy(rng.integers(90, 160, (3, 40, 4), np.uint8))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    ours = read(tmp_path, parts, {"quant_method": "mxfp4"}, f"{name}_blocks")
    assert ours.shape == (3, 40, 128) and torch.equal(ours.transpose(1, 2), theirs)


def test_the_header_of_mxfp4_is_that_of_an_archive_without_codes(tmp_path: Path) -> None:
    parts = {"e.up_blocks": torch.zeros(3, 40, 4, 16, dtype=torch.uint8), "e.up_scales": torch.zeros(3, 40, 4).byte()}
    read(tmp_path, parts, {"quant_method": "mxfp4"}, "e.up_blocks")
    stored, header = read_shard(tmp_path / "model.safetensors")
    assert header is not None
    files = HfFiles(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}}, stored, {"m": header}, {})
    entries = dequantised(files).headers["m"].entries
    assert {name: (entry.dtype.name, entry.shape) for name, entry in entries.items()} == {
        "e.up": ("BF16", (3, 128, 40))
    }


def test_int4_of_compressed_tensors(tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng(2)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    packed = torch.from_numpy(rng.integers(-(1 << 31), 1 << 31, (48, 16), np.int32))
    scale = torch.from_numpy(rng.uniform(1e-3, 1e-1, (48, 4))).to(torch.bfloat16)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([48, 128])}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = compressors.PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]
    config = {**INT4, "config_groups": {"group_0": {"weights": weights.model_dump(mode="json")}}}
    ours = read(tmp_path, {f"a.{name}": part for name, part in parts.items()}, config, "a.weight")
    assert torch.equal(ours, theirs.to(torch.bfloat16))
