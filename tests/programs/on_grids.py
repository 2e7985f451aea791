"""What a caller's own program does on the ranks of torchrun, which `test_on_grids.py` starts.

    torchrun --nproc-per-node 4 tests/programs/on_grids.py packed MODEL TP EP [sequence_parallel]
    torchrun --nproc-per-node 4 tests/programs/on_grids.py cut MODEL TP PP [packed] [sequence_parallel]

Rank 0 prints what all ranks found, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

import ckptkit
from ckptkit.sharding.grid import Parallelism

ROWS = [[(7 * i + 3 * i * i + 5 * n + 11 * k) % 250 for i in range(n)] for k in range(2) for n in (24, 9, 15)]
"""Three rows for each of two replicas, as many tokens for each."""


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def loss_of(logits: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """The sum over the next tokens of packed rows; logits [tokens, vocabulary]."""
    total, at = torch.zeros(()), 0
    for row in rows:
        own = logits[at : at + len(row) - 1].log_softmax(-1)
        total = total - own.gather(1, torch.tensor(row[1:])[:, None]).sum()
        at += len(row)
    return total


def reference(path: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of each replica's rows in transformers, and the mean of the replicas' gradients."""
    from ckptkit.verification.reference import load_model

    model = load_model(path, torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # transformers alone keeps the gradient of the padding token's row at zero
    logits = []
    for rows in (ROWS[:3], ROWS[3:]):
        found = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
        (loss_of(found, rows) / 2).backward()
        logits.append(found.detach())
    return logits, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def packed(path: str, tp: int, ep: int, *how: str) -> dict[str, Any]:
    """`convert_to_packed` and `shard` on a grid, beside transformers."""
    from megatron.core import parallel_state

    from ckptkit.verification.reference import load_model

    hf, grid = load_model(path, torch.float32), Parallelism(tp, ep=ep)
    model = ckptkit.convert_to_packed(hf, grid, sequence_parallel="sequence_parallel" in how)
    replica = parallel_state.get_data_parallel_rank() % 2  # there may be four: two then have the same rows
    rows = ROWS[3 * replica : 3 * replica + 3]
    tokens = torch.tensor([token for row in rows for token in row])
    bounds = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()])
    logits, gradients = reference(path)
    back = model.to_hf_state_dict()
    same = all(torch.equal(value, hf.state_dict()[name]) for name, value in back.items())
    model = ckptkit.shard(model)
    found = model(tokens, bounds, 24)
    loss_of(found, rows).backward()
    model.reduce_gradients()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    state |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = model.to_hf_state_dict(state)
    worst = max((error(ours[name], expected), name) for name, expected in gradients.items())
    return {"same": same, "logits": error(found.detach(), logits[replica]), "gradients": worst[0], "worst": worst[1]}


def cut(path: str, tp: int, pp: int, *how: str) -> dict[str, Any]:
    """`load_megatron` with context parallelism, beside the same without it."""
    from megatron.core import parallel_state

    found = []
    for cp in (1, 2):
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        model = ckptkit.load_megatron(
            path,
            Parallelism(tp, pp),
            dtype="float32",
            device="cpu",
            cp=cp,
            sequence_parallel="sequence_parallel" in how,
        )
        logits = model.pipeline.forward(torch.tensor([ROWS[0], ROWS[3]]))
        training = model.training()
        capacity = 64 if "packed" in how else None
        loss, tokens = training.run(model.microbatches(ROWS, packed_capacity=capacity))
        found.append((logits, loss, tokens, {name: value.clone() for name, value in training.gradients(0).items()}))
    (logits, loss, tokens, gradients), (others, loss_cut, tokens_cut, gradients_cut) = found
    worst = max((error(gradients_cut[name], expected), name) for name, expected in gradients.items())
    apart = 0.0 if logits is None or others is None else error(others, logits)
    sizes = [parallel_state.get_context_parallel_world_size(), tokens, tokens_cut]
    return {"logits": apart, "loss": abs(loss - loss_cut), "gradients": worst[0], "worst": worst[1], "sizes": sizes}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    what, path, *sizes = sys.argv[1:]
    found = {"packed": packed, "cut": cut}[what](path, int(sizes[0]), int(sizes[1]), *sizes[2:])
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, found)
    if dist.get_rank() == 0:
        print(json.dumps(answers), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
