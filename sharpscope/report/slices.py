"""Figures of the loss along lines and over planes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.plot.figure import caption, diverged, require_comparable
from sharpscope.plot.interactive import surface_traces
from sharpscope.plot.levels import COLOUR_MAP, colour_norm, format_level, grid_values, shared_levels
from sharpscope.plot.surface import describe_marks, surface_contour
from sharpscope.report.drawing import (
    QUIET,
    PageFigure,
    Panel,
    Style,
    escape,
    json_block,
    legend,
    log_ticks,
    panel,
    table,
    tag,
)
from sharpscope.results import SliceResult
from sharpscope.results.comparison import Comparison
from sharpscope.results.comparison.rows import Row
from sharpscope.results.serialization import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of more checkpoints, bands would hide each other.
BANDS = 4
# Losses that range over more are drawn on a logarithmic scale.
RANGE = 50.0


def lines(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """The loss along random directions, a panel a split, on one scale."""
    found = [(s.name, s.line) for s in comparison.subjects if s.line is not None and s.line.dimensions == 1]
    if not found:
        return None
    results = [r for _, r in found]
    require_comparable(results, grid=False)
    shown = [(name, r.finished()) for name, r in found]
    splits, (limits, log) = results[0].splits, _limits([r for _, r in shown])
    bands = len(shown) <= BANDS and any(len(r.directions) > 1 for _, r in shown)

    def drawing(split: str) -> Panel:
        def draw(axes: Axes) -> None:
            for name, r in shown:
                _line(axes, r, split, styles[name], bands, thin=len(shown) > BANDS)
            _set_loss_axis(axes, limits, log, f"{split} loss")
            axes.set_xlabel("t along random directions")

        description = "; ".join(f"{name}: {_describe_line(r, split)}" for name, r in shown)
        return panel(
            f"line-{splits.index(split) + 1}",
            f"{split} loss along random lines",
            description,
            draw,
            heading=f"{split} loss",
        )

    extra = ["lines are medians over directions" + (", bands from the lowest to the highest" if bands else "")]
    extra = extra if any(len(r.directions) > 1 for _, r in shown) else []
    scale = "logarithmic scale, shared" if log else "linear scale, shared"
    description = caption(results, scale=scale, extra=extra)
    names = [name for name, _ in shown]
    panels = tuple(map(drawing, splits))
    return PageFigure("lines", "Loss along random lines", panels, description, legend=legend(comparison, styles, names))


def between(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """The loss on the way from one checkpoint to another, with the barrier."""
    interpolations = [(a, b, r.finished()) for a, b, r in comparison.between]
    if not interpolations:
        return None
    require_comparable([r for _, _, r in interpolations], grid=False)
    splits, (limits, log) = interpolations[0][2].splits, _limits([r for _, _, r in interpolations])
    star = not comparison.groups and len(interpolations) > 1 and len({a for a, _, _ in interpolations}) == 1

    def drawing(split: str) -> Panel:
        def draw(axes: Axes) -> None:
            for a, b, r in interpolations:
                line = {"color": styles[b].colour, "linestyle": styles[b].linestyle} if star else {"color": QUIET}
                t, loss = _median(r, split)
                axes.plot(t, loss, linewidth=1.5 if len(interpolations) == 1 else 1.0, **line)
                for end, name in ((0.0, a), (1.0, b)):
                    near = int(np.argmin(np.abs(t - end)))
                    axes.plot(t[near], loss[near], marker=styles[name].marker, color=styles[name].colour, markersize=6)
            _set_loss_axis(axes, limits, log, f"{split} loss")
            axes.set_xlabel("t, from the first checkpoint (0) to the second (1)")

        description = "; ".join(
            f"{a} to {b}: {_describe_line(r, split)}, barrier {_barrier(r, split)}" for a, b, r in interpolations
        )
        name = f"between-{splits.index(split) + 1}"
        return panel(name, f"{split} loss between checkpoints", description, draw, heading=f"{split} loss")

    description = (
        "Loss of the weights (1 - t) w + t w' on the straight line between two checkpoints. The barrier is the most "
        "by which it lies above the straight line between the losses of its ends, on these points (Frankle et al. "
        f"2020); 0 means that nothing stands between them. {'Logarithmic' if log else 'Linear'} scale, shared."
    )
    barriers = [[_pair_label(a, b), *(_barrier(r, split) for split in splits)] for a, b, r in interpolations]
    after = table(["From, to", *(escape(f"barrier, {split}") for split in splits)], barriers, "Barriers")
    names = [name for a, b, _ in interpolations for name in (a, b)]
    panels = tuple(map(drawing, splits))
    return PageFigure(
        "between", "Between minima", panels, description, legend=legend(comparison, styles, names), after=after
    )


def _pair_label(a: str, b: str) -> str:
    return f"{escape(a)} → {escape(b)}"


def _losses(r: SliceResult, split: str) -> Array:
    """Of each line (lines, points), infinite where it diverged."""
    s = r.split(split)
    wrong = np.stack([diverged(r, s, line) for line in range(len(r.directions))])
    return np.where(wrong, np.inf, r.loss[s])


def _median(r: SliceResult, split: str) -> tuple[Array, Array]:
    middle = np.median(_losses(r, split), axis=0)
    return r.axes[0], np.where(np.isfinite(middle), middle, np.nan)


def _line(axes: Axes, r: SliceResult, split: str, style: Style, bands: bool, thin: bool) -> None:
    t, middle = _median(r, split)
    axes.plot(t, middle, color=style.colour, linestyle=style.linestyle, linewidth=1.1 if thin else 1.7)
    if bands and len(r.directions) > 1:
        losses = _losses(r, split)
        whole = np.isfinite(losses).all(axis=0)
        low, high = (np.where(whole, end(losses, axis=0), np.nan) for end in (np.min, np.max))
        axes.fill_between(t, low, high, color=style.colour, alpha=0.18, linewidth=0)
    missing = ~np.isfinite(middle)
    if missing.any():
        cross: dict[str, Any] = {"marker": "x", "linestyle": "", "color": style.colour, "markersize": 6}
        axes.plot(t[missing], np.ones(missing.sum()), transform=axes.get_xaxis_transform(), clip_on=False, **cross)


def _limits(results: Sequence[SliceResult]) -> tuple[tuple[float, float], bool]:
    """The range of all finite losses with a little room, and whether it asks for a logarithmic scale."""
    found = np.concatenate([r.loss[np.isfinite(r.loss)].ravel() for r in results])
    if not len(found):
        return (0.0, 1.0), False
    low, high = float(found.min()), float(found.max())
    if low > 0 and high > RANGE * low:
        return (low / (high / low) ** 0.05, high * (high / low) ** 0.05), True
    margin = 0.05 * (high - low) or 0.05 * abs(low) + 1e-6
    return (low - margin, high + margin), False


def _set_loss_axis(axes: Axes, limits: tuple[float, float], log: bool, label: str) -> None:
    axes.set(ylabel=label, yscale="log" if log else "linear")
    axes.set_ylim(*limits)
    if log:
        log_ticks(axes.yaxis)


def _describe_line(r: SliceResult, split: str) -> str:
    t, loss = _median(r, split)
    if not np.isfinite(loss).any():
        return "diverged everywhere"
    low, high = int(np.nanargmin(loss)), int(np.nanargmax(loss))
    return (
        f"lowest {loss[low]:.4g} at t = {t[low]:.3g}, highest {loss[high]:.4g} at t = {t[high]:.3g}, "
        f"{r.centre[r.split(split), 0]:.4g} at t = 0"
    )


def _barrier(r: SliceResult, split: str) -> str:
    height = r.barrier(split)
    return "unknown" if height is None else f"{height:.4g}"


# Browsers keep about 16 WebGL contexts alive, and a page may hold others.
MAX_SCENES = 12
# In inches.
PLANE, BAR = (3.2, 3.1), (6.4, 0.62)


def planes(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """Contours of the loss over a random plane, a panel a checkpoint, with one set of levels and colours."""
    found = _surfaces(comparison)
    if not found:
        return None
    results = [r for _, r in found]
    require_comparable(results, grid=True)
    at, log = _levels(results)
    split = results[0].splits[0]
    panels = [
        panel(
            f"plane-{i}",
            f"{split} loss of {name} over a random plane",
            f"{name}: {_describe_plane(r)}.",
            lambda axes, r=r: _plane(axes, r, at, log),  # type: ignore[misc]
            PLANE,
            name,
        )
        for i, (name, r) in enumerate(found, start=1)
    ]
    bar = panel(
        "plane-levels",
        f"Colours of the {split} loss",
        f"From {at[0]:.3g} to {at[-1]:.3g}, {'logarithmic' if log else 'linear'}, the same in all panels.",
        lambda axes: _colour_bar(axes, at, log, f"{split} loss"),
        BAR,
        "",
    )
    scale = f"{'logarithmic' if log else 'linear'} scale, the same levels in all"
    description = caption(results, splits=[split], scale=scale, extra=describe_marks(results))
    after = tag("div", bar.svg, class_="levels") + _interactive(found, at, log)
    return PageFigure("planes", "Loss over random planes", tuple(panels), description, "many", after=after)


def _surfaces(comparison: Comparison) -> list[tuple[str, SliceResult]]:
    found = [(s.name, s.surface) for s in comparison.subjects if s.surface is not None and s.surface.dimensions == 2]
    return [(name, r.finished()) for name, r in found]


def _levels(results: list[SliceResult]) -> tuple[Array, bool]:
    """Levels of all, logarithmic where every loss is above zero."""
    log = all(float(np.nanmin(grid_values(r, None, "loss"))) > 0 for r in results)
    return shared_levels(results, log=log), log


def _plane(axes: Axes, r: SliceResult, at: Array, log: bool) -> None:
    surface_contour(r, axes, levels=at, log=log, colorbar=False, captioned=False)
    axes.grid(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    # Hundreds of soft steps are pixels; contours, labels and axes stay lines.
    for drawn in axes.collections:
        if getattr(drawn, "filled", False):
            drawn.set_rasterized(True)


def _colour_bar(axes: Axes, at: Array, log: bool, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import NullLocator

    axes.grid(False)
    colours = ScalarMappable(colour_norm(at, log), COLOUR_MAP)
    axes.figure.colorbar(colours, cax=axes, orientation="horizontal", label=label)
    axes.set_xticks(at, [format_level(level, "loss") for level in at])
    axes.xaxis.set_minor_locator(NullLocator())
    for drawn in axes.collections:
        drawn.set_rasterized(True)
    axes.tick_params(color=QUIET)


def _describe_plane(r: SliceResult) -> str:
    z = grid_values(r, None, "loss")
    y, x = np.unravel_index(int(np.nanargmin(z)), z.shape)
    lost = int((~np.isfinite(z)).sum())
    return (
        f"{r.centre[0, 0]:.4g} at the checkpoint, lowest {np.nanmin(z):.4g} at x = {r.axes[0][x]:.3g}, "
        f"y = {r.axes[1][y]:.3g}, highest {np.nanmax(z):.4g}{f', {lost} of {z.size} points diverged' if lost else ''}"
    )


def plotly_script() -> str | None:
    """plotly's code as the installed package has it, or None."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return str(get_plotlyjs())


def _interactive(found: list[tuple[str, SliceResult]], at: Array, log: bool) -> str:
    """A button that starts the interactive surfaces, and their data; nothing without plotly."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        return ""
    shown = found[:MAX_SCENES]
    scenes: list[dict[str, Any]] = []
    for name, r in shown:
        figure = go.Figure(surface_traces(go, r, at, log=log))
        scenes.append({"name": name, "traces": json.loads(figure.to_json())["data"]})
    scaled = np.log10(at) if log else at
    ends = {"low": float(scaled[0]), "high": float(scaled[-1])}
    axis = {**ends, "at": scaled.tolist(), "told": [format_level(level, "loss") for level in at]}
    left = f" Of {len(found)} surfaces the first {MAX_SCENES}." if found[MAX_SCENES:] else ""
    button = tag("button", "Turn the surfaces in 3D", type="button", class_="start", data_scenes="scenes", hidden=True)
    hint = tag(
        "span", f"Drag to turn all of them together; the panels above show the same.{left}", class_="quiet", hidden=True
    )
    stage = tag("div", class_="stage", role="group", aria_label="Interactive surfaces", hidden=True)
    return tag("div", button, hint, stage, class_="turning") + json_block({"scenes": scenes, "axis": axis}, "scenes")
