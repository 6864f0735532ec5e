"""Loss and accuracy over planes: contours and surfaces, with checkpoints marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.errors import ArgumentError, DataError
from sharpscope.plot.figure import (
    caption,
    diverged,
    draw_caption,
    new_figure,
    require_comparable,
    short_labels,
    short_name,
    small_font,
)
from sharpscope.plot.levels import (
    COLOUR_MAP,
    colour_norm,
    format_level,
    grid_values,
    logarithmic,
    shared_levels,
    subdivided,
)
from sharpscope.results import Mark, SliceResult
from sharpscope.results.serialization import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("contour", "3d")
# Seen on all colours of the map.
PREDICTED = "#FF8066"


def surface_contour(
    result: SliceResult,
    axes: Axes | None = None,
    *,
    split: str | None = None,
    quantity: str = "loss",
    levels: Sequence[float] | Array | None = None,
    log: bool = True,
    clip: float | None = None,
    colorbar: bool = True,
    line: int = 0,
    width: float | None = None,
    captioned: bool = True,
) -> Axes:
    """Labelled contours of the loss over a plane, x to the right and y upwards; returns the Axes.

    Where a point diverged the picture is hatched, and nothing is interpolated into it. Dashed contours, at the same
    levels, are of the parabola of slope and curvature at the centre, where they were measured. Other networks are
    filled with the colour of their own loss where they lie in the plane, open where they do not.

    Args:
        result: of a plane; of an unfinished one the finished part of its grid is drawn.
        axes: where to draw; by default a new figure.
        split: by default the first.
        quantity: "loss" or "accuracy".
        levels: of the contours; by default round ones, see ``shared_levels``.
        log: levels evenly spaced in the logarithm.
        clip: loss from which on all has the colour of the highest.
        colorbar: draw one.
        line: which plane, where there are several.
        width: of a new figure, in inches.
        captioned: say beneath it what it shows.

    Raises: DataError when the result is of lines, or has no values to draw; where log is asked for and a loss is not
    above 0.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import surface_contour
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> axes = surface_contour(sharpscope.loss_surface(problem, points=5))
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('x: random direction 1', 'y: random direction 2')
    >>> axes.figure.savefig("plane.png")
    """
    shown, at = _finished_and_levels([result], levels, split, quantity, log, clip)
    own = axes is None
    if axes is None:
        _, axes = new_figure(width, 0.84)
    filled = _contours(axes, shown[0], at, split, quantity, log, line)
    if colorbar:
        _colorbar([axes], filled, at, result, split, quantity, log)
    if captioned:
        draw_caption(
            axes, _caption([result], split, quantity, log, _clip_level(shown, at, split, quantity, clip), False), own
        )
    return axes


def surface_3d(
    result: SliceResult,
    axes: Axes | None = None,
    *,
    split: str | None = None,
    quantity: str = "loss",
    levels: Sequence[float] | Array | None = None,
    log: bool = True,
    clip: float | None = None,
    colorbar: bool = True,
    line: int = 0,
    width: float | None = None,
) -> Axes:
    """The same plane as a surface above x and y, cut flat at ``clip``; returns the Axes, which must be 3D.

    The height is log10 of the loss with ``log``, labelled with the loss. Diverged points are holes with crosses above.
    Other networks are not drawn.
    Arguments and errors are those of ``surface_contour``; the levels are the marks of the vertical axis.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import surface_3d
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> axes = surface_3d(sharpscope.loss_surface(problem, points=5))
    >>> axes.name, axes.get_xlabel()
    ('3d', 'x: random direction 1')
    """
    shown, at = _finished_and_levels([result], levels, split, quantity, log, clip)
    own = axes is None
    if axes is None:
        _, axes = new_figure(width, 0.76, subplot_kw={"projection": "3d"})
    elif axes.name != "3d":
        raise ArgumentError("A surface needs 3D axes. Make them with subplot_kw={'projection': '3d'}.")
    drawn = draw_surface(axes, shown[0], at, split, quantity, log, line)
    if colorbar:
        _colorbar([axes], drawn, at, result, split, quantity, log)
    draw_caption(
        axes, _caption([result], split, quantity, log, _clip_level(shown, at, split, quantity, clip), True), own
    )
    return axes


def surfaces_side_by_side(
    results: Sequence[SliceResult],
    *,
    kind: str = "contour",
    split: str | None = None,
    quantity: str = "loss",
    levels: Sequence[float] | Array | None = None,
    log: bool = True,
    clip: float | None = None,
    width: float | None = None,
) -> list[Axes]:
    """Planes of several checkpoints with one set of levels, limits and colours in a new figure; returns the Axes.

    Arguments as of ``surface_contour``; ``kind``: "contour" or "3d".

    Raises: DataError unless grid, split, data, seed, normalisation, mode and statistics agree; and as
    ``surface_contour``.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import surfaces_side_by_side
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> models = [torch.nn.Linear(3, 1, bias=False) for _ in range(2)]
    >>> problems = [sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data) for model in models]
    >>> axes = surfaces_side_by_side([sharpscope.loss_surface(problem, points=5) for problem in problems])
    >>> len(axes), axes[0].get_ylim() == axes[1].get_ylim()
    (2, True)
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    require_comparable(results, grid=True)
    shown, at = _finished_and_levels(results, levels, split, quantity, log, clip)
    solid = kind == "3d"
    _, found = new_figure(
        width, 0.86 if solid else 1.04, len(results), subplot_kw={"projection": "3d"} if solid else {}
    )
    axes = list(np.ravel(found))
    for each, r, name in zip(axes, shown, short_labels(results), strict=True):
        drawn = (draw_surface if solid else _contours)(each, r, at, split, quantity, log, 0)
        above = each.get_legend()
        each.set_title(name, fontsize=small_font(each, -1), pad=4 if above is None else 2.2 * small_font(each))
        if not solid and each is not axes[0]:
            each.tick_params(labelleft=False)
            each.set_ylabel("")
    _colorbar(axes, drawn, at, results[0], split, quantity, log)
    draw_caption(
        axes[0], _caption(results, split, quantity, log, _clip_level(shown, at, split, quantity, clip), solid), True
    )
    return axes


def _finished_and_levels(
    results: Sequence[SliceResult], levels: Any, split: str | None, quantity: str, log: bool, clip: float | None
) -> tuple[list[SliceResult], Array]:
    """What is finished of the results, and their levels."""
    if any(r.dimensions != 2 for r in results):
        raise DataError("A surface is of planes, but a result is of lines. Use slice_curves.")
    shown = [r.finished() for r in results]
    if levels is not None and clip is not None:
        raise ArgumentError("clip and levels both say where the scale ends. Leave one of them out.")
    if levels is None:
        return shown, shared_levels(shown, split=split, quantity=quantity, log=log, clip=clip)
    at = np.unique(np.asarray(levels, dtype=np.float64))
    if len(at) < 2 or not np.isfinite(at).all() or (logarithmic(log, quantity) and at[0] <= 0):
        raise ArgumentError(f"levels must be at least two finite numbers, above 0 with log, got {levels!r}.")
    return shown, at


def _clip_level(
    shown: Sequence[SliceResult], at: Array, split: str | None, quantity: str, clip: float | None
) -> float | None:
    """Where the picture ends below the highest value."""
    highest = max(float(np.nanmax(grid_values(r, split, quantity))) for r in shown)
    return clip if clip is not None or highest <= at[-1] * (1 + 1e-9) else float(at[-1])


def _contours(axes: Axes, r: SliceResult, at: Array, split: str | None, quantity: str, log: bool, line: int) -> Any:
    """Fill, lines, labels, marks and legend of one plane; returns the fill."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    log = logarithmic(log, quantity)
    (x, y), z, norm = r.axes, grid_values(r, split, quantity, line), colour_norm(at, log)
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[(low < at[0], high > at[-1])]
    filled = axes.contourf(x, y, z, subdivided(at, log), norm=norm, cmap=COLOUR_MAP, extend=extend)
    filled.set_edgecolor("face")  # else viewers show the seams
    inks = ["white" if norm(level) < 0.6 else "black" for level in at]
    lines = axes.contour(x, y, z, at, colors=inks, linewidths=0.7, linestyles="solid")
    where = _label_positions(lines.allsegs, x, y)
    axes.clabel(
        lines, fmt=lambda v: format_level(v, quantity), fontsize=small_font(axes, 0.5), inline_spacing=2, manual=where
    )
    entries: list[Any] = []
    wrong = diverged(r, r.split(split), line)
    if wrong.any():
        # Beneath the fill, which is left out wherever a corner has no value.
        extent = {"width": x[-1] - x[0], "height": y[-1] - y[0]}
        style: dict[str, Any] = {"facecolor": "0.75", "edgecolor": "0.4", "hatch": "////", "linewidth": 0}
        axes.add_patch(Rectangle((x[0], y[0]), **extent, **style, zorder=0.5))
        ys, xs = np.nonzero(wrong)
        axes.plot(x[xs], y[ys], "x", color=CROSS, markersize=4, label="diverged")
        entries.append(Patch(**style, label=f"diverged ({wrong.sum()} of {wrong.size})"))
    fine = tuple(np.linspace(a[0], a[-1], 201) for a in r.axes)
    predicted = r.prediction(line, fine)
    if quantity == "loss" and r.split(split) == 0 and predicted is not None:
        axes.contour(*fine, predicted, at, colors=PREDICTED, linewidths=0.9, linestyles="dashed")
        entries.append(Line2D([], [], color=PREDICTED, linestyle="--", label="quadratic prediction"))
    entries += draw_marks(axes, r, split, quantity, norm)
    labels = [str(d["label"]) for d in r.directions[line]]
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel=f"x: {labels[0]}", ylabel=f"y: {labels[1]}")
    figure = axes.get_figure(root=True)
    tight = figure is not None and axes.get_window_extent().width < 1.6 * figure.dpi
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(small_font(axes, 0.5 if tight else -1))
    _set_aspect(axes, r, line)
    if entries:
        layout: dict[str, Any] = {"frameon": False, "borderaxespad": 0.1, "ncols": 2 if len(entries) > 1 else 1}
        size = small_font(axes)
        axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1.01), fontsize=size, **layout)
    return filled


def _label_positions(segments: Sequence[Sequence[Array]], x: Array, y: Array) -> list[tuple[float, float]]:
    """A place for the label of each level that has room for one: on its line, far from the edges and other labels."""
    low, size = np.array([x[0], y[0]]), np.array([x[-1] - x[0], y[-1] - y[0]])
    chosen: list[Array] = []
    for curves in segments:
        scaled = [(piece - low) / size for piece in curves if len(piece) > 1]
        long = [p for p in scaled if np.linalg.norm(np.diff(p, axis=0), axis=1).sum() > 0.4]
        if not long:
            continue
        points = np.concatenate(long)
        edge = np.minimum(points, 1 - points).min(axis=1)
        near = [np.linalg.norm(points - other, axis=1) for other in chosen]
        # As far from an edge as is half of what it should be from another label.
        space = np.min([2 * edge, *near, np.full(len(points), 0.5)], axis=0)
        if space.max() > 0.08:
            chosen.append(points[int(space.argmax())])
    return [(float(a), float(b)) for a, b in (low + place * size for place in chosen)]


def _set_aspect(axes: Axes, r: SliceResult, line: int) -> None:
    """Let equal distances in weight space be equal in the picture, unless that makes it a strip."""
    lengths: list[Any] = [d.get("length") for d in r.directions[line]]
    sides = [a[-1] - a[0] for a in r.axes]
    if lengths[0] is None or lengths[1] is None or not all(length > 0 for length in lengths):
        return
    aspect = lengths[1] / lengths[0]
    if 1 / 3 <= aspect * sides[1] / sides[0] <= 3:
        axes.set_aspect(aspect)


def _colorbar(
    axes: list[Axes], drawn: Any, at: Array, r: SliceResult, split: str | None, quantity: str, log: bool
) -> None:
    figure = axes[0].get_figure(root=True)
    assert figure is not None
    if axes[0].name == "3d":
        bar = figure.colorbar(drawn, ax=axes, pad=0.08, shrink=0.6)
    else:
        # As high as the picture, whose aspect is fixed.
        bar = figure.colorbar(drawn, cax=axes[-1].inset_axes((1.04, 0, 0.05, 1)))
    bar.ax.minorticks_off()
    marked = thinned(at, axes[-1], 0.6 if axes[0].name == "3d" else 0.8)
    bar.ax.set_yticks(marked, [format_level(level, quantity) for level in marked])
    bar.ax.tick_params(labelsize=small_font(axes[0]))
    bar.set_label(f"{r.splits[r.split(split)]} {quantity}", fontsize=small_font(axes[0], -1))


def _caption(
    results: Sequence[SliceResult], split: str | None, quantity: str, log: bool, clip: float | None, solid: bool
) -> str:
    scale = f"{'logarithmic' if logarithmic(log, quantity) else 'linear'} scale"
    name = results[0].splits[results[0].split(split)]
    return caption(results, splits=[name], scale=scale, clip=clip, extra=[] if solid else describe_marks(results))


CROSS = "#CC0000"


def draw_surface(axes: Any, r: SliceResult, at: Array, split: str | None, quantity: str, log: bool, line: int) -> Any:
    """One plane as a surface; returns what the colours are of."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    log = logarithmic(log, quantity)
    (x, y), z = r.axes, grid_values(r, split, quantity, line)
    height = np.log10 if log else np.asarray
    top, bottom = float(height(at[-1])), float(height(min(at[0], np.nanmin(z))))
    norm, cut = colour_norm(at, log), np.minimum(z, at[-1])
    colours = plt.get_cmap(COLOUR_MAP)(norm(_corners(cut)))
    mesh = np.meshgrid(x, y)
    axes.plot_surface(*mesh, height(cut), facecolors=colours, rstride=1, cstride=1, linewidth=0.2, shade=False)
    wrong = diverged(r, r.split(split), line)
    if wrong.any():
        label = f"diverged ({wrong.sum()} of {wrong.size})"
        axes.scatter(*(m[wrong] for m in mesh), top, marker="x", color=CROSS, label=label, depthshade=False)
        axes.legend(loc="upper left", frameon=False, fontsize=small_font(axes))
    labels = [str(d["label"]) for d in r.directions[line]]
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), zlim=(bottom, top))
    axes.set_xlabel(f"x: {labels[0]}", fontsize=small_font(axes), labelpad=2)
    axes.set_ylabel(f"y: {labels[1]}", fontsize=small_font(axes), labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))  # which would lie on the lowest of y
    axes.yaxis.set_major_locator(MaxNLocator(4))
    marked = thinned(at, axes, 0.45)
    axes.set_zticks([float(height(level)) for level in marked], [format_level(level, quantity) for level in marked])
    axes.set_box_aspect(None, zoom=0.88)  # the layout knows too little of 3D labels
    axes.tick_params(labelsize=small_font(axes), pad=0)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
    return plt.cm.ScalarMappable(norm=norm, cmap=COLOUR_MAP)


def _corners(z: Array) -> Array:
    """The mean of the four corners of each cell, NaN on the far edges, where no cell begins."""
    cells = np.full_like(z, np.nan)
    cells[:-1, :-1] = (z[:-1, :-1] + z[1:, :-1] + z[:-1, 1:] + z[1:, 1:]) / 4
    return cells


def thinned(levels: Array, axes: Axes, share: float) -> Array:
    """Every level, or every other, or so, as ``share`` of the height of ``axes`` has room for their labels."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    space = share * axes.get_window_extent().height / figure.dpi * 72 / (1.4 * small_font(axes))
    return levels[:: max(1, int(np.ceil(len(levels) / max(space, 2))))]


# A network nearer to the line or plane than this share of its distance from the centre lies on it.
ON_IT = 1e-3


def on_slice(mark: Mark) -> bool:
    """Whether the network lies on the line or plane, as far as a picture can tell."""
    return mark.distance <= ON_IT * mark.length or mark.distance < 1e-9


def describe_marks(results: Sequence[SliceResult]) -> list[str]:
    """What a caption must say of networks that are beside the plane, or outside of the picture."""
    sentences = []
    marks = [mark for r in results for mark in r.marks]
    off = [mark for mark in marks if not on_slice(mark)]
    if off:
        furthest = max(off, key=lambda m: m.distance)
        of = f", {furthest.distance / furthest.length:.0%} of its distance from the centre" if furthest.length else ""
        where = f"{furthest.distance:.3g} ({short_name(furthest.name)}{of})"
        sentences.append(
            f"open points are off the plane, by up to {where}, so that their own loss is not the picture's"
        )
    outside = sum(not _inside(mark, r) for r in results for mark in r.marks)
    if outside:
        sentences.append(f"{outside} network{'s lie' if outside > 1 else ' lies'} outside of the picture")
    return sentences


def draw_marks(axes: Axes, r: SliceResult, split: str | None, quantity: str, norm: Any) -> list[Any]:
    """The centre, the path of a training run in order, and other networks by name; returns entries for the legend."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    name = r.splits[r.split(split)]
    colours = plt.get_cmap(COLOUR_MAP)
    entries: list[Any] = []
    stroke = [withStroke(linewidth=2, foreground="black")]
    if all(a[0] <= 0 <= a[-1] for a in r.axes) and not any(on_slice(m) and m.length < 1e-9 for m in r.marks):
        axes.plot(0, 0, "+", color="white", markersize=7, markeredgewidth=1.2, path_effects=stroke, zorder=4)
    path = [m for m in r.marks if m.on_path]
    if path:
        xs, ys = zip(*(m.coordinates for m in path), strict=True)
        axes.plot(xs, ys, color="white", linewidth=1, path_effects=stroke, zorder=3.5, label="training path")
        grey: dict[str, Any] = {"color": "grey", "marker": "o", "markersize": 4}
        entries.append(Line2D([], [], label="training", fillstyle="none" if not on_slice(path[-1]) else "full", **grey))
    for m in r.marks:
        if not _inside(m, r):
            continue
        own = (m.loss if quantity == "loss" else m.accuracy)[name]
        face = colours(norm(own)) if on_slice(m) and np.isfinite(own) else "none"
        size = 4 if m.on_path else 6
        style: dict[str, Any] = {"markersize": size, "markerfacecolor": face, "markeredgecolor": "white", "zorder": 4}
        axes.plot(*m.coordinates, "o" if m.on_path else "D", path_effects=stroke, **style)
    for m in _labelled_marks(r):
        own = (m.loss if quantity == "loss" else m.accuracy)[name]
        label = f"{short_name(m.name)}, {f'loss {own:.3g}' if quantity == 'loss' else f'{own:.1%}'}"
        x, y = m.coordinates
        right = x < (r.axes[0][0] + r.axes[0][-1]) / 2
        axes.annotate(
            label,
            (x, y),
            xytext=(6 if right else -6, 5),
            textcoords="offset points",
            ha="left" if right else "right",
            color="white",
            fontsize=small_font(axes),
            path_effects=stroke,
            zorder=5,
        )
    return entries


def _labelled_marks(r: SliceResult) -> list[Mark]:
    """The networks with room for their name: all but the steps between the ends of a path."""
    path = [m for m in r.marks if m.on_path]
    ends = path[:1] + path[-1:]
    return [m for m in r.marks if (not m.on_path or any(m is end for end in ends)) and _inside(m, r)]


def _inside(mark: Mark, r: SliceResult) -> bool:
    return all(a[0] <= c <= a[-1] for a, c in zip(r.axes, mark.coordinates, strict=True))
