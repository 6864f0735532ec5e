"""A plane as a surface above x and y."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.plot.caption import diverged
from sharpscope.plot.figure import small
from sharpscope.plot.levels import MAP, heights, logarithmic, norm_of, told
from sharpscope.results import SliceResult
from sharpscope.results.serialization import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CROSS = "#CC0000"


def draw_solid(axes: Any, r: SliceResult, at: Array, split: str | None, quantity: str, log: bool, line: int) -> Any:
    """One plane as a surface; returns what the colours are of."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    log = logarithmic(log, quantity)
    (x, y), z = r.axes, heights(r, split, quantity, line)
    height = np.log10 if log else np.asarray
    top, bottom = float(height(at[-1])), float(height(min(at[0], np.nanmin(z))))
    norm, cut = norm_of(at, log), np.minimum(z, at[-1])
    colours = plt.get_cmap(MAP)(norm(_corners(cut)))
    mesh = np.meshgrid(x, y)
    axes.plot_surface(*mesh, height(cut), facecolors=colours, rstride=1, cstride=1, linewidth=0.2, shade=False)
    wrong = diverged(r, r.split(split), line)
    if wrong.any():
        label = f"diverged ({wrong.sum()} of {wrong.size})"
        axes.scatter(*(m[wrong] for m in mesh), top, marker="x", color=CROSS, label=label, depthshade=False)
        axes.legend(loc="upper left", frameon=False, fontsize=small(axes))
    labels = [str(d["label"]) for d in r.directions[line]]
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), zlim=(bottom, top))
    axes.set_xlabel(f"x: {labels[0]}", fontsize=small(axes), labelpad=2)
    axes.set_ylabel(f"y: {labels[1]}", fontsize=small(axes), labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))  # which would lie on the lowest of y
    axes.yaxis.set_major_locator(MaxNLocator(4))
    marked = thinned(at, axes, 0.45)
    axes.set_zticks([float(height(level)) for level in marked], [told(level, quantity) for level in marked])
    axes.set_box_aspect(None, zoom=0.88)  # the layout knows too little of 3D labels
    axes.tick_params(labelsize=small(axes), pad=0)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
    return plt.cm.ScalarMappable(norm=norm, cmap=MAP)


def _corners(z: Array) -> Array:
    """The mean of the four corners of each cell, NaN on the far edges, where no cell begins."""
    cells = np.full_like(z, np.nan)
    cells[:-1, :-1] = (z[:-1, :-1] + z[1:, :-1] + z[:-1, 1:] + z[1:, 1:]) / 4
    return cells


def thinned(levels: Array, axes: Axes, share: float) -> Array:
    """Every level, or every other, or so, as ``share`` of the height of ``axes`` has room for their labels."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    room = share * axes.get_window_extent().height / figure.dpi * 72 / (1.4 * small(axes))
    return levels[:: max(1, int(np.ceil(len(levels) / max(room, 2))))]
