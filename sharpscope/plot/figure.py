"""Figures with a caption beneath them, at whatever width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches; a narrower figure is a column of print, with type of its size.
COLUMN = 4.5


def new_figure(width: float | None, height: float, columns: int = 1, **axes: Any) -> tuple[Figure, Any]:
    """A figure ``width`` inches wide, by default a notebook's, whose layout makes room for the caption.

    ``height``: of a column over its width, without the caption.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    wide = plt.rcParams["figure.figsize"][0] * (1.6 if columns > 1 else 1) if width is None else width
    column = wide / columns
    size = (wide, column * height + (0.9 if wide < COLUMN else 0.25))
    type_size = min(plt.rcParams["font.size"], 8) if column < COLUMN else plt.rcParams["font.size"]
    # The grid is that of 3D axes, which otherwise shines in dark styles.
    with plt.rc_context({"font.size": type_size, "grid.color": "0.5", "grid.linewidth": 0.4}):
        figure, found = plt.subplots(1, columns, figsize=size, layout="constrained", **axes)
        layout = figure.get_layout_engine()
        if layout is not None:
            layout.set(w_pad=0.06, h_pad=0.06)
        for each in np.ravel(found):
            each.tick_params(labelsize="medium")  # ticks are made late, with the size of then
        drawing = plt.isinteractive()
    # A session's first figure loads its backend, and a notebook's turns on that figures show beneath their cell, which
    # leaving the context turns off again.
    matplotlib.interactive(drawing)
    return figure, found


def column_width(axes: Axes) -> float:
    """The inches that the axes have with all that is around them: the figure's, or its column's."""
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None
    return float(figure.get_figwidth() / (1 if place is None else place.get_gridspec().ncols))


def small(axes: Axes, less: float = 0.0) -> float:
    """The size in points of the small type in a figure of this width."""
    import matplotlib.pyplot as plt

    narrow = column_width(axes) < COLUMN
    return float(min(plt.rcParams["font.size"], 8 if narrow else 10)) - (1 if narrow else 1.5) - less


def draw_caption(axes: Axes, text: str, own: bool) -> None:
    """Set ``text`` small beneath the figure where that is ``own``, else beneath the axes."""
    figure, size = axes.get_figure(root=True), small(axes, 0.5)
    assert figure is not None
    # Less than the whole: small type on a screen is set up to 6 % wider than in print.
    share = 0.9 if own else min(0.9, 1.1 * axes.get_position().width)
    lines = _filled(text, 72 * share * figure.get_figwidth(), size)
    style: dict[str, Any] = {"fontsize": size, "linespacing": 1.3}
    if own:
        figure.supxlabel(lines, x=0.02, ha="left", weight="normal", **style)
        # The layout finds room for what is around axes of a fixed aspect only from where it put them the last time.
        figure.draw_without_rendering()
        return
    flat = axes.name != "3d" and axes.xaxis.label.get_text()
    style |= {"xycoords": axes.xaxis.label if flat else "axes fraction", "annotation_clip": False}
    axes.annotate(lines, (0.5, 0), xytext=(0, -4), textcoords="offset points", va="top", ha="center", **style)


def _filled(text: str, width: float, size: float) -> str:
    """``text`` with line breaks, so that no line is wider than ``width`` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    # matplotlib's own wrapping comes after the layout, which would leave no room for the lines.
    measure, font = TextToPath(), FontProperties(size=size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure.get_text_width_height_descent(longer, font, ismath=False)[0] > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
