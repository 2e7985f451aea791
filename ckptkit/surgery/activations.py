"""The residual stream of a Llama of any size, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import EMBEDDING, Checkpoint
from ckptkit.errors import UsageError
from ckptkit.families.split_llama import FIRST
from ckptkit.io.as_torch import load

if TYPE_CHECKING:
    import torch

TOKENS_PER_PASS = 4096
"""Tokens that go through a layer at a time; at least one sequence."""
EMBEDDING_ROWS = 8192
"""Rows of the embedding that are in memory at a time."""


def residual_stream(
    model: Checkpoint,
    num_layers: int,
    sequences: Sequence[Sequence[int]],
    *,
    device: str = "cpu",
    done: Callable[[int], None] = lambda layers: None,
) -> list[torch.Tensor]:
    """The input of layer `num_layers` of a Llama; or the output of its last layer, before the norm.

    The layers are those of transformers. Beside one of them, only the streams are in memory: tokens x width x 4 bytes.

    Args:
        model: A Llama, or a split one, whose first layers then count.
        num_layers: Layers to run.
        sequences: Token ids.
        device: Where the layers run. On the CPU they compute in float32, elsewhere in the checkpoint's own dtype.
        done: Called with 1 after every layer.

    Returns:
        For each sequence fp32 [tokens, width] in host memory.

    Raises:
        UsageError: There is no such device.
        InputError: A tensor cannot be read.
    """
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device", hint="--device cpu")
    config = _config(model)
    dtype = torch.float32 if device == "cpu" else getattr(torch, model.main_dtype)
    rotary = LlamaRotaryEmbedding(config).to(device)
    with torch.no_grad():
        streams = _embed(model, sequences, dtype)
        batches = _batches([len(row) for row in sequences])
        for number in range(num_layers):
            layer = _layer(model, config, number).to(device, dtype)
            for batch in batches:
                states = torch.stack([streams[index] for index in batch]).to(device)
                positions = torch.arange(states.size(1), device=device)[None]
                out = layer(states, position_ids=positions, position_embeddings=rotary(states, position_ids=positions))
                for index, state in zip(batch, out.cpu(), strict=True):
                    streams[index] = state
            done(1)
        return [stream.float() for stream in streams]


def _config(model: Checkpoint) -> Any:
    from transformers import LlamaConfig

    raw = model.sidecar.config
    config = LlamaConfig.from_dict(dict(raw[FIRST] if model.config.adapter is not None else raw))
    config._attn_implementation = "sdpa"  # causal by itself where it gets no mask
    return config


def _embed(model: Checkpoint, sequences: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Embeddings of all tokens; the table passes by, a part at a time."""
    import torch

    table = model.tensors[EMBEDDING]
    ids = [torch.tensor(row) for row in sequences]
    streams = [torch.empty(len(row), table.shape[1], dtype=dtype) for row in ids]
    for start in range(0, table.shape[0], EMBEDDING_ROWS):
        stop = min(start + EMBEDDING_ROWS, table.shape[0])
        rows = load(table.rows(start, stop)).to(dtype)
        for row, stream in zip(ids, streams, strict=True):
            here = (row >= start) & (row < stop)
            stream[here] = rows[row[here] - start]
    return streams


def _layer(model: Checkpoint, config: Any, number: int) -> torch.nn.Module:
    """One decoder layer of transformers with the weights of a checkpoint."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    group = "layers_first" if model.config.adapter is not None else "layers"
    prefix, tensors = f"model.{group}.{number}.", {}
    for key, item in model.items.items():
        if item.layer == number:
            tensors.update(item.unpack(model.tensors[key]))
    with torch.device("meta"):
        layer: torch.nn.Module = LlamaDecoderLayer(config, number)
    layer.load_state_dict({name.removeprefix(prefix): load(value) for name, value in tensors.items()}, assign=True)
    return layer.eval()


def _batches(lengths: list[int]) -> list[list[int]]:
    """Numbers of sequences that go through a layer together: of one length, and not too many."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        last = batches[-1] if batches else []
        if last and lengths[last[0]] == length and (len(last) + 1) * length <= TOKENS_PER_PASS:
            last.append(number)
        else:
            batches.append([number])
    return batches
