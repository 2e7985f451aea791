"""What is known about a recording."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptkit.errors import UsageError
from ckptkit.verification.rollouts.scores import GRID

ENGINE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class RolloutOptions:
    """What is known about a recording.

    Attributes:
        asked_temperature: Temperature of the recorded log-probabilities; None takes 1 and looks which one fits.
        engine_dtype: Type that the engine computed in; None for that of the checkpoint's config.
        max_kl: Largest KL per token (k3) that passes, in nats; or None.
    """

    asked_temperature: float | None = None
    engine_dtype: str | None = None
    max_kl: float | None = None

    @property
    def temperature(self) -> float:
        """The temperature that counts."""
        return 1.0 if self.asked_temperature is None else self.asked_temperature

    @property
    def given(self) -> bool:
        """Whether the temperature is known."""
        return self.asked_temperature is not None

    def check(self) -> None:
        """Whether a recording can be like this.

        Raises:
            UsageError: It cannot.
        """
        low, high = 1 / GRID[-1], 1 / GRID[0]
        if not (math.isfinite(self.temperature) and low <= self.temperature <= high):
            raise UsageError(f"--temperature must be {low:g} to {high:g}, got {self.temperature:g}")
        if self.engine_dtype is not None and self.engine_dtype not in ENGINE_DTYPES:
            raise UsageError(f"no engine in {self.engine_dtype}", hint=f"choose {', '.join(ENGINE_DTYPES)}")
        if self.max_kl is not None and not 0 <= self.max_kl < math.inf:
            raise UsageError(f"--max-kl must be a number from 0, got {self.max_kl:g}")
