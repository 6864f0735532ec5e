"""Loss and accuracy along lines, checkpoint beside checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.errors import ArgumentError, DataError
from sharpscope.plot.figure import (
    COLOURS,
    caption,
    column_width,
    diverged,
    draw_caption,
    new_figure,
    require_comparable,
    short_labels,
    short_name,
    small_font,
)
from sharpscope.plot.levels import require_positive
from sharpscope.plot.surface import on_slice
from sharpscope.results import SliceResult
from sharpscope.results.serialization import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of one split after the other.
STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
DOTTED = (0, (1, 1.5))
MANY = 60


def slice_curves(
    results: SliceResult | Sequence[SliceResult],
    axes: Axes | None = None,
    *,
    split: str | None = None,
    log: bool = False,
    clip: float | None = None,
    accuracy: bool = True,
    width: float | None = None,
) -> Axes:
    """The loss along lines, a colour a checkpoint, or a line where there is one checkpoint; returns the Axes.

    Several random directions of a checkpoint are a band from their lowest to their highest loss about their median. A
    parabola of slope and curvature is drawn where they were measured; the vertical range is that of the measured
    losses. A diverged point is a cross at the upper edge, and the line is broken there. Other networks are points at
    their own loss, open where they do not lie on the line.

    Args:
        results: of lines, measured alike.
        axes: where to draw; by default a new figure.
        split: to draw; by default all, the first solid and the second dashed.
        log: a logarithmic axis of the loss.
        clip: highest loss in the picture.
        accuracy: draw it too, dotted, on an axis at the right: of the last split that is drawn, the median of a band.
        width: of a new figure, in inches.

    Raises: DataError when the results are not of lines or not alike; where log is asked for and a loss is not above 0.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.plot import slice_curves
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> axes = slice_curves(sharpscope.loss_slice(problem))
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('t along a random direction', 'data loss')
    >>> axes.figure.savefig("line.png")
    """
    results = [results] if isinstance(results, SliceResult) else list(results)
    require_comparable(results, grid=False)
    if results[0].dimensions != 1:
        raise DataError("Curves are of lines, but the results are planes. Use surface_contour.")
    shown = [r.finished() for r in results]
    splits = results[0].splits if split is None else (results[0].splits[results[0].split(split)],)
    own = axes is None
    if axes is None:
        _, axes = new_figure(width, 0.62)
    twin = axes.twinx() if accuracy and any(np.isfinite(r.accuracy).any() for r in shown) else None
    entries, styles, extremes = _curves(axes, twin, results, shown, splits)
    _frame(axes, extremes, log, clip)
    for r in shown:
        _mark_diverged(axes, r, splits, styles)
    axes.set(xlabel=_axis_label(results), ylabel=f"{splits[0]} loss" if len(splits) == 1 else "loss")
    if twin is not None:
        from matplotlib.ticker import PercentFormatter

        twin.set_ylabel(f"{splits[-1]} accuracy")
        twin.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        twin.tick_params(labelsize=axes.xaxis.get_ticklabels()[0].get_fontsize())
        twin.yaxis.label.set_fontsize(axes.yaxis.label.get_fontsize())
        twin.set_ylim(0, 1.02)
        # The losses lie on top, on the twin's background.
        axes.set_zorder(twin.get_zorder() + 1)
        twin.patch.set_visible(True)
        axes.patch.set_visible(False)
        styles["accuracy (right)"] = {"color": "grey", "linestyle": DOTTED}
    _legend(axes, entries | styles)
    scale = "logarithmic scale" if log else "linear scale"
    bands = any(len(lines) > 1 for r in shown for _, lines in _groups(r))
    of = f", lowest to highest {splits[0]} loss" if len(splits) > 1 else ", lowest to highest loss"
    extra = [f"lines are medians over directions, bands their range{of}"] if bands else []
    draw_caption(axes, caption(results, splits=splits, scale=scale, clip=clip, extra=extra), own)
    return axes


Entries = dict[str, dict[str, Any]]


def _curves(
    axes: Axes, twin: Axes | None, results: Sequence[SliceResult], shown: Sequence[SliceResult], splits: Sequence[str]
) -> tuple[Entries, Entries, Array]:
    """Draw all lines; returns what the legend says of lines and of styles, and all losses that are in the picture."""
    entries: Entries = {}
    styles: Entries = {}
    losses_shown: list[Array] = []
    names = short_labels(results)
    for i, (name, r) in enumerate(zip(names, shown, strict=True)):
        for j, (what, lines) in enumerate(_groups(r)):
            colour = COLOURS[(i if len(results) > 1 else j) % len(COLOURS)]
            label = ", ".join([name] * (len(results) > 1) + [what] * bool(what)) or "loss"
            # Where colours tell checkpoints apart, the shapes of the points tell lines apart.
            marker = MARKERS[(j if len(results) > 1 else 0) % len(MARKERS)]
            marker = marker if len(lines) == 1 and len(r.axes[0]) <= MANY else ""
            entries[label] = {"color": colour, "marker": marker, "markersize": 3}
            for k, split in enumerate(splits):
                s, x = r.split(split), r.axes[0]
                losses = np.where([diverged(r, s, line) for line in lines], np.inf, r.loss[s, lines])
                whole = np.isfinite(losses).all(axis=0)
                middle = np.median(losses, axis=0)
                middle[~np.isfinite(middle)] = np.nan
                style = {"color": colour, "linestyle": STYLES[k % len(STYLES)], "linewidth": 1.5}
                axes.plot(x, middle, marker=marker, markersize=3, **style)
                losses_shown += [middle, losses[:, whole].ravel()]
                if len(lines) > 1 and k == 0:
                    low, high = (np.where(whole, end(losses, axis=0), np.nan) for end in (np.min, np.max))
                    axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
                if twin is not None and k == len(splits) - 1:
                    rights = np.median(np.where(np.isfinite(losses), r.accuracy[s, lines], np.nan), axis=0)
                    twin.plot(x, rights, color=colour, linestyle=DOTTED, linewidth=1.2)
                fine = np.linspace(x[0], x[-1], 401)
                predicted = r.prediction(lines[0], (fine,))
                if k == 0 and s == 0 and len(lines) == 1 and predicted is not None:
                    dashes = "--" if len(splits) == 1 else "-."
                    # Without a part in the limits, which are those of what was measured.
                    axes.plot(fine, predicted, color=colour, linestyle=dashes, linewidth=0.9, scaley=False)
                    styles["quadratic prediction"] = {"color": "grey", "linestyle": dashes, "linewidth": 0.9}
        losses_shown.append(_marks(axes, r, splits, entries, COLOURS[i % len(COLOURS)]))
    if len(splits) > 1:
        styles |= {split: {"color": "grey", "linestyle": STYLES[k % len(STYLES)]} for k, split in enumerate(splits)}
    flat = np.concatenate([h[np.isfinite(h)] for h in losses_shown])
    return entries, styles, flat


def _groups(r: SliceResult) -> list[tuple[str, list[int]]]:
    """What to call the lines that are drawn as one, and which they are: the random ones together."""
    random = [i for i, line in enumerate(r.directions) if line[0].get("kind") == "random"]
    groups = [(str(line[0]["label"]), [i]) for i, line in enumerate(r.directions) if i not in random]
    if len(random) > 1:
        seeds = len({r.directions[i][0].get("seed") for i in random})
        groups.insert(0, (f"{seeds} seeds" if seeds == len(random) else f"{len(random)} random directions", random))
    elif random:
        groups.insert(0, ("random direction" if groups else "", random))
    return groups if len(groups) > 1 or len(random) > 1 else [("", lines) for _, lines in groups]


def _marks(axes: Axes, r: SliceResult, splits: Sequence[str], entries: Entries, colour: str) -> Array:
    """Other networks at their own losses; returns these."""
    import matplotlib.pyplot as plt

    ink = plt.rcParams["text.color"]
    path = [m for m in r.marks if m.on_path]
    for i, mark in enumerate([m for m in r.marks if not m.on_path]):
        on = on_slice(mark)
        shape = {"marker": MARKERS[(i + 1) % len(MARKERS)], "linestyle": "", "color": ink, "markersize": 5}
        shape |= {"fillstyle": "full" if on else "none"}
        axes.plot([mark.coordinates[0]] * len(splits), [mark.loss[s] for s in splits], zorder=4, **shape)
        name = short_name(mark.name)
        entries[name if on else f"{name}, off the line by {mark.distance:.3g}"] = shape
    if path:
        line: dict[str, Any] = {"color": ink, "linewidth": 0.8, "linestyle": STYLES[0]}
        for s in splits:
            axes.plot([m.coordinates[0] for m in path], [m.loss[s] for m in path], zorder=3.5, **line)
            for m in path:
                fill = "full" if on_slice(m) else "none"
                axes.plot(m.coordinates[0], m.loss[s], "o", color=ink, fillstyle=fill, markersize=4, zorder=4)
        furthest = max(m.distance for m in path)
        note = "" if all(map(on_slice, path)) else f", off the line by up to {furthest:.3g}"
        fill = "none" if note else "full"
        entries[f"training{note}"] = {**line, "marker": "o", "fillstyle": fill, "markersize": 4}
    return np.array([m.loss[s] for m in r.marks for s in splits], dtype=np.float64)


def _frame(axes: Axes, losses_shown: Array, log: bool, clip: float | None) -> None:
    """Limits from what was measured."""
    if not len(losses_shown):
        return
    low, high = float(losses_shown.min()), float(losses_shown.max())
    top = high if clip is None else min(clip, high)
    if clip is not None and clip <= low:
        raise ArgumentError(f"clip must be above the lowest loss ({low:.4g}), got {clip:g}.")
    if not log:
        margin = 0.05 * (top - low) or 1e-6 + 0.05 * abs(low)
        axes.set_ylim(low - margin, top + margin if clip is None else top)
        return
    require_positive(low)
    axes.set_yscale("log")
    margin = (top / low) ** 0.05 if top > low else 1.05
    axes.set_ylim(low / margin, top * margin if clip is None else top)


def _mark_diverged(axes: Axes, r: SliceResult, splits: Sequence[str], entries: Entries) -> None:
    """A cross at the upper edge wherever a line has no finite loss."""
    for lines in [lines for _, lines in _groups(r)]:
        wrong = np.any([diverged(r, r.split(s), line) for s in splits for line in lines], axis=0)
        if wrong.any():
            cross: dict[str, Any] = {"marker": "x", "linestyle": "", "color": "#CC0000", "markersize": 6}
            up = axes.get_xaxis_transform()
            axes.plot(r.axes[0][wrong], np.ones(wrong.sum()), transform=up, clip_on=False, zorder=5, **cross)
            entries["diverged" if len(lines) == 1 else "diverged in some direction"] = cross


def _axis_label(results: Sequence[SliceResult]) -> str:
    """The name of the horizontal axis."""
    kinds = {(d.get("kind"), d.get("towards")) for r in results for line in r.directions for d in line}
    if len(kinds) > 1 or not kinds:
        return "t, from w to w + t d"
    kind, towards = kinds.pop()
    if kind == "checkpoint" and len(results) == 1:
        return f"t, from {short_labels(results)[0]} (0) to {short_name(str(towards))} (1)"
    several = any(len(r.directions) > 1 for r in results)
    random = "t along random directions" if several else "t along a random direction"
    names = {"random": random, "eigenvector": "t along an eigenvector of length 1"}
    return names.get(str(kind), f"t along {results[0].directions[0][0]['label']}")


def _legend(axes: Axes, entries: Entries) -> None:
    """Above the axes, where it covers nothing."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **style) for label, style in entries.items()]
    longest = max(map(len, entries))
    margin = 72 * column_width(axes) / (small_font(axes) * (0.55 * longest + 4))
    columns = max(1, min(len(handles), int(margin)))
    style = {"frameon": False, "borderaxespad": 0.1, "handlelength": 2.2, "columnspacing": 1.2}
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=columns,
        fontsize=small_font(axes),
        **style,
    )
