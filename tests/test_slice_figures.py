"""What a figure of a slice shows is where and what was measured, and nothing else."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from comparisons import DIVERGED, DONE, PENDING
from sharpscope.errors import ArgumentError, DataError
from sharpscope.plot import interactive_surface, slice_curves, surface_3d, surface_contour, surfaces_side_by_side
from sharpscope.results import Cost, Mark, SliceResult

mpl.use("Agg")
import matplotlib.pyplot as plt

X, Y = np.linspace(-1, 1, 9), np.linspace(-0.5, 1.5, 5)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def height(x: Any, y: Any) -> Any:
    """A valley of which no exchange or flip of axes leaves anything in place: it lies low at x = 0.5, y = -0.25."""
    return 0.2 + (x - 0.5) ** 2 + 3 * (y + 0.25) ** 2


def known(**more: Any) -> dict[str, Any]:
    return {
        "checkpoint": "sgd.pt",
        "sha256": "a",
        "data": "digits",
        "split": "train",
        "num_examples": 100,
        "split_examples": 1437,
        "examples_seed": 3,
        "mode": "eval",
        "batchnorm": "none",
        "statistics": "frozen",
        "loss_function": "cross_entropy",
        "also": {"test": 50},
        **more,
    }


def plane(x: Any = X, y: Any = Y, f: Any = height, seed: int = 7, norm: str = "filter", **more: Any) -> SliceResult:
    loss = np.stack([f(*np.meshgrid(x, y)), 1.5 * f(*np.meshgrid(x, y))])[:, None]
    entry = {"kind": "random", "normalisation": norm, "one_dimensional": "fixed", "seed": seed, "length": 2.0}
    return SliceResult(
        axes=(np.asarray(x), np.asarray(y)),
        loss=loss,
        accuracy=np.exp(-loss),
        status=np.full((1, len(y), len(x)), DONE, dtype=np.int8),
        splits=("train", "test"),
        directions=(tuple({**entry, "label": f"random direction {i}", "index": i} for i in (1, 2)),),
        centre=np.array([[f(0.0, 0.0), 0.9], [1.5 * f(0.0, 0.0), 0.8]]),
        slopes=np.full((1, 2), np.nan),
        curvatures=np.full((1, 2, 2), np.nan),
        cost=Cost(1, 0, 1.0, 1.0),
        provenance=known(**more),
    )


def line(losses: Any, kind: str = "gradient", t: Any = X, **more: Any) -> SliceResult:
    """One line for each row of ``losses``."""
    loss = np.atleast_2d(np.asarray(losses, dtype=float))[None]
    entries = [{"label": f"{kind} {i}", "kind": kind, "length": 1.0, "seed": i} for i in range(loss.shape[1])]
    if kind == "random":
        entries = [{**e, "label": "random direction", "normalisation": "filter"} for e in entries]
    return SliceResult(
        axes=(np.asarray(t),),
        loss=loss,
        accuracy=np.full_like(loss, np.nan),
        status=np.where(np.isfinite(loss[0]), DONE, DIVERGED).astype(np.int8),
        splits=("train",),
        directions=tuple((e,) for e in entries),
        centre=np.array([[0.0, np.nan]]),
        slopes=np.full((loss.shape[1], 1), np.nan),
        curvatures=np.full((loss.shape[1], 1, 1), np.nan),
        cost=Cost(1, 0, 1.0, 1.0),
        provenance=known(**more),
    )


def wrong_at(result: SliceResult, *places: tuple[int, int]) -> SliceResult:
    """With diverged points at (row of y, column of x)."""
    loss, status = result.loss.copy(), result.status.copy()
    for i, j in places:
        loss[:, 0, i, j], status[0, i, j] = np.nan, DIVERGED
    return replace(result, loss=loss, status=status)


def words(figure: Any) -> str:
    """Everything that is written on a figure."""
    return " ".join(" ".join(t.get_text() for t in figure.findobj(mpl.text.Text)).split())


def contours(axes: Any) -> Any:
    """The set of contour lines."""
    return next(c for c in axes.collections if isinstance(c, mpl.contour.ContourSet) and not c.filled)


# Planes


@pytest.mark.parametrize("x", [X, np.array([-1.0, -0.9, -0.5, 0.0, 0.1, 0.6, 0.7, 1.0])])
def test_x_is_horizontal_and_y_vertical_on_any_grid(x: np.ndarray) -> None:
    """Every contour of a bilinear function runs through points at which the function has the contour's level."""

    def tilted(a: Any, b: Any) -> Any:
        return 3 + a + 0.2 * b

    drawn = contours(surface_contour(plane(x, f=tilted), log=False))
    assert sum(len(s) for pieces in drawn.allsegs for s in pieces) > 20
    for level, pieces in zip(drawn.levels, drawn.allsegs, strict=True):
        for piece in pieces:
            np.testing.assert_allclose(tilted(piece[:, 0], piece[:, 1]), level, rtol=1e-12)


def test_the_lowest_colour_is_at_the_lowest_point() -> None:
    """Seen in the pixels: darkest right of the middle and below it, where the valley is, y upwards."""
    axes = surface_contour(plane(np.linspace(-1, 1, 41), np.linspace(-0.5, 1.5, 21)), colorbar=False)
    axes.figure.canvas.draw()
    pixels = np.asarray(axes.figure.canvas.buffer_rgba())[..., :3].astype(float)
    at = lambda x, y: axes.transData.transform((x, y))  # noqa: E731

    def brightness(x: float, y: float) -> float:
        column, row = at(x, y)
        return float(pixels[int(len(pixels) - row), int(column)].sum())

    low = brightness(0.48, -0.22)
    assert low < brightness(-0.75, -0.22) < brightness(-0.75, 1.2)
    assert low < brightness(0.48, 1.2)


def test_nothing_is_interpolated_into_a_diverged_point() -> None:
    """No contour or colour comes nearer to it than its neighbours' cells; a cross stands at just that point."""
    clean = plane(np.linspace(-1, 1, 9), np.linspace(-1, 1, 9))
    axes = surface_contour(wrong_at(clean, (4, 6)))
    for collection in axes.collections:
        for path in collection.get_paths():
            for polygon in path.to_polygons(closed_only=False):
                inside = np.abs(polygon - [0.5, 0.0]).sum(axis=1)
                assert (inside > 0.25 - 1e-9).all()
    (cross,) = [entry for entry in axes.lines if entry.get_marker() == "x"]
    assert cross.get_xydata().tolist() == [[0.5, 0.0]]
    assert "diverged (1 of 81)" in words(axes.figure)
    fill = next(c for c in axes.collections if isinstance(c, mpl.contour.ContourSet) and c.filled)
    assert not any(path.contains_point((0.5, 0.0)) for path in fill.get_paths())


def test_diverged_points_take_no_part_in_the_levels() -> None:
    """The levels are those of the finite losses, whatever was infinite."""
    clean = plane()
    one, two = (contours(surface_contour(result)).levels for result in (clean, wrong_at(clean, (0, 3))))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("low", "high"), [(1e-7, 30.0), (0.23, 14.6), (0.9, 1.3), (3.0, 900.0)])
@pytest.mark.parametrize("log", [True, False])
def test_levels_are_round_ascending_and_hold_all_values(low: float, high: float, log: bool) -> None:
    """From no higher than the lowest to no lower than the highest, each of at most three digits."""

    def ramp(x: Any, y: Any) -> Any:
        return low + (high - low) * (x + 1) / 2 + 0 * y

    levels = contours(surface_contour(plane(f=ramp), split="train", log=log)).levels
    assert (np.diff(levels) > 0).all()
    assert levels[0] <= low * (1 + 1e-9)
    assert levels[-1] >= high * (1 - 1e-9)
    assert 4 <= len(levels) <= 24
    assert all(float(f"{level:.3g}") == pytest.approx(level, rel=1e-9) for level in levels)


def test_clip_is_the_highest_level_and_is_said() -> None:
    """What is above has the highest colour, and the caption says from where."""
    axes = surface_contour(plane(), clip=2.5)
    assert contours(axes).levels[-1] == 2.5
    assert "clipped at 2.5" in words(axes.figure)
    assert next(c for c in axes.collections if isinstance(c, mpl.contour.ContourSet) and c.filled).extend == "max"
    with pytest.raises(ArgumentError, match="clip must be above the lowest loss"):
        surface_contour(plane(), clip=0.1)


def test_a_logarithmic_scale_of_a_loss_below_zero_is_refused() -> None:
    """It is not shifted, nor cut off: the reader is told to draw it linear."""
    with pytest.raises(DataError, match="above 0"):
        surface_contour(plane(f=lambda x, y: x + 0 * y))
    with pytest.raises(DataError, match="above 0"):
        slice_curves(line(X), log=True)


def test_equal_distances_in_weight_space_are_equal_in_the_picture() -> None:
    """Along directions of lengths 2 and 3 a unit of y is drawn 1.5 times as long as one of x."""
    result = plane()
    first, second = result.directions[0]
    axes = surface_contour(replace(result, directions=(({**first}, {**second, "length": 3.0}),)))
    axes.figure.canvas.draw()
    (x0, y0), (x1, _), (_, y1) = (axes.transData.transform(p) for p in ((0, 0), (1, 0), (0, 1)))
    assert (y1 - y0) / (x1 - x0) == pytest.approx(1.5, rel=1e-6)


def test_side_by_side_shares_levels_limits_and_colours() -> None:
    """Two surfaces of unlike heights: one norm, one set of levels, one colour bar, the same limits."""
    low, high = plane(), plane(f=lambda x, y: 7 * height(x, y), checkpoint="sam.pt", sha256="b")
    one, two = surfaces_side_by_side([low, high])
    np.testing.assert_array_equal(contours(one).levels, contours(two).levels)
    assert contours(one).levels[0] <= low.loss[0].min()
    assert contours(one).levels[-1] >= high.loss[0].max()
    assert (one.get_xlim(), one.get_ylim()) == (two.get_xlim(), two.get_ylim()) == ((-1, 1), (-0.5, 1.5))
    fills = [c for a in (one, two) for c in a.collections if isinstance(c, mpl.contour.ContourSet) and c.filled]
    assert fills[0].get_clim() == fills[1].get_clim()
    assert (one.get_title(), two.get_title()) == ("sgd", "sam")


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (plane(seed=8), "seed differs (\\[7, 7\\] against \\[8, 8\\])"),
        (plane(norm="layer"), "normalisation"),
        (plane(np.linspace(-1, 1, 7)), "grid"),
        (plane(mode="train"), "mode"),
        (plane(data="fashion-mnist"), "data"),
        (plane(split="test"), "split"),
        (plane(num_examples=101), "num_examples"),
        (plane(examples_seed=4), "subset"),
        (plane(statistics="recalibrate"), "BatchNorm"),
    ],
)
@pytest.mark.parametrize("draw", [surfaces_side_by_side, interactive_surface])
def test_surfaces_that_were_not_measured_alike_are_refused(other: SliceResult, word: str, draw: Any) -> None:
    """Seeds, normalisation, grid, mode, data, split, subset and statistics: the error names what differs."""
    with pytest.raises(
        DataError, match=re.escape(word) if "[" not in word else word.replace("(", "\\(").replace(")", "\\)")
    ):
        draw([plane(), other])


def test_a_network_has_the_colour_of_its_own_loss_and_is_open_off_the_plane() -> None:
    """One in the plane is filled, one beside it is not, and the caption says how far it is."""
    on = Mark("sam.pt", (0.5, 0.5), 0.0, 1.0, {"train": 2.0, "test": 2.0}, {"train": 0.5, "test": 0.5})
    off = replace(on, name="far.pt", coordinates=(-0.5, 0.5), distance=0.3)
    axes = surface_contour(replace(plane(), marks=(on, off)))
    drawn = {tuple(entry.get_xydata()[0]): entry for entry in axes.lines if entry.get_marker() == "D"}
    norm = next(c for c in axes.collections if isinstance(c, mpl.contour.ContourSet) and c.filled).norm
    assert drawn[0.5, 0.5].get_markerfacecolor() == plt.get_cmap("viridis")(norm(2.0))
    assert drawn[-0.5, 0.5].get_markerfacecolor() == "none"
    text = words(axes.figure)
    assert "sam, loss 2" in text
    assert "off the plane, by up to 0.3 (far, 30% of its distance from the centre)" in text


def test_a_path_is_drawn_in_the_order_of_its_steps() -> None:
    """From first to last, at the coordinates of the steps; what lies outside of the grid is counted in the caption."""
    at = [(0.9, 0.9), (0.1, 1.4), (0.5, 0.2), (3.0, 0.0)]
    step = {"train": 1.0, "test": 1.0}
    path = tuple(Mark(f"epoch {i}", c, 0.0, 1.0, step, step, on_path=True) for i, c in enumerate(at))
    axes = surface_contour(replace(plane(), marks=path))
    (drawn,) = [entry for entry in axes.lines if entry.get_label() == "training path"]
    assert drawn.get_xydata().tolist() == [list(c) for c in at]
    assert "1 network lies outside of the picture" in words(axes.figure)


def test_the_parabola_of_the_curvature_is_dashed_at_the_same_levels() -> None:
    """Each of its contours runs where the parabola has that level."""
    h = np.array([[3.0, 0.5], [0.5, 1.0]])
    result = replace(plane(np.linspace(-1, 1, 11), np.linspace(-1, 1, 11)), curvatures=h[None], slopes=np.zeros((1, 2)))
    axes = surface_contour(result)
    sets = [c for c in axes.collections if isinstance(c, mpl.contour.ContourSet) and not c.filled]
    assert len(sets) == 2
    np.testing.assert_array_equal(sets[0].levels, sets[1].levels)
    for level, pieces in zip(sets[1].levels, sets[1].allsegs, strict=True):
        for p in pieces:
            value = result.centre[0, 0] + np.einsum("ni,ij,nj->n", p, h, p) / 2
            np.testing.assert_allclose(value, level, rtol=2e-3)
    assert "quadratic prediction" in words(axes.figure)


def test_an_unfinished_surface_shows_what_is_finished() -> None:
    """Pending points are neither drawn nor taken for diverged, and the caption counts them."""
    result = plane()
    status, loss = result.status.copy(), result.loss.copy()
    status[0, 1], loss[:, 0, 1] = PENDING, np.nan
    axes = surface_contour(replace(result, status=status, loss=loss))
    text = words(axes.figure)
    assert "preview: 9 points still to be measured" in text.lower()
    assert "diverged" not in text


def test_heights_in_3d_are_the_logarithms_of_the_losses() -> None:
    """The corners of the surface's cells are the grid's points, and crosses stand over those that diverged."""
    axes: Any = surface_3d(wrong_at(plane(), (4, 8)))
    assert axes.name == "3d"
    surface = next(c for c in axes.collections if hasattr(c, "_vec") or hasattr(c, "_faces"))
    assert surface is not None
    assert "diverged (1 of 45)" in words(axes.figure)
    axes.figure.canvas.draw()
    assert [t.get_text() for t in axes.zaxis.get_ticklabels()]
    with pytest.raises(ArgumentError, match="3D axes"):
        surface_3d(plane(), plt.subplots()[1])


def test_accuracy_is_drawn_in_percent_from_0_to_100() -> None:
    """Its levels are shares, its labels percent, and its scale is linear whatever is asked for."""
    axes = surface_contour(plane(), quantity="accuracy", log=True)
    assert 0 <= contours(axes).levels.min() < contours(axes).levels.max() <= 1 + 1e-9
    assert re.search(r"\d%", words(axes.figure))
    assert "linear scale" in words(axes.figure).lower()
    blank = plane()
    with pytest.raises(DataError, match="no accuracy"):
        surface_contour(replace(blank, accuracy=np.full_like(blank.accuracy, np.nan)), quantity="accuracy")


# Lines


def test_a_line_is_broken_where_it_diverged() -> None:
    """NaN between its neighbours, and a cross at the upper edge at just that t."""
    losses = height(X, 0.0)
    losses[6] = np.inf
    axes = slice_curves(line(losses))
    (curve,) = [entry for entry in axes.lines if entry.get_linestyle() == "-"]
    np.testing.assert_array_equal(curve.get_ydata(), np.where(np.isfinite(losses), losses, np.nan))
    (cross,) = [entry for entry in axes.lines if entry.get_marker() == "x"]
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([X[6]], [1.0])
    assert cross.get_transform() == axes.get_xaxis_transform()
    assert np.isfinite(axes.get_ylim()).all()


def test_random_directions_are_a_band_about_their_median() -> None:
    """From the lowest to the highest at each t; where one of them diverged the band is broken, not the median."""
    rows = np.stack([k * (1 + X**2) for k in (1, 5, 2)])
    rows[1, 3] = np.inf
    axes = slice_curves(line(rows, kind="random"))
    (curve,) = [entry for entry in axes.lines if entry.get_linestyle() == "-"]
    np.testing.assert_allclose(curve.get_ydata(), 2 * (1 + X**2))
    corners = np.concatenate([p.vertices for p in axes.collections[0].get_paths()])
    assert corners[:, 1].max() == pytest.approx(10)
    assert corners[:, 1].min() == pytest.approx(1)
    assert not (np.abs(corners[:, 0] - X[3]) < 1e-9).any()
    assert "3 seeds" in words(axes.figure)
    assert "diverged in some direction" in words(axes.figure)


def test_the_vertical_range_is_that_of_what_was_measured() -> None:
    """A steep parabola is drawn, dashed, and leaves the range alone."""
    flat = replace(line(1 + 0.1 * X**2, kind="eigenvector"), curvatures=np.array([[[1e6]]]), slopes=np.zeros((1, 1)))
    axes = slice_curves(flat)
    assert axes.get_ylim()[1] < 1.2
    (dashed,) = [entry for entry in axes.lines if entry.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed.get_ydata(), 5e5 * dashed.get_xdata() ** 2)


def test_networks_on_a_line_stand_at_their_own_loss() -> None:
    """Filled on the line; open, and with the distance in the legend, beside it."""
    none = {"train": np.nan}
    on, off = (Mark(n, (t,), d, 4.0, {"train": 0.7}, none) for n, t, d in (("sam.pt", 1.0, 1e-9), ("far.pt", 0.5, 0.2)))
    axes = slice_curves(replace(line(height(X, 0.0), kind="checkpoint"), marks=(on, off)))
    drawn = {float(e.get_xdata()[0]): e for e in axes.lines if e.get_linestyle() == "None" and len(e.get_xdata()) == 1}
    assert (drawn[1.0].get_ydata()[0], drawn[1.0].get_fillstyle()) == (0.7, "full")
    assert (drawn[0.5].get_ydata()[0], drawn[0.5].get_fillstyle()) == (0.7, "none")
    assert "far, off the line by 0.2" in words(axes.figure)


def test_splits_are_solid_and_dashed_and_accuracy_is_dotted_on_the_right() -> None:
    """Of two splits the first is solid, the second dashed; the accuracy is the second's, on an axis in percent."""
    one = line(1 + X**2)
    both = replace(
        one,
        loss=np.concatenate([one.loss, 2 * one.loss]),
        accuracy=np.stack([np.full((1, 9), 0.8), np.full((1, 9), 0.6)]),
        splits=("train", "test"),
        centre=np.zeros((2, 2)),
    )
    axes = slice_curves(both)
    solid, dashed = axes.lines[:2]
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    np.testing.assert_array_equal(dashed.get_ydata(), 2 * solid.get_ydata())
    (twin,) = [other for other in axes.figure.axes if other is not axes]
    np.testing.assert_array_equal(twin.lines[0].get_ydata(), np.full(9, 0.6))
    assert twin.get_ylabel() == "test accuracy"
    assert len(slice_curves(both, split="train", accuracy=False).figure.axes) == 1


def test_lines_of_other_data_do_not_share_a_figure() -> None:
    """Neither do lines and planes."""
    with pytest.raises(DataError, match="data differs"):
        slice_curves([line(X**2), line(X**2, data="other")])
    with pytest.raises(DataError, match="Lines and planes"):
        slice_curves([line(X**2), plane()])
    with pytest.raises(DataError, match="surface_contour"):
        slice_curves(plane())
    with pytest.raises(DataError, match="slice_curves"):
        surface_contour(line(X**2))


# Captions and pages


@pytest.mark.parametrize("draw", [surface_contour, surface_3d, lambda r: surfaces_side_by_side([r, r])[0]])
def test_every_figure_says_subset_mode_normalisation_seed_range_scale_and_clip(draw: Any) -> None:
    """In the figure itself, so that it says so in a paper too."""
    text = words(draw(plane()).figure)
    for said in (
        *("100 of 1,437 train examples of digits (drawn with seed 3)", "eval mode", "biases and norms fixed"),
        *("andom, filter-normalised directions, seed 7", "9 x 5 points, x from -1 to 1, y from -0.5 to 1.5"),
        *("ogarithmic scale", "not clipped"),
    ):
        assert said in text


def test_a_caption_says_what_batchnorm_did_and_where_it_misleads() -> None:
    """Frozen statistics are named, and warned of."""
    text = words(surface_contour(plane(batchnorm="running statistics")).figure)
    assert "BatchNorm frozen" in text
    assert "misleads" in text
    text = words(surface_contour(plane(batchnorm="running statistics", statistics="recalibrate")).figure)
    assert "BatchNorm recalibrate" in text
    assert "misleads" not in text


def test_a_caption_says_the_barrier_between_two_networks() -> None:
    """The highest rise above the straight line between their losses."""
    t = np.array([0.0, 0.5, 1.0])
    assert "Barrier 3 (train)" in words(slice_curves(line([1.0, 5.0, 3.0], kind="checkpoint", t=t)).figure)


@pytest.mark.parametrize("width", [3.3, 6.4, 7.0])
@pytest.mark.parametrize("which", ["curves", "contour", "beside"])
def test_captions_stay_within_the_figure_and_off_the_axes(width: float, which: str) -> None:
    """At the widths of a column, a notebook and a page no letter is cut, and nothing lies over anything."""
    axes = {
        "curves": lambda: slice_curves(line(np.stack([X**2, X**4]), kind="random"), width=width),
        "contour": lambda: surface_contour(plane(), width=width),
        "beside": lambda: surfaces_side_by_side([plane(), plane()], width=width)[0],
    }[which]()
    figure = axes.figure
    figure.canvas.draw()
    assert figure.get_figwidth() == width
    box = figure._supxlabel.get_window_extent()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert all(box.y1 <= other.get_tightbbox().y0 + 1 for other in figure.axes)


def test_all_text_is_legible_on_a_dark_background() -> None:
    """Whatever stands outside of the filled picture is light where the figure is dark."""
    with plt.style.context("dark_background"):
        figures = [slice_curves(line(np.stack([X**2, X**4]), kind="random")).figure, surface_contour(plane()).figure]
        for figure in figures:
            inside = {id(t) for a in figure.axes for c in a.collections for t in getattr(c, "labelTexts", [])}
            for text in figure.findobj(mpl.text.Text):
                if text.get_text() and id(text) not in inside:
                    assert sum(mpl.colors.to_rgb(text.get_color())) > 2


def test_a_caption_stands_beneath_axes_that_somebody_else_made() -> None:
    """Beneath the axes' own label, not beneath the figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    slice_curves(line(X**2), left)
    surface_contour(plane(), right)
    figure.canvas.draw()
    for axes, count in ((left, "9 points"), (right, "9 x 5 points")):
        (note,) = [t for t in axes.texts if count in " ".join(t.get_text().split())]
        assert note.get_window_extent().y1 <= axes.xaxis.label.get_window_extent().y0 + 1


class Page(HTMLParser):
    """What a page would fetch, and all that it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.said += data if len(data) < 10_000 else ""


def test_a_legend_stays_in_its_column_of_a_wider_figure() -> None:
    """Beside other axes, the names of many lines take no width from the curves."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    slice_curves([line(X**2 + i, checkpoint=f"run number {i}.pt") for i in range(4)], axes[2], accuracy=False)
    figure.draw_without_rendering()
    assert axes[2].get_legend().get_window_extent().width < figure.bbox.width / 3
    assert axes[2].get_position().width > 0.2


def test_an_interactive_page_fetches_nothing_and_says_what_a_figure_says() -> None:
    """Plotly is inside; surfaces share the colours; a diverged point is a hole with a cross, not a number."""
    pytest.importorskip("plotly")
    page = interactive_surface([wrong_at(plane(), (2, 3)), plane(checkpoint="sam.pt")])
    parsed = Page(page)
    assert parsed.fetched == []
    assert "seed 7" in parsed.said
    assert "9 x 5 points" in parsed.said
    assert len(page) > 1_000_000
    assert page.count('"coloraxis":"coloraxis"') == 2
    assert '"name":"diverged"' in page
    assert "null" in page


def test_crosses_of_an_interactive_surface_are_at_the_diverged_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row i and column j of the losses are y[i] and x[j]; there the surface has a hole, else its height."""
    go = pytest.importorskip("plotly.graph_objects")
    drawn: list[Any] = []

    def kept(figure: Any, **options: Any) -> str:
        drawn.append(figure)
        return ""

    monkeypatch.setattr(go.Figure, "to_html", kept)
    interactive_surface(wrong_at(plane(), (2, 3), (4, 8)))
    (figure,) = drawn
    (surface, crosses), top = figure.data, figure.layout.coloraxis.cmax
    assert list(zip(crosses.x, crosses.y, strict=True)) == [(X[3], Y[2]), (X[8], Y[4])]
    holes = np.isnan(np.asarray(surface.z, dtype=float))
    assert holes.sum() == 2
    assert holes[2, 3]
    assert holes[4, 8]
    assert list(crosses.z) == [top] * 2
    assert surface.z[0, 0] == min(np.log10(height(X[0], Y[0])), top)


def test_without_plotly_one_reads_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, and no ImportError reaches the user."""
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ArgumentError, match=r"pip install 'sharpscope\[interactive\]'"):
        interactive_surface(plane())
