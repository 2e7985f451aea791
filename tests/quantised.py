"""Quantised directories, made from plain ones, and the numbers in them by a reading that knows nothing of ckptkit's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FP8_BLOCK: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
}
FP8_PLAIN: dict[str, Any] = {**FP8_BLOCK, "weight_block_size": None}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 16,
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
            },
        }
    },
}
SCALES = ("F32", "BF16", "F8_E8M0", "U8")


def e4m3(code: int) -> float:
    """The number of a code of E4M3, by the definition in the paper on FP8 formats for deep learning."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    """The number of a code of E2M1, by the definition of the Open Compute Project."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def read_fp8(codes: Array, scales: Array, block: tuple[int, int]) -> Array:
    """FP8 codes in blocks as float32 products: each scale is spread over its block, and the edge cut off."""
    rows, columns = codes.shape
    spread = np.repeat(np.repeat(scales, block[0], axis=0), block[1], axis=1)[:rows, :columns]
    return np.array([e4m3(code) for code in range(256)], np.float32)[codes] * spread.astype(np.float32)


def read_mxfp4(blocks: Array, scales: Array) -> Array:
    """MXFP4 as float32: [..., groups, 16] bytes -> [..., groups * 32]."""
    table = np.array([e2m1(code) for code in range(16)], np.float32)
    pairs = np.stack([table[blocks & 15], table[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], 32)
    numbers: Array = pairs * np.float32(2.0) ** (scales.astype(np.float32)[..., None] - 127)
    return numbers.reshape(*scales.shape[:-1], -1)


def read_int4(packed: Array, scales: Array, group: int) -> Array:
    """Packed INT4 as float32 products: [rows, columns / 8] int32 -> [rows, columns]."""
    words = packed.view(np.uint32)
    nibbles = np.stack([(words >> (4 * place)) & 15 for place in range(8)], axis=-1).reshape(len(words), -1)
    return (nibbles.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), group, axis=1)


def quantise_fp8(
    source: Path, out: Path, *, scales: str = "F32", config: Mapping[str, Any] = FP8_BLOCK, seed: int = 0
) -> dict[str, Array]:
    """A directory with random FP8 weights in its linear layers, beside the other tensors of a plain one.

    Args:
        source: The plain directory.
        out: The directory to make.
        scales: Element type of the scales.
        config: Its `quantization_config`; without blocks, scales are per tensor and per row by turns.
        seed: Of the weights.

    Returns:
        Name -> float32 products, of the quantised tensors.
    """
    rng, found, numbers = np.random.default_rng(seed), {}, {}
    for count, (name, tensor) in enumerate(_plain(source).items()):
        if not _is_linear(name, tensor):
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        stated = config["weight_block_size"]
        block = tuple(stated) if stated else ((rows, columns), (1, columns))[count % 2]
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        codes = rng.integers(0, 256, tensor.shape, np.uint8)
        codes[codes & 127 == 127] -= 1  # no NaN among weights
        stored, values = _scales(rng, grid, scales)
        found[name] = _typed(codes, "float8_e4m3fn")
        plain = {(1, 1): (), (rows, 1): (rows,)} if not stated else {}
        found[f"{name}_scale_inv"] = stored.reshape(plain.get(grid, grid))
        numbers[name] = read_fp8(codes, values, block)
    _write(source, out, found, config)
    return numbers


def quantise_int4(source: Path, out: Path, *, config: Mapping[str, Any] = INT4, seed: int = 0) -> dict[str, Array]:
    """A directory with random INT4 weights in its linear layers. See `quantise_fp8`."""
    import torch

    rng, found, numbers = np.random.default_rng(seed), {}, {}
    group = config["config_groups"]["group_0"]["weights"]["group_size"]
    for name, tensor in _plain(source).items():
        if not _is_linear(name, tensor) or tensor.shape[1] % group:
            found[name] = tensor
            continue
        module, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        packed = rng.integers(-(1 << 31), 1 << 31, (rows, columns // 8), np.int32)
        stored, values = _scales(rng, (rows, columns // group), "BF16")
        found[f"{module}.weight_packed"] = torch.from_numpy(packed)
        found[f"{module}.weight_scale"] = stored
        found[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        numbers[name] = read_int4(packed, values, group)
    _write(source, out, found, config)
    return numbers


def quantise_mxfp4(source: Path, out: Path, *, seed: int = 0) -> None:
    """A directory of GPT-OSS with random MXFP4 experts. See `quantise_fp8`."""
    import torch

    rng, found = np.random.default_rng(seed), {}
    for name, tensor in _plain(source).items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            found[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        groups = (experts, rows, columns // 32)
        found[f"{name}_blocks"] = torch.from_numpy(rng.integers(0, 256, (*groups, 16), np.uint8))
        found[f"{name}_scales"] = torch.from_numpy(rng.integers(110, 124, groups, np.uint8))
    _write(source, out, found, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def rounded(numbers: Array, dtype: str) -> Any:
    """float32 numbers in a type of torch, rounded by torch."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(numbers)).to(getattr(torch, dtype))


def _plain(source: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()}


_OTHERS = ("kv_a_proj_with_mqa", "kv_b", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
"""Linear layers that archives have in FP8, too; of DeltaNets all but betas and decays."""


def _is_linear(name: str, tensor: Any) -> bool:
    return (tensor.ndim == 2 and name.endswith("_proj.weight")) or any(part in name for part in _OTHERS)


def _scales(rng: np.random.Generator, grid: tuple[int, int], kind: str) -> tuple[Any, Array]:
    """Random scales as a tensor of torch, and their values."""
    import torch

    if kind in ("F8_E8M0", "U8"):
        exponents = rng.integers(110, 124, grid, np.uint8)
        stored = torch.from_numpy(exponents)
        return (stored if kind == "U8" else stored.view(torch.float8_e8m0fnu)), 2.0 ** (exponents.astype(float) - 127)
    stored = torch.from_numpy(rng.uniform(1e-4, 1e-2, grid)).to({"F32": torch.float32, "BF16": torch.bfloat16}[kind])
    return stored, stored.float().numpy()


def _typed(codes: Array, dtype: str) -> Any:
    import torch

    return torch.from_numpy(codes).view(getattr(torch, dtype))


def _write(source: Path, out: Path, tensors: Mapping[str, Any], quantization: Mapping[str, Any]) -> None:
    """The tensors in two files with an index, beside the small files of a directory."""
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = dict(quantization)
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (out / "notes.txt").write_text("a small file\n", encoding="utf-8")
    names, half = list(tensors), len(tensors) // 2
    files = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, some in files.items():
        save_file({name: tensors[name].contiguous() for name in some}, out / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
