"""The price of a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a measurement took.

    Attributes:
        passes: full walks over the data.
        hvps: Hessian-vector products over the whole data set.
        gradients: everything done, audit included, in units of one gradient (forward and backward) over the data set.
        seconds: wall-clock.
    """

    passes: int
    hvps: int
    gradients: float
    seconds: float


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    kept = list(costs)
    return Cost(
        passes=sum(c.passes for c in kept),
        hvps=sum(c.hvps for c in kept),
        gradients=sum(c.gradients for c in kept),
        seconds=sum(c.seconds for c in kept),
    )
