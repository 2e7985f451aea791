"""Routing that an engine recorded: which experts its tokens went to."""

from __future__ import annotations

import base64
import binascii
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np

NPY = b"\x93NUMPY"
HINT = "record it with the engine's own encoding: base64 of an .npy file, or of int32"


@dataclass(frozen=True)
class Recorded:
    """Experts as they were recorded.

    Attributes:
        experts: int32 [tokens, layers, experts per token], or flat where the recording does not say its shape.
        forwarded: Tokens that went through the engine: all of the turn but the last.
        stated: The first token that is recorded, or None where the recording does not say.
        where: Its place, for errors.
    """

    experts: np.ndarray[Any, Any]
    forwarded: int
    stated: int | None
    where: str

    def shaped(self, layers: tuple[int, ...], num_layers: int, topk: int, num_experts: int) -> Shaped:
        """The experts for a model.

        Args:
            layers: Its layers with experts, from 0.
            num_layers: All its layers; some engines record something for each of them.
            topk: Experts per token.
            num_experts: Experts of a layer.

        Raises:
            InputError: The recording is not of such a model, or was never filled in.
        """
        experts = self.experts
        if experts.ndim == 1:
            experts = self._folded(len(layers), num_layers, topk)
        tokens, recorded, width = experts.shape
        if width != topk or recorded not in (len(layers), num_layers):
            raise InputError(
                f"routed_experts is [{tokens}, {recorded}, {width}], but the model has {topk} experts per token in"
                f" {len(layers)} layers",
                where=self.where,
            )
        if recorded == num_layers:
            experts = experts[:, list(layers)]
        start = self._start(tokens)
        if experts.size and (experts.min() < 0 or experts.max() >= num_experts):
            worst = int(experts.max() if experts.max() >= num_experts else experts.min())
            raise InputError(f"routed_experts names expert {worst} of {num_experts}", where=self.where)
        self._check_filled(experts)
        return Shaped(start, experts)

    def _folded(self, moe_layers: int, num_layers: int, topk: int) -> np.ndarray[Any, Any]:
        """A recording without a shape, as that which its length allows."""
        wanted = None if self.stated is None else self.forwarded - self.stated
        for layers in (moe_layers, num_layers):
            tokens, rest = divmod(self.experts.size, layers * topk)
            if not rest and (tokens == wanted if wanted is not None else 0 < tokens <= self.forwarded):
                return self.experts.reshape(tokens, layers, topk)
        raise InputError(
            f"routed_experts has {self.experts.size:,} numbers, which are not {topk} for each of {moe_layers} layers"
            f" and {self.forwarded} tokens",
            where=self.where,
        )

    def _start(self, tokens: int) -> int:
        """The first token that is recorded."""
        start = self.forwarded - tokens if self.stated is None else self.stated
        if start < 0 or start + tokens != self.forwarded:
            raise InputError(
                f"routed_experts has {tokens} tokens from {start} on, but {self.forwarded} went through the engine",
                where=self.where,
            )
        return start

    def _check_filled(self, experts: np.ndarray[Any, Any]) -> None:
        """Whether the engine filled its buffer in: a token's experts differ from one another."""
        import numpy as np

        if experts.size and not experts.any():
            what = "routed_experts is zero everywhere: the engine's kernels went past its recording"
            raise InputError(what, where=self.where, hint="record it with kernels that fill it in")
        ordered = np.sort(experts, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        if twice.any():
            token, layer = (int(number) for number in np.argwhere(twice)[0])
            raise InputError(
                f"routed_experts sends token {token} twice to one expert at the {layer + 1}. recorded layer: it was not"
                " filled in",
                where=self.where,
            )


@dataclass(frozen=True)
class Shaped:
    """Experts of the tokens from `start` on, int32 [tokens, layers with experts, experts per token]."""

    start: int
    experts: np.ndarray[Any, Any]


def read_recorded(value: Any, forwarded: int, stated: Any, where: str) -> Recorded:
    """Reads a recording: base64 of an .npy file or of int32, or nested lists.

    Args:
        value: What stands in the record.
        forwarded: Tokens that went through the engine.
        stated: The first token that is recorded, or None.
        where: Place, for errors.

    Raises:
        InputError: It is none of these.
    """
    import numpy as np

    if stated is not None and (type(stated) is not int or not 0 <= stated <= forwarded):
        raise InputError(f"the routing begins at {stated!r} of {forwarded} tokens", where=where)
    if isinstance(value, str):
        experts = _decoded(value, where)
    else:
        try:
            experts = np.array(value)
        except ValueError:
            raise InputError("routed_experts is no list of equal lists", where=where, hint=HINT) from None
    if experts.dtype.kind not in "iu" or experts.ndim not in (1, 3):
        raise InputError(
            f"routed_experts has {experts.ndim} axes of {experts.dtype}; it should have integers [tokens, layers,"
            " experts per token]",
            where=where,
            hint=HINT,
        )
    if experts.size and (int(experts.max()) >= 2**31 or int(experts.min()) < -(2**31)):
        raise InputError("routed_experts has numbers that are no experts", where=where)
    return Recorded(experts.astype(np.int32), forwarded, stated, where)


def _decoded(text: str, where: str) -> np.ndarray[Any, Any]:
    """Numbers in base64."""
    import numpy as np

    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("routed_experts is no base64", where=where, hint=HINT) from None
    if data.startswith(NPY):
        return _npy(data, where)
    if len(data) % 4:
        raise InputError(f"routed_experts has {len(data)} bytes, which are not int32", where=where, hint=HINT)
    return np.frombuffer(data, "<i4")


def _npy(data: bytes, where: str) -> np.ndarray[Any, Any]:
    """An .npy file. numpy's own reader would make room for any shape that the header states, and unpickle."""
    import numpy as np
    from numpy.lib import format as npy

    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(stream)
    except Exception as error:  # the header is Python text, and its reader raises what that makes it raise
        raise InputError(f"routed_experts is no .npy file ({' '.join(str(error).split())})", where=where) from None
    rest = data[stream.tell() :]
    sound = len(shape) in (1, 3) and all(type(size) is int and 0 <= size <= len(rest) for size in shape)
    if dtype.kind not in "iu" or not sound or math.prod(shape) * dtype.itemsize != len(rest):
        raise InputError(f"routed_experts is an .npy file of {dtype} {shape} with {len(rest)} bytes", where=where)
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
