"""Norms that one library stores less one: Megatron-Core multiplies by one plus the weight, Hugging Face by the weight.

Hardly any weight survives the way there and back by its numbers alone: less one, a weight below a half has more digits
than its type holds. So a conversion to Megatron keeps the original weights beside it (`kept`), and the way back takes
each of them whose number in Megatron is still the one that was made of it.

Source: `Qwen3NextRMSNormGated` of transformers; `layernorm_zero_centered_gamma` of megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.dtypes import DType
from ckptkit.errors import UnsupportedError
from ckptkit.io.computed import made, numbers, whole_recipe
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptkit.io.computed import Bytes

_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Lessened:
    """The recipe of a tensor that is one less than its first input; a second input is that tensor."""


@dataclass(frozen=True)
class Raised:
    """The recipe of a tensor that is one more than its input."""


@dataclass(frozen=True)
class Restored:
    """The recipe of elements of the second input, where they are one more than those of the first, else of sums."""


class LessOne:
    """Megatron's numbers are Hugging Face's less one: a `Numbers` of the tables.

    Sums are rounded to the type of the tensor, as torch rounds them.
    """

    def to_megatron(self, tensor: Tensor) -> Tensor:
        """The vector less one; of what `to_hf` gave, the vector that it was of."""
        if (inputs := _inputs(tensor, Raised())) is not None:
            return inputs[0]
        if (inputs := _inputs(tensor, Restored())) is not None:
            return self.kept(*inputs)
        return _sum(tensor, -1, Lessened())

    def to_hf(self, tensor: Tensor) -> Tensor:
        """The vector plus one; of what `to_megatron` or `kept` gave, the original."""
        original = self.original(tensor)
        return _sum(tensor, 1, Raised()) if original is None else original

    def original(self, tensor: Tensor) -> Tensor | None:
        """The vector that a result of `to_megatron` or `kept` is one less than, or None for other tensors."""
        inputs = _inputs(tensor, Lessened())
        return None if inputs is None else inputs[0]

    def kept(self, stored: Tensor, original: Tensor) -> Tensor:
        """The stored vector, of which `to_hf` takes each element from the original whose number it is.

        Args:
            stored: The vector, one less.
            original: What it was made of. In another type than the stored one it says nothing.
        """
        if original.out_dtype != stored.out_dtype:
            return stored
        dtype = stored.out_dtype
        more = _sum(stored, 1, Raised())

        def chosen(start: int, stop: int) -> Bytes:
            import numpy as np

            others, ours = (_elements(one, start, stop) for one in (original, more))
            return np.where(_made_of(stored, original, start, stop), others, ours).view(np.uint8)

        def as_stored(start: int, stop: int) -> Bytes:
            import numpy as np

            return _elements(stored, start, stop).view(np.uint8)

        source = made(dtype, stored.shape, [stored, original], Restored(), chosen)
        return made(dtype, stored.shape, [source, stored], Lessened(), as_stored)

    def moved(self, tensor: Tensor) -> int:
        """Elements of a result of `kept` whose number is not the one that was made of the original; reads both.

        Raises:
            InputError: A source is gone or ends early.
            StorageError: A source cannot be read.
        """
        inputs = _inputs(tensor, Lessened())
        both = _inputs(inputs[0], Restored()) if inputs is not None and len(inputs) > 1 else None
        if both is None:
            return 0
        stored, original = both
        return int((~_made_of(stored, original, 0, stored.shape[0])).sum())

    def cast(self, tensor: Tensor, dtype: DType) -> Tensor:
        """The vector in another type; of what `to_megatron` gave, the original is cast."""
        inputs = _inputs(tensor, Lessened())
        if inputs is None or len(inputs) > 1:
            return tensor.astype(dtype)
        return self.to_megatron(inputs[0].astype(dtype))


LESS_ONE = LessOne()


def _inputs(tensor: Tensor, recipe: object) -> list[Tensor] | None:
    """The inputs of a tensor that is made by a recipe, with its cast; None for other tensors."""
    found = whole_recipe(tensor.astype(tensor.dtype))
    if found is None or found[0] != recipe:
        return None
    return [one if tensor.cast is None else one.astype(tensor.cast) for one in found[1]]


def _made_of(stored: Tensor, original: Tensor, start: int, stop: int) -> NDArray[np.bool_]:
    """Whether each stored number is one less than the original, as it is rounded."""
    same: NDArray[np.bool_] = _elements(stored, start, stop) == _elements(_sum(original, -1, Lessened()), start, stop)
    return same


def _sum(tensor: Tensor, number: int, recipe: object) -> Tensor:
    dtype = tensor.out_dtype
    if dtype.name not in _TYPES:
        raise UnsupportedError(f"a norm of {dtype}, whose numbers less one it cannot hold")

    def make(start: int, stop: int) -> Bytes:
        from ckptkit.io.casts import encode

        return encode(numbers(tensor.rows(start, stop)) + number, dtype)

    return made(dtype, tensor.shape, [tensor], recipe, make)


def _elements(tensor: Tensor, start: int, stop: int) -> NDArray[np.unsignedinteger]:
    """Elements of a vector as bytes, in numbers of their size."""
    from ckptkit.io.reading import read_tensor

    return read_tensor(tensor.rows(start, stop)).view(f"u{tensor.out_dtype.itemsize}")
