"""Contour levels and colours shared by several surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sharpscope.errors import ArgumentError, DataError
from sharpscope.results import SliceResult
from sharpscope.results.serialization import Array
from sharpscope.results.slice import DONE

QUANTITIES = ("loss", "accuracy")

# Perceptually uniform, and safe for colour-blind readers.
COLOUR_MAP = "viridis"

# Round numbers of a decade, from coarse to fine.
ROUND: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 4, 5, 6, 7, 8.5),
)


def shared_levels(
    results: SliceResult | Sequence[SliceResult],
    *,
    split: str | None = None,
    quantity: str = "loss",
    log: bool = True,
    clip: float | None = None,
    count: int = 11,
) -> Array:
    """About ``count`` ascending round levels (k,) that hold what is finite of all results, up to ``clip``.

    Args:
        results: whose figures are to be compared.
        split: by default the first.
        quantity: "loss" or "accuracy", whose levels are never logarithmic.
        log: evenly spaced in the logarithm.
        clip: highest level.
        count: how many, roughly.

    Raises: DataError where nothing is finite, or not above 0 on a logarithmic scale; ArgumentError for too low a clip.
    """
    from matplotlib.ticker import MaxNLocator

    results = [results] if isinstance(results, SliceResult) else results
    grids = [grid_values(r, split, quantity, i) for r in results for i in range(len(r.directions))]
    values = np.concatenate([grid.ravel() for grid in grids])
    values = values[np.isfinite(values)]
    if not len(values):
        raise DataError(f"A figure needs finite values of the {quantity}, but there are none.")
    low, high = float(values.min()), float(values.max())
    if clip is not None and clip <= low:
        raise ArgumentError(f"clip must be above the lowest {quantity} ({low:.4g}), got {clip:g}.")
    top = high if clip is None else min(clip, high)
    if logarithmic(log, quantity):
        require_positive(low)
    if high - low <= 1e-9 * abs(high):
        ends = low + np.array([-1.0, 1.0]) * (0.01 * abs(low) or 0.01)
        return ends.clip(0, 1) if quantity == "accuracy" else ends
    if not logarithmic(log, quantity) or top < 2 * low:
        steps: Array = np.asarray(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, top))
        inside = steps if clip is None or clip >= high else np.append(steps[steps < top * (1 - 1e-9)], top)
        if quantity == "accuracy":
            inside = inside[(inside >= 0) & (inside <= 1 + 1e-9)]
        return inside[inside > 0] if logarithmic(log, quantity) else inside
    decades = 10.0 ** np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(top)) + 1)
    ladders = [(decades[:, None] * np.array(steps)).ravel() for steps in ROUND]
    best = min(ladders, key=lambda ladder: abs(((ladder > low) & (ladder < top)).sum() + 2 - count))
    cut = clip is not None and clip < high
    first = int(np.searchsorted(best, low * (1 + 1e-9), side="right")) - 1
    last = int(np.searchsorted(best, top * (1 - 1e-9)))
    return np.append(best[first:last], top if cut else best[last])


def logarithmic(log: bool, quantity: str) -> bool:
    """Whether a figure's scale is logarithmic: a share's never is."""
    return log and quantity == "loss"


def require_positive(low: float) -> None:
    """Raise DataError where a logarithmic scale has no place for the lowest loss."""
    if not low > 0:
        raise DataError(f"A logarithmic scale needs losses above 0, the lowest is {low:g}. Draw it linear (log=False).")


def grid_values(result: SliceResult, split: str | None, quantity: str, line: int = 0) -> Array:
    """The quantity (points of y, points of x) where it is known and finite; NaN elsewhere.

    Raises: ArgumentError for an unknown quantity, DataError where there is no accuracy.
    """
    if quantity not in QUANTITIES:
        raise ArgumentError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}.")
    s = result.split(split)
    values = (result.loss if quantity == "loss" else result.accuracy)[s, line]
    known = (result.status[line] == DONE) & np.isfinite(result.loss[s, line]) & np.isfinite(values)
    if quantity == "accuracy" and not known.any():
        raise DataError("The slice holds no accuracy, since its loss has no labels. Draw the loss.")
    return np.where(known, values, np.nan)


def colour_norm(levels: Array, log: bool) -> Any:
    """Return the colour normalisation for these levels."""
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if log else Normalize)(vmin=float(levels[0]), vmax=float(levels[-1]))


def subdivided(levels: Array, log: bool) -> Array:
    """Subdivide ``levels``, so that filled colours change smoothly and do not look like contours."""
    parts = max(2, 120 // (len(levels) - 1))
    spaced = np.log(levels) if log else levels
    at = np.arange((len(levels) - 1) * parts + 1) / parts
    fine = np.interp(at, np.arange(len(levels)), spaced)
    fine = np.exp(fine) if log else fine
    fine[::parts] = levels
    return fine


def format_level(value: float, quantity: str) -> str:
    """Format a level as text."""
    return f"{100 * value:.3g}%" if quantity == "accuracy" else f"{value:.3g}"
