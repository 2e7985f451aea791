"""Questions about the values of factors: whether two are equal, and whether one is zero.

Adapters of experts have tens of thousands of small factors, so open files and buffers are used for all of them. NumPy
is imported by the first question that needs it: commands that read headers do not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.io.reading import Pair


class ValueReader:
    """Reads factors in one thread.

    Its questions raise what `ckptkit.io.reading.TensorReader.chunks` does.
    """

    @cached_property
    def _readers(self) -> Pair:
        from ckptkit.io.reading import TensorReader

        return TensorReader(), TensorReader()

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors hold equal bytes; reads them if their recipes do not say."""
        if (one.shape, one.out_dtype) != (other.shape, other.out_dtype):
            return False
        if one.same_bytes_as(other):
            return True
        from ckptkit.io.reading import first_difference

        return first_difference(one, other, readers=self._readers) is None

    def all_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all of some tensors hold equal bytes."""
        return all(self.same(tensors[0], other) for other in tensors[1:])

    def is_zero(self, tensor: Tensor) -> bool:
        """Whether all bytes of a tensor are zero."""
        return not any(chunk.any() for chunk in self._readers[0].chunks(tensor))

    def close(self) -> None:
        """Closes every file."""
        if "_readers" in self.__dict__:
            for reader in self._readers:
                reader.close()

    def __enter__(self) -> ValueReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def same_values(one: Tensor, other: Tensor) -> bool:
    """`ValueReader.same` for one pair of tensors."""
    with ValueReader() as reader:
        return reader.same(one, other)
