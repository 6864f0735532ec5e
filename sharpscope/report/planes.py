"""Figures of surfaces side by side with shared levels, and of the same to turn with the pointer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.plot.alike import require_alike
from sharpscope.plot.caption import caption
from sharpscope.plot.interactive import surface_traces
from sharpscope.plot.levels import MAP, heights, norm_of, shared_levels, told
from sharpscope.plot.marks import marks_said
from sharpscope.plot.surface import surface_contour
from sharpscope.report.drawing import QUIET, Drawn, panel
from sharpscope.report.look import Look
from sharpscope.report.markup import data, tag
from sharpscope.results import SliceResult
from sharpscope.results.comparison import Comparison
from sharpscope.results.comparison.rows import Row
from sharpscope.results.serialization import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Browsers keep about 16 WebGL contexts alive, and a page may hold others.
SCENES = 12
# In inches.
PLANE, BAR = (3.2, 3.1), (6.4, 0.62)


def planes(comparison: Comparison, looks: dict[str, Look], rows: list[Row]) -> Drawn | None:
    """Contours of the loss over a random plane, a panel a checkpoint, with one set of levels and colours."""
    found = _surfaces(comparison)
    if not found:
        return None
    results = [r for _, r in found]
    require_alike(results, grid=True)
    at, log = _levels(results)
    split = results[0].splits[0]
    panels = [
        panel(
            f"plane-{i}",
            f"{split} loss of {name} over a random plane",
            f"{name}: {_described(r)}.",
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
        lambda axes: _bar(axes, at, log, f"{split} loss"),
        BAR,
        "",
    )
    scale = f"{'logarithmic' if log else 'linear'} scale, the same levels in all"
    said = caption(results, splits=[split], scale=scale, also=marks_said(results))
    after = tag("div", bar.svg, class_="levels") + _turning(found, at, log)
    return Drawn("planes", "Loss over random planes", tuple(panels), said, "many", after=after)


def _surfaces(comparison: Comparison) -> list[tuple[str, SliceResult]]:
    found = [(s.name, s.surface) for s in comparison.subjects if s.surface is not None and s.surface.dimensions == 2]
    return [(name, r if r.complete else r.finished()) for name, r in found]


def _levels(results: list[SliceResult]) -> tuple[Array, bool]:
    """Levels of all, logarithmic where every loss is above zero."""
    log = all(float(np.nanmin(heights(r, None, "loss"))) > 0 for r in results)
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


def _bar(axes: Axes, at: Array, log: bool, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import NullLocator

    axes.grid(False)
    colours = ScalarMappable(norm_of(at, log), MAP)
    axes.figure.colorbar(colours, cax=axes, orientation="horizontal", label=label)
    axes.set_xticks(at, [told(level, "loss") for level in at])
    axes.xaxis.set_minor_locator(NullLocator())
    for drawn in axes.collections:
        drawn.set_rasterized(True)
    axes.tick_params(color=QUIET)


def _described(r: SliceResult) -> str:
    z = heights(r, None, "loss")
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


def _turning(found: list[tuple[str, SliceResult]], at: Array, log: bool) -> str:
    """A button that starts the interactive surfaces, and their data; nothing without plotly."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        return ""
    shown = found[:SCENES]
    scenes: list[dict[str, Any]] = []
    for name, r in shown:
        figure = go.Figure(surface_traces(go, r, at, log=log))
        scenes.append({"name": name, "traces": json.loads(figure.to_json())["data"]})
    scaled = np.log10(at) if log else at
    ends = {"low": float(scaled[0]), "high": float(scaled[-1])}
    axis = {**ends, "at": scaled.tolist(), "told": [told(level, "loss") for level in at]}
    left = f" Of {len(found)} surfaces the first {SCENES}." if found[SCENES:] else ""
    button = tag("button", "Turn the surfaces in 3D", type="button", class_="start", data_scenes="scenes", hidden=True)
    hint = tag(
        "span", f"Drag to turn all of them together; the panels above show the same.{left}", class_="quiet", hidden=True
    )
    stage = tag("div", class_="stage", role="group", aria_label="Interactive surfaces", hidden=True)
    return tag("div", button, hint, stage, class_="turning") + data({"scenes": scenes, "axis": axis}, "scenes")
