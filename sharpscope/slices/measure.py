"""From a problem to its loss along lines and over planes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sharpscope.errors import ArgumentError
from sharpscope.objective import Objective, Progress
from sharpscope.problem import Problem
from sharpscope.provenance import provenance
from sharpscope.results import Cost, Mark, SliceResult
from sharpscope.resume import PointLog, key_of
from sharpscope.slices.between import difference
from sharpscope.slices.direction import Direction, coordinates, cosine
from sharpscope.slices.evaluation import Evaluation, usual_micro_batch
from sharpscope.slices.filling import Grid
from sharpscope.slices.grid import Array, axis, custom_axis
from sharpscope.slices.random import random_directions
from sharpscope.slices.walk import FORWARD, Walk, quadratic

Span = tuple[float, float]
Preview = Callable[[SliceResult], None]


def loss_slice(
    problem: Problem,
    directions: Sequence[Direction] | None = None,
    points: int | Sequence[float] = 21,
    span: Span | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SliceResult:
    """``L(w + t d)`` and the accuracy along one direction or several, on one axis of t.

    Several random directions of different seeds give a band: one random slice is weak evidence.

    Args:
        problem: model, loss and data.
        directions: by default one random direction, filter-normalised, of seed 0; see ``random_directions``,
            ``eigenvector_directions``, ``gradient_directions`` and ``towards``.
        points: how many t, or their values.
        span: from which t to which; by default -1 to 1, and -0.5 to 1.5 where all directions lead to checkpoints.
        progress: called as ``progress(stage, done, total)`` in examples.
        options: as of ``loss_surface``.

    Cost: a forward pass a point; 1 + 2 gradients a direction more where slope and curvature are asked for.

    Raises: ArgumentError, ProblemError, DataError, AuditError; OutputError where the journal cannot be written.
    """
    chosen = random_directions(problem) if directions is None else list(directions)
    if not chosen:
        raise ArgumentError("A slice needs at least one direction, got none. Leave directions out for a random one.")
    between = all(d.settings.get("kind") == "checkpoint" for d in chosen)
    along = _axis(points, span or ((-0.5, 1.5) if between else (-1.0, 1.0)), options.pop("spacing", "linear"), between)
    return _measured(problem, [[d] for d in chosen], (along,), progress, **options)


def loss_surface(
    problem: Problem,
    plane: Sequence[Direction] | None = None,
    points: int | tuple[int, int] | tuple[Sequence[float], Sequence[float]] = 21,
    span: Span | tuple[Span, Span] = (-1.0, 1.0),
    progress: Progress | None = None,
    *,
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
    """``L(w + x d_1 + y d_2)`` and the accuracy on a grid of a plane.

    Points are taken from a coarse grid to a fine one. A point whose loss is infinite or NaN is marked as diverged. The
    model and all random states are left bit for bit as they were.

    Args:
        problem: model, loss and data.
        plane: two directions; by default random, filter-normalised ones of seed 0; see ``random_directions``,
            ``eigenvector_directions``, ``gradient_directions``, ``plane_through`` and ``trajectory_plane``.
        points: how many on each axis, or on x and on y, or the coordinates themselves. An even number of points about
            0 gets one there in addition.
        span: of both axes, or of x and of y.
        progress: called as ``progress(stage, done, total)`` in examples.
        spacing: "linear" or "log", see ``axis``.
        also: by name further data to take loss and accuracy of at each point, as of the test set.
        batchnorm: "frozen", "interpolate" or "recalibrate", see ``Statistics``.
        refine: so many coordinates more on each axis, where the loss bends most.
        curvature: measure slope and curvature at w for a quadratic prediction, in one pass of 1 + 2 gradients a
            direction; by default where a direction is an eigenvector.
        marks: networks to show where they lie, by name, with their own loss.
        trajectory: the same for the steps of a training run, in order.
        dtype, device: as of ``top_eigenvalues``.
        micro_batch: examples a forward pass, by default from the size of the model's activations; the last bits of a
            loss depend on it.
        journal: a folder for the finished points: the same call after a kill goes on with them. It is the caller's to
            remove (``sharpscope.resume.discard_points``) once the result is safe.
        shard: ``(i, n)``: only every n-th point from the i-th on, and what others have left in the same ``journal``;
            the result may then be unfinished.
        preview: called with the unfinished result at the end of each level of the grid.

    Cost: a forward pass a point over the data and each of ``also``; a second over the data with "recalibrate".

    Raises: ArgumentError, ProblemError, DataError, AuditError; OutputError where the journal cannot be written.
    """
    chosen = random_directions(problem, 2) if plane is None else list(plane)
    if len(chosen) != 2:
        raise ArgumentError(f"A surface needs two directions, got {len(chosen)}. Use loss_slice for lines.")
    if 1 - abs(cosine(*chosen)) < 1e-9:
        raise ArgumentError("The two directions of a surface must not lie in one line. Name others.")
    spans = span if isinstance(span[0], tuple) else (span, span)
    counts = points if isinstance(points, tuple) else (points, points)
    axes = tuple(_axis(n, s, spacing) for n, s in zip(counts, spans, strict=True))  # type: ignore[arg-type]
    return _measured(
        problem,
        [chosen],
        axes,
        progress,
        also=also,
        batchnorm=batchnorm,
        refine=refine,
        curvature=curvature,
        marks=marks,
        trajectory=trajectory,
        dtype=dtype,
        device=device,
        micro_batch=micro_batch,
        journal=journal,
        shard=shard,
        preview=preview,
    )


def _axis(points: int | Sequence[float], span: Span, spacing: str, between: bool = False) -> Array:
    found = axis(points, span, spacing) if isinstance(points, int) else custom_axis(points)
    # The other end of a line between networks is as much worth a point as the centre.
    return np.union1d(found, [1.0]) if between and isinstance(points, int) and span[0] < 1 < span[1] else found


def _measured(
    problem: Problem,
    lines: list[list[Direction]],
    axes: tuple[Array, ...],
    progress: Progress | None,
    *,
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
    if micro_batch is not None and micro_batch < 1:
        raise ArgumentError(f"micro_batch must be a positive integer or None, got {micro_batch!r}.")
    if refine < 0:
        raise ArgumentError(f"refine must be a number of coordinates, 0 or more, got {refine}.")
    if shard is not None:
        _require_shard(shard, journal, refine)
    objective = Objective(problem, dtype=dtype, device=device, micro_batch=micro_batch)
    first = str(problem.provenance.get("split") or "data")
    objectives = {first: objective}
    for name, data in (also or {}).items():
        if name in objectives:
            raise ArgumentError(f"Splits must have different names, got {name!r} twice. Rename one.")
        objectives[name] = Objective(objective.terms.problem_with(data), micro_batch=micro_batch)
    vectors = [d.vector for line in lines for d in line]
    if any(len(v) != objective.num_params for v in vectors):
        raise ArgumentError(
            f"A direction must have a component for each of the {objective.num_params} parameters, got "
            f"{', '.join(str(len(v)) for v in vectors)}. Make it of the same problem."
        )
    with ExitStack() as stack:
        slopes, curvatures = _curved(objective, lines, curvature)
        for each in objectives.values():
            stack.enter_context(each.measuring(products=False))
        size = micro_batch or usual_micro_batch(objective)
        log = _log(journal, shard, objectives, lines, batchnorm=batchnorm, size=size)
        stack.callback(log.close)
        others = _marks(problem, lines, objectives, marks or {}, trajectory or {}, size)
        walk = stack.enter_context(Walk(objectives, lines, batchnorm, size))
        grid = Grid(walk, log, len(lines), axes, len(objectives))
        centre = grid.centre()

        def result() -> SliceResult:
            loss, accuracy, status = grid.arrays()
            return SliceResult(
                axes=grid.axes,
                loss=loss,
                accuracy=accuracy,
                status=status,
                splits=tuple(objectives),
                directions=tuple(tuple(_described(d) for d in line) for line in lines),
                centre=centre,
                slopes=slopes,
                curvatures=curvatures,
                marks=others,
                cost=_cost(list(objectives.values())),
                provenance={
                    **provenance(problem, objective, None, refined=refine, repeated=log.replayed),
                    "statistics": batchnorm,
                    "cosine": cosine(*lines[0]) if len(axes) == 2 else None,
                    "micro_batch": size,
                    "also": {name: each.num_examples for name, each in objectives.items() if name != first},
                },
            )

        report = _report(progress, objectives)
        grid.fill(report, shard, None if preview is None else lambda: preview(result()))
        left = refine
        while left > 0:
            # Half of what is left at a time, so that the second half sees what the first has found.
            now = (left + 1) // 2
            grid.refine(now)
            grid.fill(report)
            left -= now
        return result()


def _log(
    folder: str | os.PathLike[str] | None,
    shard: tuple[int, int] | None,
    objectives: Mapping[str, Objective],
    lines: list[list[Direction]],
    **settings: Any,
) -> PointLog:
    """The finished points of just these weights, data and directions."""
    first, *others = objectives.values()
    key = (
        ""
        if folder is None
        else key_of(
            first,
            lines=[[(d.vector, d.statistics) for d in line] for line in lines],
            also=[(name, o.problem.data) for name, o in zip(list(objectives)[1:], others, strict=True)],
            **settings,
        )
    )
    name = "points" if shard is None else f"shard-{shard[0]}-of-{shard[1]}"
    return PointLog(folder, key, 1 + len(lines[0]), 2 * len(objectives), name)


def _curved(objective: Objective, lines: list[list[Direction]], wanted: bool | None) -> tuple[Any, Any]:
    """Slopes (lines, q) and curvatures (lines, q, q), NaN where they are not measured."""
    q = len(lines[0])
    if wanted is None:
        wanted = any(d.settings.get("kind") == "eigenvector" for line in lines for d in line)
    if not wanted:
        return np.full((len(lines), q), np.nan), np.full((len(lines), q, q), np.nan)
    found = quadratic(objective, lines)
    return np.stack([slope.numpy() for slope, _ in found]), np.stack([h.numpy() for _, h in found])


def _marks(
    problem: Problem,
    lines: list[list[Direction]],
    objectives: Mapping[str, Objective],
    marks: Mapping[str, Problem],
    trajectory: Mapping[str, Problem],
    micro_batch: int,
) -> tuple[Mark, ...]:
    """The networks where they lie, with the loss that each has by itself."""
    found = []
    for on_path, networks in ((False, marks), (True, trajectory)):
        for name, other in networks.items():
            if len(lines) > 1:
                raise ArgumentError("Networks are shown on one line or plane, got several. Measure one at a time.")
            vector = difference(problem, other)
            place, distance = coordinates(vector, lines[0])
            values = {}
            for split, objective in objectives.items():
                theirs = Objective(
                    replace(other, data=objective.problem.data, loss=problem.loss, params=problem.params),
                    dtype=objective.dtype,
                    device=objective.device,
                )
                with theirs.measuring():
                    values[split] = Evaluation(theirs, micro_batch)()
                objective.charge(FORWARD * (theirs.num_examples or 0))
            losses, accuracies = ({split: value[i] for split, value in values.items()} for i in range(2))
            length = float(torch.linalg.vector_norm(vector))
            found.append(Mark(name, tuple(place), distance, length, losses, accuracies, on_path))
    return tuple(found)


def _described(direction: Direction) -> dict[str, Any]:
    return {"label": direction.label, "length": direction.length, **direction.settings}


def _cost(objectives: Sequence[Objective]) -> Cost:
    """All splits together; gradients are over the first one's examples."""
    first = objectives[0]
    gradients = sum(o.meter.example_gradients for o in objectives) / max(1, first.num_examples or 1)
    return Cost(sum(o.passes for o in objectives), first.hvps, gradients, first.seconds)


def _report(progress: Progress | None, objectives: Mapping[str, Objective]) -> Callable[[int, int], None]:
    def report(done: int, points: int) -> None:
        if progress is not None:
            each = sum(o.num_examples or 0 for o in objectives.values())
            progress(f"{points} points", done * each, points * each)

    return report


def _require_shard(shard: tuple[int, int], journal: Any, refine: int) -> None:
    i, n = shard
    if not 1 <= i <= n:
        raise ArgumentError(f"A shard must be one of 1/n to n/n, got {i}/{n}.")
    if journal is None:
        raise ArgumentError("Shards meet in one journal, got none. Pass the same journal to each.")
    if refine:
        raise ArgumentError("refine needs the whole grid, which no shard has. Leave one of them out.")
