"""Casts give the bits that torch gives; for NaNs, of which torch makes what the processor has, those of a rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UnsupportedError
from ckptkit.io.casts import check_cast, convert

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
SIGNED = {8: torch.int64, 4: torch.int32, 2: torch.int16}
PAIRS = [(a, b) for a in TORCH for b in TORCH if a != b]


def patterns(name: str) -> np.ndarray:
    """All patterns of 16 bits; for the wider types random ones, and those at which rounding turns."""
    random = np.random.default_rng(0)
    if BITS[name] == np.uint16:
        return np.arange(65536, dtype=np.uint16)
    if name == "F32":
        # Every neighbourhood of a tie, for BF16 (16 bits dropped) and F16 (13 bits dropped), all exponents.
        tops = np.arange(65536, dtype=np.uint32) << 16
        edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000]
        turns = np.concatenate([tops | edge for edge in map(np.uint32, edges)])
        return np.concatenate([turns, random.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)])
    singles = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        doubles = singles.astype(np.float64)
        halfway = (doubles + np.nextafter(singles, np.float32(np.inf)).astype(np.float64)) / 2
        near = [doubles, halfway, np.nextafter(halfway, 1e300), np.nextafter(halfway, -1e300)]
        # A double that single precision rounds onto a tie of the narrow type is rounded twice.
        narrow = (np.arange(65536, dtype=np.uint32) << 16 | 0x8000).view(np.float32).astype(np.float64)
        twice = [narrow, narrow * (1 + 2.0**-40), narrow * (1 - 2.0**-40)]
    wide = random.integers(0, 1 << 64, 1 << 16, dtype=np.uint64)
    return np.concatenate([*(part.view(np.uint64) for part in near + twice), wide])


def by_torch(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    tensor = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(TORCH[source]).to(TORCH[target])
    return tensor.view(SIGNED[tensor.itemsize]).numpy().view(BITS[target])


def by_the_rule(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """A NaN keeps its sign and the leading bits of its payload, and is made quiet (IEEE 754, 6.2.3)."""
    before, after = MANTISSA[source], MANTISSA[target]
    wide = bits.astype(np.uint64)
    sign, payload = wide >> np.uint64(8 * bits.itemsize - 1), wide & np.uint64((1 << before) - 1)
    payload = payload << np.uint64(after - before) if after > before else payload >> np.uint64(before - after)
    width = 8 * np.dtype(BITS[target]).itemsize
    exponent = ((1 << (width - 1 - after)) - 1) << after
    return ((sign << np.uint64(width - 1)) | np.uint64(exponent | 1 << (after - 1)) | payload).astype(BITS[target])


def by_us(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    return convert(bits.view(np.uint8), DTYPES[source], DTYPES[target]).view(BITS[target])


def is_nan(bits: np.ndarray, name: str) -> np.ndarray:
    mantissa = MANTISSA[name]
    magnitude = bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    infinity = ((1 << (8 * bits.itemsize - 1 - mantissa)) - 1) << mantissa
    return magnitude > bits.dtype.type(infinity)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_value_as_in_torch(source: str, target: str) -> None:
    bits = patterns(source)
    ours, theirs = by_us(bits, source, target), by_torch(bits, source, target)
    nan = is_nan(bits, source)
    assert nan.any()
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert np.array_equal(is_nan(ours, target), is_nan(theirs, target))


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[1] != "BF16"])
def test_nans_keep_sign_and_payload(source: str, target: str) -> None:
    bits = patterns(source)
    bits = bits[is_nan(bits, source)]
    expected = by_the_rule(bits, source, target)
    if (source, target) == ("BF16", "F32"):  # no more than zeros are appended: a signalling one stays one
        expected = bits.astype(np.uint32) << 16
    assert len(set(expected.tolist())) > 100
    assert np.array_equal(by_us(bits, source, target), expected)


@pytest.mark.parametrize("source", ["F64", "F32", "F16"])
def test_every_nan_is_one_in_bf16(source: str) -> None:
    bits = patterns(source)
    assert set(by_us(bits, source, "BF16")[is_nan(bits, source)]) == {0x7FC0}


def test_ties_go_to_even() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32)
    assert by_us(ties, "F32", "BF16").tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


def test_overflow_is_infinity() -> None:
    largest = np.array([0x7F7FFFFF, 0xFF7FFFFF], np.uint32)
    assert by_us(largest, "F32", "BF16").tolist() == [0x7F80, 0xFF80]
    assert by_us(largest, "F32", "F16").tolist() == [0x7C00, 0xFC00]


def test_same_type_is_left_alone() -> None:
    data = np.arange(8, dtype=np.uint8)
    assert convert(data, DTYPES["I32"], DTYPES["I32"]) is data


def test_input_is_not_changed() -> None:
    bits = np.array([0x7F800001, 0x3F800000], np.uint32)  # a signalling NaN has to be made quiet elsewhere
    by_us(bits, "F32", "F16")
    assert bits.tolist() == [0x7F800001, 0x3F800000]


@pytest.mark.parametrize(("source", "target"), [("F8_E4M3", "BF16"), ("BF16", "I32"), ("I64", "F32"), ("BOOL", "U8")])
def test_other_casts_are_refused(source: str, target: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot cast {source} to {target}"):
        check_cast(DTYPES[source], DTYPES[target])
    with pytest.raises(UnsupportedError):
        convert(np.zeros(8, np.uint8), DTYPES[source], DTYPES[target])
