"""Curvature operators: the Hessian and its relatives, each a function of one micro-batch, one matrix a file."""

from __future__ import annotations

import torch

from sharpscope.errors import ArgumentError, nearest
from sharpscope.objective.graph import Curvature
from sharpscope.objective.hessian import HESSIAN
from sharpscope.operators.finite_difference import FINITE_DIFFERENCE
from sharpscope.operators.fisher import EMPIRICAL_FISHER, fisher
from sharpscope.operators.gauss_newton import GAUSS_NEWTON

__all__ = ["NAMES", "curvature"]

FIXED = {one.name: one for one in (HESSIAN, GAUSS_NEWTON, EMPIRICAL_FISHER, FINITE_DIFFERENCE)}
NAMES = (*FIXED, "fisher")


def curvature(name: str, generator: torch.Generator | None = None) -> Curvature:
    """The curvature called ``name``, for ``Objective(curvature=)``.

    "hessian", "ggn" (generalised Gauss-Newton), "fisher" (targets drawn from the model), "empirical-fisher" (the
    data's own targets) or "finite-difference" (an approximate Hessian of a model without second derivatives).
    ``generator`` (default: seeded with 0) is drawn from once, for "fisher" alone: its targets stay the same in every
    pass and whatever the micro-batches.

    Raises: ArgumentError for an unknown name.
    """
    if name == "fisher":
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        return fisher(int(torch.randint(2**62, (), generator=source)))
    if name not in FIXED:
        raise ArgumentError(nearest("operator", name, NAMES))
    return FIXED[name]
