"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope.errors import ProblemError
from sharpscope.objective.data import MicroBatch
from sharpscope.objective.forward import LossTerms
from sharpscope.objective.graph import Curvature, Graph
from sharpscope.operators.jacobian import COST, OutputMatrix, Split, graph_through_output, tangent

NAME = "ggn"


def gauss_newton(terms: LossTerms, part: MicroBatch, keep: bool) -> Graph:
    """``G = J' H_L J``: J the Jacobian of the model's output, H_L the Hessian of the loss in the output.

    The Hessian without the model's own curvature (Schraudolph 2002); positive semidefinite for a convex loss. Any loss
    that is a function of output and target will do. NLLLoss, linear in its log-probabilities, is taken as the function
    of logits that it is. Cost: 1 gradient, and 4/3 a product.

    Raises: ProblemError when the loss sees the weights elsewhere than in the output, or is linear in it.
    """
    return graph_through_output(terms, part, keep, _hessian_in_output, NAME)


def _hessian_in_output(terms: LossTerms, split: Split) -> OutputMatrix:
    live = [s for s in split.slopes if s.requires_grad]
    if not live:
        raise ProblemError(
            f"The loss must be curved in the model's output for operator={NAME!r}, but is linear in it, so that its "
            "Gauss-Newton matrix is zero. Pass operator='hessian'."
        )
    which = [i for i, s in enumerate(split.slopes) if s.requires_grad]

    def push(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(
            live, split.leaves, [tangents[i] for i in which], retain_graph=True, materialize_grads=True
        )

    return push


GAUSS_NEWTON = Curvature(NAME, "Gauss-Newton matrix", gauss_newton, COST, tangent=tangent)
