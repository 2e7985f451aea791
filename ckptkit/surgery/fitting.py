"""Adapters fitted in closed form: the linear map that takes one model's residual stream to the other's.

What enters layer N of the narrow model is to become what enters layer L - M of the wide one, for the same tokens. The
first position of a sequence is left out of the fit: its activations are so much larger than all others that it alone
would decide about the map. Source of the idea: Pan et al., "Stitchable Neural Networks" (2023), and for maps between
residual streams Chen et al., "Transferring Linear Features Across Language Models With Model Stitching" (2025).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import InputError, UsageError
from ckptkit.steps import Counted, Step
from ckptkit.surgery import matrices
from ckptkit.surgery.calibration import Calibration, read_sequences, split
from ckptkit.surgery.initialisation import Initialised, Request, realise

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]

RIDGE = 0.01
"""Default strength of `ridge`."""
BLOCK = 4096
"""Tokens whose products are computed at a time."""


@dataclass(frozen=True)
class Moments:
    """The sums over all tokens that a fit needs.

    Attributes:
        gram: X^T X, fp64 [narrow, narrow].
        cross: X^T Y, fp64 [narrow, wide].
        tokens: Number of rows of X and Y.
    """

    gram: Array
    cross: Array
    tokens: int


Solver = Callable[[Moments], Array]
"""Moments -> the map, fp64 [wide, narrow]."""


def moments(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], device: str = "cpu") -> Moments:
    """Sums over pairs of [tokens, narrow] and [tokens, wide] in fp64.

    Args:
        pairs: (input of the adapter, wanted output); at least one pair.
        device: Where to compute.
    """
    import torch

    gram = cross = None
    tokens = 0
    for x, y in pairs:
        for start in range(0, len(x), BLOCK):
            one, other = (part[start : start + BLOCK].to(device, torch.float64) for part in (x, y))
            gram = one.T @ one if gram is None else gram.addmm_(one.T, one)
            cross = one.T @ other if cross is None else cross.addmm_(one.T, other)
            tokens += len(one)
    assert gram is not None and cross is not None
    return Moments(gram.cpu().numpy(), cross.cpu().numpy(), tokens)


def solve_lstsq(sums: Moments) -> Array:
    """The map of least squares, of all such maps the smallest."""
    values, vectors = np.linalg.eigh(sums.gram)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    vectors = vectors[:, kept]
    found: Array = ((vectors / values[kept]) @ (vectors.T @ sums.cross)).T
    return found


def solve_ridge(sums: Moments, strength: float) -> Array:
    """Least squares with a penalty on the map, of `strength` times the mean square of the input's coordinates."""
    size = len(sums.gram)
    penalty = strength * np.trace(sums.gram) / size
    found: Array = np.linalg.solve(sums.gram + penalty * np.eye(size), sums.cross).T
    return found


def solve_procrustes(sums: Moments) -> Array:
    """The best map that keeps angles and scales all lengths alike.

    Source: Schoenemann, "A generalized solution of the orthogonal Procrustes problem" (1966), with the scale of
    Schoenemann and Carroll (1970). It needs at least as many outputs as inputs.
    """
    left, values, right = np.linalg.svd(sums.cross.T, full_matrices=False)
    scale = values.sum() / np.trace(sums.gram)
    found: Array = scale * (left @ right)
    return found


@dataclass(frozen=True)
class Quality:
    """How well a map does on some tokens.

    Attributes:
        tokens: How many.
        residual: Norm of the error over the norm of the target; 1 is what zeros would give.
        r2: Share of the variance that is explained, or None if the target does not vary.
        norm_ratio: Norm of the output over the norm of the target.
    """

    tokens: int
    residual: float
    r2: float | None
    norm_ratio: float


def quality(weight: Array, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: str = "cpu") -> Quality:
    """How well a map [wide, narrow] takes X to Y.

    Args:
        weight: The map.
        pairs: [tokens, narrow] and [tokens, wide].
        device: Where to compute, in fp64.
    """
    import torch

    matrix = torch.from_numpy(weight).to(device, torch.float64)
    tokens, mean = 0, torch.zeros(len(weight), dtype=torch.float64, device=device)
    error = size = made = 0.0
    for x, y in pairs:
        target, output = y.to(device, torch.float64), x.to(device, torch.float64) @ matrix.T
        error += float((output - target).square().sum())
        made += float(output.square().sum())
        size += float(target.square().sum())
        mean += target.sum(0)
        tokens += len(target)
    # Of the same numbers, computed apart, a difference below this is rounding.
    variance = size - float(mean.square().sum()) / max(tokens, 1)
    r2 = 1 - error / variance if variance > 1e-9 * size else None
    size = size or 1.0
    return Quality(tokens, (error / size) ** 0.5, r2, (made / size) ** 0.5)


@dataclass(frozen=True)
class Fit:
    """A fitted map.

    Attributes:
        weight: fp64 [wide, narrow].
        fitted: Quality on the sequences of the fit.
        held_out: Quality on the sequences held out, or None if there was only one sequence.
        first: Quality at the first position of all sequences, which the fit does not use.
    """

    weight: Array
    fitted: Quality
    held_out: Quality | None
    first: Quality

    def recipe(self) -> dict[str, Any]:
        """The qualities as JSON values."""
        found = {"fitted": self.fitted, "held_out": self.held_out, "first_position": self.first}
        return {name: {k: _rounded(v) for k, v in asdict(q).items()} for name, q in found.items() if q is not None}

    def notes(self, name: str, narrow: int) -> list[str]:
        """Notes for the user."""
        told = [("fitted on", self.fitted), ("held out", self.held_out), ("at the first position", self.first)]
        texts = [
            f"{q.tokens} tokens {what}: residual {q.residual:.3f}, R^2 {'-' if q.r2 is None else f'{q.r2:.3f}'},"
            f" norm ratio {q.norm_ratio:.2f}"
            for what, q in told
            if q is not None
        ]
        few = f"only {self.fitted.tokens} tokens for {narrow} inputs: take more, or --adapter-init ridge"
        return [f"{name}: {'; '.join(texts)}", *([few] if self.fitted.tokens < 2 * narrow else [])]


def _rounded(value: float | int | None) -> float | int | None:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def fit(solve: Solver, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], held: int, device: str = "cpu") -> Fit:
    """Fits a map to the streams of two models.

    Args:
        solve: Computes the map from the sums.
        xs: Inputs of the adapter, for each sequence [tokens, narrow], two tokens or more.
        ys: Wanted outputs, [tokens, wide].
        held: Number of sequences at the end that are held out.
        device: Where to compute, other than the solution.

    Raises:
        InputError: A stream is not finite.
    """
    if not all(bool(stream.isfinite().all()) for stream in (*xs, *ys)):
        raise InputError("the models' activations on the calibration are not all finite")
    rest = [(x[1:], y[1:]) for x, y in zip(xs, ys, strict=True)]
    count = len(rest) - held
    weight = solve(moments(rest[:count], device))
    first = [(x[:1], y[:1]) for x, y in zip(xs, ys, strict=True)]
    unseen = quality(weight, rest[count:], device) if held else None
    return Fit(weight, quality(weight, rest[:count], device), unseen, quality(weight, first, device))


def lstsq(request: Request) -> Initialised:
    """Least squares; for the errors see `_fitted`."""
    return _fitted("lstsq", request, solve_lstsq, {})


def ridge(request: Request) -> Initialised:
    """Ridge regression, `ridge:STRENGTH`; for the errors see `_fitted`."""
    try:
        strength = float(request.argument) if request.argument else RIDGE
    except ValueError:
        strength = -1.0
    if not 0 < strength < float("inf"):
        raise UsageError(f"--adapter-init ridge:{request.argument}", hint="the strength is a positive number")
    return _fitted("ridge", request, lambda sums: solve_ridge(sums, strength), {"strength": strength})


def procrustes(request: Request) -> Initialised:
    """A scaled rotation; for the errors see `_fitted`.

    Raises:
        UsageError: The wide stream has fewer coordinates.
    """
    if request.wide < request.narrow:
        raise UsageError(f"--adapter-init procrustes: {request.narrow} coordinates do not fit into {request.wide}")
    return _fitted("procrustes", request, solve_procrustes, {})


def _fitted(name: str, request: Request, solve: Solver, parameters: dict[str, Any]) -> Initialised:
    """The adapter that a fit gives.

    Raises:
        UsageError: There is no calibration, no device, or as `realise`.
        InputError: The calibration or a model cannot be read, or activations are not finite.
    """
    calibration = Calibration.of(request.options, name)
    first, last = request.first, request.last
    assert first is not None and last is not None
    shape = matrices.zeros(request.wide, request.narrow)
    realise(request, shape)  # refuses an impossible adapter before the models run
    told = {"name": name, **parameters, **_told(calibration)}
    sequences = read_sequences(calibration, first)
    if request.options.get("dry_run"):
        tokens, widths = sum(map(len, sequences)), request.narrow + request.wide
        streams = f"its streams take {tokens * widths * 4 / 1e9:.1f} GB of memory ({tokens} tokens)"
        return Initialised(
            realise(request, shape), told, [f"{name}: fitted when it is built, not in a dry run; {streams}"]
        )
    found = _run(request, first, last, solve, sequences, calibration.device)
    weight = found.weight.astype(np.float32)
    digest = hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()
    made = realise(request, matrices.of_array(weight, f"{name}({digest})"))
    return Initialised(made, {**told, **found.recipe()}, found.notes(name, request.narrow))


def _told(calibration: Calibration) -> dict[str, Any]:
    facts = {"calibration_sha256": calibration.sha256, "tokens": calibration.tokens, "length": calibration.length}
    return {**facts, "device": calibration.device}


def _run(
    request: Request, first: Checkpoint, last: Checkpoint, solve: Solver, sequences: list[list[int]], device: str
) -> Fit:
    from ckptkit.surgery.activations import residual_stream

    used, held = split(sequences)
    layers = (request.num_first, last.config.num_layers - request.num_last)
    tokens = sum(map(len, sequences))
    told = (
        Counted(f"{tokens:,} tokens through the {name} model", count, "layers", request.tell)
        for name, count in zip(("narrow", "wide"), layers, strict=True)
    )
    xs, ys = (
        residual_stream(model, count, [*used, *held], device=device, done=counted.add)
        for model, count, counted in zip((first, last), layers, told, strict=True)
    )
    request.tell(Step("fitting the adapter"))
    return fit(solve, xs, ys, len(held), device)
