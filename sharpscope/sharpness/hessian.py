"""Measures from the Hessian: eigenvalue and trace in a scaled ball, relative flatness, alignment, edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.edge_of_stability import descent_edge, sam_edge
from sharpscope.errors import ArgumentError
from sharpscope.linalg import Eigenpairs
from sharpscope.linalg.top_eigenpairs import top_eigenpairs_rows
from sharpscope.linalg.trace import trace_and_frobenius_rows
from sharpscope.objective import Objective, Progress
from sharpscope.precision import wide
from sharpscope.results import EigenResult, Measure
from sharpscope.results.statistics import Estimate
from sharpscope.sharpness.losses import whole
from sharpscope.weights.norm_ball import Ball, inner_of, norm_of
from sharpscope.weights.parameters import select, views
from sharpscope.weights.perturbation import Perturbation


def scaled_products(objective: Objective, ball: Ball, progress: Progress | None) -> Callable[[Tensor], Tensor]:
    """Rows (K, n) times ``D H D``, D that of ``ball`` at w; cost ``1 + 2K`` gradients."""
    scales = ball.scales(objective.terms.params)
    if scales is None:
        return lambda rows: objective.products(rows, progress)
    d = torch.cat([s.flatten() for s in scales]).to(objective.device, objective.dtype)
    return lambda rows: d * objective.products(d * rows, progress)


def largest_eigenvalue(
    objective: Objective, ball: Ball, tol: float, generator: torch.Generator, progress: Progress | None = None
) -> Eigenpairs:
    """``lambda_max(DHD)`` and the next eigenvalue with their vectors, by block Lanczos; cost 7 gradients a pass."""
    products, k = scaled_products(objective, ball, progress), min(2, objective.num_params)
    return top_eigenpairs_rows(products, objective.empty_block(), k, tol=tol, method="lanczos", generator=generator)


def scaled_trace(
    objective: Objective, ball: Ball, probes: int, generator: torch.Generator, progress: Progress | None = None
) -> Estimate:
    """``tr(DHD)`` by XTrace; cost ``2 (1 + 2 probes)`` gradients."""
    products = scaled_products(objective, ball, progress)
    found = trace_and_frobenius_rows(products, objective.empty_block(), probes, generator=generator)
    return Estimate(found.trace, found.trace_error)


def relative_flatness(
    objective: Objective, probes: int, generator: torch.Generator, progress: Progress | None = None
) -> dict[str, Estimate]:
    """``sum_{s,s'} <w_s, w_s'> tr(H_ss')`` of each weight matrix W, w_s its rows and H_ss' their blocks of H.

    A convolution's filters are its rows. With a and b random signs and ``U = (W a) b'``, ``E[U'HU]`` is that number, so
    a probe takes one product, where dense blocks would take as many as there are weights.

    Cost: ``1 + 2 probes`` gradients for each matrix, a pass.

    Raises: ArgumentError where no weight has two dimensions.
    Source: Petzka et al. 2021, Definition 3.
    """
    params = objective.terms.params
    found = {}
    for name, place in require_matrices(objective).items():
        rows = torch.zeros(probes, objective.num_params, dtype=objective.dtype, device=objective.device)
        w = params[place].detach().flatten(1)
        for row in rows:
            a, b = (_signs(w.shape[1], generator).to(w) for _ in range(2))
            views(row, params)[place].copy_(torch.outer(w @ a, b).view_as(params[place]))
        images = objective.products(rows, progress)
        forms = (rows.to(wide(rows.device)) * images.to(wide(rows.device))).sum(1)
        found[name] = Estimate.of(forms.cpu().numpy().astype(np.float64))
    return found


def require_matrices(objective: Objective) -> dict[str, int]:
    """The names of the parameters with two dimensions or more, and their places among all.

    Raises: ArgumentError where there are none.
    """
    chosen = select(objective.problem.model, objective.problem.params)
    places = {name: i for i, (name, p) in enumerate(chosen.items()) if p.dim() > 1}
    if not places:
        raise ArgumentError("Relative flatness is of weight matrices, and no chosen parameter has two dimensions.")
    return places


def alignment(objective: Objective, eigenvector: Tensor, rho: float) -> tuple[float, float]:
    """``|cos(g, v)|`` and ``|cos(g_SAM, v)|`` of the gradients at w and at ``w + rho g / ||g||`` with a unit vector v.

    NaN where a gradient is zero. Cost: 2 gradients.

    Source: Long and Bartlett 2024.
    """
    v = views(eigenvector.to(objective.device), objective.terms.params)
    with objective.measuring(), Perturbation(objective.terms.params) as moved:
        loss = whole(objective)
        _, grads = loss.gradient()
        ball = Ball()
        slope = ball.dual_norm(grads, None)
        if not slope:
            return math.nan, math.nan
        direction, factor = ball.steepest(grads, None, slope)
        moved.add(moved.weights, direction, rho * factor)
        _, there = loss.gradient()
    return _cosine(grads, v), _cosine(there, v)


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator) * 2 - 1


def _cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    size = norm_of(left) * norm_of(right)
    return abs(inner_of(left, right)) / size if size else math.nan


def edge_measure(
    value: float,
    ends: tuple[float, float],
    norm: float,
    recipe: Mapping[str, Any],
    *,
    converged: bool,
    gradients: float = 0.0,
    examples: int | None = None,
    **settings: Any,
) -> Measure:
    """``lambda_max`` over SGD's edge, beside SAM's where ``recipe``, which has ``lr``, is of plain SAM.

    Args:
        value, ends: lambda_max and its interval.
        norm: ``||grad L(w)||``, on which SAM's edge depends.
    """
    lr, momentum = float(recipe["lr"]), float(recipe.get("momentum") or 0.0)
    rho = plain_rho(recipe)
    plain = descent_edge(lr, momentum)
    limits = {"SGD's edge": plain} | ({} if rho is None else {"SAM's edge": sam_edge(lr, rho, norm, momentum)})
    said = {"lr": lr, "momentum": momentum, "rho": rho, "lambda_max": value, **limits, "converged": converged}
    return Measure(
        "edge",
        value / plain,
        lower=ends[0] / plain,
        upper=ends[1] / plain,
        settings={**said, **settings},
        gradients=gradients,
        examples=examples,
    )


def edge_of(result: EigenResult) -> Measure | None:
    """The edge measure of eigenvalues that are there already, at the learning rate in force; no further cost.

    None where the checkpoint does not say the rate, or it was not SGD's.
    """
    recipe = recipe_of(result.provenance)
    if not recipe.get("lr") or recipe.get("optimizer", "sgd") != "sgd":
        return None
    drawn = result.sampling if result.sampling is not None and result.sampling.get("lower") else None
    lower, upper = (result.lower, result.upper) if drawn is None else (drawn["lower"], drawn["upper"])
    return edge_measure(
        result.lambda_max,
        (float(lower[0]), float(upper[0])),
        result.gradient_norm,
        recipe,
        converged=bool(result.converged[0]),
        examples=result.provenance.get("num_examples"),
        sampled=drawn is not None,
    )


def recipe_of(provenance: Mapping[str, Any], lr: float | None = None) -> dict[str, Any]:
    """Learning rate, momentum and rho with which training stopped, as far as the checkpoint says."""
    said, metrics = dict(provenance.get("recipe") or {}), provenance.get("metrics") or {}
    return {**said, "lr": lr if lr is not None else metrics.get("lr", said.get("lr"))}


def plain_rho(recipe: Mapping[str, Any]) -> float | None:
    """The radius of SAM in the plain ball of p = 2, None where the recipe is of no or another SAM."""
    named = recipe.get("variant", "sam") == "sam" and recipe.get("p", 2) == 2
    plain = named and recipe.get("m") is None and not recipe.get("sam_args")
    return float(recipe["rho"]) if plain and recipe.get("rho") else None
