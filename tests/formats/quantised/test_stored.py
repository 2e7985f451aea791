"""Codes with their scales: what is missing, too much, or of a wrong shape or type is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.quantised.scheme import Scheme
from ckptkit.formats.quantised.stored import find_stored
from ckptkit.tensors import Tensor

BLOCKS, PLAIN, MXFP4, INT4 = Scheme("fp8", (128, 128)), Scheme("fp8"), Scheme("mxfp4"), Scheme("int4", group=32)


def made(**tensors: tuple[object, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): Tensor.full(DTYPES[str(kind)], shape) for name, (kind, *shape) in tensors.items()}  # type: ignore[arg-type]


FP8 = {"a__weight": ("F8_E4M3", 576, 256), "a__weight_scale_inv": ("F32", 5, 2), "b__weight": ("BF16", 4, 4)}
EXPERTS = {"e__up": ("F8_E4M3", 8, 192, 130), "e__up_scale_inv": ("F8_E8M0", 8, 2, 2)}
BYTES = {"e__up_blocks": ("U8", 4, 64, 3, 16), "e__up_scales": ("U8", 4, 64, 3), "e__up_bias": ("BF16", 4, 64)}
PACKED = {"a__weight_packed": ("I32", 48, 16), "a__weight_scale": ("BF16", 48, 4), "a__weight_shape": ("I64", 2)}


@pytest.mark.parametrize(
    ("tensors", "scheme", "shapes"),
    [
        (FP8, BLOCKS, {"a.weight": (576, 256)}),
        (EXPERTS, BLOCKS, {"e.up": (8, 192, 130)}),
        ({**FP8, "a__weight_scale_inv": ("BF16",)}, PLAIN, {"a.weight": (576, 256)}),
        ({**FP8, "a__weight_scale_inv": ("U8", 1)}, PLAIN, {"a.weight": (576, 256)}),
        ({**FP8, "a__weight_scale_inv": ("F32", 576, 1)}, PLAIN, {"a.weight": (576, 256)}),
        ({**FP8, "a__weight_scale_inv": ("F32", 576)}, PLAIN, {"a.weight": (576, 256)}),
        (BYTES, MXFP4, {"e.up_blocks": (4, 64, 96)}),
        (PACKED, INT4, {"a.weight": (48, 128)}),
        ({**PACKED, "a__weight_scale": ("F32", 48, 1)}, Scheme("int4"), {"a.weight": (48, 128)}),
    ],
)
def test_what_is_found(tensors: dict[str, tuple[object, ...]], scheme: Scheme, shapes: dict[str, object]) -> None:
    found = find_stored(made(**tensors), scheme, Path("here"))
    assert {item.name: item.shape for item in found.values()} == shapes
    for item in found.values():
        assert item.numbers(DTYPES["F16"]).shape == item.shape


@pytest.mark.parametrize(
    ("tensors", "scheme", "text"),
    [
        ({"a__weight": FP8["a__weight"]}, BLOCKS, "a.weight is quantised, and a.weight_scale_inv is missing"),
        ({**FP8, "a__weight_scale_inv": ("F32", 2, 5)}, BLOCKS, r"a.weight_scale_inv is \[2, 5\], which is no scale"),
        ({**FP8, "a__weight_scale_inv": ("F32", 4, 2)}, BLOCKS, r"a.weight_scale_inv is \[4, 2\], which is no scale"),
        ({**FP8, "a__weight_scale_inv": ("F32",)}, BLOCKS, "no scale for blocks of 128 x 128"),
        ({**FP8, "a__weight_scale_inv": ("F32", 256)}, PLAIN, "no scale for blocks of a tensor or a row"),
        ({**FP8, "a__weight_scale_inv": ("I32", 5, 2)}, BLOCKS, "a.weight_scale_inv is I32, and should be"),
        ({**FP8, "b__weight_scale_inv": ("F32", 1, 1)}, BLOCKS, "b.weight_scale_inv is a scale whose .* is BF16"),
        ({**FP8, "c__weight_scale_inv": ("F32", 1, 1)}, BLOCKS, "c.weight_scale_inv is a scale whose .* is missing"),
        ({"c__weight": ("F8_E4M3", 4), "c__weight_scale_inv": ("F32", 1)}, PLAIN, r"c.weight_scale_inv is \[1\]"),
        ({**EXPERTS, "e__up_scale_inv": ("F32", 7, 2, 2)}, BLOCKS, r"\[7, 2, 2\]"),
        ({**BYTES, "e__up_scales": ("U8", 4, 3, 64)}, MXFP4, r"e.up_scales is \[4, 3, 64\]"),
        ({**BYTES, "e__up_scales": ("F32", 4, 64, 3)}, MXFP4, "e.up_scales is F32"),
        ({"e__up_blocks": BYTES["e__up_blocks"]}, MXFP4, "e.up_scales is missing"),
        ({"e__up_scales": BYTES["e__up_scales"]}, MXFP4, "e.up_scales is a scale whose"),
        ({**PACKED, "a__weight_scale": ("BF16", 4, 48)}, INT4, r"a.weight_scale is \[4, 48\]"),
        ({**PACKED, "a__weight_shape": ("I64", 3)}, INT4, "a.weight_shape"),
        ({**PACKED, "a__weight_packed": ("I8", 48, 16)}, INT4, "a.weight_packed is I8"),
        ({"a__weight_packed": ("I32", 48, 16), "a__weight_scale": ("BF16", 48, 4)}, INT4, "weight_shape is missing"),
        ({"a__weight_scale": ("BF16", 48, 4)}, INT4, "a.weight_scale is a scale whose I32 tensor is missing"),
    ],
)
def test_faults(tensors: dict[str, tuple[object, ...]], scheme: Scheme, text: str) -> None:
    with pytest.raises(InputError, match=text):
        find_stored(made(**tensors), scheme, Path("here"))


@pytest.mark.parametrize("ending", ["zero_point", "g_idx"])
def test_integers_of_other_kinds_are_refused(ending: str) -> None:
    tensors: dict[str, tuple[object, ...]] = {**PACKED, f"a__weight_{ending}": ("I32", 6, 4)}
    kind: type[CkptkitError] = UnsupportedError
    with pytest.raises(kind, match=f"INT4 with a.weight_{ending}"):
        find_stored(made(**tensors), INT4, Path("here"))


def test_all_problems_are_counted() -> None:
    tensors: dict[str, tuple[object, ...]] = {"a__weight": ("F8_E4M3", 4, 4), "b__weight": ("F8_E4M3", 4, 4)}
    with pytest.raises(InputError, match="2 such problems"):
        find_stored(made(**tensors), BLOCKS, Path("here"))
