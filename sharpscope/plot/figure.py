"""New figures, their captions, and the check that results in one figure are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpscope.errors import DataError
from sharpscope.results import SliceResult
from sharpscope.results.measured_alike import DATA, LOSS, describe, differing
from sharpscope.results.origin import checkpoint_names, describe_departures
from sharpscope.results.slice import DIVERGED, PENDING, describe_directions, describe_mode, keeps_centre_statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinguishable by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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


def small_font(axes: Axes, less: float = 0.0) -> float:
    """The size in points of the small type in a figure of this width."""
    import matplotlib.pyplot as plt

    narrow = column_width(axes) < COLUMN
    return float(min(plt.rcParams["font.size"], 8 if narrow else 10)) - (1 if narrow else 1.5) - less


def draw_caption(axes: Axes, text: str, own: bool) -> None:
    """Set ``text`` small beneath the figure where that is ``own``, else beneath the axes."""
    figure, size = axes.get_figure(root=True), small_font(axes, 0.5)
    assert figure is not None
    # Less than the whole: small type on a screen is set up to 6 % wider than in print.
    share = 0.9 if own else min(0.9, 1.1 * axes.get_position().width)
    lines = _wrapped(text, 72 * share * figure.get_figwidth(), size)
    style: dict[str, Any] = {"fontsize": size, "linespacing": 1.3}
    if own:
        figure.supxlabel(lines, x=0.02, ha="left", weight="normal", **style)
        # The layout finds room for what is around axes of a fixed aspect only from where it put them the last time.
        figure.draw_without_rendering()
        return
    flat = axes.name != "3d" and axes.xaxis.label.get_text()
    style |= {"xycoords": axes.xaxis.label if flat else "axes fraction", "annotation_clip": False}
    axes.annotate(lines, (0.5, 0), xytext=(0, -4), textcoords="offset points", va="top", ha="center", **style)


def _wrapped(text: str, width: float, size: float) -> str:
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


def caption(
    results: Sequence[SliceResult],
    *,
    splits: Sequence[str] | None = None,
    scale: str = "",
    clip: float | None = None,
    extra: Sequence[str] = (),
) -> str:
    """Which examples, mode, BatchNorm, directions, seed and range a figure shows, on which scale, and what it cuts off.

    Args:
        results: shown in the figure; common values appear once.
        splits: shown; by default all.
        scale: as "logarithmic scale".
        clip: the loss above which the colours saturate.
        also: sentences of the figure's own.
    """
    shown = list(results[0].splits if splits is None else splits)
    sentences = [f"{_shared(_examples(r, shown) for r in results)}; {_shared(_how(r) for r in results)}"]
    sentences.append(f"{_shared(_directions(r) for r in results)}; {_shared(_range(r) for r in results)}")
    sentences.append(
        "; ".join([*([scale] if scale else []), "not clipped" if clip is None else f"clipped at {clip:g}"])
    )
    sentences += extra
    sentences += [f"barrier {b}" for b in [_shared(_barrier(r, shown[0]) for r in results)] if b]
    left = sum(int((r.status == PENDING).sum()) for r in results)
    if left:
        sentences.append(f"preview: {left} points still to be measured")
    if any(abs(r.provenance.get("cosine") or 0) > 1e-6 for r in results):
        sentences.append(f"axes drawn at right angles, their cosine is {_shared(_cosine(r) for r in results)}")
    if any(keeps_centre_statistics(r) for r in results):
        sentences.append("BatchNorm keeps the centre's statistics, which misleads away from it")
    return ". ".join(s[:1].upper() + s[1:] for s in sentences) + "."


def short_labels(results: Sequence[SliceResult]) -> list[str]:
    """The checkpoints' names, as short as tells them apart."""
    names = checkpoint_names([r.provenance for r in results])
    short = list(map(short_name, names))
    return short if len(set(short)) == len(set(names)) else names


def short_name(name: str) -> str:
    """A checkpoint's name as a figure has room for it."""
    return name.removesuffix(".pt")


def diverged(result: SliceResult, split: int, line: int = 0) -> Any:
    """Which points of a line or plane have no finite loss in any of the splits, or not in this one."""
    wrong = (result.status[line] == DIVERGED) | ~np.isfinite(result.loss[split, line])
    return wrong & (result.status[line] != PENDING)


def _shared(values: Any) -> str:
    """The one value, or all of them in order."""
    return " | ".join(dict.fromkeys(values))


def _how(result: SliceResult) -> str:
    """Mode and statistics, and what else of the loss is not the default."""
    return ", ".join([describe_mode(result), *describe_departures(result.provenance)])


def _text_or_unknown(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _examples(result: SliceResult, splits: Sequence[str]) -> str:
    known = result.provenance
    counts = {result.splits[0]: known.get("num_examples"), **(known.get("also") or {})}
    all_of_them = known.get("split_examples")
    parts = []
    for split in splits:
        count = counts.get(split)
        text = "an unknown number of" if count is None else f"{count:,}"
        if split == result.splits[0] and count is not None and all_of_them is not None:
            text = f"{text} of {all_of_them:,}" if count < all_of_them else f"all {text}"
        parts.append(f"{text} {split}")
    data = f" of {known['data']}" if known.get("data") else ""
    seed = known.get("examples_seed")
    drawn = f" (drawn with seed {seed})" if seed is not None and known.get("num_examples") != all_of_them else ""
    return f"{' and '.join(parts)} examples{data}{drawn}"


def _directions(result: SliceResult) -> str:
    kinds = {d.get("kind") for line in result.directions for d in line}
    if kinds == {"random"}:
        many = "s" if result.dimensions > 1 or result.directions[1:] else ""
        return f"{describe_directions(result).rpartition(', seed ')[0]} direction{many}, {_seeds(result)}"
    lines = [describe_directions(result, i) for i in range(len(result.directions))]
    unit = ", of length 1" if kinds == {"eigenvector"} else ""
    return ("along " if result.dimensions == 1 and kinds != {"checkpoint"} else "") + ", ".join(lines) + unit


def _seeds(result: SliceResult) -> str:
    seeds: list[Any] = list(dict.fromkeys(d.get("seed") for line in result.directions for d in line))
    if len(seeds) == 1:
        return f"seed {_text_or_unknown(seeds[0])}"
    if all(isinstance(s, int) for s in seeds) and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(_text_or_unknown, seeds))}"


def _range(result: SliceResult) -> str:
    points = " x ".join(str(len(a)) for a in result.axes)
    spans = [f"{a[0]:.3g} to {a[-1]:.3g}" for a in result.axes]
    if result.dimensions == 1:
        return f"{points} points, t from {spans[0]}"
    both = f"x and y from {spans[0]}" if spans[0] == spans[1] else f"x from {spans[0]}, y from {spans[1]}"
    return f"{points} points, {both}"


def _barrier(result: SliceResult, split: str) -> str:
    height = result.barrier(split)
    return "" if height is None else f"{height:.3g} ({split})"


def _cosine(result: SliceResult) -> str:
    return f"{result.provenance.get('cosine') or 0:.2g}"


def require_comparable(results: Sequence[SliceResult], *, grid: bool) -> None:
    """Raise DataError unless the results are of the same data, measured alike along directions made alike.

    Args:
        results: to stand in one figure.
        grid: whether they must have one grid too.
    """
    if not results:
        raise DataError("A figure needs at least one result, got none.")
    if len({r.dimensions for r in results}) > 1:
        raise DataError("Lines and planes cannot share a figure. Draw them apart.")
    provenances = [r.provenance for r in results]
    differ = differing(provenances, (*DATA, *LOSS))
    found: dict[str, list[Any]] = {
        "splits": [r.splits for r in results],
        "BatchNorm statistics": [(r.provenance.get("batchnorm"), r.provenance.get("statistics")) for r in results],
        "other data": [r.provenance.get("also") for r in results],
    }
    if grid:
        found["grid"] = [[a.tolist() for a in r.axes] for r in results]
    kinds = [[d.get("kind") for line in r.directions for d in line] for r in results]
    if grid or all(k == kinds[0] for k in kinds):
        found |= {
            "kind of direction": kinds,
            "normalisation": [_settings(r, "normalisation") for r in results],
            "biases and norms": [_settings(r, "one_dimensional") for r in results],
            "seed": [_settings(r, "seed") for r in results],
            "index of the direction": [_settings(r, "index") for r in results],
        }
    differ |= {name: values for name, values in found.items() if any(v != values[0] for v in values)}
    if differ:
        raise DataError(f"Slices in one figure must be alike, but {describe(differ)}. Measure them in one call.")


def _settings(result: SliceResult, key: str) -> list[Any]:
    return [d.get(key) for line in result.directions for d in line]
