"""lambda_max against the edge of stability of the training that made the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharpscope.edges import descent_edge, sam_edge
from sharpscope.results import EigenResult, Measure


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
