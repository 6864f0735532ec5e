"""Several runs as a group: their mean, and how one group differs from another, with Student's intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.results.difference import PAIRS, WELCH, Difference, bracket
from sharpscope.results.estimate import student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A mean over runs and its 95 % interval; None where one run says nothing of the scatter.

    Attributes:
        value: the mean; of ``log`` quantities the geometric one.
        runs: their number.
    """

    value: float
    lower: float | None
    upper: float | None
    runs: int

    def within(self, least: float, most: float) -> Spread:
        """The same with its interval cut off there, as that of a share at 0 and 1."""
        if self.lower is None or self.upper is None:
            return self
        return replace(self, lower=max(self.lower, least), upper=min(self.upper, most))

    @property
    def ends(self) -> str:
        """Its interval: " [4.43, 9.92]", nothing where there is none."""
        return bracket(self.lower, self.upper)

    def __str__(self) -> str:
        return f"{self.value:.4g}{self.ends}"


def spread(values: Sequence[float], *, log: bool = False) -> Spread:
    """Mean of ``values`` and the 95 % interval of the mean that their scatter supports (Student 1908).

    ``log``: of their logarithms, as for quantities that range over factors; they must be positive.

    Raises: DataError without values, or where a logarithm has none.
    """
    found = _logarithms(values) if log else np.asarray(values, dtype=float)
    if len(found) == 0:
        raise DataError("A mean needs at least one run, got none.")
    mean, half = float(found.mean()), None
    if _scatters(found):
        half = student(CONFIDENCE, len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    back = math.exp if log else float
    lower, upper = (None, None) if half is None else (back(mean - half), back(mean + half))
    return Spread(back(mean), lower, upper, len(found))


def difference(
    first: Sequence[float], second: Sequence[float], *, paired: bool = False, ratio: bool = False
) -> Difference:
    """``second`` less ``first``, or over it: of pairs by their differences, else by Welch's interval (1947).

    Welch's degrees of freedom are rounded down, which widens the interval.

    Raises: DataError where pairs have unequal numbers, there are no values, or a ratio has no logarithm.
    """
    a, b = (_logarithms(v) if ratio else np.asarray(v, dtype=float) for v in (first, second))
    if paired and len(a) != len(b):
        raise DataError(f"Pairs need as many runs in both groups, got {len(a)} and {len(b)}.")
    if min(len(a), len(b)) == 0:
        raise DataError("A difference needs at least one run in each group.")
    mean, freedom, error = float(b.mean() - a.mean()), 0, 0.0
    if paired and _scatters(b - a):
        freedom, error = len(a) - 1, float((b - a).std(ddof=1)) / math.sqrt(len(a))
    elif not paired and min(len(a), len(b)) > 1:
        parts = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
        error = math.sqrt(sum(parts))
        weights = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
        freedom = max(1, int(sum(parts) ** 2 / weights)) if weights else min(len(a), len(b)) - 1
    half = student(CONFIDENCE, freedom) * error if freedom and _scatters(np.concatenate([a, b])) else None
    back = math.exp if ratio else float
    lower, upper = (None, None) if half is None else (back(mean - half), back(mean + half))
    runs, by = (len(a), PAIRS) if paired else (len(a) + len(b), WELCH)
    return Difference(back(mean), lower, upper, ratio, by, runs, freedom)


def _scatters(values: NDArray[np.float64]) -> bool:
    """Whether there is a scatter to speak of: equal accuracies, as few examples give them, say nothing of it."""
    return len(values) > 1 and float(np.ptp(values)) > 1e-12 * float(np.abs(values).max())


def _logarithms(values: Sequence[float]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if not (found > 0).all():
        raise DataError(f"A ratio needs positive values, got {float(found.min()):g}. Take differences.")
    logarithms: NDArray[np.float64] = np.log(found)
    return logarithms
