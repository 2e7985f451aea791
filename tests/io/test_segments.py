"""Files of one form: their tensors are cut while they are read, and every check sees them all the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UnsupportedError
from ckptkit.io.plan import OutputFile, Plan, literal
from ckptkit.io.segments import Checksum, Cut, Form, Place, Segment
from ckptkit.tensors import Tensor

U8, BF16, F32 = DTYPES["U8"], DTYPES["BF16"], DTYPES["F32"]
HEAD = Segment(0, literal(b"head"))
FORM = Form(20, (HEAD, Place(4, 8, "a"), Place(12, 8, "b")), (Checksum(4, 20, (0,)),), 2)


def source(file: str) -> Tensor:
    """8 rows of 4 bytes in a file."""
    return Tensor.from_file(file, 0, U8, (8, 4))


def top(tensor: Tensor) -> Tensor:
    return tensor.rows(0, 2)


def left(tensor: Tensor) -> Tensor:
    return tensor.cols(0, 1)


def both(file: OutputFile) -> tuple[Plan, Plan]:
    """A plan with a file of a form, and one with the same file written out."""
    return Plan((file,)), Plan((OutputFile(file.path, file.size, tuple(file.segments), file.checksums, file.tensors),))


@pytest.mark.parametrize("cuts", [(top, top), (top, left), (left, left)])
@pytest.mark.parametrize("wholes", [("x", "x"), ("x", "y")])
def test_a_form_is_its_file_written_out(cuts: Sequence[Cut], wholes: Sequence[str]) -> None:
    tensors = list(zip(map(source, wholes), cuts, strict=True))
    filled, plain = both(OutputFile.filled("f", FORM, tensors))
    filled.check()
    assert filled.digest([]) == plain.digest([])
    assert filled.traffic() == plain.traffic()
    assert filled.sources() == plain.sources() == set(wholes)
    (file,) = filled.files
    assert file.tensors == 2
    assert len(file.segments) == 3
    assert file.segments[-1] == Segment(12, cuts[1](source(wholes[1])), "b") == file.segments[1:][1]


def test_files_of_one_form_count_each() -> None:
    files = [OutputFile.filled(str(n), FORM, [(source("x"), top), (source(str(n)), left)]) for n in range(3)]
    plan = Plan((*files, OutputFile.small("small", b"12")))
    assert plan.traffic() == (3 * 8, 3 * (8 + 4) + 2)
    assert plan.sources() == {"x", "0", "1", "2"}
    plan.check()


def test_a_form_of_a_file_with_blanks() -> None:
    blank = Tensor.full(U8, (8,))
    form = Form.of(12, [HEAD, Segment(4, blank, "a")], (), [blank])
    assert form.parts == (HEAD, Place(4, 8, "a"))
    assert form.tensors == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 tensors for 2 places"):
        OutputFile.filled("f", FORM, [(source("x"), top)])
    taller = OutputFile.filled("f", FORM, [(source("x"), top), (source("x"), lambda tensor: tensor.rows(0, 3))])
    with pytest.raises(ValueError, match="b: 12 bytes for a place of 8"):
        list(taller.segments)


@pytest.mark.parametrize(
    ("form", "match"),
    [
        (Form(20, (HEAD, Place(3, 8, "a"), Place(12, 8, "b"))), "overlaps"),
        (Form(19, (HEAD, Place(4, 8, "a"), Place(12, 8, "b"))), "overlaps"),
        (Form(20, FORM.parts, (Checksum(4, 20, (5,)),)), "another checksum covers"),
    ],
)
def test_every_form_is_checked(form: Form, match: str) -> None:
    files = [OutputFile.filled(str(n), kind, [(source("x"), top)] * 2) for n, kind in enumerate((FORM, form, FORM))]
    with pytest.raises(ValueError, match=match):
        Plan(tuple(files)).check()


def test_every_kind_of_tensor_is_checked_for_its_cast() -> None:
    floats = Tensor.from_file("x", 0, F32, (8, 4)).astype(BF16)
    numbers = Tensor.from_file("x", 0, DTYPES["I32"], (8, 4)).astype(BF16)
    for tensor, wrong in ((floats, False), (numbers, True)):
        plan = Plan((OutputFile.filled("f", FORM, [(source("x"), top), (tensor, lambda t: t.rows(0, 1))]),))
        if wrong:
            with pytest.raises(UnsupportedError, match="cannot cast I32 to BF16"):
                plan.check()
        else:
            plan.check()
