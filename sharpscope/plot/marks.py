"""Networks on or near a plane, where they lie and with the loss that they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.plot.caption import short_name
from sharpscope.plot.figure import small
from sharpscope.plot.levels import MAP
from sharpscope.results import Mark, SliceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A network nearer to the line or plane than this share of its distance from the centre lies on it.
ON_IT = 1e-3


def is_on(mark: Mark) -> bool:
    """Whether the network lies on the line or plane, as far as a picture can tell."""
    return mark.distance <= ON_IT * mark.length or mark.distance < 1e-9


def marks_said(results: Sequence[SliceResult]) -> list[str]:
    """What a caption must say of networks that are beside the plane, or outside of the picture."""
    said = []
    marks = [mark for r in results for mark in r.marks]
    off = [mark for mark in marks if not is_on(mark)]
    if off:
        furthest = max(off, key=lambda m: m.distance)
        of = f", {furthest.distance / furthest.length:.0%} of its distance from the centre" if furthest.length else ""
        where = f"{furthest.distance:.3g} ({short_name(furthest.name)}{of})"
        said.append(f"open points are off the plane, by up to {where}, so that their own loss is not the picture's")
    outside = sum(not _inside(mark, r) for r in results for mark in r.marks)
    if outside:
        said.append(f"{outside} network{'s lie' if outside > 1 else ' lies'} outside of the picture")
    return said


def draw_marks(axes: Axes, r: SliceResult, split: str | None, quantity: str, norm: Any) -> list[Any]:
    """The centre, the path of a training run in order, and other networks by name; returns entries for the legend."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    name = r.splits[r.split(split)]
    colours = plt.get_cmap(MAP)
    entries: list[Any] = []
    stroke = [withStroke(linewidth=2, foreground="black")]
    if all(a[0] <= 0 <= a[-1] for a in r.axes) and not any(is_on(m) and m.length < 1e-9 for m in r.marks):
        axes.plot(0, 0, "+", color="white", markersize=7, markeredgewidth=1.2, path_effects=stroke, zorder=4)
    path = [m for m in r.marks if m.on_path]
    if path:
        xs, ys = zip(*(m.coordinates for m in path), strict=True)
        axes.plot(xs, ys, color="white", linewidth=1, path_effects=stroke, zorder=3.5, label="training path")
        grey: dict[str, Any] = {"color": "grey", "marker": "o", "markersize": 4}
        entries.append(Line2D([], [], label="training", fillstyle="none" if not is_on(path[-1]) else "full", **grey))
    for m in r.marks:
        if not _inside(m, r):
            continue
        own = (m.loss if quantity == "loss" else m.accuracy)[name]
        face = colours(norm(own)) if is_on(m) and np.isfinite(own) else "none"
        size = 4 if m.on_path else 6
        style: dict[str, Any] = {"markersize": size, "markerfacecolor": face, "markeredgecolor": "white", "zorder": 4}
        axes.plot(*m.coordinates, "o" if m.on_path else "D", path_effects=stroke, **style)
    for m in _named(r):
        own = (m.loss if quantity == "loss" else m.accuracy)[name]
        told = f"{short_name(m.name)}, {f'loss {own:.3g}' if quantity == 'loss' else f'{own:.1%}'}"
        x, y = m.coordinates
        right = x < (r.axes[0][0] + r.axes[0][-1]) / 2
        axes.annotate(
            told,
            (x, y),
            xytext=(6 if right else -6, 5),
            textcoords="offset points",
            ha="left" if right else "right",
            color="white",
            fontsize=small(axes),
            path_effects=stroke,
            zorder=5,
        )
    return entries


def _named(r: SliceResult) -> list[Mark]:
    """The networks with room for their name: all but the steps between the ends of a path."""
    path = [m for m in r.marks if m.on_path]
    ends = path[:1] + path[-1:]
    return [m for m in r.marks if (not m.on_path or any(m is end for end in ends)) and _inside(m, r)]


def _inside(mark: Mark, r: SliceResult) -> bool:
    return all(a[0] <= c <= a[-1] for a, c in zip(r.axes, mark.coordinates, strict=True))
