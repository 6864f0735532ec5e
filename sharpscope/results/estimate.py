"""A number that was estimated from random draws, and how far it scatters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharpscope.formatting import with_bound


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate and one standard error of it."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, draws: NDArray[np.float64]) -> Estimate:
        """The mean of independent draws (K,), K at least 2."""
        return cls(float(draws.mean()), float(draws.std(ddof=1)) / math.sqrt(len(draws)))

    def __str__(self) -> str:
        return with_bound(self.value, self.value - self.standard_error, self.value + self.standard_error)


def wilson(share: float, examples: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``examples`` independent ones (Wilson 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples**2))
    # A share of 1 lies at the interval's end, which rounding must not pull under it.
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def student(confidence: float, freedom: int) -> float:
    """The t with ``P(|T| <= t) = confidence`` for Student's T with ``freedom`` degrees of freedom.

    By bisection of the finite series for whole degrees (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), since results
    need NumPy alone.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _inside(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _inside(angle: float, freedom: int) -> float:
    """``P(|T| <= sqrt(freedom) tan(angle))``."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= (i - 1) / i * math.cos(angle) ** 2
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
