"""What was asked for: the options of a verification, from the command line to the rank.

A new option is a field of `RunOptions` and of `RunKeywords`, its declaration in `cli/verify.py`, and what reads it. How
a side then runs is made of them once (`RunOptions.config`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict, Unpack

from ckptkit.errors import UsageError, VerificationError
from ckptkit.megatron import DDP, DP_KINDS
from ckptkit.megatron.run_config import CAPACITY, RunConfig
from ckptkit.sharding.grid import Parallelism

LEVELS = ("structure", "weights", "logits", "gradients", "training")
BACKWARD = ("gradients", "training")
"""Levels that run backwards."""
DEVICES = ("cpu", "cuda")
EXACT = ("float32", "float64")
"""Types that are judged absolutely."""
DTYPES = (*EXACT, "bfloat16", "float16")
PREDICTION_WEIGHT = 0.1
"""What the mean loss of layers of multi-token prediction counts beside the model's own: `mtp_loss_scaling_factor` of
megatron-core, whose default it is."""
LEARNING_RATES = {"adamw": 1e-3, "sgd": 1e-2}
"""Optimizer -> its learning rate by default."""
OPTIMIZERS = tuple(LEARNING_RATES)
STEPS = 4
"""Steps of the level training by default."""
TOLERANCE = 1e-4
TIMEOUT = 3600.0
"""Seconds that a run on Megatron ranks may take by default; a rank that dies is noticed at once."""

_AT_EVERY_LEVEL = {"device", "dtype", "tolerance", "replay", "dp_kind", "timeout"}
"""Options that a level without a forward pass accepts and ignores."""
_BACKWARD_ONLY = ("--recompute", "--train-steps", "--optimizer", "--lr", "--train-only")


class RunKeywords(TypedDict, total=False):
    """The fields of `RunOptions` as keyword arguments; None stands for the default."""

    device: str
    dtype: str
    tolerance: float | None
    replay: bool
    packed: bool
    sequence_parallel: bool
    cp: int
    dp: int
    dp_kind: str
    recompute: bool
    capacity: int
    train_steps: int
    optimizer: str
    lr: float | None
    train_only: str | None
    save_logits: str | Path | None
    timeout: float | None
    tp: int | None
    pp: int | None
    ep: int | None


@dataclass(frozen=True)
class RunOptions:
    """How the two sides run.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: Type that the candidate computes in: `float32` or `float64` (judged absolutely; in `float64` the
            reference computes in it, too), `bfloat16` or `float16` (judged by the noise floor, see
            `results.NoiseFloor`).
        tolerance: Largest error of an absolute judgement that passes: of a logit relative to the largest |logit|, of a
            gradient relative to the largest one of its tensor.
        replay: With experts: send the candidate's tokens to the experts that the reference chose, and judge routers by
            themselves.
        packed: Take the candidate's logits from packed inputs, sequences joined in one row without padding. Hidden
            states and routing stay those of plain rows.
        sequence_parallel: Split the candidate's sequence over its tensor parallel ranks outside of the linears.
        cp: Ranks that share out every sequence of the candidate (context parallelism).
        dp: Replicas of the candidate's grid; all must compute the same logits. Backwards they share out the rows.
        dp_kind: Wrapper of the replicas: `ddp` (megatron-core's DistributedDataParallel) or `fsdp2`.
        recompute: Keep only the inputs of layers when the candidate runs forwards, and compute their activations again
            backwards.
        capacity: Tokens that go through the candidate at a time, unless one row is longer; packed, in one row.
        train_steps: Steps of the level training; 0 for none.
        optimizer: Their optimizer, `adamw` or `sgd`, with torch's defaults.
        lr: Their learning rate, or None for the optimizer's entry in `LEARNING_RATES`.
        train_only: Pattern (`fnmatch`) of the Hugging Face names of the parameters that are trained, or None for all.
        save_logits: Safetensors file for `reference` and `candidate`, float32 [batch, seq, vocab], or None.
        timeout: Seconds that a run of a Megatron side may take, loading included, and that a collective may wait.
        tp: Tensor parallel size for a candidate without a grid of its own (a Hugging Face directory, the packed format,
            a module's state), which megatron-core then runs. If all three sizes are None, the candidate runs as it is.
        pp: Pipeline parallel size of that grid.
        ep: Expert parallel size of that grid.
    """

    device: str = "cpu"
    dtype: str = "float32"
    tolerance: float = TOLERANCE
    replay: bool = True
    packed: bool = False
    sequence_parallel: bool = False
    cp: int = 1
    dp: int = 1
    dp_kind: str = DDP
    recompute: bool = False
    capacity: int = CAPACITY
    train_steps: int = 0
    optimizer: str = OPTIMIZERS[0]
    lr: float | None = None
    train_only: str | None = None
    save_logits: str | None = None
    timeout: float = TIMEOUT
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None

    @classmethod
    def of(cls, **given: Unpack[RunKeywords]) -> RunOptions:
        """The record with defaults where an argument is missing or None."""
        values = {name: value for name, value in given.items() if value is not None}
        if (path := given.get("save_logits")) is not None:
            values["save_logits"] = str(path)
        return cls(**values)  # type: ignore[arg-type]  # RunKeywords has the same types, a test compares them

    def config(self, grid: Parallelism, window: int) -> RunConfig:
        """How a side runs.

        Args:
            grid: The side's grid.
            window: Its widest sliding window, see `RunConfig`.
        """
        return RunConfig(
            grid=grid,
            cp=self.cp,
            dp=self.dp,
            dp_kind=self.dp_kind,
            sequence_parallel=self.sequence_parallel,
            packed=self.packed,
            capacity=self.capacity,
            window=window,
            device=self.device,
            dtype=self.dtype,
            recompute=self.recompute,
        )

    @property
    def grid(self) -> Parallelism | None:
        """The grid for a candidate without one, if any of its sizes is given."""
        if self.tp is None and self.pp is None and self.ep is None:
            return None
        return Parallelism(self.tp or 1, self.pp or 1, ep=self.ep or 1)

    @property
    def exact_dtype(self) -> str:
        """The type in which the reference computes what counts."""
        return self.dtype if self.dtype in EXACT else "float32"

    @property
    def rate(self) -> float:
        """The learning rate."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    def plain(self, dtype: str | None = None) -> RunOptions:
        """How the reference runs beside such a candidate: one replica, rows one by one, in the exact type by default.

        What is trained, and how, is the same on both sides.
        """
        return RunOptions(
            device=self.device,
            dtype=dtype or self.exact_dtype,
            replay=self.replay,
            timeout=self.timeout,
            train_steps=self.train_steps,
            optimizer=self.optimizer,
            lr=self.lr,
            train_only=self.train_only,
        )

    def in_dtype(self, dtype: str) -> RunOptions:
        """The same in another dtype."""
        return RunOptions(**{**vars(self), "dtype": dtype})

    def for_logits_only(self) -> list[str]:
        """Options that were given and have a meaning at the level logits only, as the command line spells them."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if field.name not in _AT_EVERY_LEVEL and getattr(self, field.name) != field.default
        ]

    def for_backward_only(self) -> list[str]:
        """Options that were given and have a meaning only where the sides run backwards, by name."""
        return [name for name in self.for_logits_only() if name in _BACKWARD_ONLY]

    def check(self) -> None:
        """Whether there is something to run on.

        Raises:
            UsageError: There is no such device, dtype, kind of replicas or optimizer, or a number is out of range.
            VerificationError: There is no CUDA device here.
        """
        if self.dtype not in DTYPES:
            raise UsageError(f"no logits in {self.dtype}", hint=f"choose {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise UsageError(f"no device {self.device!r}", hint=f"choose {' or '.join(DEVICES)}")
        for name, size in (("--cp", self.cp), ("--dp", self.dp)):
            if size < 1:
                raise UsageError(f"{name} must be at least 1, got {size}")
        if self.dp_kind not in DP_KINDS:
            raise UsageError(f"no data parallelism by {self.dp_kind!r}", hint=f"choose {' or '.join(DP_KINDS)}")
        if self.capacity < 1:
            raise UsageError(f"--capacity must be at least 1, got {self.capacity}")
        if self.train_steps < 0:
            raise UsageError(f"--train-steps must be at least 1, got {self.train_steps}")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"no optimizer {self.optimizer!r}", hint=f"choose {' or '.join(OPTIMIZERS)}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"--lr must be a positive number, got {self.lr:g}")
        if self.device == "cuda":
            _check_cuda()


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise VerificationError("no CUDA device is available", hint="run on cpu")
