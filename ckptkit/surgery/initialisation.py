"""Where the adapter of a split Llama starts: a registry of initialisations, and those that need no data.

An initialisation gives the matrices of an adapter, made row by row (`matrices.py`). Most give one linear map and leave
it to `realise` to write it as the adapter that was asked for; one of two matrices then computes the same map at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UsageError
from ckptkit.families.split_llama import LINEAR, RELU
from ckptkit.formats import safetensors
from ckptkit.io.reading import hash_tensor, read_tensor
from ckptkit.steps import Tell, nobody
from ckptkit.surgery import matrices
from ckptkit.surgery.matrices import Matrix
from ckptkit.tensors import Tensor

FIRST_MATRIX, SECOND_MATRIX = "linear_1", "linear_2"

INITIALISATIONS: dict[str, str] = {
    "kaiming": "ckptkit.surgery.initialisation:kaiming",
    "orthogonal": "ckptkit.surgery.initialisation:orthogonal",
    "identity-pad": "ckptkit.surgery.initialisation:identity_pad",
    "procrustes": "ckptkit.surgery.fitting:procrustes",
    "lstsq": "ckptkit.surgery.fitting:lstsq",
    "ridge": "ckptkit.surgery.fitting:ridge",
    "file": "ckptkit.surgery.initialisation:from_file",
}
"""Name -> `module:function`, which takes a `Request` and gives an `Initialised`; imported when it is used."""

WITH_ARGUMENT = ("ridge", "file")
"""Initialisations that take an argument after a colon."""

FITTED = ("lstsq", "ridge", "procrustes")
"""Initialisations that need calibration text and both models."""


@dataclass(frozen=True)
class Request:
    """An adapter that is to be initialised.

    Attributes:
        kind: `linear`, `two-linear` or `mlp`.
        narrow: Width before it.
        wide: Width after it.
        seed: Seed of a random adapter.
        argument: The text after the name and a colon, e.g. the PATH of `file:PATH`.
        first: The narrow model, whole; None where there is none.
        last: The wide model, whole; None where there is none.
        num_first: Layers taken from the front of `first`.
        num_last: Layers taken from the end of `last`.
        options: Options of single initialisations: calibration text, device, ...
        tell: Told what runs where an initialisation takes long.
    """

    kind: str
    narrow: int
    wide: int
    seed: int = 0
    argument: str = ""
    first: Checkpoint | None = None
    last: Checkpoint | None = None
    num_first: int = 0
    num_last: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    tell: Tell = nobody


@dataclass(frozen=True)
class Initialised:
    """The matrices of an adapter.

    Attributes:
        matrices: `linear_1` [wide, narrow], and `linear_2` [wide, wide] unless the adapter is linear.
        recipe: JSON values that say how they came about, for config.json.
        notes: Sentences a user should read.
    """

    matrices: dict[str, Matrix]
    recipe: dict[str, Any]
    notes: list[str] = field(default_factory=list)


Initialisation = Callable[[Request], Initialised]


def initialise(name: str, request: Request) -> Initialised:
    """The matrices that an initialisation gives.

    Args:
        name: A key of `INITIALISATIONS`.
        request: The adapter.

    Raises:
        UsageError: There is no such initialisation, or it cannot make this adapter.
        InputError: The file that it reads is damaged.
    """
    if name not in INITIALISATIONS:
        raise UsageError(f"--adapter-init {name}", hint=f"one of {', '.join(INITIALISATIONS)}")
    if request.argument and name not in WITH_ARGUMENT:
        hint = f"{' and '.join(WITH_ARGUMENT)} do; drop the colon and what follows"
        raise UsageError(f"--adapter-init {name}:{request.argument}: {name} takes no argument", hint=hint)
    given = request.options
    if name not in FITTED and any(given.get(key) is not None for key in ("calibration", "tokens", "length")):
        hint = f"--adapter-init {', '.join(FITTED)} are fitted"
        raise UsageError(f"--adapter-init {name} is not fitted to a calibration", hint=hint)
    module, _, function = INITIALISATIONS[name].partition(":")
    found: Initialisation = getattr(import_module(module), function)
    result = found(request)
    wide, narrow = request.wide, request.narrow
    expected = {FIRST_MATRIX: (wide, narrow), SECOND_MATRIX: (wide, wide)}
    if request.kind == LINEAR:
        del expected[SECOND_MATRIX]
    shapes = {key: matrix.shape for key, matrix in result.matrices.items()}
    if shapes != expected:
        raise InputError(f"the adapter's matrices are {shapes}, it needs {expected}", where=f"--adapter-init {name}")
    return result


def realise(request: Request, linear: Matrix) -> dict[str, Matrix]:
    """A linear map [wide, narrow] as an adapter that computes it.

    With a ReLU in between it is exact: x = relu(x) - relu(-x), so W x = [W, -W] relu([I; -I] x).

    Raises:
        UsageError: The ReLU has less than two units for each input.
    """
    wide, narrow = request.wide, request.narrow
    if request.kind == LINEAR:
        return {FIRST_MATRIX: linear}
    if request.kind != RELU:
        return {FIRST_MATRIX: linear, SECOND_MATRIX: matrices.identity(wide, wide)}
    if wide < 2 * narrow:
        raise UsageError(
            f"an mlp adapter starts as a linear map only if the last layers are at least twice as wide as the first"
            f" ({wide} and {narrow})",
            hint="--adapter linear or two-linear, or --adapter-init kaiming",
        )
    one, rest = matrices.identity(narrow, narrow), wide - 2 * narrow
    return {
        FIRST_MATRIX: matrices.above([one, matrices.negative(one), matrices.zeros(rest, narrow)]),
        SECOND_MATRIX: matrices.beside([linear, matrices.negative(linear), matrices.zeros(wide, rest)]),
    }


def _random(request: Request, name: str) -> list[str]:
    return [
        f"the adapter is random ({name}, seed {request.seed}): the model says nothing sensible before it is trained"
    ]


def kaiming(request: Request) -> Initialised:
    """What `torch.nn.init.kaiming_uniform_` draws by default: uniform within sqrt(6 / inputs), matrix by matrix."""
    shapes = {FIRST_MATRIX: request.narrow} | ({} if request.kind == LINEAR else {SECOND_MATRIX: request.wide})
    made = {
        key: matrices.uniform(request.wide, inputs, sqrt(6 / inputs), request.seed, stream)
        for stream, (key, inputs) in enumerate(shapes.items())
    }
    return Initialised(made, {"name": "kaiming", "seed": request.seed}, _random(request, "kaiming"))


def orthogonal(request: Request) -> Initialised:
    """A random map that keeps lengths and angles.

    Raises:
        UsageError: As `realise`.
    """
    made = realise(request, matrices.orthogonal(request.wide, request.narrow, request.seed))
    return Initialised(made, {"name": "orthogonal", "seed": request.seed}, _random(request, "orthogonal"))


def identity_pad(request: Request) -> Initialised:
    """The narrow stream in the first coordinates of the wide one, zeros in the others.

    Raises:
        UsageError: The wide stream has fewer coordinates, or as `realise`.
    """
    if request.wide < request.narrow:
        raise UsageError(f"--adapter-init identity-pad: {request.narrow} coordinates do not fit into {request.wide}")
    made = realise(request, matrices.identity(request.wide, request.narrow))
    note = "the adapter is a padded identity: untrained, the model says nothing sensible"
    return Initialised(made, {"name": "identity-pad"}, [note])


_ROWS = 512
"""Rows of a stored matrix that are looked at a time."""
_SINGLE = ("model.adapter.weight", "adapter.weight", "weight")
_DOUBLE = tuple(
    tuple(f"{prefix}{stem}_{number}.weight" for number in (1, 2))
    for prefix, stem in (("model.", "adapter_linear"), ("", "adapter_linear"), ("", "linear"))
)


def from_file(request: Request) -> Initialised:
    """The adapter in a safetensors file: a linear map for any kind of adapter, or the two matrices of one.

    The file may hold other tensors as well: that of another split Llama will do.

    Raises:
        UsageError: No file is named, or the adapter is linear and the file holds two matrices, or as `realise`.
        InputError: The file is not there, is damaged, or holds no adapter.
    """
    path = Path(request.argument)
    if not request.argument:
        raise UsageError("--adapter-init file", hint="name the file: file:PATH of a safetensors file")
    if not path.is_file():
        raise InputError("no such file", where=path, hint="--adapter-init file:PATH names a safetensors file")
    stored = safetensors.tensors_of(path, safetensors.read_header(path))
    single = [name for name in _SINGLE if name in stored]
    double = [pair for pair in _DOUBLE if set(pair) <= stored.keys()]
    if not single and not double:
        known = ", ".join((*_SINGLE, " and ".join(_DOUBLE[0])))
        raise InputError("holds no adapter", where=path, hint=f"it must hold one of {known}")
    names = double[0] if double else (single[0],)
    if double and request.kind == LINEAR:
        raise UsageError(f"{path} holds two matrices", hint="--adapter two-linear or mlp")
    shas = {name: hash_tensor(stored[name]) for name in names}
    read = [_stored(name, stored[name], shas[name], path) for name in names]
    made = dict(zip((FIRST_MATRIX, SECOND_MATRIX), read, strict=True)) if double else _map(request, read[0], path)
    return Initialised(made, {"name": "file", "path": request.argument, "sha256": shas})


def _map(request: Request, matrix: Matrix, path: Path) -> dict[str, Matrix]:
    expected = (request.wide, request.narrow)
    if matrix.shape != expected:
        raise InputError(f"the adapter is {list(matrix.shape)}, the models need {list(expected)}", where=path)
    return realise(request, matrix)


def _stored(name: str, tensor: Tensor, sha256: str, path: Path) -> Matrix:
    if len(tensor.shape) != 2 or not tensor.dtype.is_float:
        raise InputError(f"{name} is {tensor.dtype}{list(tensor.shape)}, not a matrix of numbers", where=path)
    height, width = tensor.shape

    def rows(start: int, stop: int) -> matrices.Rows:
        data = read_tensor(tensor.rows(start, stop).astype(DTYPES["F32"]))
        return data.view(np.float32).reshape(stop - start, width)

    for start in range(0, height, _ROWS):
        if not np.isfinite(rows(start, min(start + _ROWS, height))).all():
            raise InputError(f"{name} has values that are not finite", where=path)

    return Matrix((height, width), rows, f"file({sha256})", (str(path),))
