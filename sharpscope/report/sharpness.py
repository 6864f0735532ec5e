"""Figures of m-sharpness against m, and of lambda_max against the edge of stability."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sharpscope.report.drawing import PAIR, QUIET, PageFigure, Panel, Style, group_by_style, legend, log_ticks, panel
from sharpscope.report.spectra import label_rows
from sharpscope.results.comparison import Comparison, Subject
from sharpscope.results.comparison.rows import Row
from sharpscope.results.sharpness import SAM_EDGE, SGD_EDGE, Measure, exact_setting
from sharpscope.results.statistics import SUBSETS, Cell, OwnError, spread, surely_positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[Subject, list[Measure]]]


def m_sharpness(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """m-sharpness against m, a panel for each radius and shape of the ball."""
    balls: dict[tuple[Any, ...], Points] = {}
    for s in comparison.subjects:
        for measure in _measures_of(s, "m-sharpness"):
            ball = tuple(measure.settings.get(k) for k in ("rho", "p", "adaptive", "ascent"))
            points = balls.setdefault(ball, [])
            if not points or points[-1][0] is not s:
                points.append((s, []))
            points[-1][1].append(measure)
    if not balls:
        return None
    panels = [_ball(f"m-sharpness-{i}", *entry, styles) for i, entry in enumerate(balls.items(), start=1)]
    shown = {s.name for points in balls.values() for s, _ in points}
    several = any(len(runs) > 1 for runs in comparison.groups.values())
    whiskers = (
        "Thin: runs; thick: their mean (geometric, where the intervals of all runs are above 0) with its 95 % interval."
        if several
        else "Whiskers: 95 % over the disjoint subsets; a point without them is one subset."
    )
    caption = (
        "Mean over disjoint subsets of m examples of how much the loss of a subset rises in the worst direction that "
        f"the ascent finds within radius rho (Foret et al. 2021, section 4.1). {whiskers} "
        "Points of one m are set a little apart. A lower bound of the maximum."
    )
    return PageFigure(
        "m-sharpness",
        "m-sharpness against m",
        tuple(panels),
        caption,
        "pair",
        legend(comparison, styles, list(shown)),
    )


def _measures_of(subject: Subject, name: str) -> list[Measure]:
    return [] if subject.sharpness is None else [m for m in subject.sharpness.measures if m.name == name]


def _ball(name: str, ball: tuple[Any, ...], points: Points, styles: dict[str, Style]) -> Panel:
    rho, p, adaptive, ascent = ball
    grouped = [(s, sorted(ms, key=lambda m: int(m.settings["m"]))) for s, ms in points]
    what = f"rho = {exact_setting(rho)}, p = {p}{f', adaptive ({adaptive})' if adaptive else ''}, ascent: {ascent}"
    description = "; ".join(f"{s.name}: " + ", ".join(f"{m} at m = {m.settings['m']}" for m in ms) for s, ms in grouped)
    title = f"m-sharpness against m, {what}"
    return panel(name, title, f"m-sharpness: {description}.", lambda axes: _curves(axes, grouped, styles), heading=what)


def _curves(axes: Axes, points: Points, styles: dict[str, Style]) -> None:
    measured = {s.name: ms for s, ms in points}
    parts = group_by_style(s for s, _ in points)
    positive = all(m.value > 0 for _, found in points for m in found)
    # Apart by a fraction of the step to the next m, so that whiskers of several checkpoints are seen.
    spacing = 2 ** (0.36 / len(parts))
    for i, (_, members) in enumerate(parts):
        offset = spacing ** (i - (len(parts) - 1) / 2)
        style = styles[members[0].name]
        many = len(members) > 1
        for ms in (measured[s.name] for s in members):
            x, y = [m.settings["m"] * offset for m in ms], [m.value for m in ms]
            below = [0.0 if m.lower is None else max(m.value - m.lower, 0) for m in ms]
            above = [0.0 if m.upper is None else max(m.upper - m.value, 0) for m in ms]
            if many:
                axes.plot(x, y, color=style.colour, linewidth=0.8, alpha=0.5)
            else:
                axes.errorbar(x, y, yerr=[below, above], capsize=3, **style.line)
        if many:
            _mean(axes, [measured[s.name] for s in members], style, offset, positive)
    ms = [m for _, found in points for m in found]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({m.settings["m"] for m in ms}))
    log_ticks(axes.xaxis, ticks=False)
    axes.set(xlabel="m, the examples that share a perturbation", ylabel="m-sharpness")
    if positive:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)


def _mean(axes: Axes, runs: list[list[Measure]], style: Style, offset: float, geometric: bool) -> None:
    """The mean over runs at each m that all of them have."""
    by_m: dict[int, list[Cell]] = {}
    for ms in runs:
        for m in ms:
            by_m.setdefault(int(m.settings["m"]), []).append(Cell(m.value, m.lower, m.upper, SUBSETS))
    whole = {
        m: cells
        for m, cells in by_m.items()
        if len(cells) == len(runs) and all(math.isfinite(cell.value) for cell in cells)
    }
    means = []
    for cells in whole.values():
        log = geometric and all(map(surely_positive, cells))
        means.append(spread([cell.value for cell in cells], log=log, own=OwnError.of(cells, log=log)))
    below = [0.0 if s.lower is None else s.value - s.lower for s in means]
    above = [0.0 if s.upper is None else s.upper - s.value for s in means]
    axes.errorbar(
        [m * offset for m in whole],
        [s.value for s in means],
        yerr=[below, above],
        capsize=3,
        **{**style.line, "linewidth": 2},
    )


def edge(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """lambda_max of each checkpoint and the edge of stability that its last step size sets."""
    found = [(s, m) for s in comparison.subjects for m in _measures_of(s, "edge") if m.value > 0]
    if not found:
        return None
    beyond = max(found, key=lambda entry: entry[1].value)
    description = "; ".join(
        f"{s.name}: lambda_max {m.settings['lambda_max']:.4g}, edge {m.settings[SGD_EDGE]:.4g}, {m.value:.2g} of it"
        for s, m in found
    )
    drawing = panel(
        "edge-of-stability",
        "lambda_max against the edge of stability",
        f"{description}. Nearest to its edge is {beyond[0].name}.",
        lambda axes: _draw_edges(axes, found, styles),
        (1.6 * PAIR[0], 1.1 + 0.27 * len(found)),
        "",
    )
    with_sam = "; triangle: SAM's edge" if any(m.settings.get(SAM_EDGE) for _, m in found) else ""
    caption = (
        "Filled: lambda_max. Bar: SGD's edge of stability 2 (1 + momentum) / lr, beyond which a quadratic would make "
        f"this step size diverge (Cohen et al. 2021){with_sam}. "
        "At the learning rate in force when the checkpoint was written: at the end of a schedule that goes to zero the "
        "edge is far away whatever the network."
    )
    return PageFigure("edge", "Edge of stability", (drawing,), caption, "wide")


def _draw_edges(axes: Axes, found: list[tuple[Subject, Measure]], styles: dict[str, Style]) -> None:
    axes.set_xscale("log")
    for y, (s, m) in enumerate(found):
        style, top = styles[s.name], float(m.settings["lambda_max"])
        limit = float(m.settings[SGD_EDGE])
        if math.isfinite(limit):
            axes.plot([top, limit], [y, y], color=QUIET, linewidth=0.7)
            axes.plot(limit, y, marker="|", markersize=11, markeredgewidth=2, color=QUIET)
        sam = m.settings.get(SAM_EDGE)
        if sam and math.isfinite(sam):
            axes.plot(sam, y, marker="v", color=QUIET, fillstyle="none")
        axes.plot(top, y, marker=style.marker, color=style.colour, markersize=6)
    label_rows(axes, [s.name for s, _ in found])
    axes.set_xlabel("eigenvalue of the Hessian")
    log_ticks(axes.xaxis)
