"""What a `quantization_config` says, and what is refused by name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.quantised.scheme import Scheme, scheme_of, without_scheme
from tests.quantised import FP8_BLOCK, FP8_PLAIN, INT4


def int4(**changes: Any) -> dict[str, Any]:
    found = deepcopy(INT4)
    found["config_groups"]["group_0"]["weights"] |= changes
    return found


CHANNEL = int4(strategy="channel", group_size=None)


@pytest.mark.parametrize(
    ("stated", "scheme"),
    [
        (None, None),
        ({}, None),
        (FP8_BLOCK, Scheme("fp8", (32, 32))),
        (FP8_PLAIN, Scheme("fp8")),
        ({"quant_method": "mxfp4"}, Scheme("mxfp4")),
        (INT4, Scheme("int4", group=16)),
        (CHANNEL, Scheme("int4")),
    ],
)
def test_what_is_read(stated: Any, scheme: Scheme | None) -> None:
    for config in ({"quantization_config": stated}, {"text_config": {"quantization_config": stated}}):
        assert scheme_of(config, "here") == scheme
        plain = without_scheme(config)
        assert scheme_of(plain, "here") is None and "quantization_config" not in str(plain)


@pytest.mark.parametrize(
    ("stated", "kind", "text"),
    [
        ("fp8", UnsupportedError, r"\(fp8\)"),
        ({"quant_method": "gptq"}, UnsupportedError, "gptq"),
        ({"quant_method": "awq"}, UnsupportedError, "awq"),
        ({"quant_method": "bitsandbytes"}, UnsupportedError, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, UnsupportedError, "modelopt"),
        ({**INT4, "format": "nvfp4-pack-quantized"}, UnsupportedError, "nvfp4-pack-quantized"),
        (int4(num_bits=8), UnsupportedError, "pack-quantized of 8 bits"),
        (int4(symmetric=False), UnsupportedError, "zero points"),
        (int4(actorder="group"), UnsupportedError, "another order"),
        (int4(group_size=12), InputError, "group_size is 12"),
        (int4(group_size=True), InputError, "group_size is True"),
        ({**INT4, "config_groups": {}}, InputError, "config_groups"),
        (
            {**INT4, "config_groups": INT4["config_groups"] | {"b": CHANNEL["config_groups"]["group_0"]}},
            UnsupportedError,
            "in several ways",
        ),
        ({**FP8_BLOCK, "fmt": "e5m2"}, UnsupportedError, "e5m2"),
        ({**FP8_BLOCK, "expert_dtype": "fp4"}, UnsupportedError, "FP8 with experts in fp4"),
        ({**FP8_BLOCK, "weight_block_size": [128]}, InputError, "two sizes"),
        ({**FP8_BLOCK, "weight_block_size": [128, 0]}, InputError, "two sizes"),
        ({**FP8_BLOCK, "weight_block_size": [128, 1.5]}, InputError, "two sizes"),
    ],
)
def test_what_is_refused(stated: Any, kind: type[CkptkitError], text: str) -> None:
    with pytest.raises(kind, match=text):
        scheme_of({"quantization_config": stated}, "here")
