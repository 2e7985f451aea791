"""`load_megatron`: a checkpoint's model on the ranks of the caller's own program, to be trained and saved.

# torchrun --nproc-per-node 4 train.py
model = load_megatron("Llama-3.1-8B", Parallelism(tp=2, pp=2), dtype="bfloat16", sequence_parallel=True)
training = model.training("*adapter*")
loss, tokens = training.run(model.microbatches(rows))
...
model.save("trained", iteration=10)  # then: ckptkit convert trained out --to hf --hf-reference Llama-3.1-8B
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import check_grid
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.errors import UsageError
from ckptkit.formats.torch_legacy import rank_folder
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism, Rank, StatedGrid
from ckptkit.verification.ranks.adapters import open_laid_out
from ckptkit.verification.ranks.jobs import OPENER, AdapterJob, LogitsJob, find, open_model

if TYPE_CHECKING:
    import torch

    from ckptkit.checkpoints.checkpoint import Checkpoint
    from ckptkit.megatron.model import CausalModel
    from ckptkit.megatron.pipeline import Pipeline
    from ckptkit.megatron.training import Microbatch, Training

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, eq=False)
class LiveModel:
    """One rank's part of a model, loaded.

    Attributes:
        chunks: megatron-core's modules, one per virtual stage.
        grid: The grid that they are on; further ranks of the program are replicas of it.
        rank: This rank's place on the grid.
        replica: Number of this rank's replica, from 0.
        device: Where the chunks live.
        pipeline: Runs them forwards, without a schedule (`Pipeline.forward`, `forward_packed`).
        checkpoint: What they were loaded from.
        run: How they run.
        lora_alpha: Alpha of the adapter beside the linears, for its rank there; or None.
    """

    chunks: list[CausalModel]
    grid: Parallelism
    rank: Rank
    replica: int
    device: torch.device
    pipeline: Pipeline
    checkpoint: Checkpoint
    run: RunConfig
    lora_alpha: float | None = None

    def training(self, train_only: str | None = None) -> Training:
        """The model forwards and backwards by megatron-core's schedule, ready for the caller's optimizer.

        After `Training.run` each parameter of `Training.parameters()` has its reduced gradient in `main_grad`. The loss
        is that of the next token, or of a value model the squared difference from the targets of `microbatches`.

        Args:
            train_only: Pattern (`fnmatch`) of the names of what is trained; the rest is frozen. Names are those of
                Hugging Face, those of an adapter's factors Megatron's own. None trains all: with an adapter its
                factors.

        Raises:
            UsageError: The pattern fits nothing, or cuts a tensor that Megatron has as one.
        """
        from ckptkit.megatron.training import Training

        return Training(self.pipeline, self._trained(train_only))

    def microbatches(
        self,
        rows: Sequence[Sequence[int]],
        *,
        packed_capacity: int | None = None,
        targets: Sequence[Sequence[float]] | None = None,
    ) -> list[Microbatch]:
        """Rows of token ids as this rank's microbatches. The next tokens of the last three quarters of a row count.

        Args:
            rows: Token ids of all data parallel ranks' rows, the same on every rank.
            packed_capacity: Tokens of a packed row, unless one sequence is longer; None for plain rows.
            targets: For a value model the value that each token should get, in rows as long as those of `rows`; the
                same positions count.

        Raises:
            UsageError: `targets` are not as many as the tokens.
        """
        if targets is not None and list(map(len, targets)) != list(map(len, rows)):
            raise UsageError("the targets are not as many as the tokens", hint="give one for each token of each row")
        from megatron.core import parallel_state

        from ckptkit.megatron.context_parallel.share import multiple_of
        from ckptkit.verification.training.batches import Sharing

        sharing = Sharing(
            ranks=parallel_state.get_data_parallel_world_size(),
            rank=parallel_state.get_data_parallel_rank(),
            multiple=self.grid.pp if self.grid.vpp > 1 else 1,
            split=multiple_of(self.grid.tp if self.run.sequence_parallel else 1),
            cut=self.run.cp > 1,
            capacity=packed_capacity,
        )
        return sharing.deal(rows, {}, targets)

    def save(self, folder: str | Path, iteration: int) -> Path:
        """Writes the weights as Megatron-LM's `--ckpt-format torch` does, without `args` and optimizer.

        All ranks call this and share the directory. `ckptkit convert FOLDER OUT --to hf --hf-reference MODEL` takes it
        back, with `--src-tp` and so on for the sizes of the grid (see `source`).

        The iteration appears as a whole, or not at all; one that is there already is refused.

        Args:
            folder: The checkpoint's root.
            iteration: Number of the iteration, 1 or more.

        Returns:
            The folder of the iteration.

        Raises:
            UsageError: The iteration is there already.
            StorageError: A rank cannot write; the same error on every rank.
        """
        import torch.distributed as dist

        from ckptkit.megatron import parallel
        from ckptkit.megatron.model import expected_tensors
        from ckptkit.verification.ranks.saving import save_iteration

        key = "model" if len(self.chunks) == 1 else "model{}"
        state = {key.format(number): dict(expected_tensors(chunk)) for number, chunk in enumerate(self.chunks)}
        state = {name: {key: value.detach().cpu() for key, value in part.items()} for name, part in state.items()}
        own = rank_folder((self.rank.pp, self.rank.tp, self.rank.ep), self.grid.pp, self.grid.ep)
        return save_iteration(
            Path(folder),
            iteration,
            None if self.replica else own,
            {"iteration": iteration, "checkpoint_version": 3.0, **state},
            first=dist.get_rank() == 0,
            agree=parallel.agree,
        )

    def source(self, reference: str | Path) -> dict[str, Any]:
        """Arguments with which `convert`, `export_adapter` and `open_checkpoint` read what `save` wrote.

        Args:
            reference: Hugging Face directory with config and tokenizer.
        """
        plain = Parallelism()
        sizes = {field.name: getattr(self.grid, field.name) for field in fields(StatedGrid)}
        given = {name: size for name, size in sizes.items() if size != getattr(plain, name)}
        alpha = {} if self.lora_alpha is None else {"lora_alpha": self.lora_alpha}
        return {"hf_reference": str(reference), "stored_grid": StatedGrid(**given), **alpha}

    def _trained(self, train_only: str | None) -> list[set[str]] | None:
        """For each chunk the names of its parameters that are trained; None for all."""
        from ckptkit.megatron.lora import is_factor
        from ckptkit.verification.training.candidate import trained_names
        from ckptkit.verification.training.names import matching

        factors = [{name for name, _ in chunk.named_parameters() if is_factor(name)} for chunk in self.chunks]
        if any(factors):
            if train_only is not None:
                raise UsageError("with an adapter only its factors are trained", hint="leave train_only out")
            return factors
        if train_only is None:
            return None
        return trained_names(self.checkpoint, set(matching(self.checkpoint, train_only)), self.grid, self.rank)


def load_megatron(
    path: str | Path,
    grid: Parallelism | None = None,
    *,
    dtype: str = "bfloat16",
    recompute: bool = False,
    sequence_parallel: bool = False,
    cp: int = 1,
    device: str | None = None,
    adapter: str | Path | None = None,
    source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
) -> LiveModel:
    """Loads a checkpoint of any format into megatron-core's modules, strictly, inside the caller's torchrun.

    Every rank calls this. A process group that is there is used, otherwise one is made; megatron-core's groups are
    made for the grid. Where there are more ranks than the grid has, they are data parallel replicas.

    Args:
        path: The checkpoint.
        grid: The grid; None for the checkpoint's own.
        dtype: torch's name of the dtype of parameters and activations.
        recompute: Keep only the inputs of layers, and compute their activations again backwards.
        sequence_parallel: Split the sequence over tensor parallel ranks outside of the linears.
        cp: Ranks that share out every sequence (context parallelism), by attention of ckptkit's own. They come between
            the tensor parallel ranks and the replicas, and hold the same part of the model.
        device: `cpu` or `cuda`; None takes CUDA where there is a device.
        adapter: A LoRA adapter of any format that is put beside the model's linears, or None.
        source: Facts about the checkpoint that it does not record itself.

    Returns:
        This rank's part.

    Raises:
        UsageError: The process was not started by torchrun, the ranks do not divide over the grid, or megatron-core's
            groups are there for another one.
        InputError: The checkpoint is damaged; the same error on every rank.
        UnsupportedError: No family converts it, or megatron-core has no module for it.
    """
    from ckptkit.verification.ranks.pool import inside_torchrun

    if not inside_torchrun():
        raise UsageError("load_megatron runs on the ranks of torchrun", hint="torchrun --nproc-per-node N program.py")
    if cp < 1:
        raise UsageError(f"cp must be at least 1, got {cp}")
    if dtype not in DTYPES:
        raise UsageError(f"no dtype {dtype!r}", hint=f"choose {', '.join(DTYPES)}")
    from ckptkit.megatron.compat import import_megatron

    import_megatron()
    import torch
    import torch.distributed as dist

    from ckptkit.megatron import parallel
    from ckptkit.megatron.replicas import seat
    from ckptkit.verification.ranks.worker import load_together

    part = None if adapter is None else AdapterJob(str(adapter))
    checkpoint = open_model(find(OPENER), str(path), source, part)
    grid = grid or checkpoint.grid
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    needed = RunConfig(grid=grid, cp=cp).world_size
    if world % needed:
        with_cp = f" with CP{cp}" if cp > 1 else ""
        raise UsageError(f"{world} ranks do not divide over {grid}{with_cp}, which has {needed}")
    check_grid(checkpoint.config, grid)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = parallel.device_of(kind, int(os.environ.get("LOCAL_RANK", rank)))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        dist.init_process_group(parallel.backend(where, local))
    if _groups_are_missing(grid, cp):
        parallel.create_groups(grid, device=where, cp=cp)
    run = RunConfig(
        grid=grid,
        cp=cp,
        dp=world // needed,
        sequence_parallel=sequence_parallel,
        device=kind,
        dtype=dtype,
        recompute=recompute,
    )
    job = LogitsJob(str(path), run, rows=[], output="", opening=source, adapter=part)
    pipeline = load_together(job, rank, where)
    here = seat(grid, run.copies, rank)
    alpha = None
    if part is not None:
        laid_out = open_laid_out(part, checkpoint, grid, find(OPENER))
        alpha = laid_out.scale * laid_out.record.rank
    return LiveModel(pipeline.chunks, grid, here.place, here.replica, where, pipeline, checkpoint, run, alpha)


def _groups_are_missing(grid: Parallelism, cp: int) -> bool:
    """Whether megatron-core has no groups yet.

    Raises:
        UsageError: It has some, for another grid.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return True
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    if sizes != (grid.tp, grid.pp, grid.ep, cp):
        here = "megatron-core's groups are there for TP{} x PP{} x EP{} x CP{}".format(*sizes)
        raise UsageError(f"{here}, not for {grid} with CP{cp}")
    return False
