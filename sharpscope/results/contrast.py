"""How one checkpoint's number differs from another's, as far as their intervals tell."""

from __future__ import annotations

import math

from sharpscope.results.difference import Difference
from sharpscope.results.intervals import KINDS
from sharpscope.results.reading import Reading


def contrast(one: Reading | None, two: Reading | None, factor: bool) -> Difference | None:
    """The second reading over the first, where ``factor`` and both are surely positive, or less it.

    Its interval is what the ends of both leave possible, each widened to about 95 %; where both are of 95 %, it holds
    with at least 90 %. None where a reading is missing or not finite.
    """
    if one is None or two is None or not (math.isfinite(one.value) and math.isfinite(two.value)):
        return None
    ours, theirs, lower, upper = _ends(one), _ends(two), None, None
    least = [reading.value if ends is None else ends[0] for reading, ends in ((one, ours), (two, theirs))]
    ratio = factor and min(least) > 0
    value = two.value / one.value if ratio else two.value - one.value
    if ours is not None and theirs is not None:
        (low, high), (lowest, highest) = ours, theirs
        lower, upper = (lowest / high, highest / low) if ratio else (lowest - high, highest - low)
    return Difference(value, lower, upper, ratio, converged=one.converged and two.converged)


def _ends(reading: Reading) -> tuple[float, float] | None:
    """The interval of about 95 %, or the bound."""
    if reading.lower is None or reading.upper is None:
        return None
    reach = KINDS[reading.interval].reach if reading.interval in KINDS else 1.0
    return (
        reading.value - reach * (reading.value - reading.lower),
        reading.value + reach * (reading.upper - reading.value),
    )
