"""Weighted points, several draws of them, as one smooth curve with a band."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sharpscope.results.estimate import student
from sharpscope.results.serialization import Array

# The grid reaches this many widths beyond the points on it, where a Gaussian is 1e-8 of its height, in steps of a
# tenth of the width, where the trapezoidal rule is exact for Gaussians to rounding.
REACH, STEP = 6.0, 0.1


@dataclass(frozen=True, eq=False)
class Curve:
    """A density (its integral over the default grid 1) on a grid, and a pointwise confidence band for its mean.

    Attributes:
        grid: ascending (g,).
        density, lower, upper: (g,), per unit of the grid.
        width: the standard deviation of the smoothing Gaussian.
        confidence: of the band at each point.
    """

    grid: Array
    density: Array
    lower: Array
    upper: Array
    width: float
    confidence: float


def smoothed(nodes: Array, weights: Array, width: float, confidence: float, grid: Array | None) -> Curve:
    """The mean of K draws ``sum_j w_j delta(t - node_j)``, convolved with a Gaussian, and a t-interval over draws."""
    at = covering(nodes[weights > 0], width) if grid is None else np.asarray(grid, float)
    draws = np.stack([_mixture(at, n[w > 0], w[w > 0], width) for n, w in zip(nodes, weights, strict=True)])
    count = len(draws)
    half = student(confidence, count - 1) * draws.std(0, ddof=1) / np.sqrt(count)
    mean = draws.mean(0)
    return Curve(at, mean, np.maximum(mean - half, 0), mean + half, width, confidence)


def shares_below(nodes: Array, weights: Array, at: float, width: float) -> Array:
    """The integral of each draw (K,), smoothed to ``width``, from minus infinity to ``at``."""
    parts = [0.5 * math.erfc((node - at) / (width * math.sqrt(2))) for node in nodes.ravel()]
    return np.asarray((weights * np.reshape(parts, nodes.shape)).sum(1))


def covering(points: Array, width: float) -> Array:
    """A grid around all points, without the empty stretches between far ones: an outlier must not cost a million."""
    ends = np.sort(points)
    cuts = np.flatnonzero(np.diff(ends) > 2 * REACH * width)
    starts, stops = ends[np.r_[0, cuts + 1]], ends[np.r_[cuts, len(ends) - 1]]
    pieces = []
    for start, stop in zip(starts - REACH * width, stops + REACH * width, strict=True):
        pieces.append(np.linspace(start, stop, int(np.ceil((stop - start) / (STEP * width))) + 1))
    return np.concatenate(pieces)


def _mixture(at: Array, means: Array, weights: Array, width: float) -> Array:
    kernel = np.exp(-0.5 * ((at[:, None] - means) / width) ** 2)
    return np.asarray(kernel @ weights / (width * np.sqrt(2 * np.pi)))
