"""Synthetic Llamas of any size: real shapes and names, weights that repeat one block of random numbers.

Converting never looks at the values, except for casts, which take the same time whatever they are; so the block is
drawn once (normal, standard deviation 0.02) and repeated. It is not compressible within 8 MiB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptkit.dtypes import DTYPES
from ckptkit.formats.hf import INDEX
from ckptkit.formats.safetensors import build_header
from ckptkit.tensors import Tensor

BLOCK = 8 << 20


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; embedding and head are not tied. Numbers of elements."""

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

    def layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a decoder layer."""
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


SHAPES = {
    "tiny": Shape("tiny", 1024, 2816, 16, 4, 32000),
    "1.1b": Shape("TinyLlama-1.1B", 2048, 5632, 32, 4, 32000),
    "8b": Shape("Llama-3.1-8B", 4096, 14336, 32, 8, 128256),
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


def write_llama(path: Path, size: int, shape: Shape, dtype: str = "BF16") -> Model:
    """Writes a Hugging Face directory of about `size` bytes, at least two layers and an even number of them.

    Args:
        path: Directory to create.
        size: Bytes wanted.
        shape: Everything but the number of layers.
        dtype: `BF16` or `F32`.
    """
    itemsize = DTYPES[dtype].itemsize
    ends = (2 * shape.vocab + 1) * shape.hidden * itemsize
    layer = sum(int(np.prod(dims)) for dims in shape.layer(0).values()) * itemsize
    layers = max(2, 2 * round((size - ends) / layer / 2))
    path.mkdir(parents=True)
    config = path / "config.json"
    config.write_text(json.dumps(_config(shape, layers, dtype), indent=2) + "\n", encoding="utf-8")
    block = _block(dtype)
    shards = list(_shards(shape, layers, (ends + layers * layer) // 6, dtype))
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path / name, tensors, block)
        weight_map.update(dict.fromkeys(tensors, name))
    total = ends + layers * layer
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Model(path, shape, layers, dtype, sum(file.stat().st_size for file in path.iterdir()))


def _shards(shape: Shape, layers: int, limit: int, dtype: str) -> Iterator[dict[str, Tensor]]:
    """Tensors in the model's order, a new shard once one is full."""
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for index in range(layers):
        names.update(shape.layer(index))
    names.update({"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)})
    shard: dict[str, Tensor] = {}
    for name, dims in names.items():
        shard[name] = Tensor.full(DTYPES[dtype], dims)
        if sum(tensor.nbytes for tensor in shard.values()) >= limit:
            yield shard
            shard = {}
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


def _config(shape: Shape, layers: int, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
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
