"""A rank that trains split Llamas: `python -m tests.surgery.stage_training RANK`.

It takes steps of whole models over pipeline stages, and those of `adapter_training`. The schedules are megatron-core's
own. What a rank must find is at hand as checkpoints: the gradients of the whole model, and its weights after a step.
The answer is a JSON file of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.megatron import compat
from ckptkit.sharding.grid import Parallelism
from tests.formats.rank_pool import RankProcesses, incoming
from tests.precision import relative_error
from tests.surgery import adapter_training

MODULE = "tests.surgery.stage_training"
CPU = torch.device("cpu")
RATE = 0.01
VOCABULARY = 256  # nothing is padded: the rows that pad it would have logits, which a softmax counts
LENGTHS = (24, 12, 18, 6, 16, 8)
"""Lengths of the microbatches."""


@dataclass(frozen=True)
class Job:
    """A step of training, and a forward pass after it.

    Attributes:
        grid: Sizes of the grid.
        checkpoint: What is trained.
        gradients: The gradients that the ranks must have, as a checkpoint.
        after: The weights that they must have after the step.
        folder: Where each rank leaves its answer.
        sequence_parallel: Whether the sequence is split over tensor parallel ranks.
        recompute: Whether activations are computed again backwards.
        device: `cpu`, or `cuda` with a GPU for each rank, over NCCL.
    """

    grid: dict[str, Any]
    checkpoint: str
    gradients: str
    after: str
    folder: str
    sequence_parallel: bool = False
    recompute: bool = False
    device: str = "cpu"


def run(ranks: RankProcesses, job: Job) -> list[dict[str, Any]]:
    """The answers of all ranks."""
    return _answers(ranks, asdict(job))


def run_adapter_training(ranks: RankProcesses, folder: Path) -> list[dict[str, Any]]:
    """The answers of two tensor parallel ranks that train adapters alone."""
    return _answers(ranks, {"grid": {"tp": 2}, "folder": str(folder)})


def _answers(ranks: RankProcesses, job: dict[str, Any]) -> list[dict[str, Any]]:
    size = Parallelism(**job["grid"]).world_size
    problem = ranks.run(size, job)
    assert not problem, problem
    return [json.loads((Path(job["folder"]) / f"{rank}.json").read_text()) for rank in range(size)]


def microbatches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, int64 [2, length] each; no padding, whose embedding transformers does not train."""
    drawn = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(1, VOCABULARY, (2, length), generator=drawn),
            torch.randint(0, VOCABULARY, (2, length), generator=drawn),
        )
        for length in LENGTHS
    ]


def loss_of(model: Any) -> torch.Tensor:
    """The loss of a transformers model over all microbatches, each of which counts the same."""
    logits = ((model(tokens, use_cache=False).logits, labels) for tokens, labels in microbatches())
    return torch.stack([F.cross_entropy(found.flatten(0, 1), labels.flatten()) for found, labels in logits]).mean()


@contextlib.contextmanager
def schedule_on_cpu() -> Iterator[None]:
    """Makes the schedules run without a GPU: they count tokens with `device="cuda"`, and wait for the device."""
    from megatron.core.pipeline_parallel import schedules

    class Torch:
        """torch for that module alone."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def zeros(self, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
            return torch.zeros(*size, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(schedules, "torch", Torch())
        patched.setattr(torch.cuda, "synchronize", lambda device=None: None)
        yield


def run_schedule(chunks: list[Any], forward_only: bool = False) -> list[float]:
    """megatron-core's schedule over all microbatches: their losses on the last stage, nothing on the others."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(batches: Iterator[Any], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens, labels = next(batches)
        device = next(chunk.parameters()).device
        losses = chunk(tokens.to(device), None, None, labels=labels.to(device))
        return losses, lambda losses: (losses.mean(), {"loss": losses.mean().item()})

    found = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(microbatches()) for _ in chunks],
        model=chunks,
        num_microbatches=len(LENGTHS),
        seq_length=max(LENGTHS),
        micro_batch_size=2,
        forward_only=forward_only,
    )
    return [loss["loss"] for loss in found]


def train(job: Job, device: torch.device) -> dict[str, Any]:
    """What a rank sees of the step."""
    from megatron.core import parallel_state

    from ckptkit.megatron.model import build_chunks, expected_tensors, load_strict

    grid, checkpoint = Parallelism(**job.grid), open_checkpoint(job.checkpoint)
    place = {
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
    }

    def shard(path: str, stage: int) -> dict[str, torch.Tensor]:
        return open_checkpoint(path).shard(grid=grid, vp_stage=stage, spec="local", **place)

    how = {"sequence_parallel": job.sequence_parallel, "recompute": job.recompute}
    chunks = build_chunks(checkpoint.config, grid, VOCABULARY, dtype=torch.float32, device=device, **how)
    for number, chunk in enumerate(chunks):
        load_strict(chunk, shard(job.checkpoint, number))
        chunk.train()
    losses = run_schedule(chunks)
    parameters = [dict(chunk.named_parameters()) for chunk in chunks]
    group = parallel_state.get_tensor_model_parallel_group()
    for own in parameters:
        for parameter in own.values():
            if getattr(parameter, "sequence_parallel", False):  # each rank saw a part of the tokens
                dist.all_reduce(parameter.grad, group=group)
    errors = {
        f"{number} {name}": relative_error(parameter.grad.cpu(), gradient)
        for number, own in enumerate(parameters)
        for name, gradient in shard(job.gradients, number).items()
        for parameter in [own[name]]
    }
    assert len(errors) == sum(len(expected_tensors(chunk)) for chunk in chunks)
    torch.optim.SGD([parameter for own in parameters for parameter in own.values()], lr=RATE).step()
    after = [
        relative_error(own[name].detach().cpu(), weight)
        for number, own in enumerate(parameters)
        for name, weight in shard(job.after, number).items()
    ]
    return {
        "losses": losses,
        "gradients": errors,
        "after": max(after),
        "losses after": run_schedule(chunks, forward_only=True),
        "adapters": [name for name in errors if ".adapter." in name],
        "widths": [[chunk.input_width, chunk.config.hidden_size] for chunk in chunks],
    }


def main(rank: int) -> int:
    """Runs jobs until there are no more, or one fails."""
    compat.import_megatron()
    from ckptkit.megatron import parallel

    for content, store in incoming():
        grid, folder = Parallelism(**content["grid"]), Path(content["folder"])
        device = parallel.device_of(content.get("device", "cpu"), rank)
        try:
            parallel.initialize(grid, rank, store=dist.FileStore(store, grid.world_size), device=device)
            with compat.runs_on(device), schedule_on_cpu() if device == CPU else contextlib.nullcontext():
                if "gradients" in content:
                    answer: Any = train(Job(**content), device)
                else:
                    answer = adapter_training.train_all(folder, rank)
            parallel.finalize()
            (folder / f"{rank}.json").write_text(json.dumps(answer))
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
