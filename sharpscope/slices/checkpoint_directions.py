"""Directions between checkpoints, and checkpoints marked on a line or plane."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, ProblemError
from sharpscope.objective import Objective
from sharpscope.objective.cost_and_out_of_memory import FORWARD
from sharpscope.problem import Problem
from sharpscope.results import Mark
from sharpscope.slices.directions import Direction, coordinates, gram_schmidt, sign_normalised
from sharpscope.slices.evaluation import Evaluation, running_norms, running_statistics
from sharpscope.weights import parameters
from sharpscope.weights.perturbation import Perturbation


def weight_difference(problem: Problem, other: Problem) -> Tensor:
    """``w' - w`` (n,) of the selected weights of two networks of the same architecture, in float64 on the CPU.

    Raises: ProblemError if ``require_same_network`` does.
    """
    require_same_network(problem, other)
    ours = parameters.select(problem.model, problem.params)
    theirs = dict(other.model.named_parameters(remove_duplicate=False))
    moved = [theirs[name].detach().cpu().double() - weight.detach().cpu().double() for name, weight in ours.items()]
    return torch.cat([m.reshape(-1) for m in moved])


# Examples on which both networks are tried with equal weights.
EXAMPLES = 256


def require_same_network(problem: Problem, other: Problem) -> None:
    """Raise ProblemError unless the networks differ in nothing but their weights and BatchNorm's running statistics.

    All parameters must have the same names and shapes, selected or not, and so must the buffers. With equal weights and
    statistics both must have the same loss on the first examples of ``problem``: a line moves the weights alone, and
    would leave out what another constant, buffer or activation does.

    Cost: two forward passes of EXAMPLES examples.
    """
    ours, theirs = (dict(one.model.named_parameters()) for one in (problem, other))
    for name in {**ours, **theirs}:
        _require_same_shape("weights", name, ours.get(name), theirs.get(name))
    statistics = {
        f"{module}.{kind}" if module else kind
        for one in (problem, other)
        for module in running_norms(one.model)
        for kind in ("running_mean", "running_var", "num_batches_tracked")
    }
    here, there = (dict(one.model.named_buffers()) for one in (problem, other))
    saved = {*problem.model.state_dict(), *other.model.state_dict()} - statistics
    for name in sorted(saved & {*here, *there}):
        _require_same_shape("buffers", name, here.get(name), there.get(name))
    mine, its = _losses_with_equal_weights(problem, other, here.keys() & there.keys() & statistics)
    coarser = max(torch.finfo(w.dtype).eps for w in (*ours.values(), *theirs.values()))
    # In float32 equal networks differ by 1e-6, from sums in another order on another device.
    if not torch.allclose(mine, its, rtol=coarser**0.5, atol=0, equal_nan=True):
        differ = [name for name in here.keys() & there.keys() if name not in statistics]
        differ = [name for name in sorted(differ) if not torch.equal(here[name].cpu(), there[name].cpu())]
        what = f"the buffer {differ[0]} differs" if differ else "an activation or another setting differs"
        raise ProblemError(
            "Both networks must have the same loss where their weights are equal, but they have "
            f"{float(mine[0]):.6g} and {float(its[0]):.6g} summed over the first examples: {what}. Build both models "
            "with the same settings, or measure each network by itself."
        )


def _require_same_shape(what: str, name: str, ours: Tensor | None, theirs: Tensor | None) -> None:
    one, two = ("has no such entry" if t is None else f"has {tuple(t.shape)}" for t in (ours, theirs))
    if one != two:
        raise ProblemError(
            f"Both networks must have the same {what}, but for {name} one {one} and the other {two}. Pass checkpoints "
            "of the same architecture."
        )


def _losses_with_equal_weights(problem: Problem, other: Problem, statistics: Collection[str]) -> tuple[Tensor, Tensor]:
    """The sums over the first examples, of ``problem`` and of the other network with the weights of ``problem``."""
    ours, theirs = Objective(problem), Objective(replace(problem, model=other.model))
    batch = ours.first_examples(EXAMPLES)
    with ours.measuring(products=False):
        mine = ours.terms.without_graph(lambda: ours.terms.sums(batch))
    model = theirs.terms.model  # a copy where the computation needs another dtype
    source = {**dict(ours.terms.model.named_parameters()), **dict(ours.terms.model.named_buffers())}
    weights = dict(model.named_parameters())
    # Modes and buffers are restored by measuring(), the weights by Perturbation.
    with theirs.measuring(products=False), torch.no_grad(), Perturbation(list(weights.values())):
        buffers = dict(model.named_buffers())
        for name, tensor in {**weights, **{name: buffers[name] for name in statistics}}.items():
            tensor.copy_(source[name])
        its = theirs.terms.without_graph(lambda: theirs.terms.sums(batch))
    return tuple(torch.stack([s.double().cpu() for s in sums]) for sums in (mine, its))  # type: ignore[return-value]


def towards(problem: Problem, other: Problem, name: str = "the other") -> Direction:
    """Direction ``d = w' - w`` to another network: t = 0 is ``problem``, t = 1 is ``other``, in the selected weights.

    Args:
        problem: network at w; its ``params`` select the weights.
        other: network at w', of the same architecture.
        name: name of the other network in labels.

    Raises: ProblemError for another architecture or other constants; ArgumentError if both have the same weights.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import towards
    >>> here, there = (torch.nn.Linear(3, 1, bias=False) for _ in range(2))
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> one, two = (sharpscope.Problem(model=m, loss=torch.nn.MSELoss(), data=data) for m in (here, there))
    >>> line = sharpscope.loss_slice(one, towards(one, two), points=9)
    >>> line.barrier() < 1e-6  # none, since this loss is convex
    True
    """
    vector = weight_difference(problem, other)
    if not float(vector.abs().max()):
        raise ArgumentError(f"The line to {name} needs another network, but its weights are the same. Pass another.")
    return Direction(
        vector, f"towards {name}", {"kind": "checkpoint", "towards": name}, _statistics_change(problem, other)
    )


def plane_through(problem: Problem, others: Mapping[str, Problem]) -> list[Direction]:
    """Two orthonormal directions of the plane through w and two other networks; the first points to the first of them.

    Args:
        problem: network at w, the centre; its ``params`` select the weights.
        others: two networks of the same architecture, by name.

    Raises: ProblemError for another architecture or other constants; ArgumentError unless there are two others, not
        collinear with w.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import plane_through
    >>> def at(*weights):
    ...     model = torch.nn.Linear(2, 1, bias=False)
    ...     model.weight.data = torch.tensor([weights])
    ...     return sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=(torch.eye(2), torch.zeros(2, 1)))
    >>> plane = plane_through(at(0.0, 0.0), {"one": at(3.0, 0.0), "two": at(3.0, 4.0)})
    >>> [d.vector.tolist() for d in plane]
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if len(others) != 2:
        raise ArgumentError(f"A plane through checkpoints needs two besides the centre, got {len(others)}.")
    rows = torch.stack([weight_difference(problem, other) for other in others.values()])
    axes = gram_schmidt(list(rows))
    changes = _statistics_change_along(axes, rows, [_statistics_change(problem, other) for other in others.values()])
    first, second = others
    settings = {"kind": "plane", "through": [first, second]}
    return [
        Direction(axes[0], f"distance towards {first}", {**settings, "index": 1}, changes[0]),
        Direction(axes[1], f"distance across, on the side of {second}", {**settings, "index": 2}, changes[1]),
    ]


def trajectory_plane(problem: Problem, steps: Sequence[Problem]) -> list[Direction]:
    """Two orthonormal directions of the plane through w closest to ``steps``, in least squares (PCA, not centred).

    They are the first two right singular vectors of the rows ``w_t - w``. Li et al. 2018, section 7, use the same rows
    with w the last step, but subtract their mean, so that their plane need not contain w. ``settings["explained"]`` is
    the fraction of ``sum_t ||w_t - w||^2`` along each direction.

    Args:
        problem: network at w, the centre; its ``params`` select the weights.
        steps: at least two networks at w_t, of the same architecture.

    Raises: ProblemError for another architecture or other constants; ArgumentError if the steps are collinear with w.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import trajectory_plane
    >>> def at(*weights):
    ...     model = torch.nn.Linear(2, 1, bias=False)
    ...     model.weight.data = torch.tensor([weights])
    ...     return sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=(torch.eye(2), torch.zeros(2, 1)))
    >>> plane = trajectory_plane(at(0.0, 0.0), [at(3.0, 0.0), at(0.0, 1.0)])
    >>> [round(d.settings["explained"], 3) for d in plane]  # 9 and 1, of 10
    [0.9, 0.1]
    """
    rows = torch.stack([weight_difference(problem, step) for step in steps]) if steps else torch.zeros(0, 1)
    if len(rows) < 2:
        raise ArgumentError(f"The plane of a trajectory needs two steps besides the centre, got {len(rows)}.")
    _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
    if not float(sizes[1]) > 1e-9 * float(sizes[0]):
        raise ArgumentError("The steps of the trajectory must not be collinear with the centre. Add others.")
    shares = (sizes**2 / (sizes**2).sum()).tolist()
    axes = gram_schmidt([sign_normalised(vectors[0]), sign_normalised(vectors[1])])
    changes = _statistics_change_along(axes, rows, [_statistics_change(problem, step) for step in steps])
    found = []
    for i, vector in enumerate(axes):
        settings = {"kind": "trajectory", "steps": len(rows), "index": i + 1, "explained": shares[i]}
        found.append(Direction(vector, f"PCA {i + 1} ({100 * shares[i]:.1f} % of the squares)", settings, changes[i]))
    return found


def span_of(
    problem: Problem, plane: Sequence[Direction], networks: Sequence[Problem], margin: float = 0.25
) -> list[tuple[float, float]]:
    """Spans (low, high) along each direction of ``plane`` that contain w and all ``networks``, for ``loss_surface``.

    Args:
        problem: network at w, the centre.
        plane: directions.
        networks: networks of the same architecture.
        margin: fraction of the span by which each end is extended.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import plane_through, span_of
    >>> def at(*weights):
    ...     model = torch.nn.Linear(2, 1, bias=False)
    ...     model.weight.data = torch.tensor([weights])
    ...     return sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=(torch.eye(2), torch.zeros(2, 1)))
    >>> one, two = at(4.0, 0.0), at(0.0, 2.0)
    >>> span_of(at(0.0, 0.0), plane_through(at(0.0, 0.0), {"one": one, "two": two}), [one, two])
    [(-1.0, 5.0), (-0.5, 2.5)]
    """
    places = [coordinates(weight_difference(problem, other), plane)[0] for other in networks]
    ends = [(min(0.0, *along), max(0.0, *along)) for along in zip(*places, strict=True)]
    widest = max(high - low for low, high in ends)
    # A minimum width, so that the plane does not shrink to a line if all networks are close along a direction.
    reach = [margin * max(high - low, widest / 4) for low, high in ends]
    return [(low - r, high + r) for (low, high), r in zip(ends, reach, strict=True)]


def _statistics_change(problem: Problem, other: Problem) -> dict[str, Tensor]:
    """Differences of the BatchNorm running statistics, ``other`` minus ``problem``, by name."""
    here, there = running_statistics(problem.model), running_statistics(other.model)
    return {key: there[key] - here[key] for key in here if key in there}


def _statistics_change_along(
    axes: Sequence[Tensor], rows: Tensor, changes: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Change of the statistics along each of ``axes``, which are linear combinations of ``rows``."""
    shares = torch.stack(list(axes)) @ rows.T @ torch.linalg.pinv(rows @ rows.T)
    along = []
    for share in shares.tolist():
        terms = list(zip(share, changes, strict=True))
        along.append({key: torch.stack([c * change[key] for c, change in terms]).sum(0) for key in changes[0]})
    return along


def measure_marks(
    problem: Problem,
    lines: Sequence[Sequence[Direction]],
    objectives: Mapping[str, Objective],
    marks: Mapping[str, Problem],
    trajectory: Mapping[str, Problem],
    micro_batch: int,
) -> tuple[Mark, ...]:
    """Coordinates of ``marks`` and ``trajectory`` steps on the line or plane, and the loss of each network.

    Each network keeps its own buffers. Loss, data, mode and weight decay are those of ``problem``.

    Cost: a forward pass of each network over each split.

    Raises: ArgumentError if there are several lines; ProblemError for another architecture or other constants.
    """
    if len(lines) > 1 and (marks or trajectory):
        raise ArgumentError("Networks are shown on one line or plane, got several. Measure one at a time.")
    found = []
    for on_path, networks in ((False, marks), (True, trajectory)):
        for name, other in networks.items():
            vector = weight_difference(problem, other)
            place, distance = coordinates(vector, lines[0])
            unselected = unselected_distance(problem, other)
            values = {}
            for split, objective in objectives.items():
                own = replace(problem, model=other.model, data=objective.problem.data)
                kept: int | str = "loader" if objective.keeps_batches else micro_batch
                theirs = Objective(own, dtype=objective.dtype, device=objective.device, micro_batch=kept)
                with theirs.measuring(products=False):
                    values[split] = Evaluation(theirs, micro_batch)()
                objective.add_cost(FORWARD * (theirs.num_examples or 0))
            losses, accuracies = ({split: value[i] for split, value in values.items()} for i in range(2))
            length = math.hypot(float(torch.linalg.vector_norm(vector)), unselected)
            found.append(
                Mark(name, tuple(place), math.hypot(distance, unselected), length, losses, accuracies, on_path)
            )
    return tuple(found)


def unselected_distance(problem: Problem, other: Problem) -> float:
    """Distance between the networks in the weights that are not selected, which no line or plane changes.

    Raises: ProblemError if ``require_same_network`` does.
    """
    require_same_network(problem, other)
    chosen = {id(p) for p in parameters.select(problem.model, problem.params).values()}
    theirs = dict(other.model.named_parameters())
    squares = [
        (theirs[name].detach().cpu().double() - p.detach().cpu().double()).square().sum()
        for name, p in problem.model.named_parameters()
        if id(p) not in chosen
    ]
    return math.sqrt(float(sum(squares)))
