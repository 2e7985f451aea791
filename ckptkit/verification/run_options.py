"""How a verification runs its two sides: one record, from the command line to the rank.

A new option is a field of `RunOptions` and of `RunKeywords`, its declaration in `cli/verify.py`, and what reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict, Unpack

from ckptkit.errors import UsageError, VerificationError
from ckptkit.megatron import DDP, DP_KINDS
from ckptkit.sharding.grid import Parallelism

LEVELS = ("structure", "weights", "logits")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 1e-4
TIMEOUT = 3600.0
"""Seconds that a run on Megatron ranks may take by default; a rank that dies is noticed at once."""

_AT_EVERY_LEVEL = {"device", "dtype", "tolerance", "replay", "dp_kind", "timeout"}
"""Options that a level without a forward pass accepts and ignores."""


class RunKeywords(TypedDict, total=False):
    """The fields of `RunOptions` as keyword arguments; None stands for the default."""

    device: str
    dtype: str
    tolerance: float | None
    replay: bool
    packed: bool
    sequence_parallel: bool
    dp: int
    dp_kind: str
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
        dtype: Type that the candidate computes in: `float32` (judged absolutely), `bfloat16` or `float16` (judged by
            the noise floor, see `results.NoiseFloor`).
        tolerance: Largest float32 error that passes, relative to the largest |logit|.
        replay: With experts: send the candidate's tokens to the experts that the reference chose, and judge routers by
            themselves.
        packed: Take the candidate's logits from packed inputs, sequences joined in one row without padding. Hidden
            states and routing stay those of plain rows.
        sequence_parallel: Split the candidate's sequence over its tensor parallel ranks outside of the linears.
        dp: Replicas of the candidate's grid; all must compute the same.
        dp_kind: Wrapper of the replicas: `ddp` (megatron-core's DistributedDataParallel) or `fsdp2`.
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
    dp: int = 1
    dp_kind: str = DDP
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

    @property
    def changes_candidate(self) -> bool:
        """Whether the candidate runs in another way than the reference."""
        return self.packed or self.sequence_parallel or self.dp > 1

    @property
    def grid(self) -> Parallelism | None:
        """The grid for a candidate without one, if any of its sizes is given."""
        if self.tp is None and self.pp is None and self.ep is None:
            return None
        return Parallelism(self.tp or 1, self.pp or 1, ep=self.ep or 1)

    def plain(self, dtype: str = "float32") -> RunOptions:
        """How the reference runs beside such a candidate: one replica, rows one by one."""
        return RunOptions(device=self.device, dtype=dtype, replay=self.replay, timeout=self.timeout)

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

    def check(self) -> None:
        """Whether there is something to run on.

        Raises:
            UsageError: There is no such device, dtype or kind of replicas.
            VerificationError: There is no CUDA device here.
        """
        if self.dtype not in DTYPES:
            raise UsageError(f"no logits in {self.dtype}", hint=f"choose {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise UsageError(f"no device {self.device!r}", hint=f"choose {' or '.join(DEVICES)}")
        if self.dp < 1:
            raise UsageError(f"--dp must be at least 1, got {self.dp}")
        if self.dp_kind not in DP_KINDS:
            raise UsageError(f"no data parallelism by {self.dp_kind!r}", hint=f"choose {' or '.join(DP_KINDS)}")
        if self.device == "cuda":
            _check_cuda()


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise VerificationError("no CUDA device is available", hint="run on cpu")
