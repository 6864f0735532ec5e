"""Figures of the Hessian's spectrum: its largest eigenvalues with their bounds, and its density."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.errors import DataError
from sharpscope.formatting import with_bound
from sharpscope.plot.density import density_curve, single_eigenvalue_height, with_gaps
from sharpscope.report.drawing import (
    PAIR,
    QUIET,
    THIRD,
    PageFigure,
    Panel,
    Style,
    group_by_style,
    legend,
    log_ticks,
    panel,
)
from sharpscope.results.comparison import Comparison, Subject
from sharpscope.results.comparison.rows import Row
from sharpscope.results.density_and_trace import DensityResult
from sharpscope.results.statistics import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A name in a figure has so many letters; the table has all of them.
LETTERS = 22
# Bars from zero say nothing of the small ones where the largest is so many times larger.
BARS = 60.0
BANDS = (
    "Bands: 95 % over random vectors. Triangles: the largest eigenvalues. Dotted: the height of a single eigenvalue; a "
    "bump below it is part of one. "
)


def eigenvalues(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """lambda_max as bars with bounds, and the k largest eigenvalues."""
    row = next((row for row in rows if row.label == "lambda_max"), None)
    if row is None:
        return None
    found = [(s, r) for s, r in zip(comparison.subjects, row.cells, strict=True) if r is not None]
    size = (PAIR[0], max(PAIR[1], 0.9 + 0.27 * len(found)))
    description = "; ".join(f"{s.name} {r}" for s, r in found)
    panels = [
        panel(
            "lambda-max",
            "lambda_max of each checkpoint",
            f"lambda_max with its interval: {description}.",
            lambda axes: _bars(axes, [(s.name, styles[s.name], r) for s, r in found]),
            size,
            "lambda_max, with its interval",
        )
    ]
    several = [
        s for s, _ in found if s.eigen is not None and len(s.eigen.eigenvalues) > 1 and s.eigen.which == "largest"
    ]
    if several:
        k = max(len(s.eigen.eigenvalues) for s in several if s.eigen is not None)
        panels.append(
            panel(
                "top-eigenvalues",
                f"The {k} largest eigenvalues of each checkpoint",
                f"The largest eigenvalues: {'; '.join(f'{s.name} {_list_eigenvalues(s)}' for s in several)}.",
                lambda axes: _largest(axes, several, styles),
                size,
            )
        )
    kinds = dict.fromkeys(r.interval for _, r in found)
    widths = [(r.upper - r.lower) / abs(r.value) for _, r in found if r.upper is not None and r.lower is not None]
    narrow = max(widths, default=1.0) < 0.02
    thin = "; most are narrower than the line that draws them" if narrow else ""
    unsure = "; ? marks what did not converge to its tolerance" if any(not r.converged for _, r in found) else ""
    caption = (
        f"Largest eigenvalues of the Hessian of the mean training loss. Whiskers: {', '.join(kinds)}{thin}"
        f"{unsure}. A larger lambda_max is a sharper direction, no worse network."
    )
    return PageFigure("eigenvalues", "Largest eigenvalues", tuple(panels), caption, legend=legend(comparison, styles))


def bars_scale(values: list[float]) -> str:
    """ "linear" or "log": bars start at zero unless that hides the small ones."""
    return "log" if min(values) > 0 and max(values) > BARS * min(values) else "linear"


def shortened(name: str) -> str:
    """As much of a name as a figure has room for: its end, which tells runs apart."""
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"


def label_rows(axes: Axes, names: list[str]) -> None:
    """Names of rows from the top downwards."""
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _bars(axes: Axes, found: list[tuple[str, Style, Cell]]) -> None:
    values = [cell.value for _, _, cell in found]
    scale = bars_scale(values)
    axes.set_xscale(scale)
    highs: list[float] = []
    lows: list[float] = []
    for y, (_, style, r) in enumerate(found):
        low, high = (r.value if end is None else end for end in (r.lower, r.upper))
        if scale == "linear":
            axes.barh(y, r.value, height=0.55, color=style.colour, alpha=0.35)
        error: Any = [[max(r.value - low, 0)], [max(high - r.value, 0)]]
        axes.errorbar(r.value, y, xerr=error, color=style.colour, marker=style.marker, capsize=3)
        highs.append(max(high, r.value))
        lows.append(min(low, r.value))
        axes.annotate(
            str(r),
            (highs[-1], y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    label_rows(axes, [name for name, _, _ in found])
    axes.set_xlabel("lambda_max")
    if scale == "log":
        lowest = min((start for start in lows if start > 0), default=min(values))
        axes.set_xlim(lowest / 2, max(highs) * (max(highs) / min(values)) ** 0.5)
        log_ticks(axes.xaxis)
    else:
        low = 1.05 * min(0.0, *lows)
        axes.set_xlim(low, low + 1.42 * (max(max(highs), 0.0) - low or 1.0))


def _largest(axes: Axes, subjects: list[Subject], styles: dict[str, Style]) -> None:
    positive = all((_intervals(s)[0] > 0).all() for s in subjects)
    for s in subjects:
        if s.eigen is not None:
            values, (lower, upper) = s.eigen.eigenvalues, _intervals(s)
            error = np.stack([values - lower, upper - values]).clip(0)
            axes.errorbar(np.arange(1, len(values) + 1), values, yerr=error, capsize=2, **styles[s.name].line)
    if positive:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    axes.set(xlabel="k", ylabel="lambda_k")
    axes.set_xticks(range(1, max(len(s.eigen.eigenvalues) for s in subjects if s.eigen is not None) + 1))


def _list_eigenvalues(subject: Subject) -> str:
    eigen = subject.eigen
    assert eigen is not None
    return ", ".join(map(with_bound, eigen.eigenvalues, *_intervals(subject)))


def _intervals(subject: Subject) -> tuple[Any, Any]:
    """The intervals that the table has: over examples where the eigenvalues are those of a sample."""
    eigen = subject.eigen
    assert eigen is not None
    sampling = eigen.sampling or {}
    if sampling.get("lower") is None:
        return eigen.lower, eigen.upper
    return np.array(sampling["lower"]), np.array(sampling["upper"])


def densities(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """The spectral density of each checkpoint or group, on one scale, with the others in grey behind."""
    found = [s for s in comparison.subjects if s.density is not None]
    if not found:
        return None
    curves = {s.name: (s.density, s.density.curve()) for s in found if s.density is not None}
    floor = min(single_eigenvalue_height(d, c) for d, c in curves.values()) / 100
    limits = (
        (min(float(c.grid[0]) for _, c in curves.values()), max(float(c.grid[-1]) for _, c in curves.values())),
        (floor, 5 * max(float(c.upper.max()) for _, c in curves.values())),
    )
    parts = group_by_style(found)
    size = PAIR if len(parts) < 5 else THIRD
    panels = [
        _density_panel(f"density-{i}", name, members, found, styles, limits, size)
        for i, (name, members) in enumerate(parts, start=1)
    ]
    widths = [c.width for _, c in curves.values()]
    caption = (
        "Share of all eigenvalues per unit of lambda (stochastic Lanczos quadrature), smoothed to a width of "
        f"{min(widths):.2g}{f' to {max(widths):.2g}' if max(widths) > 1.005 * min(widths) else ''}; logarithmic and "
        f"shared scale. {BANDS if any(len(members) == 1 for _, members in parts) else ''}"
        f"{'Grey: the others.' if len(panels) > 1 else ''}"
    )
    layout = "pair" if size is PAIR else "many"
    return PageFigure("density", "Spectral density", tuple(panels), caption, layout)


def _density_panel(
    legend: str,
    name: str,
    members: list[Subject],
    everyone: list[Subject],
    styles: dict[str, Style],
    limits: Any,
    size: tuple[float, float],
) -> Panel:
    own = {s.name for s in members}

    def draw(axes: Axes) -> None:
        for s in everyone:
            if s.density is not None and s.name not in own:
                at, shown, _, _ = with_gaps(s.density.curve())
                axes.plot(at, shown, color=QUIET, alpha=0.55 if size is PAIR else 0.25, linewidth=1, zorder=1)
        for s in members:
            if s.density is not None:
                _density_line(axes, s.density, s, styles[s.name], alone=len(members) == 1)
        axes.set(xlabel="eigenvalue λ", ylabel="density", yscale="log", xlim=limits[0], ylim=limits[1])
        log_ticks(axes.yaxis)

    description = "; ".join(_describe_density(s.name, s.density) for s in members if s.density is not None)
    return panel(legend, f"Spectral density of {name}", description, draw, size, name)


def _density_line(axes: Axes, density: DensityResult, subject: Subject, style: Style, alone: bool) -> None:
    if not alone:
        at, shown, _, _ = with_gaps(density.curve())
        axes.plot(at, shown, color=style.colour, linewidth=1)
        return
    eigen = subject.eigen if subject.eigen is not None and subject.eigen.which == "largest" else None
    try:
        density_curve(density, eigen, axes, colour=style.colour)
    except DataError:  # eigenvalues of other data have no place on this curve
        density_curve(density, None, axes, colour=style.colour)
    legend = axes.get_legend()
    if legend is not None:
        legend.remove()


def _describe_density(name: str, density: DensityResult) -> str:
    return (
        f"{name}: Frobenius norm {density.frobenius}, share of negative eigenvalues "
        f"{density.negative_mass}, nodes from {density.nodes.min():.3g} to {density.nodes.max():.3g}"
    )
