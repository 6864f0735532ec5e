"""Curvature operators: Hessian, Gauss-Newton and Fisher matrices, each as a function of one micro-batch."""

from __future__ import annotations

import torch

from sharpscope.errors import ArgumentError, nearest
from sharpscope.objective.curvature_interface import Curvature
from sharpscope.objective.double_backprop import HESSIAN
from sharpscope.operators.finite_difference import FINITE_DIFFERENCE
from sharpscope.operators.fisher import EMPIRICAL_FISHER, fisher
from sharpscope.operators.gauss_newton import GAUSS_NEWTON
from sharpscope.random_streams import stream_from

__all__ = ["NAMES", "curvature"]

BY_NAME = {matrix.name: matrix for matrix in (HESSIAN, GAUSS_NEWTON, EMPIRICAL_FISHER, FINITE_DIFFERENCE)}
NAMES = (*BY_NAME, "fisher")


def curvature(name: str, generator: torch.Generator | None = None) -> Curvature:
    """The curvature called ``name``, for ``Objective(curvature=)``.

    Args:
        name: "hessian", "ggn" (generalised Gauss-Newton), "fisher" (targets sampled from the model),
            "empirical-fisher" (the data's own targets; outer products of the gradients of loss terms, which are the
            output's elements for MSE and BCE) or "finite-difference" (an approximate Hessian for models without second
            derivatives).
        generator: source of the seed of "fisher"; not used by the others. The sampled targets are the same in every
            pass and for every micro-batch size. Default: seeded with 0.

    Raises: ArgumentError for an unknown name.
    """
    if name == "fisher":
        return fisher(stream_from(generator, "fisher").initial_seed())
    if name not in BY_NAME:
        raise ArgumentError(nearest("operator", name, NAMES))
    return BY_NAME[name]
