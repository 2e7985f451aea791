"""Matrices made row by row: the algebra, the distributions, and that equal requests give equal bytes."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UsageError
from ckptkit.io.reading import read_tensor
from ckptkit.surgery import matrices
from ckptkit.surgery.initialisation import Request, initialise, kaiming, realise
from ckptkit.surgery.matrices import Matrix, of_array

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**63)


@given(sizes, sizes, seeds)
def test_orthogonal_columns_or_rows(rows: int, columns: int, seed: int) -> None:
    made = matrices.orthogonal(rows, columns, seed).array().astype(np.float64)
    gram = made.T @ made if rows >= columns else made @ made.T
    assert np.allclose(gram, np.eye(min(rows, columns)), atol=1e-6)


def test_orthogonal_is_spread_out() -> None:
    """No coordinate of the one stream goes to a single one of the other, as it would without the random signs."""
    made = matrices.orthogonal(256, 128, 3).array()
    assert np.abs(made).max() < 6 / sqrt(256)
    assert abs(made.mean()) < 0.01
    other = matrices.orthogonal(256, 128, 4).array()
    assert np.abs((made * other).sum()) < 0.2 * 128


@given(sizes, sizes, seeds, st.integers(0, 3), st.data())
def test_rows_do_not_depend_on_their_company(
    rows: int, columns: int, seed: int, stream: int, data: st.DataObject
) -> None:
    made = matrices.uniform(rows, columns, 1.5, seed, stream)
    whole = made.array()
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert np.array_equal(made.rows(start, stop), whole[start:stop])
    assert np.abs(whole).max() <= 1.5


def test_uniform_is_uniform_and_streams_differ() -> None:
    made = matrices.uniform(300, 301, 2.0, 7, 0).array()
    assert abs(made.mean()) < 0.02 and abs(made.std() - 2 / sqrt(3)) < 0.01
    for other in (matrices.uniform(300, 301, 2.0, 8, 0), matrices.uniform(300, 301, 2.0, 7, 1)):
        assert abs(np.corrcoef(made.ravel(), other.array().ravel())[0, 1]) < 0.02
    assert len(np.unique(made[:2])) == 602


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_any_cut_of_the_bytes(rows: int, columns: int, data: st.DataObject) -> None:
    made = matrices.uniform(rows, columns, 1.0, 1, 0)
    tensor = made.tensor(DTYPES["F32"])
    top = data.draw(st.integers(0, rows - 1))
    left = data.draw(st.integers(0, columns - 1))
    part = tensor.rows(top, rows).cols(left, columns)
    found = read_tensor(part).view(np.float32).reshape(rows - top, columns - left)
    assert np.array_equal(found, made.array()[top:, left:])


@given(st.integers(1, 12), st.integers(0, 12), seeds)
def test_an_mlp_computes_the_linear_map(narrow: int, more: int, seed: int) -> None:
    wide = 2 * narrow + more
    random = np.random.default_rng(seed)
    linear, x = random.normal(size=(wide, narrow)), random.normal(size=(narrow, 5))
    made = realise(Request("mlp", narrow, wide), of_array(linear, "test"))
    first, second = (made[key].array().astype(np.float64) for key in ("linear_1", "linear_2"))
    assert first.shape == (wide, narrow) and second.shape == (wide, wide)
    assert np.allclose(second @ np.maximum(first @ x, 0), linear @ x, atol=1e-5)


def test_two_matrices_compute_the_linear_map() -> None:
    linear = np.random.default_rng(0).normal(size=(3, 5))
    made = realise(Request("two-linear", 5, 3), of_array(linear, "test"))
    assert np.allclose(made["linear_2"].array() @ made["linear_1"].array(), linear, atol=1e-6)


def test_an_mlp_needs_room_for_both_signs() -> None:
    with pytest.raises(UsageError, match="twice as wide"):
        realise(Request("mlp", 4, 7), matrices.identity(7, 4))


@pytest.mark.parametrize("kind", ["linear", "two-linear", "mlp"])
def test_kaiming_against_torch(kind: str) -> None:
    """The same bounds, and what is drawn fills them."""
    import torch

    made = kaiming(Request(kind, 64, 128, seed=5)).matrices
    assert list(made) == (["linear_1"] if kind == "linear" else ["linear_1", "linear_2"])
    for matrix in made.values():
        theirs = torch.nn.init.kaiming_uniform_(torch.empty(matrix.shape))
        ours = matrix.array()
        assert abs(ours.std() / theirs.std().item() - 1) < 0.05
        assert np.abs(ours).max() == pytest.approx(theirs.abs().max().item(), rel=0.01)


def test_what_decides_about_the_bytes_is_in_the_digest() -> None:
    def digest(matrix: Matrix) -> str:
        (piece,) = matrix.tensor(DTYPES["F32"]).bands[0].pieces
        return str(piece.data.digest)  # type: ignore[union-attr]

    made = [
        matrices.uniform(4, 6, 1.0, 0, 0),
        matrices.uniform(4, 6, 1.0, 1, 0),
        matrices.uniform(4, 6, 1.0, 0, 1),
        matrices.uniform(4, 6, 2.0, 0, 0),
        matrices.uniform(6, 4, 1.0, 0, 0),
        matrices.orthogonal(4, 6, 0),
        matrices.negative(matrices.orthogonal(4, 6, 0)),
        matrices.identity(4, 6),
        matrices.zeros(4, 6),
        matrices.above([matrices.zeros(3, 6), matrices.identity(1, 6)]),
        matrices.above([matrices.zeros(1, 6), matrices.identity(3, 6)]),
        matrices.beside([matrices.zeros(4, 1), matrices.identity(4, 5)]),
    ]
    assert len({digest(matrix) for matrix in made}) == len(made)
    assert digest(made[0]) == digest(matrices.uniform(4, 6, 1.0, 0, 0))


def test_unknown_initialisations_are_named() -> None:
    with pytest.raises(UsageError, match=r"--adapter-init zeros; one of kaiming, orthogonal, .*, file"):
        initialise("zeros", Request("linear", 2, 4))
