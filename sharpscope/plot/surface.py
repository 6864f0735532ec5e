"""Loss and accuracy over planes: contours and surfaces, alone and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.errors import ArgumentError, DataError
from sharpscope.plot.alike import require_alike
from sharpscope.plot.caption import caption, diverged, labels_of
from sharpscope.plot.figure import draw_caption, new_figure, small
from sharpscope.plot.levels import MAP, between, heights, logarithmic, norm_of, shared_levels, told
from sharpscope.plot.marks import draw_marks, marks_said
from sharpscope.plot.solid import CROSS, draw_solid, thinned
from sharpscope.results import SliceResult
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
    shown, at = _checked([result], levels, split, quantity, log, clip)
    own = axes is None
    if axes is None:
        _, axes = new_figure(width, 0.84)
    filled = _contours(axes, shown[0], at, split, quantity, log, line)
    if colorbar:
        _colorbar([axes], filled, at, result, split, quantity, log)
    if captioned:
        draw_caption(axes, _said([result], split, quantity, log, _cut(shown, at, split, quantity, clip), False), own)
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
    shown, at = _checked([result], levels, split, quantity, log, clip)
    own = axes is None
    if axes is None:
        _, axes = new_figure(width, 0.76, subplot_kw={"projection": "3d"})
    elif axes.name != "3d":
        raise ArgumentError("A surface needs 3D axes. Make them with subplot_kw={'projection': '3d'}.")
    drawn = draw_solid(axes, shown[0], at, split, quantity, log, line)
    if colorbar:
        _colorbar([axes], drawn, at, result, split, quantity, log)
    draw_caption(axes, _said([result], split, quantity, log, _cut(shown, at, split, quantity, clip), True), own)
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
    require_alike(results, grid=True)
    shown, at = _checked(results, levels, split, quantity, log, clip)
    solid = kind == "3d"
    _, found = new_figure(
        width, 0.86 if solid else 1.04, len(results), subplot_kw={"projection": "3d"} if solid else {}
    )
    axes = list(np.ravel(found))
    for each, r, name in zip(axes, shown, labels_of(results), strict=True):
        drawn = (draw_solid if solid else _contours)(each, r, at, split, quantity, log, 0)
        above = each.get_legend()
        each.set_title(name, fontsize=small(each, -1), pad=4 if above is None else 2.2 * small(each))
        if not solid and each is not axes[0]:
            each.tick_params(labelleft=False)
            each.set_ylabel("")
    _colorbar(axes, drawn, at, results[0], split, quantity, log)
    draw_caption(axes[0], _said(results, split, quantity, log, _cut(shown, at, split, quantity, clip), solid), True)
    return axes


def _checked(
    results: Sequence[SliceResult], levels: Any, split: str | None, quantity: str, log: bool, clip: float | None
) -> tuple[list[SliceResult], Array]:
    """What is finished of the results, and their levels."""
    if any(r.dimensions != 2 for r in results):
        raise DataError("A surface is of planes, but a result is of lines. Use slice_curves.")
    shown = [r if r.complete else r.finished() for r in results]
    if levels is not None and clip is not None:
        raise ArgumentError("clip and levels both say where the scale ends. Leave one of them out.")
    if levels is None:
        return shown, shared_levels(shown, split=split, quantity=quantity, log=log, clip=clip)
    at = np.unique(np.asarray(levels, dtype=np.float64))
    if len(at) < 2 or not np.isfinite(at).all() or (logarithmic(log, quantity) and at[0] <= 0):
        raise ArgumentError(f"levels must be at least two finite numbers, above 0 with log, got {levels!r}.")
    return shown, at


def _cut(shown: Sequence[SliceResult], at: Array, split: str | None, quantity: str, clip: float | None) -> float | None:
    """Where the picture ends below the highest value."""
    highest = max(float(np.nanmax(heights(r, split, quantity))) for r in shown)
    return clip if clip is not None or highest <= at[-1] * (1 + 1e-9) else float(at[-1])


def _contours(axes: Axes, r: SliceResult, at: Array, split: str | None, quantity: str, log: bool, line: int) -> Any:
    """Fill, lines, labels, marks and legend of one plane; returns the fill."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    log = logarithmic(log, quantity)
    (x, y), z, norm = r.axes, heights(r, split, quantity, line), norm_of(at, log)
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[(low < at[0], high > at[-1])]
    filled = axes.contourf(x, y, z, between(at, log), norm=norm, cmap=MAP, extend=extend)
    filled.set_edgecolor("face")  # else viewers show the seams
    inks = ["white" if norm(level) < 0.6 else "black" for level in at]
    lines = axes.contour(x, y, z, at, colors=inks, linewidths=0.7, linestyles="solid")
    where = _labels(lines.allsegs, x, y)
    axes.clabel(lines, fmt=lambda v: told(v, quantity), fontsize=small(axes, 0.5), inline_spacing=2, manual=where)
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
        label.set_fontsize(small(axes, 0.5 if tight else -1))
    _equal(axes, r, line)
    if entries:
        layout: dict[str, Any] = {"frameon": False, "borderaxespad": 0.1, "ncols": 2 if len(entries) > 1 else 1}
        size = small(axes)
        axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1.01), fontsize=size, **layout)
    return filled


def _labels(segments: Sequence[Sequence[Array]], x: Array, y: Array) -> list[tuple[float, float]]:
    """A place for the label of each level that has room for one: on its line, far from the edges and other labels."""
    low, size = np.array([x[0], y[0]]), np.array([x[-1] - x[0], y[-1] - y[0]])
    taken: list[Array] = []
    for pieces in segments:
        scaled = [(piece - low) / size for piece in pieces if len(piece) > 1]
        long = [p for p in scaled if np.linalg.norm(np.diff(p, axis=0), axis=1).sum() > 0.4]
        if not long:
            continue
        points = np.concatenate(long)
        edge = np.minimum(points, 1 - points).min(axis=1)
        near = [np.linalg.norm(points - other, axis=1) for other in taken]
        # As far from an edge as is half of what it should be from another label.
        room = np.min([2 * edge, *near, np.full(len(points), 0.5)], axis=0)
        if room.max() > 0.08:
            taken.append(points[int(room.argmax())])
    return [(float(a), float(b)) for a, b in (low + place * size for place in taken)]


def _equal(axes: Axes, r: SliceResult, line: int) -> None:
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
    bar.ax.set_yticks(marked, [told(level, quantity) for level in marked])
    bar.ax.tick_params(labelsize=small(axes[0]))
    bar.set_label(f"{r.splits[r.split(split)]} {quantity}", fontsize=small(axes[0], -1))


def _said(
    results: Sequence[SliceResult], split: str | None, quantity: str, log: bool, clip: float | None, solid: bool
) -> str:
    scale = f"{'logarithmic' if logarithmic(log, quantity) else 'linear'} scale"
    name = results[0].splits[results[0].split(split)]
    return caption(results, splits=[name], scale=scale, clip=clip, also=[] if solid else marks_said(results))
