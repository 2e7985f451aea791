"""Which casts exist: known without NumPy, which looking at headers has no use for."""

from __future__ import annotations

from ckptkit.dtypes import DType
from ckptkit.errors import UnsupportedError

CASTABLE = ("F64", "F32", "F16", "BF16")
"""Types that are converted among each other."""


def check_cast(source: DType, target: DType) -> None:
    """Whether `source` can become `target` while the bytes pass.

    Raises:
        UnsupportedError: Only F64, F32, F16 and BF16 are converted among each other.
    """
    if source != target and not (source.name in CASTABLE and target.name in CASTABLE):
        raise UnsupportedError(f"cannot cast {source} to {target}", hint=f"casts exist among {', '.join(CASTABLE)}")
