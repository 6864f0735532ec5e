"""Directions that the loss decides: eigenvectors of its Hessian, its gradient, and SAM's gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sharpscope.ball import Ball
from sharpscope.errors import ArgumentError
from sharpscope.objective import Objective
from sharpscope.params import views
from sharpscope.perturbation import Perturbation
from sharpscope.problem import Problem
from sharpscope.results import EigenResult
from sharpscope.slices.direction import Direction, orthonormal, signed


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
    vectors = [signed(torch.from_numpy(result.eigenvectors[:, i - 1].copy()).double()) for i in which]
    return [
        Direction(v, f"eigenvector {i}", {"kind": "eigenvector", "index": i, "eigenvalue": result.eigenvalues[i - 1]})
        for i, v in zip(which, orthonormal(vectors), strict=True)
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
