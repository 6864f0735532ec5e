"""Points of a slice: axes, spacing, and the order from coarse to fine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import ArgumentError, DataError
from sharpscope.results.slice import DIVERGED, DONE, PENDING
from sharpscope.resume import PointLog
from sharpscope.slices.evaluation import PointEvaluator


class Grid:
    """Points of ``lines`` lines or planes on ``axes``, with their values in ``log`` by ``(line, x, ...)``.

    Attributes:
        axes: ascending coordinates (x,) or (x, y).
    """

    def __init__(
        self, evaluator: PointEvaluator, log: PointLog, lines: int, axes: tuple[Array, ...], splits: int
    ) -> None:
        self._evaluator, self._log, self._lines, self._splits = evaluator, log, lines, splits
        self.axes = axes

    def centre(self) -> Array:
        """Evaluate loss and accuracy at w (splits, 2); discard the log if its values at w differ.

        Raises: DataError if the loss is not finite.
        """
        w = (0.0,) * len(self.axes)
        values, first = tuple(self._evaluator.evaluate(0, w)), (0.0, *w)
        if not np.isfinite(values[0]):
            raise DataError(
                f"The loss at the weights must be finite, got {values[0]}. Check that checkpoint and data belong "
                "together."
            )
        if first in self._log and not np.array_equal(self._log[first], values, equal_nan=True):
            self._log.clear()  # the code has changed without changing the key
        for line in range(self._lines):  # w is on every line
            if (float(line), *w) not in self._log:
                self._log.add((float(line), *w), values)
        return np.array(values).reshape(self._splits, 2)

    def num_logged(self) -> int:
        """Number of points in the log, without w."""
        points = np.stack(np.meshgrid(*self.axes), axis=-1).reshape(-1, len(self.axes)).tolist()
        return sum((float(line), *p) in self._log for line in range(self._lines) for p in points if any(p))

    def fill(
        self,
        report: Callable[[int, int], None],
        shard: tuple[int, int] | None = None,
        preview: Callable[[], None] | None = None,
    ) -> None:
        """Evaluate every point, or with ``shard = (i, n)`` every n-th from the i-th.

        Call ``report(done, points)`` and ``preview`` after each point.
        """
        order, _ = coarse_to_fine(self.axes)
        points = []
        for flat in order.tolist():
            place = reversed(np.unravel_index(flat, self._shape))
            coordinates = tuple(float(a[i]) for a, i in zip(self.axes, place, strict=True))
            points += [(line, coordinates) for line in range(self._lines)]
        if shard is not None:
            points = points[shard[0] - 1 :: shard[1]]
        for done, (line, coordinates) in enumerate(points, start=1):
            point = (float(line), *coordinates)
            if point not in self._log:
                self._log.add(point, self._evaluator.evaluate(line, coordinates))
            report(done, len(points))
            if preview is not None:
                preview()
        if shard is not None:
            self._log.read()

    def arrays(self) -> tuple[Array, Array, Any]:
        """Loss and accuracy (splits, lines, ...), NaN if pending, and status (lines, ...)."""
        points = np.stack(np.meshgrid(*self.axes), axis=-1)
        values = np.full((self._lines, *self._shape, self._splits, 2), np.nan)
        known = np.zeros((self._lines, *self._shape), bool)
        for place in np.ndindex(*known.shape):
            point = (float(place[0]), *points[place[1:]].tolist())
            if point in self._log:
                known[place] = True
                values[place] = np.reshape(self._log[point], (self._splits, 2))
        loss, accuracy = np.moveaxis(values, (-1, -2), (0, 1))
        diverged = known & ~np.isfinite(loss).all(axis=0)
        return loss, accuracy, np.where(diverged, DIVERGED, np.where(known, DONE, PENDING)).astype(np.int8)

    def refine(self, count: int) -> None:
        """Add at most ``count`` coordinates to each axis, where the first split's loss has the largest curvature."""
        loss = self.arrays()[0][0]
        across = np.swapaxes(loss, -1, -2) if len(self.axes) == 2 else loss
        self.axes = tuple(refined_axis(a, values, count) for a, values in zip(self.axes, (loss, across), strict=False))

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(len(a) for a in reversed(self.axes))


Array = NDArray[np.float64]
Span = tuple[float, float]

SPACINGS = ("linear", "log")

# The smallest nonzero coordinate of a log-spaced axis, as a fraction of its end.
FIRST_LOG_STEP = 1e-3

# Larger coordinates may overflow float32.
MAX_COORDINATE = 1e30


def make_axis(points: int = 21, span: Span = (-1.0, 1.0), spacing: str = "linear") -> Array:
    """Ascending coordinates from ``span[0]`` to ``span[1]``, ends exact; 0 is added, exactly, if it lies between.

    "log" spaces them geometrically: from ``span[0]`` to ``span[1]`` if 0 is outside, else on each side of 0 from 1/1000
    of the end to the end.

    Raises: ArgumentError for fewer than 2 points, a span that is empty or not finite, or unknown spacing.
    """
    if len(span) != 2:
        raise ArgumentError(f"The range of an axis must be two numbers, got {span!r}.")
    low, high = map(float, span)
    if not isinstance(points, int) or points < 2:
        raise ArgumentError(f"An axis must have at least 2 points, got {points}.")
    if not -MAX_COORDINATE <= low < high <= MAX_COORDINATE:
        raise ArgumentError(
            f"The range of an axis must go from a lower to a higher number, at most {MAX_COORDINATE:g}, got {low:g} to "
            f"{high:g}."
        )
    if spacing not in SPACINGS:
        raise ArgumentError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}.")
    if spacing == "log":
        return _logarithmic(points, low, high)
    steps = np.arange(points)
    # Exactly symmetric about the middle, unlike linspace.
    found: Array = (low * (points - 1 - steps) + high * steps) / (points - 1)
    found[0], found[-1] = low, high
    return with_point(found, 0.0) if low <= 0 <= high else found


def custom_axis(values: Sequence[float] | Array) -> Array:
    """``values`` as an axis. Raises ArgumentError unless they are at least 2, finite and ascending."""
    found = np.array(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < 2 or not (abs(found) <= MAX_COORDINATE).all() or not (np.diff(found) > 0).all():
        raise ArgumentError(f"Coordinates must be at least 2 finite, ascending numbers, got {values!r}.")
    return found


def _logarithmic(points: int, low: float, high: float) -> Array:
    if low > 0 or high < 0:
        return np.geomspace(low, high, points)
    sides = [end for end in (low, high) if end]
    count = points // 2 if len(sides) == 2 else points - 1
    away = [end * (np.geomspace(FIRST_LOG_STEP, 1.0, count) if count > 1 else np.ones(1)) for end in sides]
    return np.sort(np.concatenate([np.zeros(1), *away]))


def with_point(coordinates: Array, value: float) -> Array:
    """Insert ``value`` into ``coordinates``; a coordinate equal to it up to rounding is replaced."""
    near = int(np.abs(coordinates - value).argmin())
    if abs(coordinates[near] - value) < 1e-9 * (coordinates[-1] - coordinates[0]):
        return np.concatenate([coordinates[:near], [value], coordinates[near + 1 :]])
    return np.sort(np.append(coordinates, value))


def coarse_to_fine(axes: Sequence[Array]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flat indices of the grid's points from coarse to fine, and the level of each.

    The grid is (points of y, points of x). Level 0 is the corners and the centre; each further level bisects the gaps
    of the one before, so the finished levels are a coarser grid of the whole plane.
    """
    levels = [_levels(a) for a in reversed(axes)]
    level = levels[0] if len(levels) == 1 else np.maximum(levels[0][:, None], levels[1][None, :])
    order = np.argsort(level.reshape(-1), kind="stable")
    return order, level.reshape(-1)[order]


def _levels(coordinates: Array) -> NDArray[np.int64]:
    level = np.full(len(coordinates), -1)
    known = sorted({0, len(coordinates) - 1, int(np.abs(coordinates).argmin())})
    level[known] = now = 0
    while (level < 0).any():
        now += 1
        middles = [(a + b) // 2 for a, b in pairwise(known) if b - a > 1]
        level[middles] = now
        known = sorted({*known, *middles})
    return level


def refined_axis(coordinates: Array, values: NDArray[np.float64], count: int) -> Array:
    """Add the midpoints of at most ``count`` intervals, those with the largest error of linear interpolation.

    The error is ``h^2/8 |f''|``, with ``f''`` the mean of the three-point estimates at both ends, and the largest over
    all lines of ``values`` (..., points). It is measured on the logarithm if all values are positive, as in figures of
    losses over several decades. Next to a value that is not finite, f'' is taken as zero.
    """
    lines = values.reshape(-1, values.shape[-1])
    finite = lines[np.isfinite(lines)]
    if finite.size and finite.min() > 0:
        with np.errstate(invalid="ignore"):
            lines = np.log(lines)
    h = np.diff(coordinates)
    slopes = np.diff(lines, axis=1) / h
    second = 2 * np.abs(np.diff(slopes, axis=1)) / (h[1:] + h[:-1])
    second[~np.isfinite(second)] = 0.0
    at = np.zeros(len(coordinates))
    at[1:-1] = second.max(axis=0)
    score = h**2 / 8 * (at[1:] + at[:-1]) / 2
    chosen = np.argsort(-score, kind="stable")[:count]
    chosen = chosen[score[chosen] > 0]
    return np.sort(np.concatenate([coordinates, (coordinates[chosen] + coordinates[chosen + 1]) / 2]))
