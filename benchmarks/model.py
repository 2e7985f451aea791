"""Synthetic models of any size: real shapes and names, weights that repeat one block of random numbers.

Converting never looks at the values, except for casts, which take the same time whatever they are; so the block is
drawn once (normal, standard deviation 0.02) and repeated. It is not compressible within 8 MiB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.planning import Experts
from ckptkit.dtypes import DTYPES
from ckptkit.formats.hf import INDEX
from ckptkit.formats.safetensors import build_header
from ckptkit.tensors import Tensor

BLOCK = 8 << 20


Sizes = dict[str, tuple[int, ...]]


class Shape(Protocol):
    """The sizes of a model, whatever the number of its layers; embedding and head are not tied."""

    @property
    def name(self) -> str:
        """The model's name."""

    def tensors(self, layers: int) -> Sizes:
        """Names and shapes, in the model's order."""

    def config(self, layers: int) -> dict[str, object]:
        """config.json, for BF16."""


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama. Numbers of elements."""

    name: str
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    def tensors(self, layers: int) -> Sizes:
        """Names and shapes, in the model's order."""
        names: Sizes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for index in range(layers):
            names.update(self._layer(index))
        return {**names, "model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def _layer(self, index: int) -> Sizes:
        q, kv, prefix = self.hidden, self.groups * self.head_dim, f"model.layers.{index}"
        return {
            f"{prefix}.self_attn.q_proj.weight": (q, self.hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, self.hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, self.hidden),
            f"{prefix}.self_attn.o_proj.weight": (self.hidden, q),
            f"{prefix}.mlp.gate_proj.weight": (self.ffn, self.hidden),
            f"{prefix}.mlp.up_proj.weight": (self.ffn, self.hidden),
            f"{prefix}.mlp.down_proj.weight": (self.hidden, self.ffn),
            f"{prefix}.input_layernorm.weight": (self.hidden,),
            f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
        }

    def config(self, layers: int) -> dict[str, object]:
        """config.json, for BF16."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


@dataclass(frozen=True)
class Qwen:
    """The sizes of a Qwen3-MoE, a tensor for each projection of each expert."""

    model: Experts

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def tensors(self, layers: int) -> Sizes:
        """Names and shapes, in the model's order."""
        return dict(replace(self.model, layers=layers).tensors())

    def config(self, layers: int) -> dict[str, object]:
        """config.json, for BF16."""
        return replace(self.model, layers=layers).config()


# A few layers of Qwen3-30B-A3B have their true share of the model only beside a small embedding.
SHAPES: dict[str, Shape] = {
    "tiny": Llama("tiny", 1024, 2816, 16, 4, 32000),
    "1.1b": Llama("TinyLlama-1.1B", 2048, 5632, 32, 4, 32000),
    "8b": Llama("Llama-3.1-8B", 4096, 14336, 32, 8, 128256),
    "tiny-moe": Qwen(Experts("tiny with experts", 0, 8, 256, 128, 4, vocab=4096)),
    "30b-a3b": Qwen(Experts("Qwen3-30B-A3B, a tenth of its vocabulary", 0, 128, 2048, 768, 32, vocab=15360)),
}


def shape_for(gigabytes: float) -> Shape:
    """The largest real shape of which `gigabytes` hold several layers."""
    return SHAPES["8b" if gigabytes >= 4 else "1.1b" if gigabytes >= 0.7 else "tiny"]


@dataclass(frozen=True)
class Model:
    """What was written: where, its shape, layers and size in bytes."""

    path: Path
    shape: Shape
    layers: int
    dtype: str
    nbytes: int


def write_model(path: Path, size: int, shape: Shape, dtype: str = "BF16", shards: int = 6) -> Model:
    """Writes a Hugging Face directory of about `size` bytes, at least two layers and an even number of them.

    Args:
        path: Directory to create.
        size: Bytes wanted.
        shape: Everything but the number of layers.
        dtype: `BF16` or `F32`.
        shards: Files wanted; a large tensor may leave fewer.
    """
    ends, two = (_nbytes(shape.tensors(layers), dtype) for layers in (0, 2))
    layers = max(2, 2 * round((size - ends) / (two - ends)))
    path.mkdir(parents=True)
    config = {**shape.config(layers), "dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype]}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    block = _block(dtype)
    names = shape.tensors(layers)
    total = _nbytes(names, dtype)
    parts = list(_shards(names, total // shards, dtype))
    weight_map = {}
    for number, tensors in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        _write_shard(path / name, tensors, block)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Model(path, shape, layers, dtype, sum(file.stat().st_size for file in path.iterdir()))


def _nbytes(names: Sizes, dtype: str) -> int:
    return sum(math.prod(dims) for dims in names.values()) * DTYPES[dtype].itemsize


def _shards(names: Sizes, limit: int, dtype: str) -> Iterator[dict[str, Tensor]]:
    """Tensors in the model's order, a new shard once one is full."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, dims in names.items():
        shard[name] = Tensor.full(DTYPES[dtype], dims)
        size += shard[name].nbytes
        if size >= limit:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _write_shard(path: Path, tensors: dict[str, Tensor], block: bytes) -> None:
    header = build_header(tensors, {"format": "pt"})
    with path.open("wb", buffering=0) as file:
        file.write(header.raw)
        left = header.data_size
        while left:
            left -= file.write(memoryview(block)[:left]) or 0


def _block(dtype: str) -> bytes:
    values = np.random.default_rng(0).normal(0, 0.02, BLOCK // 4).astype(np.float32)
    if dtype == "F32":
        return values.tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() * 2
