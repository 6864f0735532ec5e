"""Measure the loss along lines and over planes in weight space."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sharpscope.atomic_io import locked
from sharpscope.errors import ArgumentError
from sharpscope.fingerprint import key_of
from sharpscope.measurement import Measurement
from sharpscope.objective import Objective, Progress
from sharpscope.objective.audit import FLOAT64_EXAMPLES, require_slope
from sharpscope.problem import Problem
from sharpscope.random_streams import stream
from sharpscope.results import Cost, SliceResult
from sharpscope.results.measured_alike import another_matrix
from sharpscope.resume import Journal, PointLog, journaled_hvp
from sharpscope.slices.checkpoint_directions import measure_marks
from sharpscope.slices.directions import Direction, cosine, random_directions
from sharpscope.slices.evaluation import PointEvaluator, default_micro_batch
from sharpscope.slices.grid import Array, Grid, Span, custom_axis, make_axis, with_point
from sharpscope.weights.perturbation import Perturbation

Preview = Callable[[Callable[[], SliceResult]], None]


@dataclass(frozen=True)
class _Settings:
    """The arguments shared by ``loss_slice`` and ``loss_surface``, in the order of ``loss_surface``."""

    also: Mapping[str, Any] | None
    batchnorm: str
    refine: int
    curvature: bool | None
    marks: Mapping[str, Problem] | None
    trajectory: Mapping[str, Problem] | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    micro_batch: int | None
    journal: str | os.PathLike[str] | None
    shard: tuple[int, int] | None
    preview: Preview | None

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ArgumentError(f"micro_batch must be a positive integer or None, got {self.micro_batch!r}.")
        if self.refine < 0:
            raise ArgumentError(f"refine must be a number of coordinates, 0 or more, got {self.refine}.")
        if self.shard is None:
            return
        if not 1 <= self.shard[0] <= self.shard[1]:
            raise ArgumentError(f"A shard must be one of 1/n to n/n, got {self.shard[0]}/{self.shard[1]}.")
        if self.journal is None:
            raise ArgumentError("Shards need a common journal, got none. Pass the same journal to each.")
        if self.refine:
            raise ArgumentError(
                "refine needs the whole grid, but a shard has only some of the points. Leave out one of them."
            )


def loss_slice(
    problem: Problem,
    directions: Direction | Sequence[Direction] | None = None,
    points: int = 21,
    span: Span | None = None,
    progress: Progress | None = None,
    *,
    coordinates: Sequence[float] | None = None,
    spacing: str = "linear",
    also: Mapping[str, Any] | None = None,
    batchnorm: str = "frozen",
    refine: int = 0,
    curvature: bool | None = None,
    marks: Mapping[str, Problem] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
    preview: Preview | None = None,
) -> SliceResult:
    """Compute ``L(w + t d)`` and the accuracy along one or several directions d.

    A single random slice is weak evidence: pass several random directions of different seeds to see their spread.

    Args:
        problem: model, loss and data.
        directions: by default one random, filter-normalised direction of seed 0; see ``random_directions``,
            ``eigenvector_directions``, ``gradient_directions`` and ``towards`` in ``sharpscope.slices``.
        points: number of values of t.
        span: first and last t; by default (-1, 1), or (-0.5, 1.5) if all directions lead to checkpoints.
        progress: called as ``progress(stage, done, total)`` in examples.
        coordinates: values of t, instead of ``points``, ``span`` and ``spacing``.
        spacing, also, batchnorm, refine, curvature, marks, dtype, device, micro_batch, journal, shard, preview: as for
            ``loss_surface``.

    Cost, Raises: as ``loss_surface``.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import Direction
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> first = Direction(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), "the first weight")
    >>> sharpscope.loss_slice(problem, first, points=5).loss  # 6 t^2/2, on one split and line
    array([[[3.  , 0.75, 0.  , 0.75, 3.  ]]])
    """
    if isinstance(directions, Direction):
        directions = [directions]
    chosen = random_directions(problem) if directions is None else list(directions)
    if not chosen:
        raise ArgumentError("A slice needs at least one direction, got none. Leave directions out for a random one.")
    leads = all(d.settings.get("kind") == "checkpoint" for d in chosen)
    low, high = span or ((-0.5, 1.5) if leads else (-1.0, 1.0))
    if coordinates is not None:
        t_axis = custom_axis(coordinates)
    else:
        t_axis = make_axis(points, (low, high), spacing)
        # A line between two networks has a point at each network.
        t_axis = with_point(t_axis, 1.0) if leads and low < 1 < high else t_axis
    settings = _Settings(
        also, batchnorm, refine, curvature, marks, None, dtype, device, micro_batch, journal, shard, preview
    )
    return _measure(problem, [[d] for d in chosen], (t_axis,), progress, settings)


def loss_surface(
    problem: Problem,
    plane: Sequence[Direction] | None = None,
    points: int | tuple[int, int] = 21,
    span: Span | tuple[Span, Span] = (-1.0, 1.0),
    progress: Progress | None = None,
    *,
    coordinates: tuple[Sequence[float], Sequence[float]] | None = None,
    spacing: str = "linear",
    also: Mapping[str, Any] | None = None,
    batchnorm: str = "frozen",
    refine: int = 0,
    curvature: bool | None = None,
    marks: Mapping[str, Problem] | None = None,
    trajectory: Mapping[str, Problem] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
    preview: Preview | None = None,
) -> SliceResult:
    """Compute ``L(w + x d_1 + y d_2)`` and the accuracy on a grid in the plane of two directions.

    Points are evaluated from coarse to fine. A point with infinite or NaN loss is marked as diverged. The model and all
    random states are preserved, bit for bit.

    Args:
        problem: model, loss and data.
        plane: two directions; by default random, filter-normalised ones of seed 0; see ``random_directions``,
            ``eigenvector_directions``, ``gradient_directions``, ``plane_through`` and ``trajectory_plane`` in
            ``sharpscope.slices``.
        points: number per axis, or for x and for y. If 0 is inside the span and not among the points, it is added.
        span: (first, last) coordinate of both axes, or of x and of y.
        progress: called as ``progress(stage, done, total)`` in examples.
        coordinates: coordinates of x and of y, instead of ``points``, ``span`` and ``spacing``.
        spacing: "linear", or "log": geometric from 1/1000 of the span's end to its end, on each side of 0.
        also: further data by name, such as the test set, for loss and accuracy at each point.
        batchnorm: running statistics, "frozen", "interpolate" or "recalibrate", see ``BatchNormStatistics``.
        refine: coordinates to add to each axis, where the loss has the largest curvature.
        curvature: measure slope and curvature at w, for a quadratic prediction; by default if a direction is an
            eigenvector.
        marks: networks by name, shown at their projection, with their own loss.
        trajectory: the same for the steps of a training run, in order.
        dtype, device: as for ``top_eigenvalues``.
        micro_batch: examples per forward pass; by default from the size of the model's activations. The last bits of
            the loss depend on it.
        journal: folder for finished points; the same call after a kill resumes from them. Delete it when the result is
            saved.
        shard: ``(i, n)``: evaluate only every n-th point from the i-th, and read those of other processes from the
            ``journal``; the result may be incomplete. All processes need bit-identical directions.
        preview: called after each point with a function that returns the incomplete result.

    Cost: per point, a forward pass over the data and each of ``also``, and a second over the data with "recalibrate";
        one for each of the other networks; 1 + 2 gradients per direction for ``curvature``; with a journal, one walk
        over the data without the model. Memory: a copy of the weights and of each direction, the activations of a
        micro-batch, and the data of each split if below 2 GB.

    Raises: ArgumentError for an argument outside its domain, or a range that rounding takes; ProblemError if model,
        data and directions do not fit together; DataError if the loss is not finite at w, or too small for the dtype;
        AuditError if it is not a fixed function of the weights; OutputError if the journal cannot be written, or
        another process has it.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import Direction
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> plane = [Direction(axis, "a weight") for axis in torch.eye(3, dtype=torch.float64)[[0, 2]]]
    >>> sharpscope.loss_surface(problem, plane, points=3).loss[0, 0].round(3)  # 3 x^2 + y^2/3
    array([[3.333, 0.333, 3.333],
           [3.   , 0.   , 3.   ],
           [3.333, 0.333, 3.333]])
    """
    chosen = random_directions(problem, 2) if plane is None else list(plane)
    if len(chosen) != 2:
        raise ArgumentError(f"A surface needs two directions, got {len(chosen)}. Use loss_slice for lines.")
    if 1 - abs(cosine(*chosen)) < 1e-9:
        raise ArgumentError("The two directions of a surface must be linearly independent. Choose others.")
    if coordinates is not None:
        x, y = (custom_axis(values) for values in coordinates)
    else:
        counts: Any = points if isinstance(points, tuple | list) else (points, points)
        spans: Any = span if isinstance(span[0], tuple | list) else (span, span)
        if len(counts) != 2 or len(spans) != 2:
            raise ArgumentError(f"points and span must be of x and y, got {points!r} and {span!r}.")
        x, y = (make_axis(n, s, spacing) for n, s in zip(counts, spans, strict=True))
    settings = _Settings(
        also, batchnorm, refine, curvature, marks, trajectory, dtype, device, micro_batch, journal, shard, preview
    )
    return _measure(problem, [chosen], (x, y), progress, settings)


def _measure(
    problem: Problem, lines: list[list[Direction]], axes: tuple[Array, ...], progress: Progress | None, s: _Settings
) -> SliceResult:
    m = Measurement(problem, dtype=s.dtype, device=s.device, micro_batch=s.micro_batch, audited=False, products=False)
    objective, objectives = m.objective, _objectives(m.objective, s)
    vectors = [d.vector for line in lines for d in line]
    if any(len(v) != objective.num_params for v in vectors):
        raise ArgumentError(
            f"A direction must have a component for each of the {objective.num_params} parameters, got "
            f"{', '.join(str(len(v)) for v in vectors)}. Create it from the same problem."
        )
    _require_own_eigenvectors(m, lines)
    with ExitStack() as stack:
        if s.journal is not None:
            stack.enter_context(locked(s.journal, shared=s.shard is not None))
            if s.shard is not None:
                stack.enter_context(locked(f"{os.fspath(s.journal)}.shard-{s.shard[0]}-of-{s.shard[1]}"))
        # Before the first forward pass, in which some layers write into their weights.
        perturbation = stack.enter_context(Perturbation(objective.terms.params))
        with objective.measuring(products=False):
            size = s.micro_batch or default_micro_batch(objective)
        # Before the micro-batch of the derivatives is autotuned, on which the points do not depend.
        key = "" if s.journal is None else _key(objectives, lines, s, size)
        name = "points" if s.shard is None else f"shard-{s.shard[0]}-of-{s.shard[1]}"
        log = PointLog(s.journal, key, 1 + len(axes), 2 * len(objectives), name)
        stack.callback(log.close)
        slopes, curvatures = slopes_and_curvatures(objective, lines, s.curvature, Journal(s.journal, key), m.report)
        stack.enter_context(m)  # the first of the objectives
        _, *others = objectives.items()
        for _, other in others:
            stack.enter_context(other.measuring(products=False))
        marks = measure_marks(problem, lines, objectives, s.marks or {}, s.trajectory or {}, size)
        evaluator = PointEvaluator(objectives, lines, s.batchnorm, size, perturbation)
        evaluator.require_resolved(axes)
        grid = Grid(evaluator, log, len(lines), axes, len(objectives))
        centre = grid.centre()
        if s.batchnorm != "recalibrate":
            _require_own_eigenvectors(m, lines, float(centre[0, 0]))
        _require_own_curvatures(lines, curvatures)
        repeated = grid.num_logged()

        def result() -> SliceResult:
            loss, accuracy, status = grid.arrays()
            return SliceResult(
                axes=grid.axes,
                loss=loss,
                accuracy=accuracy,
                status=status,
                splits=tuple(objectives),
                directions=tuple(
                    tuple({"label": d.label, "length": d.length, **d.settings} for d in line) for line in lines
                ),
                centre=centre,
                slopes=slopes,
                curvatures=curvatures,
                marks=marks,
                cost=_cost(objective, objectives.values()),
                provenance={
                    **m.provenance(refined=s.refine, repeated=repeated),
                    "seed": None,
                    "statistics": s.batchnorm,
                    "cosine": cosine(*lines[0]) if len(axes) == 2 else None,
                    "micro_batch": "loader" if objective.keeps_batches else size,
                    "also": {name: other.num_examples for name, other in others},
                },
            )

        def report(done: int, points: int) -> None:
            if progress is not None:
                each = sum(o.num_examples or 0 for o in objectives.values())
                progress(f"{points} points", done * each, points * each)

        preview = s.preview
        grid.fill(report, s.shard, None if preview is None else lambda: preview(result))
        left = s.refine
        while left > 0:
            # Half of the rest at a time, so that later points use the values of earlier ones.
            now = (left + 1) // 2
            grid.refine(now)
            grid.fill(report)
            left -= now
        return result()


def _require_own_eigenvectors(m: Measurement, lines: list[list[Direction]], loss: float | None = None) -> None:
    """Raise ArgumentError for eigenvectors of another matrix than the Hessian of this loss."""
    for d in {id(d.eigenvalues): d for line in lines for d in line}.values():
        differ = None if d.eigenvalues is None else another_matrix(d.eigenvalues, m.provenance(), loss)
        if differ is not None:
            raise ArgumentError(
                f"Eigenvectors must be of the Hessian of this problem, but {differ}. Measure them on it, or pass "
                "Direction(vector, label), which may be any vector."
            )


def _require_own_curvatures(lines: list[list[Direction]], curvatures: Array) -> None:
    """Raise ArgumentError unless ``d'Hd / d'd`` of an eigenvector d is its eigenvalue: H may be of equal loss only."""
    for line, found in zip(lines, curvatures, strict=True):
        for d, quotient in zip(line, np.diag(found) / [d.length**2 for d in line], strict=True):
            known = d.settings.get("eigenvalue")
            if d.eigenvalues is None or known is None or not math.isfinite(quotient):
                continue
            # The quotient is the eigenvalue but for rounding, and for the residuals where the vectors were made
            # orthogonal anew.
            if abs(quotient - known) > 1e-2 * float(np.abs(d.eigenvalues.eigenvalues).max()):
                raise ArgumentError(
                    f"Eigenvectors must be of the Hessian of this problem, but {d.label} has the eigenvalue "
                    f"{known:.6g} and here a curvature of {quotient:.6g}. Measure them on it, or pass "
                    "Direction(vector, label), which may be any vector."
                )


def _objectives(objective: Objective, s: _Settings) -> dict[str, Objective]:
    """The objective of each split by name; all share the same weights."""
    found = {str(objective.problem.provenance.get("split") or "data"): objective}
    for name, data in (s.also or {}).items():
        if name in found:
            raise ArgumentError(f"Splits must have different names, got {name!r} twice. Rename one.")
        found[name] = Objective(objective.terms.problem_with(data), micro_batch=s.micro_batch)
    return found


def _key(objectives: Mapping[str, Objective], lines: list[list[Direction]], s: _Settings, size: int) -> str:
    """Hash of everything but the coordinates that the values of a point depend on."""
    (_, first), *others = objectives.items()
    return key_of(
        first,
        lines=[[(d.vector, d.statistics) for d in line] for line in lines],
        also=[(name, other.problem.data) for name, other in others],
        batchnorm=s.batchnorm,
        size=size,
    )


def _cost(first: Objective, objectives: Collection[Objective]) -> Cost:
    """The cost of all splits; gradients are over the first one's examples."""
    gradients = sum(o.cost_counter.example_gradients for o in objectives) / max(1, first.num_examples or 1)
    return Cost(sum(o.passes for o in objectives), first.hvps, gradients, first.seconds)


def slopes_and_curvatures(
    objective: Objective,
    lines: Sequence[Sequence[Direction]],
    wanted: bool | None,
    journal: Journal,
    progress: Progress,
) -> tuple[Array, Array]:
    """``g'd`` (lines, q) and ``d'Hd`` (lines, q, q) for the q directions of each line or plane, in float64.

    NaN unless ``wanted``; None means if a direction is an eigenvector.

    Cost: 1 + 2 gradients per direction, in one pass; one that is in ``journal`` is not repeated. Before it 15 gradients
    over 32 examples.

    Raises: ProblemError if the gradient is cut off, and so is not the slope of the loss.
    """
    q = len(lines[0])
    if wanted is None:
        wanted = any(d.settings.get("kind") == "eigenvector" for line in lines for d in line)
    if not wanted:
        return np.full((len(lines), q), np.nan), np.full((len(lines), q, q), np.nan)
    d = torch.stack([torch.stack([direction.vector for direction in line]) for line in lines])
    rows = d.flatten(0, 1).to(objective.device, objective.dtype)
    with objective.measuring():
        require_slope(objective, objective.first_examples(FLOAT64_EXAMPLES), stream(0, "audit"))
        images = journaled_hvp(objective, journal, progress)(rows).cpu().double().reshape(d.shape)
    assert objective.gradient is not None
    h = d @ images.transpose(1, 2)
    return (d @ objective.gradient.cpu().double()).numpy(), ((h + h.transpose(1, 2)) / 2).numpy()
