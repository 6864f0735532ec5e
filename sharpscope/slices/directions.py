"""Directions in weight space: random, gradient, Hessian eigenvectors, and planes that they span."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.atomic_io import atomic
from sharpscope.errors import ArgumentError
from sharpscope.measurement import seeded
from sharpscope.objective import Objective
from sharpscope.objective.audit import FLOAT64_EXAMPLES, require_slope
from sharpscope.objective.fastest_micro_batch import DEFAULT
from sharpscope.problem import Problem
from sharpscope.random_streams import stream
from sharpscope.results import EigenResult
from sharpscope.results.serialization import UNREADABLE, jsonable
from sharpscope.weights import parameters
from sharpscope.weights.norm_ball import Ball
from sharpscope.weights.parameters import views
from sharpscope.weights.perturbation import Perturbation, require_kept, require_length

# A vector with less than this fraction orthogonal to the others is linearly dependent on them.
INDEPENDENT = 1e-6


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction d in weight space, of the line ``w + t d``.

    Attributes:
        vector: d (n,), float64 on the CPU, in the flat order of the parameters.
        label: label of its axis.
        settings: everything that d depends on besides the weights: kind, normalisation, seed, ...
        statistics: change of each BatchNorm running statistic at t = 1, by the name of the buffer; empty unless d leads
            to another network.

        eigenvalues: the result that d is an eigenvector of; a slice of another matrix is refused.

    Raises: ArgumentError for another dtype, shape or device, or a length that is zero or not finite.

    >>> import torch
    >>> from sharpscope.slices import Direction
    >>> Direction(torch.tensor([3.0, 4.0], dtype=torch.float64), "mine").length
    5.0
    """

    vector: Tensor
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    eigenvalues: EigenResult | None = None

    def __post_init__(self) -> None:
        if self.vector.dim() != 1 or self.vector.dtype != torch.float64 or self.vector.device.type != "cpu":
            given = f"{self.vector.dtype} {tuple(self.vector.shape)} on {self.vector.device}"
            raise ArgumentError(f"A direction must be a float64 vector on the CPU, got {given}. Use .cpu().double().")
        if not 0 < self.length < math.inf:
            raise ArgumentError(f"The direction {self.label} must be finite and not zero, got length {self.length:g}.")

    @property
    def length(self) -> float:
        """``||d||_2``."""
        return float(torch.linalg.vector_norm(self.vector))


def cosine(one: Direction, two: Direction) -> float:
    """Cosine of the angle between two directions."""
    return float(one.vector / one.length @ (two.vector / two.length))


def gram_schmidt(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormalise ``vectors`` in order, in float64, by Gram-Schmidt with reorthogonalisation (Giraud et al. 2005).

    Raises: ArgumentError if a vector is in the span of those before it.
    """
    done: list[Tensor] = []
    for i, vector in enumerate(vectors):
        length = float(torch.linalg.vector_norm(vector))
        rest = vector.double() / length if length else vector
        for _ in range(2):
            for axis in done:
                rest = rest - (axis @ rest) * axis
            left = float(torch.linalg.vector_norm(rest))
            if not left > INDEPENDENT:
                raise ArgumentError(
                    f"Directions must be linearly independent, but direction {i + 1} is "
                    f"{'zero' if not length else 'a combination of those before it'}. Choose others."
                )
            rest = rest / left
        done.append(rest)
    return done


def sign_normalised(vector: Tensor) -> Tensor:
    """``vector`` or its negative, such that the component of largest magnitude is positive: a reproducible sign."""
    return vector if float(vector[vector.abs().argmax()]) > 0 else -vector


def orthonormalised(directions: Sequence[Direction]) -> list[Direction]:
    """Orthonormalise ``directions`` in order; the first keeps its direction.

    A direction to another network no longer reaches it at t = 1, so its kind changes to "plane".

    Raises: ArgumentError if a direction is in the span of those before it.

    >>> import torch
    >>> from sharpscope.slices import Direction, orthonormalised
    >>> pair = [Direction(v, "mine") for v in torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64)]
    >>> [d.vector.tolist() for d in orthonormalised(pair)]
    [[1.0, 0.0], [0.0, 1.0]]
    """
    axes = gram_schmidt([d.vector for d in directions])
    return [
        replace(
            d,
            vector=axis,
            label=d.label if i == 0 else f"{d.label}, across",
            settings={
                **d.settings,
                "kind": "plane" if d.settings.get("kind") == "checkpoint" else d.settings.get("kind"),
            },
            statistics={},
        )
        for i, (d, axis) in enumerate(zip(directions, axes, strict=True))
    ]


def coordinates(vector: Tensor, directions: Sequence[Direction]) -> tuple[list[float], float]:
    """Least-squares coefficients c of ``min ||vector - sum_k c_k d_k||_2``, and that distance.

    The directions need not be orthonormal.
    """
    lengths = [d.length for d in directions]
    basis = torch.stack([d.vector / length for d, length in zip(directions, lengths, strict=True)])
    scaled = torch.linalg.solve(basis @ basis.T, basis @ vector)
    rest = vector - scaled @ basis
    return [float(c) / length for c, length in zip(scaled, lengths, strict=True)], float(torch.linalg.vector_norm(rest))


def write_directions(path: str | os.PathLike[str], directions: Sequence[Direction], asked: Mapping[str, Any]) -> None:
    """Save ``directions`` to the file ``path``, unless another process has saved those of the same ``asked``.

    Args:
        path: file with the suffix .npz.
        directions: without their BatchNorm statistics, which are not saved.
        asked: settings that identify the directions, compared as JSON.

    Raises: OutputError if the file cannot be written.

    >>> import torch
    >>> from sharpscope.slices import Direction, read_directions, write_directions
    >>> write_directions("kept.npz", [Direction(torch.ones(2, dtype=torch.float64), "mine")], {"seed": 0})
    >>> [d.label for d in read_directions("kept.npz", {"seed": 0})]
    ['mine']
    """
    place = Path(path)
    about = [{"label": d.label, "settings": dict(d.settings)} for d in directions]
    text = np.frombuffer(
        json.dumps({"asked": _json_round_trip(asked), "directions": _json_round_trip(about)}).encode(), np.uint8
    )
    mine = place.with_name(f"{place.stem}-{os.getpid()}.npz")
    try:
        with atomic(mine) as temporary, open(temporary, "wb") as file:
            np.savez(file, text, *(d.vector.numpy() for d in directions))
        if place.exists() and read_directions(place, asked) is None:
            os.replace(mine, place)
            return
        with contextlib.suppress(FileExistsError):
            os.link(mine, place)  # unlike a rename, keeps the file of the process that was first
    finally:
        mine.unlink(missing_ok=True)


def read_directions(path: str | os.PathLike[str], asked: Mapping[str, Any]) -> list[Direction] | None:
    """Load the directions that ``write_directions`` saved for ``asked``; None if there are none.

    >>> import torch
    >>> from sharpscope.slices import Direction, read_directions, write_directions
    >>> write_directions("kept.npz", [Direction(torch.ones(2, dtype=torch.float64), "mine")], {"seed": 0})
    >>> read_directions("kept.npz", {"seed": 1}) is None
    True
    """
    try:
        with np.load(path) as arrays:
            kept = json.loads(arrays["arr_0"].tobytes())
            if kept["asked"] != _json_round_trip(asked):
                return None
            vectors = [torch.from_numpy(arrays[f"arr_{i + 1}"]) for i in range(len(kept["directions"]))]
    except (*UNREADABLE, UnicodeDecodeError):
        return None
    return [Direction(v, d["label"], d["settings"]) for v, d in zip(vectors, kept["directions"], strict=True)]


def _json_round_trip(value: Any) -> Any:
    """``value`` after writing and reading as JSON."""
    return json.loads(json.dumps(jsonable(value)))


NORMALISATIONS = ("filter", "layer", "model", "none")
ONE_DIMENSIONAL = ("fixed", "scaled")


def random_directions(
    problem: Problem,
    count: int = 1,
    generator: torch.Generator | None = None,
    *,
    normalisation: str = "filter",
    one_dimensional: str = "fixed",
) -> list[Direction]:
    """Draw ``count`` orthogonal Gaussian directions, normalised by the weights (Li et al. 2018, section 4).

    "filter" scales each filter f, a slice along a tensor's first dimension (a neuron's weights in a linear layer), to
    ``||d_f|| = ||w_f||``; "layer" does so for each tensor, "model" for all weights together, and "none" does not scale.
    Slices of different networks are comparable only with normalised directions.

    The directions are orthogonalised within each filter (tensor, model) by float64 Gram-Schmidt, so they are orthogonal
    and every filter has its norm. Li et al. do not orthogonalise. A tensor whose filters are single weights counts as
    one filter. A filter with fewer weights than directions is zero in the later directions.

    Args:
        problem: network; the directions are of its selected weights.
        count: number of directions.
        generator: source of random numbers; by default seeded with 0. Before normalisation, networks of the same
            architecture get the same directions from the same seed.
        normalisation: "filter", "layer", "model" or "none".
        one_dimensional: "fixed" sets the direction of tensors with at most one dimension (biases, weights of norms) to
            zero, as Li et al. do; "scaled" treats each as one filter.

    Cost: no gradients.

    Raises: ArgumentError for an argument outside its domain, or if all components would be zero.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import random_directions
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> one, two = random_directions(problem, 2)  # each as long as w
    >>> abs(one.length / float(model.weight.detach().norm()) - 1) < 1e-6, abs(float(one.vector @ two.vector)) < 1e-9
    (True, True)
    """
    if normalisation not in NORMALISATIONS:
        raise ArgumentError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}.")
    if one_dimensional not in ONE_DIMENSIONAL:
        raise ArgumentError(f"one_dimensional must be one of {', '.join(ONE_DIMENSIONAL)}, got {one_dimensional!r}.")
    if count < 1:
        raise ArgumentError(f"The number of directions must be at least 1, got {count}.")
    source, seed = seeded(generator, "directions")
    weights = [w.detach().cpu().double() for w in parameters.select(problem.model, problem.params).values()]
    n = sum(w.numel() for w in weights)
    # One direction after the other, so that the first does not depend on the count.
    drawn = [torch.randn(n, generator=source, dtype=torch.float64) for _ in range(count)]
    vectors = [torch.zeros(n, dtype=torch.float64) for _ in range(count)]
    for where, sizes in _groups(weights, normalisation, one_dimensional == "scaled"):
        for vector, group in zip(
            vectors, _orthogonalised_groups([d[where].reshape(len(sizes), -1) for d in drawn]), strict=True
        ):
            sized = group if normalisation == "none" else group / _row_norms(group) * sizes[:, None]
            vector[where] = sized.reshape(-1)
    settings = {"kind": "random", "normalisation": normalisation, "one_dimensional": one_dimensional, "seed": seed}
    if not all(float(v.abs().max()) for v in vectors):
        hint = " Pass one_dimensional='scaled'." if one_dimensional == "fixed" else ""
        raise ArgumentError(f"Random directions must have weights to move, but all are fixed or zero.{hint}")
    return [
        Direction(vector, f"random direction {i}" if count > 1 else "random direction", {**settings, "index": i})
        for i, vector in enumerate(vectors, start=1)
    ]


def _groups(weights: Sequence[Tensor], normalisation: str, scaled: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the flat indices (groups x size) and the norms of w (groups,) of groups of equal size."""
    start = 0
    all_of_them = []
    for w in weights:
        where = torch.arange(start, start + w.numel())
        start += w.numel()
        if not w.numel() or (w.dim() <= 1 and not scaled):
            continue
        if normalisation in ("model", "none"):
            all_of_them.append((where, w.reshape(-1)))
            continue
        by_filter = normalisation == "filter" and w.dim() > 1 and w.numel() > len(w)
        rows = w.reshape(len(w), -1) if by_filter else w.reshape(1, -1)
        yield where, torch.linalg.vector_norm(rows, dim=1)
    if all_of_them:
        whole = torch.cat([w for _, w in all_of_them])
        yield torch.cat([where for where, _ in all_of_them]), torch.linalg.vector_norm(whole).reshape(1)


def _orthogonalised_groups(drawn: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise each row of each matrix (groups, size) in ``drawn`` against that row of the matrices before it."""
    done: list[Tensor] = []
    for i, rows in enumerate(drawn):
        # Rows of at most i components are in the span of the i rows before them.
        rest = rows if rows.shape[1] > i else torch.zeros_like(rows)
        for _ in range(2):
            for before in done:
                rest = rest - (rest * before).sum(1, keepdim=True) / _row_norms(before) ** 2 * before
        done.append(rest)
    return done


def _row_norms(rows: Tensor) -> Tensor:
    """2-norm (groups, 1) of each row, with 1 for rows of zeros."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def eigenvector_directions(result: EigenResult, which: Sequence[int] = (1, 2)) -> list[Direction]:
    """Eigenvectors v_i of the Hessian as orthonormal directions; the curvature along v_i is ``lambda_i``.

    They are not normalised by the weights, which would change the curvature. The sign is such that the component of
    largest magnitude is positive. A slice of another problem refuses them; ``Direction(vector, label)`` of a vector of
    ``result.eigenvectors`` goes through any.

    Args:
        result: eigenvalues of the problem's Hessian, measured with ``vectors=True``.
        which: indices i, from 1, into ``result.eigenvalues``.

    Raises: ArgumentError if ``result`` has no vectors, or for an index out of range.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import eigenvector_directions
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> result = sharpscope.top_eigenvalues(problem, k=1, vectors=True)
    >>> (first,) = eigenvector_directions(result, [1])
    >>> print(sharpscope.loss_slice(problem, first, points=3).curvatures.round(2))  # lambda_1
    [[[6.]]]
    """
    if result.eigenvectors is None:
        raise ArgumentError("Eigenvector directions need a result with vectors. Measure with vectors=True.")
    k = len(result.eigenvalues)
    if not which or not all(1 <= i <= k for i in which) or len(set(which)) < len(which):
        raise ArgumentError(f"which must be different indices from 1 to {k}, got {list(which)}.")
    vectors = [sign_normalised(torch.from_numpy(result.eigenvectors[:, i - 1].copy()).double()) for i in which]
    return [
        Direction(
            v,
            f"eigenvector {i}",
            {"kind": "eigenvector", "index": i, "eigenvalue": result.eigenvalues[i - 1]},
            eigenvalues=result,
        )
        for i, v in zip(which, gram_schmidt(vectors), strict=True)
    ]


def gradient_directions(
    problem: Problem,
    rho: float = 0.05,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
) -> list[Direction]:
    """Unit vectors of the gradient g of L and of SAM's gradient ``grad L(w + rho g/||g||)`` (Foret et al. 2021, Eq. 3).

    They are not orthogonal: ``settings["cosine"]`` is their cosine; use ``orthonormalised`` for a plane.

    Args:
        problem: model, loss and data.
        rho: SAM's radius, > 0.
        dtype, device, micro_batch: as for ``top_eigenvalues``.

    Cost: 2 gradients, and 15 over 32 examples, which show whether a gradient is cut off.

    Raises: ArgumentError if the gradient is zero, or rho is not positive or so small that rounding takes it;
    ProblemError if the gradient is not the slope of the loss.

    >>> import sharpscope
    >>> import torch
    >>> from sharpscope.slices import gradient_directions
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> gradient, sams = gradient_directions(problem, rho=0.05)  # H w, and H (w + e)
    >>> [round(float(v), 2) for v in gradient.vector], gradient.settings["cosine"] < 1
    ([0.91, 0.4, 0.1], True)
    """
    if not 0 < rho < math.inf:
        raise ArgumentError(f"rho must be a positive number, got {rho}.")
    objective = Objective(problem, dtype=dtype, device=device, micro_batch=micro_batch)
    require_length("rho", rho, objective.dtype)
    if objective.micro_batch is None:
        objective.micro_batch = DEFAULT  # not timed: equal calls give equal bits, and two gradients are soon done
    with objective.measuring():
        require_slope(objective, objective.first_examples(FLOAT64_EXAMPLES), stream(0, "audit"))
    _, at_w = objective.loss_and_gradient()
    weights, ball = objective.terms.params, Ball()
    size = float(torch.linalg.vector_norm(at_w))
    if not size:
        raise ArgumentError("The gradient must not be zero to give a direction. Choose another direction.")
    e, scale = ball.steepest(views(at_w, weights), None, size)
    with Perturbation(weights) as moved:
        require_kept(moved.lost(e, rho * scale), f"rho = {rho:g}", objective.dtype)  # which moves there
        # A new objective, since this one checks that the loss at its weights does not change.
        _, at_e = Objective(
            objective.terms.problem_with(problem.data), micro_batch=objective.micro_batch
        ).loss_and_gradient()
    units = [v.cpu().double() / torch.linalg.vector_norm(v.cpu().double()) for v in (at_w, at_e)]
    settings = {"rho": rho, "cosine": float(units[0] @ units[1])}
    return [
        Direction(units[0], "gradient", {"kind": "gradient", **settings}),
        Direction(units[1], f"SAM's gradient, rho {rho:g}", {"kind": "sam", **settings}),
    ]
