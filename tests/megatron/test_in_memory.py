"""Recipes over torch's memory against the same slices of torch itself, and against the engine that reads files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UnsupportedError
from ckptkit.io.computed import columns_apart, columns_together
from ckptkit.io.zero_centered import LESS_ONE
from ckptkit.megatron.in_memory import Memory
from ckptkit.tensors import Tensor, hstack, stack, vstack

SIZES = st.integers(1, 5)


@settings(max_examples=80)
@given(SIZES, SIZES, SIZES, st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.data())
def test_slices_stacks_and_shapes(depth: int, rows: int, columns: int, dtype: torch.dtype, data: st.DataObject) -> None:
    whole = torch.arange(depth * rows * columns).view(depth, rows, columns).to(dtype)
    other = (whole + 100).transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    memory = Memory()
    a, b = memory.add({"a": whole, "b": other}, "test").values()
    top, left = data.draw(st.integers(0, depth - 1)), data.draw(st.integers(0, columns - 1))
    cases = [
        (a, whole),
        (b, other),
        (a.rows(top, depth), whole[top:]),
        (a.cols(left, columns), whole[..., left:]),
        (vstack([a, b.rows(top, depth)]), torch.cat([whole, other[top:]])),
        (hstack([a.cols(left, columns), b]), torch.cat([whole[..., left:], other], dim=-1)),
        (stack([a, b]), torch.stack([whole, other])),
        (
            vstack([b, a]).reshape((2 * columns, depth, rows)),
            torch.cat([other, whole]).reshape(2 * columns, depth, rows),
        ),
    ]
    for recipe, expected in cases:
        found = memory.read(recipe)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert found.data_ptr() != expected.data_ptr()


def test_numbers_constants_literals_and_casts() -> None:
    memory = Memory()
    recipes = memory.add({"number": torch.tensor(2.5), "empty": torch.zeros(0, 3), "wide": torch.randn(3, 4)}, "test")
    assert memory.read(recipes["number"]).shape == () and memory.read(recipes["number"]) == 2.5
    assert memory.read(recipes["empty"]).shape == (0, 3)
    padded = vstack([recipes["wide"], Tensor.full(DTYPES["F32"], (2, 4))])
    assert not memory.read(padded)[3:].any()
    values = torch.randn(2, 4)
    literal = Tensor.from_bytes(values.numpy().tobytes(), DTYPES["F32"], (2, 4))
    assert torch.equal(memory.read(literal.cols(1, 3)), values[:, 1:3])
    assert torch.equal(memory.read(literal.astype(DTYPES["BF16"])), values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_that_are_rows_elsewhere(dtype: torch.dtype) -> None:
    """Tensors in memory are no files: what is made of them is made there, too."""
    matrix, parts = torch.randn(7, 6).to(dtype), torch.randn(2, 3, 7).to(dtype)
    memory = Memory()
    recipes = memory.add({"matrix": matrix, "gate": parts[0], "up": parts[1]}, "test")
    gate, up = columns_apart(recipes["matrix"], 2)
    assert torch.equal(
        memory.read(vstack([up, gate.rows(1, 3)])), torch.cat([matrix[:, 1::2].t(), matrix[:, 2::2].t()])
    )
    together = columns_together([recipes["gate"], recipes["up"]])
    expected = torch.stack([parts[0], parts[1]], dim=-1).transpose(0, 1).reshape(7, 6)
    assert torch.equal(memory.read(together), expected)
    assert torch.equal(memory.read(together.rows(2, 5).cols(1, 4)), expected[2:5, 1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_one_less_elsewhere(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.3, 1.7, 1e-3, -0.2, 5.0]).to(dtype)
    memory = Memory()
    recipes = memory.add({"weight": weight, "trained": torch.tensor([0.5, 0.7, 1.0, -3.0, 4.0]).to(dtype)}, "test")
    less = LESS_ONE.to_megatron(recipes["weight"])
    assert torch.equal(memory.read(less), weight - 1)
    assert torch.equal(memory.read(LESS_ONE.to_hf(less)), weight)
    stored = memory.add({"stored": weight - 1}, "ranks")["stored"]
    assert torch.equal(memory.read(LESS_ONE.to_hf(stored)), (weight - 1) + 1)
    assert not torch.equal((weight - 1) + 1, weight)
    kept = LESS_ONE.kept(stored, recipes["weight"])
    assert torch.equal(memory.read(kept), weight - 1) and torch.equal(memory.read(LESS_ONE.to_hf(kept)), weight)
    trained = LESS_ONE.kept(recipes["trained"], recipes["weight"])
    found, moved = memory.read(LESS_ONE.to_hf(trained)), memory.read(recipes["trained"])
    assert torch.equal(found, torch.where(moved == weight - 1, weight, moved + 1)) and found[4] == 5


def test_types_that_checkpoints_do_not_have() -> None:
    with pytest.raises(UnsupportedError, match=r"x has elements of type torch\.complex128"):
        Memory().add({"x": torch.zeros(2, dtype=torch.complex128)}, "test")
