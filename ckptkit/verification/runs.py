"""One side's run over the tokens, and the files with its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import StorageError, VerificationError
from ckptkit.megatron.run_config import RunConfig
from ckptkit.verification.tokens import group_by_length

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Run:
    """The results of a side's run over the tokens.

    Attributes:
        rows: Token ids that went in, greedy continuation included.
        logits: Safetensors file of the logits: `logits.<length>` [rows of that length, length, vocabulary], fp32.
        again: Like `logits`, of the same run with attention computed in another way; or None.
        probes: Directory of hidden states, or None.
        routing: Directory of what routers saw and chose, or None.
        feeds: Probe -> names of the tensors that feed it, in the side's own spelling.
        modules: Class of module -> how many of them ran.
        versions: Package -> version.
        seconds: Phase -> wall-clock seconds.
        seen: Facts that a `what_ran.Observer` recorded on each rank, in order; empty for transformers.
        config: How it ran.
    """

    rows: list[list[int]]
    logits: Path
    again: Path | None = None
    probes: Path | None = None
    routing: Path | None = None
    feeds: dict[str, list[str]] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    seen: list[dict[str, Any]] = field(default_factory=list)
    config: RunConfig = RunConfig()  # noqa: RUF009  frozen


def run_by_length(
    rows: Sequence[Sequence[int]],
    extend: Callable[[torch.Tensor], torch.Tensor],
    forward: Callable[[torch.Tensor], torch.Tensor | None],
) -> tuple[list[list[int]], dict[int, torch.Tensor]]:
    """Run rows of one length at a time.

    Args:
        rows: Token ids.
        extend: Appends the greedy continuation to token ids, int64 [batch, length].
        forward: Logits [batch, length, vocabulary] of such, or None where others hold them.

    Returns:
        The rows with their continuation, and the logits by length.
    """
    import torch

    extended, groups = [list(row) for row in rows], {}
    for numbers in group_by_length(rows).values():
        tokens = extend(torch.tensor([rows[number] for number in numbers]))
        for number, row in zip(numbers, tokens.tolist(), strict=True):
            extended[number] = row
        logits = forward(tokens)
        if logits is not None:
            groups[tokens.size(1)] = logits
    return extended, groups


def tokens_to_run(rows: Sequence[Sequence[int]], greedy: int, *, again: bool = False) -> int:
    """Tokens that go through a model in `run_by_length`.

    Args:
        rows: Token ids.
        greedy: Tokens that `extend` appends to each row, one by one.
        again: Whether the rows run once more, with their continuation.
    """
    passes = sum(len(row) * (greedy + 1) for row in rows) + len(rows) * greedy * (greedy + 1) // 2
    return passes + again * sum(len(row) + greedy for row in rows)


def save_logits(path: str | Path, groups: Mapping[int, torch.Tensor]) -> None:
    """Write logits, fp32 [rows, length, vocabulary] for each length."""
    from safetensors.torch import save_file

    save_file({f"logits.{length}": logits.contiguous() for length, logits in groups.items()}, str(path))


@contextmanager
def row_logits(run: Run) -> Iterator[list[Any]]:
    """Each row's logits as a lazy slice: `rows[i][a:b]` reads [b - a, vocabulary] from the file.

    Raises:
        VerificationError: The file is not there, as on a machine that does not share the directory.
    """
    from safetensors import safe_open

    if not run.logits.is_file():
        raise VerificationError("the logits are missing", where=run.logits, hint="all ranks must share the directory")
    with safe_open(str(run.logits), framework="pt") as file:
        slices: list[Any] = [None] * len(run.rows)
        for length, numbers in group_by_length(run.rows).items():
            whole = file.get_slice(f"logits.{length}")
            for place, number in enumerate(numbers):
                slices[number] = _Row(whole, place)
        yield slices


def keep_logits(path: Path, reference: Run, candidate: Run, lengths: list[int]) -> None:
    """Write `reference` and `candidate`, fp32 [rows, longest length, vocabulary], to one safetensors file.

    Positions past a shorter row's end hold NaN; the greedy continuation is left out.

    Args:
        path: File to write.
        reference: One run.
        candidate: The other.
        lengths: How many positions of each row to keep.

    Raises:
        StorageError: It cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept = {}
    for name, run in (("reference", reference), ("candidate", candidate)):
        with row_logits(run) as rows:
            kept[name] = torch.full((len(rows), max(lengths), rows[0].vocab_size), torch.nan)
            for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                kept[name][index, :length] = row[0:length]
    try:
        save_file(kept, str(path))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write the logits ({error})", where=path) from error


class _Row:
    """One row of a group's logits."""

    def __init__(self, whole: Any, place: int) -> None:
        self.whole, self.place = whole, place
        _, self.length, self.vocab_size = whole.get_shape()

    def __getitem__(self, positions: slice) -> torch.Tensor:
        part: torch.Tensor = self.whole[self.place : self.place + 1, positions.start : positions.stop]
        return part[0]


def save_probes(folder: Path, states: dict[str, torch.Tensor], rank: int = 0) -> None:
    """Write what one rank recorded, fp32 [positions, hidden] for each place."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(states, str(folder / f"rank_{rank}.safetensors"))


def read_probes(run: Run) -> dict[str, list[torch.Tensor]]:
    """All hidden states of a run: place -> the state on each rank of its stage, which should all be the same."""
    from safetensors.torch import load_file

    assert run.probes is not None
    states: dict[str, list[torch.Tensor]] = {}
    for path in sorted(run.probes.glob("*.safetensors")):
        for place, state in load_file(path).items():
            states.setdefault(place, []).append(state)
    return states
