"""The loss with multi-token prediction, beside the one that megatron-core's own GPTModel computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import open_checkpoint
from ckptkit.sharding.grid import Parallelism
from tests.models import add_prediction, save_model

LENGTH, PROMPT = 24, 7
ROWS = 256
"""Of the embedding: those that fill it up count in both softmaxes."""


def chunk_of(model: Path, grid: Parallelism) -> Any:
    from ckptkit.megatron.model import build_chunks, load_strict

    opened = open_checkpoint(model)
    (chunk,) = build_chunks(opened.config, grid, ROWS, dtype=torch.float32, device=torch.device("cpu"))
    load_strict(chunk, opened.shard(grid=grid, pp_rank=0, tp_rank=0, spec="local", layout="text"))
    return chunk


def batch_of(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, those that follow, and which positions count."""
    row = torch.randint(vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    places = torch.arange(LENGTH)[None]
    return row, row.roll(-1, 1), (places >= PROMPT) & (places < LENGTH - 1)


@pytest.mark.parametrize("kind", ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_gradients_are_those_of_megatron_cores_own_loss(one_rank: Parallelism, tmp_path: Path, kind: str) -> None:
    """Of both releases: 0.19 makes up for tokens that no layer sees any more, and behind a prompt there are none."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import multi_token_prediction

    from ckptkit.megatron.compat import trains_on
    from ckptkit.megatron.pipeline import Pipeline
    from ckptkit.megatron.training import Microbatch, Training

    model, device = add_prediction(save_model(tmp_path / "hf", kind), 2), torch.device("cpu")
    chunk = chunk_of(model, one_rank)
    tokens, labels, counted = batch_of(chunk.vocab_size)
    training = Training(Pipeline([chunk], one_rank, device, chunk.vocab_size))
    training.run([Microbatch(tokens, labels, counted)])
    ours = {name: value.clone() for name, value in training.gradients(0).items()}

    stock = chunk_of(model, one_rank).train()
    stock.mtp_process, stock.config.mtp_num_layers, stock.config.calculate_per_token_loss = True, 2, True
    positions = torch.arange(LENGTH)[None]
    multi_token_prediction.MTPLossAutoScaler.set_loss_scale(torch.ones(1))
    with trains_on(device):
        losses = GPTModel.forward(stock, tokens, positions, None, labels=labels, loss_mask=counted)
        (losses * counted).sum().backward()
    found = 0
    for name, parameter in stock.named_parameters():
        name = name.replace("mtp_model_layer", "transformer_layer")
        assert parameter.grad is not None, name
        theirs = parameter.grad / counted.sum()
        assert torch.allclose(ours[name], theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max())), name
        found += int(theirs.any())  # no token may have come to an expert
    assert found > 20
