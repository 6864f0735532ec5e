"""Measures from the Hessian: eigenvalue and trace in a scaled ball, relative flatness, alignment, edge of stability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.edge_of_stability import descent_edge, sam_edge
from sharpscope.errors import ArgumentError
from sharpscope.linalg import Eigenpairs
from sharpscope.linalg.trace_and_frobenius import trace_and_frobenius_rows
from sharpscope.objective import Objective
from sharpscope.precision import wide
from sharpscope.results import EigenResult, Measure
from sharpscope.results.sharpness import SAM_EDGE, SGD_EDGE
from sharpscope.results.statistics import Estimate
from sharpscope.sharpness.measure_context import EIGENVALUE_TOL, MeasureContext, MeasureSpec, unresolved, with_interval
from sharpscope.sharpness.subset_loss import full_loss
from sharpscope.weights.norm_ball import Ball, inner_of, norm_of
from sharpscope.weights.parameters import select, views
from sharpscope.weights.perturbation import Perturbation


def lambda_max(context: MeasureContext) -> Iterator[Measure]:
    """``lambda_max(DHD)`` by block Lanczos; cost 7 gradients a pass, and 10 of 256 examples at most in float32."""
    objective, ball = context.objective, context.settings.ball
    gradients_before = objective.gradients
    top = context.top_eigenpairs(ball)
    yield Measure(
        "lambda-max",
        float(top.eigenvalues[0]),
        lower=float(top.lower[0]),
        upper=float(top.upper[0]),
        settings={
            "adaptive": ball.scaling,
            "eta": ball.offset,
            "tol": EIGENVALUE_TOL,
            "converged": bool(top.converged[0]),
            "missed_probability": _missed_probability(top),
        },
        gradients=objective.gradients - gradients_before,
        examples=objective.num_examples,
    )


def trace(context: MeasureContext) -> Iterator[Measure]:
    """``tr(DHD)`` by XTrace; cost ``2 (1 + 2 probes)`` gradients."""
    objective, ball = context.objective, context.settings.ball
    probes = min(context.settings.probes, objective.num_params)
    gradients_before = objective.gradients
    found = trace_and_frobenius_rows(
        context.scaled_products(ball, "trace"), objective.empty_block(), probes, generator=context.generator("trace")
    )
    yield Measure(
        "trace",
        *with_interval(Estimate(found.trace, found.trace_error), probes),
        settings={"adaptive": ball.scaling, "eta": ball.offset, "probes": probes},
        gradients=objective.gradients - gradients_before,
        examples=objective.num_examples,
    )


def relative_flatness(context: MeasureContext) -> Iterator[Measure]:
    """``sum_{s,s'} <w_s, w_s'> tr(H_ss')`` of each weight matrix W; w_s are its rows and H_ss' their blocks of H.

    The rows of a convolution are its filters. With random signs a and b and ``U = (W a) b'``, ``E[U'HU]`` is that
    number, so a probe costs one product, where dense blocks would cost as many as there are weights.

    Cost: ``1 + 2 probes`` gradients and a pass for each matrix.

    Raises: ArgumentError if no chosen parameter has two dimensions.
    Source: Petzka et al. 2021, Definition 3.
    """
    objective, probes = context.objective, context.settings.probes
    generator, progress = context.generator("relative-flatness"), context.stage_progress("relative flatness")
    gradients_before = objective.gradients
    params = objective.terms.params
    estimates = {}
    for name, index in _weight_matrices(objective).items():
        rows = torch.zeros(probes, objective.num_params, dtype=objective.dtype, device=objective.device)
        w = params[index].detach().flatten(1)
        for row in rows:
            a, b = (_signs(w.shape[1], generator).to(w) for _ in range(2))
            views(row, params)[index].copy_(torch.outer(w @ a, b).view_as(params[index]))
        products = objective.products(rows, progress)
        quadratic_forms = (rows.to(wide(rows.device)) * products.to(wide(rows.device))).sum(1)
        estimates[name] = Estimate.of(quadratic_forms.cpu().numpy().astype(np.float64))
    each = (objective.gradients - gradients_before) / len(estimates)
    for name, estimate in estimates.items():
        yield Measure(
            "relative-flatness",
            *with_interval(estimate, probes),
            settings={"layer": name, "probes": probes},
            gradients=each,
            examples=objective.num_examples,
        )


def edge(context: MeasureContext) -> Iterator[Measure]:
    """``lambda_max`` divided by SGD's edge of stability; cost 0 where lambda_max is known."""
    objective = context.objective
    gradients_before = objective.gradients
    top = context.top_eigenpairs(Ball())
    assert objective.gradient is not None
    yield _edge_measure(
        float(top.eigenvalues[0]),
        (float(top.lower[0]), float(top.upper[0])),
        norm_of([objective.gradient]),
        context.settings.recipe,
        converged=bool(top.converged[0]),
        gradients=objective.gradients - gradients_before,
        examples=objective.num_examples,
    )


def alignment(context: MeasureContext) -> Iterator[Measure]:
    """``|cos(g, v)|`` and ``|cos(g_SAM, v)|``: gradients at w and at ``w + rho g / ||g||``, and the top eigenvector v.

    NaN where a gradient is zero. Cost: 2 gradients, and those of lambda_max where it is not known.

    Source: Long and Bartlett 2024.
    """
    objective, rho = context.objective, max(context.settings.rho)
    gradients_before = objective.gradients
    top = context.top_eigenpairs(Ball())
    v = views(top.eigenvectors[:, 0].to(objective.device), objective.terms.params)
    with objective.measuring(), Perturbation(objective.terms.params) as perturbation:
        loss = full_loss(objective)
        _, grads = loss.gradient()
        ball = Ball()
        norm = ball.dual_norm(grads, None)
        cosines, lost = (math.nan, math.nan), 0.0
        if norm:
            direction, factor = ball.steepest(grads, None, norm)
            lost = perturbation.lost(direction, rho * factor)  # and move there
            _, sam_grads = loss.gradient()
            cosines = _abs_cosine(grads, v), _abs_cosine(sam_grads, v)
    error = _eigenvector_error(top)
    cost = objective.gradients - gradients_before
    for which, value in zip(("gradient", "SAM's gradient"), cosines, strict=True):
        yield Measure(
            "alignment",
            value,
            lower=max(0.0, value - error),
            upper=min(1.0, value + error),
            settings={
                "of": which,
                "rho": None if which == "gradient" else rho,
                "converged": error < 1.0,
                **({} if which == "gradient" else unresolved(lost, 1.0)),
            },
            gradients=cost / 2,
            examples=objective.num_examples,
        )


def _require_sgd(context: MeasureContext) -> None:
    recipe = context.settings.recipe
    if not recipe.get("lr"):
        raise ArgumentError("The edge of stability needs the learning rate, which is not in the checkpoint. Pass lr.")
    if recipe.get("optimizer", "sgd") != "sgd":
        raise ArgumentError(f"The edge of stability is SGD's, and the checkpoint was trained by {recipe['optimizer']}.")


MEASURES = (
    MeasureSpec("lambda-max", lambda_max),
    MeasureSpec("trace", trace),
    MeasureSpec("relative-flatness", relative_flatness, requires=lambda context: _weight_matrices(context.objective)),
    MeasureSpec("edge", edge, requires=_require_sgd),
    MeasureSpec("alignment", alignment),
)


def edge_from_eigenvalues(result: EigenResult) -> Measure | None:
    """The "edge" measure from eigenvalues that are known, at the learning rate in force; no further cost.

    None if the checkpoint does not hold the learning rate or was not trained by SGD.
    """
    recipe = training_recipe(result.provenance)
    if not recipe.get("lr") or recipe.get("optimizer", "sgd") != "sgd":
        return None
    sampling = result.sampling if result.sampling is not None and result.sampling.get("lower") else None
    lower, upper = (result.lower, result.upper) if sampling is None else (sampling["lower"], sampling["upper"])
    return _edge_measure(
        result.lambda_max,
        (float(lower[0]), float(upper[0])),
        result.gradient_norm,
        recipe,
        converged=bool(result.converged[0]),
        examples=result.provenance.get("num_examples"),
        sampled=sampling is not None,
    )


def training_recipe(provenance: Mapping[str, Any], lr: float | None = None) -> dict[str, Any]:
    """The recipe in the checkpoint, with ``lr``, by default the learning rate in force when it was written."""
    recipe, metrics = dict(provenance.get("recipe") or {}), provenance.get("metrics") or {}
    return {**recipe, "lr": lr if lr is not None else metrics.get("lr", recipe.get("lr"))}


def _edge_measure(
    value: float,
    interval: tuple[float, float],
    gradient_norm: float,
    recipe: Mapping[str, Any],
    *,
    converged: bool,
    gradients: float = 0.0,
    examples: int | None = None,
    **settings: Any,
) -> Measure:
    """``lambda_max``, its value and interval, over SGD's edge; SAM's edge is a setting if the recipe is plain SAM's."""
    lr, momentum = float(recipe["lr"]), float(recipe.get("momentum") or 0.0)
    rho = _plain_sam_radius(recipe)
    sgd = descent_edge(lr, momentum)
    edges = {SGD_EDGE: sgd} | ({} if rho is None else {SAM_EDGE: sam_edge(lr, rho, gradient_norm, momentum)})
    shown = {"lr": lr, "momentum": momentum, "rho": rho, "lambda_max": value, **edges, "converged": converged}
    return Measure(
        "edge",
        value / sgd,
        lower=interval[0] / sgd,
        upper=interval[1] / sgd,
        settings={**shown, **settings},
        gradients=gradients,
        examples=examples,
    )


def _plain_sam_radius(recipe: Mapping[str, Any]) -> float | None:
    """rho of plain SAM with p = 2; None for other variants and for training without SAM."""
    named = recipe.get("variant", "sam") == "sam" and recipe.get("p", 2) == 2
    plain = named and recipe.get("m") is None and not recipe.get("sam_args")
    return float(recipe["rho"]) if plain and recipe.get("rho") else None


def _weight_matrices(objective: Objective) -> dict[str, int]:
    """Names and indices of the parameters with two dimensions or more.

    Raises: ArgumentError if there are none.
    """
    chosen = select(objective.problem.model, objective.problem.params)
    indices = {name: i for i, (name, p) in enumerate(chosen.items()) if p.dim() > 1}
    if not indices:
        raise ArgumentError("Relative flatness is of weight matrices, and no chosen parameter has two dimensions.")
    return indices


def _missed_probability(top: Eigenpairs) -> float:
    """Upper bound on the probability that a larger eigenvalue was missed, as for ``top_eigenvalues``."""
    if top.missed_bound is None or not bool(top.converged[0]):
        return 1.0
    return float(top.missed_bound.probability(float(top.upper[0] - top.residuals.norm())))


def _eigenvector_error(top: Eigenpairs) -> float:
    """Error of the cosine with the first eigenvector: ``sqrt(2) ||r|| / gap`` (Davis and Kahan 1970)."""
    if len(top.eigenvalues) < 2:
        return 0.0
    gap = float(top.lower[0] - top.upper[1])
    return min(1.0, math.sqrt(2) * float(top.residuals[0]) / gap) if gap > 0 else 1.0


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator) * 2 - 1


def _abs_cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    norms = norm_of(left) * norm_of(right)
    return abs(inner_of(left, right)) / norms if norms else math.nan
