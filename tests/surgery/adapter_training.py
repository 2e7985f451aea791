"""Two tensor parallel ranks that train nothing but an adapter; transformers takes the same steps on rank 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.sharding.grid import Parallelism
from tests.precision import relative_error
from tests.surgery.pairs import KINDS, load_remote

STEPS, RATE = 5, 0.01
CPU = torch.device("cpu")
RUNS = [
    *((kind, split, False) for kind in KINDS for split in (True, False)),
    ("linear", True, True),
    ("mlp", False, True),
]
"""Kind of adapter, sequence parallelism, and whether activations are computed again backwards."""
NAMES = {
    "linear": {"linear_1": "model.adapter.weight"},
    **{kind: {f"linear_{n}": f"model.adapter_linear_{n}.weight" for n in (1, 2)} for kind in ("two-linear", "mlp")},
}


def whole(part: torch.Tensor, name: str) -> torch.Tensor:
    """A matrix of the adapter: the first one is split along its rows, the second along its columns."""
    from ckptkit.megatron.parallel import gather_over_tensor_ranks

    return gather_over_tensor_ranks(part.detach(), 0 if name == "linear_1" else 1)


def steps(model: Any, loss: Any, adapter: dict[str, torch.nn.Parameter]) -> dict[str, Any]:
    """A few steps of gradient descent of the adapter alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter.values():
        parameter.requires_grad_(True)
    own = {id(parameter) for parameter in adapter.values()}
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in own}
    before = {name: parameter.clone() for name, parameter in frozen.items()}
    optimizer = torch.optim.SGD(adapter.values(), lr=RATE)
    losses, gradients = [], {}
    for step in range(STEPS):
        value = loss()
        value.backward()
        if not step:
            gradients = {name: parameter.grad.clone() for name, parameter in adapter.items()}  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    moved = [name for name, p in frozen.items() if p.grad is not None or not torch.equal(p, before[name])]
    return {"losses": losses, "gradients": gradients, "moved": moved, "frozen": len(frozen)}


def train(folder: Path, kind: str, sequence_parallel: bool, recompute: bool, rank: int) -> dict[str, Any]:
    """The same steps in Megatron and, on rank 0, in transformers."""
    from ckptkit.megatron.model import build_chunks, load_strict

    grid, checkpoint = Parallelism(2), open_checkpoint(folder / kind)
    shard = checkpoint.shard(grid=grid, tp_rank=rank, spec="local", layout="text")
    padded = 2 * len(shard["output_layer.weight"])
    how = {"sequence_parallel": sequence_parallel, "recompute": recompute}
    (chunk,) = build_chunks(checkpoint.config, grid, padded, dtype=torch.float32, device=CPU, **how)
    load_strict(chunk, shard)
    chunk.train()
    # The rows that pad the vocabulary give logits of 0, which a softmax would count: a bias takes them out.
    first = rank * padded // 2
    ids = torch.arange(first, first + padded // 2)
    hidden = torch.where(ids < checkpoint.config.vocab_size, 0.0, -1e9)
    chunk.output_layer.register_forward_hook(lambda module, inputs, output: (output[0] + hidden, output[1]))
    tokens = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    adapter = {name: getattr(chunk.decoder.adapter, name).weight for name in NAMES[kind]}
    found = steps(chunk, lambda: chunk(tokens, None, None, labels=labels).mean(), adapter)
    gradients = {name: whole(value, name) for name, value in found["gradients"].items()}
    ends = {name: whole(value, name) for name, value in adapter.items()}
    answer = {name: found[name] for name in ("losses", "moved", "frozen")}
    if rank:
        return answer

    model = load_remote(folder / kind, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    theirs = {name: parameters[hf] for name, hf in NAMES[kind].items()}

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), labels.flatten())

    expected = steps(model, loss, theirs)
    last = expected["gradients"].keys() & gradients.keys()
    return {
        **answer,
        "expected": expected["losses"],
        "gradient_error": max(relative_error(gradients[name], expected["gradients"][name]) for name in last),
        # What the comparison must be able to see: that halves of a matrix are in the wrong order.
        "swapped": min(
            relative_error(gradients[n].roll(len(gradients[n]) // 2, 0), expected["gradients"][n]) for n in last
        ),
        "weight_error": max(relative_error(ends[name], theirs[name]) for name in last),
        "matrices": sorted(last),
    }


def train_all(folder: Path, rank: int) -> dict[str, Any]:
    """Trains everything on one rank: run -> what was seen.

    Args:
        folder: Holds a Hugging Face directory for each kind of adapter.
        rank: This tensor parallel rank.
    """
    return {f"{kind} {split} {again}": train(folder, kind, split, again, rank) for kind, split, again in RUNS}
