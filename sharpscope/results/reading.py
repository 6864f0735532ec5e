"""One number of one checkpoint, with all that is known of it."""

from __future__ import annotations

from dataclasses import dataclass

from sharpscope.results.intervals import EXACT
from sharpscope.tables import with_bound


@dataclass(frozen=True)
class Reading:
    """One number of one checkpoint.

    Attributes:
        value: the number.
        lower, upper: its interval, or None.
        interval: what the interval is, of ``intervals.KINDS``; or "none: " and the reason.
        converged: False where the interval does not meet the tolerance.
        origin: data, examples, precision; and ``price``: what it took.
        more: further things to know of it.
        data: the examples alone, alike for all that were measured on the same.
    """

    value: float
    lower: float | None = None
    upper: float | None = None
    interval: str = EXACT
    converged: bool = True
    origin: str = ""
    price: str = ""
    more: str = ""
    data: str = ""

    def __str__(self) -> str:
        mark = "" if self.converged else "?"
        if self.lower is None or self.upper is None:
            return f"{self.value:.4g}{mark}"
        return f"{with_bound(self.value, self.lower, self.upper)}{mark}"
