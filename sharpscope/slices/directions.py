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
from sharpscope.problem import Problem
from sharpscope.results import EigenResult
from sharpscope.results.serialization import UNREADABLE, jsonable
from sharpscope.weights import parameters
from sharpscope.weights.norm_ball import Ball
from sharpscope.weights.parameters import views
from sharpscope.weights.perturbation import Perturbation

# A vector with less than this fraction orthogonal to the others is linearly dependent on them.
INDEPENDENT = 1e-6


@dataclass(frozen=True, eq=False)
class Direction:
    """``d`` of the line ``w + t d``.

    Attributes:
        vector: d (n,), float64 on the CPU, in the parameters' flat order.
        label: what its axis is called.
        settings: everything that it depends on beside the weights: kind, normalisation, seed, ...
        statistics: by the name of the buffer, by how much BatchNorm's running statistics change at t = 1; empty where
            the direction leads to no other network.

    >>> import torch
    >>> from sharpscope.slices import Direction
    >>> Direction(torch.tensor([3.0, 4.0], dtype=torch.float64), "mine").length
    5.0
    """

    vector: Tensor
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vector.dim() != 1 or self.vector.dtype != torch.float64 or self.vector.device.type != "cpu":
            came = f"{self.vector.dtype} {tuple(self.vector.shape)} on {self.vector.device}"
            raise ArgumentError(f"A direction must be a float64 vector on the CPU, got {came}. Use .cpu().double().")
        if not 0 < self.length < math.inf:
            raise ArgumentError(f"The direction {self.label} must be finite and not zero, got length {self.length:g}.")

    @property
    def length(self) -> float:
        """``||d||_2``."""
        return float(torch.linalg.vector_norm(self.vector))


def cosine(one: Direction, two: Direction) -> float:
    """The cosine of the angle between two directions."""
    return float(one.vector / one.length @ (two.vector / two.length))


def gram_schmidt(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormal float64 vectors, the first k of which span what the first k given span.

    Gram-Schmidt, twice: "twice is enough" (Giraud et al. 2005).

    Raises: ArgumentError where one lies in the span of those before it.
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
                    f"Directions must not lie in each other's span, but direction {i + 1} is "
                    f"{'zero' if not length else 'a combination of those before it'}. Name others."
                )
            rest = rest / left
        done.append(rest)
    return done


def sign_normalised(vector: Tensor) -> Tensor:
    """``vector`` or its negative, whichever has a positive largest component, so that figures are reproducible."""
    return vector if float(vector[vector.abs().argmax()]) > 0 else -vector


def orthonormalised(directions: Sequence[Direction]) -> list[Direction]:
    """The same plane with axes of length 1 at right angles, the first along the first of ``directions``.

    A line to a network no longer ends at it at t = 1, and is no longer called so.

    Raises: ArgumentError where one lies in the span of those before it.

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
    """The ``c`` that makes ``||vector - sum_k c_k d_k||_2`` least, and that distance.

    The directions need be neither orthogonal nor of length 1.
    """
    lengths = [d.length for d in directions]
    basis = torch.stack([d.vector / length for d, length in zip(directions, lengths, strict=True)])
    scaled = torch.linalg.solve(basis @ basis.T, basis @ vector)
    rest = vector - scaled @ basis
    return [float(c) / length for c, length in zip(scaled, lengths, strict=True)], float(torch.linalg.vector_norm(rest))


def write_directions(path: str | os.PathLike[str], directions: Sequence[Direction], asked: Mapping[str, Any]) -> None:
    """Keep ``directions`` in the file ``path``, unless another process has kept its own for the same ``asked``.

    Raises: OutputError when it cannot be written.

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
            os.link(mine, place)  # which, unlike a rename, leaves the file of whoever was first
    finally:
        mine.unlink(missing_ok=True)


def read_directions(path: str | os.PathLike[str], asked: Mapping[str, Any]) -> list[Direction] | None:
    """What ``write_directions`` kept for ``asked``; None where there is nothing, or of something else.

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
    """``count`` orthogonal directions of normal numbers, sized by the weights (Li et al. 2018, section 4).

    With "filter" each filter f, a slice of a tensor's first dimension (a neuron's weights in a linear layer), is scaled
    to ``||d_f|| = ||w_f||``; with "layer" each tensor, with "model" all together; "none" leaves standard normal
    numbers. Only where directions are sized so can slices of two networks be compared.

    Orthogonality is made within each filter (tensor, model), by float64 Gram-Schmidt, so that both hold: the cosine is
    0 and every filter has its size. Li et al. leave their second direction at whatever small angle chance gives it.
    A tensor whose filters are single weights counts as one filter; a filter with fewer weights than directions
    stands still along the directions that have no room in it.

    Args:
        problem: whose weights, as far as they are selected.
        count: number of directions.
        generator: source of the numbers; by default one seeded with 0. Networks of one architecture get the same
            numbers from the same seed, before they are sized.
        normalisation: "filter", "layer", "model" or "none".
        one_dimensional: what biases and the weights of norms, tensors of one dimension or none, do: "fixed", the rule
            of Li et al., leaves them where they are; with "scaled" each is one filter.

    Cost: none.

    Raises: ArgumentError for an argument outside its domain, or where nothing may move.

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
    source, seed = seeded(generator)
    weights = [w.detach().cpu().double() for w in parameters.select(problem.model, problem.params).values()]
    n = sum(w.numel() for w in weights)
    # All of a direction before the next, so that the first is the same whatever the count.
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
    """Indices (groups x size) flat, and each group's norm of w, for groups of one size at a time."""
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
    """Each row of each of ``drawn`` (groups, size) orthogonalised against the same row of those before it."""
    done: list[Tensor] = []
    for i, rows in enumerate(drawn):
        # Rows of length i or less are dependent on the i rows before them.
        rest = rows if rows.shape[1] > i else torch.zeros_like(rows)
        for _ in range(2):
            for before in done:
                rest = rest - (rest * before).sum(1, keepdim=True) / _row_norms(before) ** 2 * before
        done.append(rest)
    return done


def _row_norms(rows: Tensor) -> Tensor:
    """The 2-norm (groups, 1) of each row, 1 for rows of zeros, to divide by."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def eigenvector_directions(result: EigenResult, which: Sequence[int] = (1, 2)) -> list[Direction]:
    """Eigenvectors v_i of the Hessian as orthonormal directions: the loss bends by ``lambda_i`` along each.

    They are not scaled to the weights as random ones are: the curvature would then not be lambda_i. The sign, which
    has no meaning, makes the largest component positive.

    Args:
        result: measured with vectors.
        which: places from 1 in ``result.eigenvalues``.

    Raises: ArgumentError without vectors, or for a place that is not there.

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
        raise ArgumentError(f"Eigenvectors must be different places from 1 to {k}, got {list(which)}.")
    vectors = [sign_normalised(torch.from_numpy(result.eigenvectors[:, i - 1].copy()).double()) for i in which]
    return [
        Direction(v, f"eigenvector {i}", {"kind": "eigenvector", "index": i, "eigenvalue": result.eigenvalues[i - 1]})
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
    """The unit vectors of the gradient g of L, and of ``grad L(w + rho g/||g||)``, SAM's (Foret et al. 2021, Eq. 3).

    They are not orthogonal: ``settings["cosine"]``, and ``orthonormalised`` for a plane. Cost: 2 gradients.

    Raises: ArgumentError where the gradient is zero, or rho is not above 0.

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
    _, at_w = objective.loss_and_gradient()
    weights, ball = objective.terms.params, Ball()
    size = float(torch.linalg.vector_norm(at_w))
    if not size:
        raise ArgumentError("The gradient must not be zero to give a direction. Name another direction.")
    e, scale = ball.steepest(views(at_w, weights), None, size)
    with Perturbation(weights) as moved:
        moved.move_to(e, rho * scale)
        # At other weights the loss is another one: an objective without a point to hold it against.
        _, at_e = Objective(objective.terms.problem_with(problem.data), micro_batch=micro_batch).loss_and_gradient()
    units = [v.cpu().double() / torch.linalg.vector_norm(v.cpu().double()) for v in (at_w, at_e)]
    settings = {"rho": rho, "cosine": float(units[0] @ units[1])}
    return [
        Direction(units[0], "gradient", {"kind": "gradient", **settings}),
        Direction(units[1], f"SAM's gradient, rho {rho:g}", {"kind": "sam", **settings}),
    ]
