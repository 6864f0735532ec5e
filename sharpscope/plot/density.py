"""How the eigenvalues are distributed, with the outliers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.errors import DataError
from sharpscope.plot.figure import COLOURS
from sharpscope.results import Curve, DensityResult, EigenResult
from sharpscope.results.measured_alike import another_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def density_curve(
    result: DensityResult,
    eigenvalues: EigenResult | None = None,
    axes: Axes | None = None,
    *,
    label: str | None = None,
    colour: str = COLOURS[0],
    width: float | None = None,
) -> Axes:
    """The smoothed spectral density on a log scale with its band of 95 %, outliers marked; returns the Axes.

    The dotted line is the height of a single eigenvalue: a bump that stays below it is part of one, as chance weighted
    it. Several results may be drawn on the same Axes, which then hold all of them.

    Args:
        result: what to draw.
        eigenvalues: of the same weights, marked by triangles on the curve, with their intervals; those that the result
            knew exactly are marked anyway.
        axes: where to draw; by default a new figure.
        label: of the curve, for the legend.
        colour: of the curve.
        width: of the smoothing; by default the result's.

    Raises: DataError when the eigenvalues are of other weights or data than the result.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import density_curve
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> axes = density_curve(sharpscope.spectral_density(problem, probes=3), sharpscope.top_eigenvalues(problem, k=2))
    >>> axes.get_ylabel(), axes.get_yscale()
    ('density', 'log')
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    differ = None if eigenvalues is None else another_matrix(eigenvalues, result.provenance, result.loss)
    if differ is not None:
        raise DataError(f"Eigenvalues must be those of the density's own matrix, but {differ}. Measure both alike.")
    curve = result.curve(width=width)
    single = single_eigenvalue_height(result, curve)
    floor = single / 100
    at, shown, lower, upper = with_gaps(curve)
    axes.fill_between(at, np.maximum(lower, floor), np.maximum(upper, floor), color=colour, alpha=0.25, linewidth=0)
    axes.plot(at, shown, color=colour, label=f"{label + ', ' if label else ''}width {curve.width:.2g}")
    axes.axhline(single, color=colour, linestyle=":", linewidth=1, label=None if axes.lines[1:] else "one eigenvalue")
    marks, below, above = _marks(result, eigenvalues)
    if len(marks):
        grid_values = 1.5 * np.maximum(result.curve(marks, curve.width).density, single)
        error: Any = np.stack([marks - below, above - marks]).clip(0)
        axes.errorbar(marks, grid_values, xerr=error, color=colour, marker="v", markersize=5, linestyle="", capsize=2)
    low, high = axes.get_ylim()
    top = 5 * float(curve.upper.max())
    # Autoscaling would follow the tails down to nothing; what was drawn before stays in the picture.
    before = axes.get_yscale() == "log"
    axes.set_yscale("log")
    axes.set_ylim(min(low, floor) if before else floor, max(high, top) if before else top)
    axes.set(xlabel=r"eigenvalue $\lambda$", ylabel="density")
    axes.legend(fontsize="small")
    return axes


def single_eigenvalue_height(result: DensityResult, curve: Curve) -> float:
    """How high a single eigenvalue's bump is."""
    return float(1 / (result.n * curve.width * np.sqrt(2 * np.pi)))


def with_gaps(curve: Curve) -> tuple[Any, Any, Any, Any]:
    """Grid, density and band, where a gap in the grid is a gap in the picture, no line across it."""
    gaps = np.flatnonzero(np.diff(curve.grid) > curve.width) + 1
    at, shown, lower, upper = (
        np.insert(y, gaps, np.nan) for y in (curve.grid, curve.density, curve.lower, curve.upper)
    )
    return at, shown, lower, upper


def _marks(result: DensityResult, eigenvalues: EigenResult | None) -> tuple[Any, Any, Any]:
    """Where to mark an outlier, and the ends of its interval."""
    if eigenvalues is not None:
        return eigenvalues.eigenvalues, eigenvalues.lower, eigenvalues.upper
    known = result.nodes[0, : result.num_known]
    return known, known, known
