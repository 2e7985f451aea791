"""The engine's routing, laid out for a replay, and compared with what the model chooses by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptkit.errors import InputError, VerificationError
from ckptkit.tables.model_config import ModelConfig
from ckptkit.verification.rollouts.conversations import Row
from ckptkit.verification.routing import Experts, Record, read_experts
from ckptkit.verification.runs import Run
from ckptkit.verification.tokens import group_by_length


@dataclass(frozen=True)
class FreeRouting:
    """What the candidate chooses by itself, against what the engine recorded.

    Attributes:
        recorded: Tokens whose routing was recorded.
        tokens: Share of these that go to other experts in some layer.
        choices: Share of the choices, one a token and layer, that are others.
        layers: Share of the tokens for each layer with experts, in order.
    """

    recorded: int
    tokens: float
    choices: float
    layers: list[float]


def moe_layers(config: ModelConfig) -> tuple[int, ...]:
    """Numbers of the layers with experts, from 0."""
    return tuple(number for number, layer in enumerate(config.layers) if layer.moe)


def engine_run(rows: Sequence[Row], config: ModelConfig, folder: Path) -> Run:
    """The engine's routing, as a run that another one can follow.

    Tokens without a recording, the last one of each row among them, are left to the model's routers.

    Args:
        rows: The rows.
        config: The model's.
        folder: Where to write.

    Raises:
        InputError: The recording is not of such a model.
    """
    layers, topk = moe_layers(config), config.experts_per_token
    if not layers:
        recorded = next(routing for row in rows for routing in row.routings)
        raise InputError("routed_experts was recorded, but the model has no experts", where=recorded.where)
    tensors = []
    for row in rows:
        experts = torch.full((len(layers), len(row.tokens), topk), -1, dtype=torch.int64)
        for recorded in row.routings:
            shaped = recorded.shaped(layers, config.num_layers, topk, config.num_experts)
            part = torch.tensor(shaped.experts, dtype=torch.int64)
            experts[:, shaped.start : shaped.start + part.size(0)] = part.transpose(0, 1)
        tensors.append(experts)
    record = Record()
    tokens = [row.tokens for row in rows]
    for length, numbers in group_by_length(tokens).items():
        whole = torch.stack([tensors[number] for number in numbers], 1)
        for layer, part in zip(layers, whole, strict=True):
            record.tensors[f"experts.{layer}.{length}"] = part
    record.save(folder)
    return Run(tokens, folder / "none", routing=folder)


def check_replayed(engine: Run, replayed: Run) -> None:
    """Whether the tokens went where the engine sent them.

    Raises:
        VerificationError: They did not.
    """
    if any(_others(*pair).any() for pair in _pairs(engine, replayed)):
        raise VerificationError("the candidate did not follow the engine's routing", where=engine.routing)


def free_routing(engine: Run, free: Run) -> FreeRouting:
    """How often the candidate chooses otherwise."""
    layers: dict[int, list[torch.Tensor]] = {}
    for length, chosen in read_experts(engine.routing).items():
        own = read_experts(free.routing)[length]
        for layer, experts in chosen.items():
            layers.setdefault(layer, []).append(_others(experts, own[layer])[(experts >= 0).all(-1)])
    found = torch.stack([torch.cat(layers[layer]) for layer in sorted(layers)])  # [layers, recorded tokens]
    shares = [float(share) for share in found.double().mean(1)]
    return FreeRouting(found.size(1), float(found.any(0).double().mean()), float(found.double().mean()), shares)


def _pairs(engine: Run, other: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    theirs: dict[int, Experts] = read_experts(other.routing)
    return [
        (experts, theirs[length][layer])
        for length, chosen in read_experts(engine.routing).items()
        for layer, experts in chosen.items()
    ]


def _others(experts: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Which tokens went to other experts, whatever their order, bool [...]; of those without a recording, none."""
    recorded = (experts >= 0).all(-1)
    if found.size(-1) != experts.size(-1):
        return recorded
    return (experts.sort(-1).values != found.sort(-1).values).any(-1) & recorded
