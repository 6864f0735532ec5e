"""The price of a measurement."""

from __future__ import annotations

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
