"""How one checkpoint's number differs from another's, as far as their intervals tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharpscope.results.readings import PROBED, PROBED_SAMPLED, Reading, Row
from sharpscope.tables import with_bound

# A standard error reaches so far to each side for about 95 %.
REACH = 2.0

# A factor whose interval is wider than this share of it is shown with both ends.
WIDE = 0.1


@dataclass(frozen=True)
class Contrast:
    """A second reading over a first, or less it.

    Attributes:
        value: the factor, with ``ratio``, or the difference.
        lower, upper: what the ends of both intervals leave possible, of a standard error two of them; None where either
            has no interval. Where both are of 95 % this holds with at least 90 %.
        ratio: whether it is a factor, 1 for no difference.
        converged: whether both readings are.
    """

    value: float
    lower: float | None
    upper: float | None
    ratio: bool
    converged: bool

    @property
    def sure(self) -> bool | None:
        """Whether the intervals leave a gap between the two; None where there are none."""
        if self.lower is None or self.upper is None:
            return None
        none = 1.0 if self.ratio else 0.0
        return not self.lower <= none <= self.upper

    def __str__(self) -> str:
        """ "x 0.3059 ±0.0001", or "x 0.49 [0.2, 1.3]" where the interval is wide and lopsided."""
        sign, mark = "x " if self.ratio else "", "" if self.converged else "?"
        if self.lower is not None and self.upper is not None:
            if self.ratio and self.upper - self.lower > WIDE * self.value:
                return f"x {self.value:.3g} [{self.lower:.3g}, {self.upper:.3g}]{mark}"
            plus = "+" if not self.ratio and self.value >= 0 else ""
            return f"{sign}{plus}{with_bound(self.value, self.lower, self.upper)}{mark}"
        return f"{sign}{self.value:.3g}{mark}" if self.ratio else f"{self.value:+.3g}{mark}"


def contrast(row: Row, second: int, first: int = 0) -> Contrast | None:
    """The reading of the ``second`` checkpoint against the ``first``'s; None where either is missing or not finite."""
    one, two = row.readings[first], row.readings[second]
    if one is None or two is None or not (math.isfinite(one.value) and math.isfinite(two.value)):
        return None
    ratio = row.factor and one.value > 0 and two.value > 0
    value = two.value / one.value if ratio else two.value - one.value
    ours, theirs, lower, upper = _ends(one), _ends(two), None, None
    if ours is not None and theirs is not None:
        (low, high), (lowest, highest) = ours, theirs
        lower = max(lowest, 0.0) / high if ratio else lowest - high
        upper = (highest / low if low > 0 else math.inf) if ratio else highest - low
    return Contrast(value, lower, upper, ratio, one.converged and two.converged)


def _ends(reading: Reading) -> tuple[float, float] | None:
    """The interval of about 95 %, or the bound."""
    if reading.lower is None or reading.upper is None:
        return None
    reach = REACH if reading.interval in (PROBED, PROBED_SAMPLED) else 1.0
    return (
        reading.value - reach * (reading.value - reading.lower),
        reading.value + reach * (reading.upper - reading.value),
    )
