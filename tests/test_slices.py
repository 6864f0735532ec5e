"""Slices show the loss where they say they do, and leave the model as it was."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sharpscope
from comparisons import DIVERGED, DONE, PENDING
from conftest import classifier
from sharpscope import Problem, SliceResult, loss_slice, loss_surface
from sharpscope.errors import ArgumentError, AuditError, DataError, ProblemError
from sharpscope.slices import (
    Direction,
    eigenvector_directions,
    gradient_directions,
    orthonormalised,
    plane_through,
    random_directions,
    span_of,
    towards,
    trajectory_plane,
)

LAMBDAS = torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Bowl(nn.Module):
    """Its output at weights w, for the loss ``sum_k lambda_k (q_k'w)^2 / 2 + floor`` of orthonormal q_k."""

    def __init__(self, at: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64) if at is None else at.clone())
        self.axes = torch.linalg.qr(drawn(4, 4, seed=7)).Q

    def forward(self, x: Tensor) -> Tensor:
        return (self.axes.T @ self.w).expand(len(x), 4)


def bowl_loss(output: Tensor, target: Tensor) -> Tensor:
    return (LAMBDAS * output.square() / 2).sum(1).mean() + target.mean()


def bowl(at: Tensor | None = None, floor: float = 0.5) -> Problem:
    """A quadratic with the eigenvalues LAMBDAS and eigenvectors ``axes``; its minimum ``floor`` is at 0."""
    targets = torch.full((3, 1), floor, dtype=torch.float64)
    return Problem(model=Bowl(at), loss=bowl_loss, data=(torch.zeros(3, 1, dtype=torch.float64), targets))


def along(problem: Problem, *places: int) -> list[Direction]:
    assert isinstance(problem.model, Bowl)
    return [Direction(problem.model.axes[:, i].clone(), f"axis {i}") for i in places]


def cosine(one: Direction, two: Direction) -> float:
    return float(nn.functional.cosine_similarity(one.vector, two.vector, dim=0))


def network(seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)] if norm else [nn.Conv2d(1, 3, 3)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).double()
    if norm:
        net.train()
        for i in range(20):
            net(drawn(16, 1, 6, 6, seed=i))
    return net.eval()


def classified(seed: int = 0, norm: bool = False, n: int = 37) -> Problem:
    labels = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(1))
    return Problem(model=network(seed, norm), loss=nn.CrossEntropyLoss(), data=(drawn(n, 1, 6, 6, seed=5), labels))


def state(problem: Problem) -> dict[str, Tensor]:
    return copy.deepcopy(dict(problem.model.state_dict()))


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[key], two[key]) for key in one)


def moved(problem: Problem, direction: Tensor, t: float = 1.0) -> nn.Module:
    """A copy of the model at ``w + t d``."""
    model = copy.deepcopy(problem.model)
    with torch.no_grad():
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()) + t * direction, model.parameters()
        )
    return model


def oracle(model: nn.Module, data: Any) -> tuple[float, float]:
    """Mean cross-entropy and accuracy by one forward pass."""
    with torch.no_grad():
        output = model(data[0])
    return float(nn.functional.cross_entropy(output, data[1])), float((output.argmax(1) == data[1]).double().mean())


# Geometry.


@pytest.mark.parametrize("k", range(4))
def test_the_curvature_along_an_axis_is_its_eigenvalue(k: int) -> None:
    """On an anisotropic quadratic the slice along eigenvector k is floor + lambda_k t^2 / 2, to 1e-8."""
    result = loss_slice(bowl(), along(bowl(), k), 21, (-2, 2))
    expected = 0.5 + LAMBDAS[k].item() * result.axes[0] ** 2 / 2
    np.testing.assert_allclose(result.loss[0, 0], expected, rtol=1e-12)
    assert np.polyfit(result.axes[0], result.loss[0, 0], 2)[0] == pytest.approx(LAMBDAS[k].item() / 2, rel=1e-8)


def test_measured_eigenvectors_are_never_renormalised() -> None:
    """Along measured eigenvectors the loss bends by the measured eigenvalues: lengths are 1, not the weights' own."""
    problem = bowl(at=drawn(4, seed=3))
    found = sharpscope.top_eigenvalues(problem, k=3, vectors=True)
    directions = eigenvector_directions(found, (1, 3))
    result = loss_surface(problem, directions, points=5)
    assert [d.length for d in directions] == pytest.approx([1, 1], abs=1e-12)
    for second, value in ((result.loss[0, 0][2], 9.0), (result.loss[0, 0][:, 2], 1.0)):
        assert (second[0] - 2 * second[2] + second[4]) == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(result.curvatures[0], np.diag([9.0, 1.0]), atol=1e-8)


@pytest.mark.parametrize("points", [(7, 4), (4, 7), (6, 6), (5, 5)])
def test_x_is_x_and_y_is_y_on_every_grid(points: tuple[int, int]) -> None:
    """Non-square, even and odd grids: each value is the loss at its own coordinates, no row or column exchanged."""
    problem = bowl(at=drawn(4, seed=3))
    plane = along(problem, 0, 3)
    result = loss_surface(problem, plane, points, ((-1.0, 2.0), (-0.5, 0.25)))
    x, y = result.axes
    assert result.loss.shape == (1, 1, len(y), len(x))
    for j, b in enumerate(y):
        for i, a in enumerate(x):
            at = Bowl(drawn(4, seed=3) + a * plane[0].vector + b * plane[1].vector)
            expected = bowl_loss(at(torch.zeros(1, 1)), torch.full((1, 1), 0.5, dtype=torch.float64)).item()
            assert result.loss[0, 0, j, i] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("points", [5, 6, (4, 9)])
@pytest.mark.parametrize("span", [(-1.0, 1.0), (-0.3, 1.0)])
def test_the_minimum_is_at_the_centre_on_even_and_odd_grids(points: Any, span: tuple[float, float]) -> None:
    """At a minimum the lowest point of a surface is (0, 0) exactly, whatever the number of points."""
    result = loss_surface(bowl(), along(bowl(), 0, 1), points, span)
    j, i = np.unravel_index(result.loss[0, 0].argmin(), result.loss[0, 0].shape)
    assert (result.axes[0][i], result.axes[1][j]) == (0.0, 0.0)
    assert result.loss[0, 0, j, i] == 0.5 == result.centre[0, 0]


@pytest.mark.parametrize("points", [2, 3, 20, 21])
@pytest.mark.parametrize("spacing", ["linear", "log"])
@pytest.mark.parametrize("span", [(-1.0, 1.0), (0.0, 2.0), (-3.0, 0.0), (0.5, 2.0), (-2.0, -0.1), (-0.1, 0.7)])
def test_an_axis_ends_where_it_was_asked_to(points: int, spacing: str, span: tuple[float, float]) -> None:
    """Ends are exact, coordinates ascend, 0 is among them if it lies between, and at most one point is added."""
    (found,) = loss_slice(bowl(), along(bowl(), 0), points, span, spacing=spacing).axes
    assert (found[0], found[-1]) == span or points == 2
    assert (np.diff(found) > 0).all()
    assert (0.0 in found) == (span[0] <= 0 <= span[1])
    assert points <= len(found) <= points + 1


def test_an_axis_about_0_is_symmetric_to_the_bit() -> None:
    """Each coordinate has its negative, so that a symmetric loss looks symmetric."""
    for points in (20, 21, 51, 100):
        for spacing in ("linear", "log"):
            (found,) = loss_slice(bowl(), along(bowl(), 0), points, (-0.7, 0.7), spacing=spacing).axes
            np.testing.assert_array_equal(found, -found[::-1])


@pytest.mark.parametrize(
    ("points", "span"),
    [(1, (-1, 1)), (5, (1, -1)), (5, (0, 0)), (5, (0, math.inf)), (5, (math.nan, 1)), (3, (0, 1e308))],
)
def test_an_axis_that_is_none_is_refused(points: int, span: tuple[float, float]) -> None:
    """Fewer than 2 points, and ranges that are empty or not finite, end in a sentence."""
    with pytest.raises(ArgumentError, match="must"):
        loss_slice(bowl(), along(bowl(), 0), points, span)


def test_points_come_from_coarse_to_fine_and_each_once() -> None:
    """Every point of the grid once; each time all gaps are halved, what is finished is a grid."""
    counts, grids = [], []

    def preview(unfinished: Callable[[], SliceResult]) -> None:
        done = unfinished().status[0] != PENDING
        rows, columns = int(done.any(1).sum()), int(done.any(0).sum())
        counts.append(int(done.sum()))
        if counts[-1] == rows * columns and (columns, rows) not in grids:
            grids.append((columns, rows))

    loss_surface(bowl(), along(bowl(), 0, 1), (9, 12), ((-1.0, 1.0), (-1.0, 3.0)), preview=preview)
    # The centre is known before all others, and changes nothing in its turn.
    assert (len(counts), sorted(set(counts))) == (9 * 13, list(range(2, 9 * 13 + 1)))
    assert counts == sorted(counts)
    # The ends and 0, which is the fourth of 13 coordinates of y; then the middles of all gaps, down to single steps.
    assert {(3, 3), (5, 5), (9, 8), (9, 12), (9, 13)} <= set(grids)


def test_refinement_goes_where_the_loss_bends() -> None:
    """The new coordinates lie about the kink of a function that is straight elsewhere."""

    class Kink(Bowl):
        def forward(self, x: Tensor) -> Tensor:
            return (self.w[0] - 0.3).abs().expand(len(x), 1)

    problem = Problem(model=Kink(), loss=lambda output, target: 1 + (output + 0 * target).mean(), data=bowl().data)
    line, x = [Direction(torch.eye(4, dtype=torch.float64)[0], "x")], np.linspace(-1, 1, 11).tolist()
    for count in (1, 3):
        (found,) = loss_slice(problem, line, coordinates=x, refine=count).axes
        new = set(found.tolist()) - set(x)
        assert len(new) == count
        assert min(abs(t - 0.3) for t in new) < 1e-9
        assert max(abs(t - 0.3) for t in new) < 0.21


def test_refined_surfaces_keep_every_point_of_the_coarse_one() -> None:
    """--refine adds coordinates and changes no value."""
    problem = classified()
    coarse = loss_surface(problem, points=5)
    fine = loss_surface(problem, points=5, refine=3)
    rows, columns = np.isin(fine.axes[1], coarse.axes[1]), np.isin(fine.axes[0], coarse.axes[0])
    assert [len(a) for a in fine.axes] == [8, 8]
    np.testing.assert_array_equal(fine.loss[0, 0][np.ix_(rows, columns)], coarse.loss[0, 0])
    assert fine.complete


# Directions.


@pytest.mark.parametrize("normalisation", ["filter", "layer", "model", "none"])
@pytest.mark.parametrize("one_dimensional", ["fixed", "scaled"])
def test_random_directions_are_orthogonal_to_rounding(normalisation: str, one_dimensional: str) -> None:
    """The cosine of any two is 0 to 1e-12: Gram-Schmidt divides by the squared norm."""
    found = random_directions(classified(), 4, normalisation=normalisation, one_dimensional=one_dimensional)
    for i in range(4):
        for j in range(i):
            assert abs(cosine(found[i], found[j])) < 1e-12


def pieces(problem: Problem, direction: Direction) -> dict[str, Tensor]:
    sizes = dict(problem.model.named_parameters())
    parts = torch.split(direction.vector, [p.numel() for p in sizes.values()])
    return {name: part.view_as(p) for (name, p), part in zip(sizes.items(), parts, strict=True)}


def test_each_filter_of_a_random_direction_is_as_long_as_its_weights() -> None:
    """Li et al. 2018: ||d_f|| = ||w_f|| for every filter and neuron, for both directions of a plane."""
    problem = classified()
    for direction in random_directions(problem, 2):
        for name, d in pieces(problem, direction).items():
            w = dict(problem.model.named_parameters())[name].detach()
            if w.dim() > 1:
                torch.testing.assert_close(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))


@pytest.mark.parametrize("normalisation", ["layer", "model"])
def test_layers_and_models_are_sized_whole(normalisation: str) -> None:
    """With "layer" each tensor is as long as its weights, with "model" all that move together."""
    problem = classified()
    (direction,) = random_directions(problem, normalisation=normalisation)
    weights = {name: w.detach() for name, w in problem.model.named_parameters() if w.dim() > 1}
    parts = {name: d for name, d in pieces(problem, direction).items() if name in weights}
    if normalisation == "layer":
        for name, w in weights.items():
            assert float(parts[name].norm()) == pytest.approx(float(w.norm()))
    else:
        assert direction.length == pytest.approx(math.sqrt(sum(float(w.square().sum()) for w in weights.values())))


def test_biases_and_batchnorm_stand_still_along_random_directions() -> None:
    """Tensors of one dimension do not move by default, running statistics never; "scaled" moves the former."""
    problem = classified(norm=True)
    before = state(problem)
    (fixed,) = random_directions(problem)
    assert all(bool((d == 0).all()) == (d.dim() <= 1) for d in pieces(problem, fixed).values())
    (scaled,) = random_directions(problem, one_dimensional="scaled")
    weights = dict(problem.model.named_parameters())
    assert all(bool((d != 0).any()) == bool((weights[k] != 0).any()) for k, d in pieces(problem, scaled).items())
    result = loss_surface(problem, points=5, span=(-3.0, 3.0))
    assert (result.status == DONE).all()
    assert same(state(problem), before)


def test_the_same_seed_gives_checkpoints_the_same_numbers() -> None:
    """Two networks get the same direction up to the size of each filter, and one direction is the first of two."""
    one, two = classified(0), classified(1)
    a, b = random_directions(one)[0], random_directions(two)[0]
    for left, right in zip(pieces(one, a).values(), pieces(two, b).values(), strict=True):
        if left.dim() > 1:
            torch.testing.assert_close(
                nn.functional.normalize(left.flatten(1)), nn.functional.normalize(right.flatten(1))
            )
    assert torch.equal(a.vector, random_directions(one, 2)[0].vector)
    other = random_directions(one, 1, torch.Generator().manual_seed(1))[0]
    assert abs(cosine(a, other)) < 0.5


def test_filters_too_small_for_a_second_direction_stand_still_in_it() -> None:
    """A layer of single weights a filter counts as one filter, and a single weight moves along one direction alone."""
    problem = Problem(model=nn.Linear(1, 3, bias=False).double(), loss=nn.MSELoss(), data=(drawn(4, 1), drawn(4, 3)))
    first, second = random_directions(problem, 2)
    assert first.length == pytest.approx(second.length)
    assert abs(cosine(first, second)) < 1e-12
    single = Problem(model=nn.Linear(1, 1, bias=False).double(), loss=nn.MSELoss(), data=(drawn(4, 1), drawn(4, 1)))
    with pytest.raises(ArgumentError, match="have weights to move"):
        random_directions(single, 2)


def test_a_line_between_networks_meets_both() -> None:
    """t = 0 is the one and t = 1 the other, buffers apart; the barrier is what rises above the straight line."""
    one, two = classified(0), classified(1)
    direction = towards(one, two, "two")
    result = loss_slice(one, [direction], marks={"two": two}, points=20)
    at = {float(t): loss for t, loss in zip(result.axes[0], result.loss[0, 0], strict=True)}
    assert at[0.0] == pytest.approx(oracle(one.model, one.data)[0], rel=1e-12)
    assert at[1.0] == pytest.approx(oracle(two.model, one.data)[0], rel=1e-12)
    (mark,) = result.marks
    assert mark.coordinates == pytest.approx((1.0,))
    assert mark.distance < 1e-12 * mark.length
    assert (mark.loss["data"], mark.accuracy["data"]) == pytest.approx(oracle(two.model, one.data))
    between = [t for t in at if 0 <= t <= 1]
    assert result.barrier() == pytest.approx(max(at[t] - (1 - t) * at[0.0] - t * at[1.0] for t in between))


@pytest.mark.parametrize(
    ("points", "span"), [(17, (-0.3, 1.3)), (15, (-0.2, 1.2)), (13, (-0.1, 1.1)), (21, (-0.5, 1.5))]
)
def test_a_line_between_networks_has_one_point_at_its_end(points: int, span: tuple[float, float]) -> None:
    """t = 1 is on the axis, and no twin of it by rounding."""
    one, two = classified(0), classified(1)
    x = loss_slice(one, [towards(one, two)], points, span).axes[0]
    assert 1.0 in x
    assert np.diff(x).min() > 1e-3


def test_only_a_line_that_ends_at_the_network_has_a_barrier() -> None:
    """Of length 1 it no longer does; of some parameters alone the network lies beside it."""
    one, two = classified(0), classified(1)
    (unit,) = orthonormalised([towards(one, two, "two")])
    assert loss_slice(one, [unit], 5, (0.0, 2.0)).barrier() is None
    partial = Problem(model=one.model, loss=one.loss, data=one.data, params="*.weight")
    (mark,) = loss_slice(partial, [towards(partial, two)], 5, marks={"two": two}).marks
    apart = [(a - b).detach().norm() for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True)]
    biases = [n for n, p in zip(apart, one.model.parameters(), strict=True) if p.dim() == 1]
    assert mark.distance == pytest.approx(math.hypot(*map(float, biases)))
    assert mark.length == pytest.approx(math.hypot(*map(float, apart)))


def test_the_plane_through_three_networks_holds_them_at_right_angles() -> None:
    """Axes are orthonormal, and each network lies in the plane at its true distance from the centre."""
    one, others = classified(0), {"b": classified(1), "c": classified(2)}
    plane = plane_through(one, others)
    assert abs(cosine(*plane)) < 1e-12
    assert [d.length for d in plane] == pytest.approx([1, 1], abs=1e-12)
    span = span_of(one, plane, list(others.values()))
    result = loss_surface(one, plane, 5, (span[0], span[1]), marks=others)
    for (name, other), mark in zip(others.items(), result.marks, strict=True):
        assert mark.name == name
        assert mark.distance < 1e-9 * mark.length
        assert math.hypot(*mark.coordinates) == pytest.approx(mark.length)
        there = moved(one, sum((c * d.vector for c, d in zip(mark.coordinates, plane, strict=True)), torch.zeros(1)))
        assert oracle(there, one.data)[0] == pytest.approx(oracle(other.model, one.data)[0])
        assert all(low < c < high for c, (low, high) in zip(mark.coordinates, span, strict=True))


def test_three_networks_in_one_line_span_no_plane() -> None:
    """A combination of the others is refused, not drawn."""
    one, two = classified(0), classified(1)
    half = Problem(model=moved(one, towards(one, two).vector, 0.5), loss=one.loss, data=one.data)
    with pytest.raises(ArgumentError, match="combination"):
        plane_through(one, {"b": two, "c": half})


def test_the_plane_of_a_trajectory_is_the_nearest_one() -> None:
    """It is the best rank-2 fit of the steps about the centre, and the distances off it are those of the fit."""
    problem = classified()
    n = sum(p.numel() for p in problem.model.parameters())
    rows = 0.1 * torch.stack(
        [k * drawn(n, seed=1) + k * k * drawn(n, seed=2) + drawn(n, seed=2 + k) for k in range(1, 6)]
    )
    steps = [Problem(model=moved(problem, row), loss=problem.loss, data=problem.data) for row in rows]
    plane = trajectory_plane(problem, steps)
    left = np.linalg.svd(rows.numpy(), compute_uv=False)
    result = loss_surface(problem, plane, 3, trajectory={str(i): s for i, s in enumerate(steps)})
    assert [d.settings["explained"] for d in plane] == pytest.approx((left**2 / (left**2).sum())[:2])
    assert sum(m.distance**2 for m in result.marks) == pytest.approx(float((left[2:] ** 2).sum()))
    assert all(m.on_path for m in result.marks)


def test_an_overlay_is_scaled_by_the_directions_own_length() -> None:
    """Coordinates are those of the nearest point of the plane whatever the directions' lengths and angle."""
    d = [Direction(5 * drawn(4, seed=1), "a"), Direction(0.1 * drawn(4, seed=2) + drawn(4, seed=1), "b")]
    way = 2 * d[0].vector - 3 * d[1].vector + drawn(4, seed=3)
    centre = drawn(4, seed=4)
    (mark,) = loss_surface(bowl(centre), d, 2, marks={"other": bowl(centre + way)}).marks
    basis = torch.stack([v.vector for v in d], 1).numpy()
    expected, *_ = np.linalg.lstsq(basis, way.numpy(), rcond=None)
    assert mark.coordinates == pytest.approx(expected.tolist())
    assert mark.distance == pytest.approx(float(np.linalg.norm(way.numpy() - basis @ expected)))


def test_gradient_directions_are_the_gradients_at_w_and_after_sams_ascent() -> None:
    """The first is g, the second the gradient at w + rho g/||g||, both of length 1; orthonormalised keeps the plane."""
    problem = bowl(at=drawn(4, seed=3))
    h = problem.model.axes @ torch.diag(LAMBDAS) @ problem.model.axes.T  # type: ignore[operator,union-attr]
    g = h @ drawn(4, seed=3)
    s = h @ (drawn(4, seed=3) + 0.2 * g / g.norm())
    before = state(problem)
    first, second = gradient_directions(problem, rho=0.2)
    torch.testing.assert_close(first.vector, g / g.norm())
    torch.testing.assert_close(second.vector, s / s.norm())
    assert same(state(problem), before)
    assert second.settings["cosine"] == pytest.approx(float(g @ s / g.norm() / s.norm()))
    across = orthonormalised([first, second])
    assert abs(cosine(*across)) < 1e-12
    torch.testing.assert_close(across[0].vector, first.vector)


def test_directions_of_other_networks_are_refused() -> None:
    """A direction of the wrong length, another architecture, the same network and parallel axes end in sentences."""
    problem = classified()
    with pytest.raises(ArgumentError, match="component for each"):
        loss_slice(problem, [Direction(drawn(7), "d")])
    with pytest.raises(ProblemError, match="same weights"):
        towards(problem, Problem(model=nn.Linear(3, 2), loss=problem.loss, data=problem.data))
    with pytest.raises(ArgumentError, match="are the same"):
        towards(problem, problem)
    (d,) = random_directions(problem)
    with pytest.raises(ArgumentError, match="linearly independent"):
        loss_surface(problem, [d, Direction(-2 * d.vector, "back")])


# Values.


def test_loss_and_accuracy_are_those_of_the_moved_network() -> None:
    """Each point equals one forward pass of a copy of the model there, train and test in one run."""
    problem, test = classified(), classified(n=11).data
    (direction,) = random_directions(problem)
    result = loss_slice(problem, [direction], 7, also={"test": test}, micro_batch=8)
    assert result.splits == ("data", "test")
    for i, t in enumerate(result.axes[0]):
        for s, data in enumerate((problem.data, test)):
            found = (result.loss[s, 0, i], result.accuracy[s, 0, i])
            assert found == pytest.approx(oracle(moved(problem, direction.vector, t), data), rel=1e-12)


def test_the_micro_batch_and_a_small_last_batch_change_nothing() -> None:
    """Loss terms count, not batches."""
    problem = classified()
    losses = [loss_surface(problem, points=3, micro_batch=size).loss for size in (1, 5, 36, 100)]
    for other in losses[1:]:
        np.testing.assert_allclose(losses[0], other, rtol=1e-12)
    batches = Problem(
        model=problem.model,
        loss=problem.loss,
        data=[(problem.data[0][:36], problem.data[1][:36]), (problem.data[0][36:], problem.data[1][36:])],
    )
    np.testing.assert_allclose(loss_surface(batches, points=3).loss, losses[0], rtol=1e-12)


def test_diverged_points_are_marked_not_mended() -> None:
    """A loss that is infinite or NaN is a status of its own; its neighbours keep their values, and none is averaged."""

    class Cliff(Bowl):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.w[0].item() < 0.5 else super().forward(x) * math.nan

    problem = Problem(model=Cliff(), loss=bowl_loss, data=bowl().data)
    e = torch.eye(4, dtype=torch.float64)
    result = loss_surface(problem, [Direction(e[0], "x"), Direction(e[1], "y")], 5)
    np.testing.assert_array_equal(result.status[0] == DIVERGED, np.tile(result.axes[0] >= 0.5, (5, 1)))
    assert np.isnan(result.loss[0, 0][result.status[0] == DIVERGED]).all()
    assert np.isfinite(result.loss[0, 0][result.status[0] == DONE]).all()
    assert result.complete


def test_a_loss_that_is_not_finite_at_the_weights_is_refused() -> None:
    """There is no slice about a centre that has no loss."""
    problem = bowl()
    with torch.no_grad():
        problem.data[1][0] = math.inf
    with pytest.raises(DataError, match="finite"):
        loss_slice(problem, along(problem, 0))


def test_points_do_not_drift_however_many_came_before() -> None:
    """The first and the last visit of a point give the same bits, and those of a network moved there at once."""
    problem = classified()
    problem.model.float()
    data = (problem.data[0].float(), problem.data[1])
    problem = Problem(model=problem.model, loss=problem.loss, data=data)
    plane = random_directions(problem, 2)
    whole = loss_surface(problem, plane, 21)
    alone = loss_surface(problem, plane, coordinates=([-1.0, 1.0], [-1.0, 1.0]))
    np.testing.assert_array_equal(alone.loss[0, 0], whole.loss[0, 0][np.ix_([0, -1], [0, -1])])


def test_memory_does_not_grow_with_the_points() -> None:
    """No point's parameters are kept, nor the directions or the model copied for each."""
    problem = classified()
    live: list[int] = []

    def count(stage: str, done: int, total: int | None) -> None:
        live.append(sum(x.numel() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)))

    loss_surface(problem, points=3, progress=count)
    assert max(live[2:]) == min(live[2:])


@pytest.mark.parametrize("norm", [False, True])
def test_the_model_is_bit_for_bit_what_it_was(norm: bool) -> None:
    """Weights, buffers, modes, gradients and random states survive a slice, and an error in the middle of one."""
    problem = classified(norm=norm)
    problem.model.train()
    before, random = state(problem), torch.get_rng_state()
    loss_surface(problem, points=4, batchnorm="recalibrate" if norm else "frozen")
    calls = []

    def stop(stage: str, done: int, total: int | None) -> None:
        calls.append(done)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_surface(problem, points=4, progress=stop)
    assert same(state(problem), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in problem.model.modules())
    assert all(p.grad is None for p in problem.model.parameters())


def test_weight_decay_joins_the_loss_of_every_point() -> None:
    """c/2 ||w + t d||^2 is added where it was asked for."""
    plain, problem = classified(), classified()
    decayed = Problem(model=problem.model, loss=problem.loss, data=problem.data, weight_decay=0.3)
    (d,) = random_directions(plain)
    w = nn.utils.parameters_to_vector(plain.model.parameters()).detach()
    bare, more = (loss_slice(p, [d], 5) for p in (plain, decayed))
    extra = [0.15 * float((w + t * d.vector).square().sum()) for t in bare.axes[0]]
    np.testing.assert_allclose(more.loss[0, 0] - bare.loss[0, 0], extra, rtol=1e-10)


def test_accuracy_leaves_out_labels_that_are_no_loss_term() -> None:
    """ignore_index counts for neither loss nor accuracy; a regression has no accuracy."""
    problem = classified()
    labels = problem.data[1].clone()
    labels[::3] = -100
    result = loss_slice(Problem(model=problem.model, loss=problem.loss, data=(problem.data[0], labels)), points=3)
    kept = labels != -100
    assert result.centre[0].tolist() == pytest.approx(
        list(oracle(problem.model, (problem.data[0][kept], labels[kept]))), rel=1e-12
    )
    assert np.isnan(loss_slice(bowl(), along(bowl(), 0), 3).accuracy).all()


def test_a_model_that_writes_into_its_input_sees_the_data_at_every_point() -> None:
    """Data kept on the device are handed over as copies where the model is seen to change them."""

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            grad.append(torch.is_grad_enabled())
            out: Tensor = self.inner(x)
            x.mul_(2.0)
            return out

    problem, grad = classified(), list[bool]()
    greedy = Problem(model=Greedy(), loss=problem.loss, data=problem.data)
    before = problem.data[0].clone()
    np.testing.assert_array_equal(loss_surface(greedy, points=3).loss, loss_surface(problem, points=3).loss)
    assert not any(grad[-9:])  # it is not taken for one that differentiates
    assert torch.equal(problem.data[0], before)


def test_a_loss_that_differentiates_is_given_autograd() -> None:
    """A physics-style loss of the network's own derivative is measured, though others run without autograd."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(1, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return torch.autograd.grad(self.f(x).square().sum(), x, create_graph=True)[0]

    problem = Problem(model=Slope(), loss=nn.MSELoss(), data=(drawn(6, 1), drawn(6, 1, seed=1)))
    (d,) = random_directions(problem)
    result = loss_slice(problem, [d], 3)
    there = moved(problem, d.vector, 1.0)
    x = problem.data[0].clone()
    assert result.loss[0, 0, -1] == pytest.approx(nn.functional.mse_loss(there(x), problem.data[1]).item())


def test_a_loss_that_draws_random_numbers_is_refused() -> None:
    """Dropout left on makes every point another function."""
    model = nn.Sequential(network(), nn.Dropout(0.5))
    problem = classified()
    with pytest.raises(AuditError, match="dropout"):
        loss_slice(Problem(model=model, loss=problem.loss, data=problem.data, mode="train"))


@pytest.mark.parametrize("how", ["data", "numpy", "some"])
def test_hidden_writes_into_the_input_are_seen(how: str) -> None:
    """Through .data, through numpy, and into a later example alone: no point sees what another left behind."""

    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            if how == "data":
                x.data.mul_(0.5)
            elif how == "numpy":
                array = x.detach().numpy()
                array *= 0.5
            else:
                big = x.abs().amax((1, 2, 3)) > 10
                if bool(big.any()):
                    x[big] *= 0.1
            out: Tensor = self.inner(x)
            return out

    problem = classified()
    problem.data[0][20] *= 10
    sly = Problem(model=Sly(), loss=problem.loss, data=problem.data)
    (d,) = random_directions(sly)
    result = loss_slice(sly, [d], 5)
    for t, loss in zip(result.axes[0], result.loss[0, 0], strict=True):
        there = moved(sly, d.vector, t)
        assert loss == pytest.approx(oracle(there, (problem.data[0].clone(), problem.data[1]))[0], rel=1e-9)


def test_layers_that_change_weights_come_back_too() -> None:
    """An embedding that renorms its rows in a forward pass, and an adapter that merges itself on eval()."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> Merging:
            super().train(mode)
            if not mode and not self.merged:
                self.weight.data += 1.0
                self.merged = True
            return self

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Flatten(), Merging(8, 3))
    before = copy.deepcopy(model.state_dict())
    data = torch.randint(0, 7, (20, 2)), torch.randint(0, 3, (20,))
    loss_slice(Problem(model=model, loss=nn.CrossEntropyLoss(), data=data), points=3)
    assert same(model.state_dict(), before)
    assert not model[2].merged


def test_a_function_of_the_users_is_not_taken_for_torchs_by_its_name() -> None:
    """Accuracy is of losses that are known to be of labels, not of what is called cross_entropy."""

    def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, ignore_index=-1)

    problem = classified()
    own = Problem(model=problem.model, loss=cross_entropy, data=problem.data)
    assert np.isnan(loss_slice(own, points=3).accuracy).all()


def test_accuracy_is_unknown_where_the_outputs_are() -> None:
    """The largest of NaN is no answer: a diverged point has no accuracy."""
    problem = classified()
    (d,) = random_directions(problem)
    huge = Direction(d.vector * 1e150, "huge")
    result = loss_slice(problem, [huge], coordinates=[0.0, 1e20])
    assert result.status[0].tolist() == [DONE, DIVERGED]
    assert np.isnan(result.accuracy[0, 0, 1])


def test_an_augmented_loader_is_refused() -> None:
    """Data that change from walk to walk have no slice."""

    class Noisy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> Any:
            return torch.randn(1, 6, 6, dtype=torch.float64), i % 5

    problem = classified()
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=10)
    with pytest.raises(AuditError, match="augmentation"):
        loss_slice(Problem(model=problem.model, loss=problem.loss, data=loader))


def test_a_model_can_be_trained_after_a_slice_whatever_it_keeps() -> None:
    """A table that the model makes in its first forward pass and keeps is an ordinary tensor."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.table = network(), None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones(5, dtype=torch.float64)
            return self.inner(x) * self.table

    problem = classified()
    keeping = Problem(model=Keeping(), loss=problem.loss, data=problem.data)
    loss_slice(keeping, points=3)
    problem.loss(keeping.model(problem.data[0]), problem.data[1]).backward()


def test_a_mark_is_measured_as_the_centre_is() -> None:
    """The same weights have the same loss, mode and weight decay of the network's own problem apart."""
    problem = classified()
    other = Problem(model=classified().model, loss=nn.MSELoss(), data=problem.data, weight_decay=10.0, mode="train")
    (mark,) = loss_surface(problem, points=3, marks={"same": other}).marks
    assert mark.loss["data"] == loss_surface(problem, points=3).centre[0, 0]


def test_low_precision_weights_are_lifted() -> None:
    """bfloat16 weights are moved in float32, and come back as they were."""
    problem = classified()
    model = problem.model.to(torch.bfloat16)
    low = Problem(model=model, loss=problem.loss, data=(problem.data[0].bfloat16(), problem.data[1]))
    high = Problem(
        model=copy.deepcopy(model).float(),
        loss=problem.loss,
        data=(problem.data[0].bfloat16().float(), problem.data[1]),
    )
    before = state(low)
    np.testing.assert_allclose(loss_surface(low, points=3).loss, loss_surface(high, points=3).loss, rtol=1e-6)
    assert same(state(low), before)


# Quadratic prediction.


def test_a_quadratic_is_its_own_prediction() -> None:
    """L(w) + g't + t'Ht/2 equals the measured surface of a quadratic at any point of it."""
    problem = bowl(at=drawn(4, seed=3))
    plane = [Direction(drawn(4, seed=4), "a"), Direction(drawn(4, seed=5), "b")]
    result = loss_surface(problem, plane, (5, 4), curvature=True)
    predicted = result.prediction()
    assert predicted is not None
    np.testing.assert_allclose(result.loss[0, 0], predicted, rtol=1e-10)
    assert loss_surface(problem, plane, 3).prediction() is None


# BatchNorm.


def test_frozen_statistics_stay_those_of_the_centre() -> None:
    """The default moves weights alone, says so, and warns that it misleads."""
    one, two = classified(0, norm=True), classified(1, norm=True)
    result = loss_slice(one, [towards(one, two, "two")], coordinates=[0.0, 1.0])
    there = copy.deepcopy(two.model)
    for name, buffer in there.named_buffers():
        buffer.copy_(dict(one.model.named_buffers())[name])
    assert result.loss[0, 0, 1] == pytest.approx(oracle(there, one.data)[0], rel=1e-12)
    assert result.provenance["statistics"] == "frozen"
    assert "nobody would use" in result.summary()


def test_interpolated_statistics_end_at_the_other_network() -> None:
    """With "interpolate" t = 1 is the other checkpoint, statistics included, and no variance goes below 0."""
    one, two = classified(0, norm=True), classified(1, norm=True)
    result = loss_slice(one, [towards(one, two, "two")], coordinates=[0.0, 0.5, 1.0, 300.0], batchnorm="interpolate")
    assert result.loss[0, 0, 2] == pytest.approx(oracle(two.model, one.data)[0], rel=1e-12)
    middle = moved(one, towards(one, two).vector, 0.5)
    for name, buffer in middle.named_buffers():
        if buffer.is_floating_point():
            buffer.add_(dict(two.model.named_buffers())[name]).div_(2)
    assert result.loss[0, 0, 1] == pytest.approx(oracle(middle, one.data)[0], rel=1e-12)
    assert (result.status == DONE).all()
    assert "nobody would use" not in result.summary()


def test_recalibrated_statistics_are_those_of_the_data_at_the_point() -> None:
    """With "recalibrate" statistics are the batches' means by their examples, at the cost of a second pass."""
    problem = classified(norm=True)
    (d,) = random_directions(problem)
    result = loss_slice(problem, [d], coordinates=[0.0, 0.7], batchnorm="recalibrate", micro_batch=10)
    there = moved(problem, d.vector, 0.7)
    with torch.no_grad():
        batches = [there[0](x) for x in problem.data[0].split(10)]  # type: ignore[index]
    shares = torch.tensor([len(b) / 37 for b in batches], dtype=torch.float64)
    means, variances = (torch.stack([f(b, dim=(0, 2, 3)) for b in batches]) for f in (torch.mean, torch.var))
    there[1].running_mean.copy_(shares @ means)  # type: ignore[index,union-attr]
    there[1].running_var.copy_(shares @ variances)  # type: ignore[index,union-attr]
    assert result.loss[0, 0, 1] == pytest.approx(oracle(there.eval(), problem.data)[0], rel=1e-12)
    assert result.cost.passes == 4


def test_a_plane_through_networks_interpolates_their_statistics() -> None:
    """At each network's place in the plane the statistics are its own, and the loss with them."""
    one, others = classified(0, norm=True), {"b": classified(1, norm=True), "c": classified(2, norm=True)}
    plane = plane_through(one, others)
    places = [m.coordinates for m in loss_surface(one, plane, 2, marks=others).marks]
    for (x, y), other in zip(places, others.values(), strict=True):
        there = loss_surface(one, plane, coordinates=([x, x + 1], [y, y + 1]), batchnorm="interpolate")
        assert there.loss[0, 0, 0, 0] == pytest.approx(oracle(other.model, one.data)[0], rel=1e-9)


def test_a_small_last_micro_batch_does_not_decide_the_statistics() -> None:
    """With outliers in the last two of many examples, the micro-batch by default gives what one batch gives."""
    x, y = drawn(2050, 5), torch.randint(0, 3, (2050,), generator=torch.Generator().manual_seed(0))
    x[-2:] += 8
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(x, y))
    d = random_directions(problem)
    default, whole = (
        loss_slice(problem, d, coordinates=[0.0, 1.0], batchnorm="recalibrate", micro_batch=size).loss
        for size in (None, 2050)
    )
    np.testing.assert_allclose(default, whole, rtol=1e-2)
    one_more = Problem(model=model, loss=problem.loss, data=(x[:2049], y[:2049]))
    assert loss_slice(one_more, d, 3, batchnorm="recalibrate").complete


def test_statistics_without_counters_are_recalibrated() -> None:
    """A norm that counts no batches, or no longer tracks them, is treated all the same, and left so."""
    one, two = classified(norm=True), classified(norm=True)
    two.model[1].num_batches_tracked = None  # type: ignore[index,union-attr]
    two.model[1].track_running_stats = False  # type: ignore[index,union-attr]
    results = [loss_slice(p, random_directions(p), 3, batchnorm="recalibrate") for p in (one, two)]
    np.testing.assert_array_equal(results[0].loss, results[1].loss)
    assert two.model[1].track_running_stats is False  # type: ignore[index,union-attr]


def test_statistics_that_one_network_lacks_are_refused() -> None:
    """Interpolation between a network with running statistics and one without ends in a sentence."""
    one, two = classified(norm=True), classified(1, norm=True)
    direction = towards(one, two)
    two.model[1].running_mean = two.model[1].running_var = None  # type: ignore[index,union-attr]
    with pytest.raises(ProblemError, match="same loss where their weights are equal"):
        towards(one, two)
    without = Direction(direction.vector, direction.label, direction.settings)
    with pytest.raises(ArgumentError, match="recalibrate"):
        loss_slice(one, [without], batchnorm="interpolate")


@pytest.mark.parametrize("treatment", ["interpolate", "recalibrate"])
def test_statistics_in_train_mode_are_refused(treatment: str) -> None:
    """Where the batch decides, running statistics change nothing: no number is given that would say they did."""
    one, two = classified(0, norm=True), classified(1, norm=True)
    problem = Problem(model=one.model, loss=one.loss, data=one.data, mode="train")
    with pytest.raises(ArgumentError, match="eval mode"):
        loss_slice(problem, [towards(problem, two)], batchnorm=treatment)


@pytest.mark.parametrize("treatment", ["interpolate", "recalibrate"])
def test_statistics_that_are_not_there_are_refused(treatment: str) -> None:
    """A model without running statistics has none to treat; a random direction none to interpolate."""
    with pytest.raises(ArgumentError, match="none"):
        loss_slice(classified(), batchnorm=treatment)
    with pytest.raises(ArgumentError, match="recalibrate"):
        loss_slice(classified(norm=True), batchnorm="interpolate")


# Results.


def test_a_result_comes_back_from_disk_as_it_was(tmp_path: Any) -> None:
    """Arrays bit for bit, NaN and infinity too, and everything else."""
    problem = classified(norm=True)
    result = loss_surface(problem, points=(4, 3), marks={"b": classified(1, norm=True)}, also={"test": problem.data})
    result.loss[0, 0, 0, 0] = math.inf
    result.save(tmp_path / "s.json")
    again = SliceResult.load(tmp_path / "s.json")
    for name in ("loss", "accuracy", "status", "centre", "slopes", "curvatures"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert again.marks == result.marks
    assert again.to_dict() == result.to_dict()
    assert again.summary() == result.summary()
    (tmp_path / "s.npz").unlink()
    for damaged in (None, b"", (tmp_path / "t.npz")):
        if isinstance(damaged, bytes):
            (tmp_path / "s.npz").write_bytes(damaged)
        elif damaged is not None:
            loss_surface(problem, points=(4, 3)).save(tmp_path / "t.json")
            (tmp_path / "s.npz").write_bytes(damaged.read_bytes())
        with pytest.raises(DataError, match=r"arrays|losses of shape"):
            SliceResult.load(tmp_path / "s.json")


def test_an_unfinished_surface_shows_a_coarser_grid() -> None:
    """What a preview shows is the largest grid without pending points, with its own values."""
    seen: list[SliceResult] = []
    whole = loss_surface(classified(), points=9, preview=lambda unfinished: seen.append(unfinished()))
    sizes = set()
    for preview in seen[:-1]:
        assert not preview.complete
        try:
            part = preview.finished()
        except DataError:
            continue  # not even the corners are there
        assert part.complete
        sizes.add(part.loss.shape[2:])
        rows, columns = np.isin(whole.axes[1], part.axes[1]), np.isin(whole.axes[0], part.axes[0])
        np.testing.assert_array_equal(part.loss[0, 0], whole.loss[0, 0][np.ix_(rows, columns)])
    assert {(3, 3), (5, 5)} <= sizes
    assert len(seen) == 81


def test_a_range_or_radius_that_float32_rounds_away_is_refused() -> None:
    """Of lines, planes and SAM's gradient: points at which w + c d rounds to w are no points; in float64 they are."""
    given = classifier()
    line = random_directions(given, 1)
    for measure in (
        lambda **kw: loss_slice(given, line, 3, (-1e-9, 1e-9), **kw),
        lambda **kw: loss_surface(given, random_directions(given, 2), 3, ((-1, 1), (-1e-9, 1e-9)), **kw),
        lambda **kw: loss_slice(given, line, coordinates=[0.0, 1e-9], **kw),
        lambda **kw: gradient_directions(given, 1e-9, **kw),
    ):
        with pytest.raises(ArgumentError, match=r"by more than float32 rounds.*--dtype float64"):
            measure()
        measure(dtype=torch.float64)
    lifted = loss_slice(given, line, 3, (-1e-6, 1e-6), dtype=torch.float64, curvature=True)
    rise = (lifted.loss[0, 0, -1] - lifted.loss[0, 0, 0]) / 2e-6  # the slope, by central differences
    assert rise == pytest.approx(float(lifted.slopes[0, 0]), rel=1e-4)
