"""Figures of groups: every run as a point, its partner tied to it, and the group's mean with its interval."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from sharpscope.report.drawing import QUIET, SMALL, PageFigure, Panel, Style, key, log_ticks, panel
from sharpscope.results.comparison import Comparison
from sharpscope.results.comparison.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Values that range over more are drawn on a logarithmic scale.
RANGE = 20.0


def runs(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """A small panel for each quantity that every run of two groups has."""
    groups = comparison.groups
    if len(groups) < 2 or max(map(len, groups.values())) < 2:
        return None
    chosen = [row for row in rows if len(row.spreads) == len(groups)]
    if not chosen:
        return None
    panels = tuple(_panel(f"runs-{i}", comparison, row, styles) for i, row in enumerate(chosen, start=1))
    paired = [pair for pair in pairwise(groups) if comparison.paired(*pair) is not None]
    tied = " Grey lines tie runs of one seed in neighbouring groups." if paired else ""
    said = (
        "Each point is a run; beside them the mean (geometric, where groups are compared by ratios) and Student's 95 % "
        f"interval of it.{tied} Scales are each panel's own and need not start at zero."
    )
    return PageFigure("runs", "Run by run", panels, said, "small", key(comparison, styles))


def _panel(name: str, comparison: Comparison, row: Row, styles: dict[str, Style]) -> Panel:
    means = []
    for group, spread in row.spreads.items():
        sure = "" if spread.lower is None or spread.upper is None else f" ({spread.lower:.4g} to {spread.upper:.4g})"
        means.append(f"{group} mean {spread.value:.4g}{sure} of {spread.runs} runs")
    for group, d in row.differences.items():
        means.append(f"{group} against the first group: {d}")
    title = f"{row.label} of every run"
    return panel(
        name, title, "; ".join(means) + ".", lambda axes: _strip(axes, comparison, row, styles), SMALL, row.label
    )


def _strip(axes: Axes, comparison: Comparison, row: Row, styles: dict[str, Style]) -> None:
    at = {s.name: r.value for s, r in zip(comparison.subjects, row.cells, strict=True) if r is not None}
    groups = list(comparison.groups)
    for left, right in pairwise(groups):
        for one, two in comparison.paired(left, right) or []:
            place = groups.index(left)
            axes.plot([place, place + 1], [at[one.name], at[two.name]], color=QUIET, alpha=0.5, linewidth=0.8, zorder=1)
    for x, (group, members) in enumerate(comparison.groups.items()):
        style, mean = styles[members[0].name], row.spreads[group]
        values = [at[s.name] for s in members]
        axes.plot([x] * len(values), values, linestyle="", marker=style.marker, color=style.colour, alpha=0.75)
        low, high = mean.lower, mean.upper
        reach = [[0.0], [0.0]] if low is None or high is None else [[mean.value - low], [high - mean.value]]
        axes.errorbar(
            x + 0.22, mean.value, yerr=reach, marker="_", markersize=9, capsize=3, color=style.colour, linewidth=2
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    finite = [value for value in at.values() if math.isfinite(value)]
    if row.factor and min(finite) > 0 and max(finite) > RANGE * min(finite):
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
