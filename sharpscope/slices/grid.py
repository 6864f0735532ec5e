"""A grid that fills, from coarse to fine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sharpscope.errors import DataError
from sharpscope.results.slice import DIVERGED, DONE, PENDING
from sharpscope.resume import PointLog
from sharpscope.slices.axes import Array, coarse_to_fine, refined
from sharpscope.slices.walk import Walk


class Grid:
    """The points of ``lines`` lines or planes over ``axes``; their values are in ``log``, by ``(line, x, ...)``.

    Attributes:
        axes: ascending coordinates (x,) or (x, y).
    """

    def __init__(self, walk: Walk, log: PointLog, lines: int, axes: tuple[Array, ...], splits: int) -> None:
        self._walk, self._log, self._lines, self._splits = walk, log, lines, splits
        self.axes = axes

    def centre(self) -> Array:
        """Loss and accuracy at w (splits, 2), taken anew: what is in the log is of this loss only if it agrees.

        Raises: DataError when the loss is not finite there.
        """
        w = (0.0,) * len(self.axes)
        values, first = tuple(self._walk.at(0, w)), (0.0, *w)
        if not np.isfinite(values[0]):
            raise DataError(
                f"The loss at the weights must be finite, got {values[0]}. Check that checkpoint and data belong "
                "together."
            )
        if first in self._log and not np.array_equal(self._log[first], values, equal_nan=True):
            self._log.clear()  # code that no hash sees has changed
        for line in range(self._lines):  # w is on every line
            if (float(line), *w) not in self._log:
                self._log.add((float(line), *w), values)
        return np.array(values).reshape(self._splits, 2)

    def known(self) -> int:
        """How many of its points beside w are in the log."""
        points = np.stack(np.meshgrid(*self.axes), axis=-1).reshape(-1, len(self.axes)).tolist()
        return sum((float(line), *p) in self._log for line in range(self._lines) for p in points if any(p))

    def fill(
        self,
        report: Callable[[int, int], None],
        shard: tuple[int, int] | None = None,
        preview: Callable[[], None] | None = None,
    ) -> None:
        """Take every point, or every n-th from the i-th on; ``preview`` is called after each.

        ``report(done, points)`` is called after each point.
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
            self._value(line, coordinates)
            report(done, len(points))
            if preview is not None:
                preview()
        if shard is not None:
            self._log.read()

    def arrays(self) -> tuple[Array, Array, Any]:
        """Loss and accuracy (splits, lines, ...), NaN where pending, and the status (lines, ...)."""
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
        """At most ``count`` coordinates more on each axis, where the first split's loss bends most."""
        loss = self.arrays()[0][0]
        across = np.swapaxes(loss, -1, -2) if len(self.axes) == 2 else loss
        self.axes = tuple(refined(a, values, count) for a, values in zip(self.axes, (loss, across), strict=False))

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(len(a) for a in reversed(self.axes))

    def _value(self, line: int, coordinates: tuple[float, ...]) -> None:
        point = (float(line), *coordinates)
        if point not in self._log:
            self._log.add(point, self._walk.at(line, coordinates))
