"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope.errors import ProblemError
from sharpscope.objective.curvature_interface import Curvature, Graph
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.micro_batches import MicroBatch
from sharpscope.operators.jacobian import COST, OutputMatrix, Split, graph_through_output, tangent

NAME = "ggn"


def gauss_newton(terms: ForwardLoss, batch: MicroBatch, keep: bool) -> Graph:
    """``G = J' H_L J``: J the Jacobian of the model's output, H_L the Hessian of the loss in the output.

    The Hessian without the model's second derivative (Schraudolph 2002); positive semidefinite for a convex loss. The
    loss may be any function of output and target. NLLLoss, which is linear in the log-probabilities, is differentiated
    as a function of logits.

    Raises: ProblemError when the loss depends on the weights other than through the output, or is linear in it.

    Cost: 1 gradient, and 4/3 a product.
    """
    return graph_through_output(terms, batch, keep, _hessian_in_output, NAME)


def _hessian_in_output(terms: ForwardLoss, split: Split) -> OutputMatrix:
    indices = [i for i, g in enumerate(split.output_gradients) if g.requires_grad]
    if not indices:
        raise ProblemError(
            f"The loss must be curved in the model's output for operator={NAME!r}, but is linear in it, so that its "
            "Gauss-Newton matrix is zero. Pass operator='hessian'."
        )
    curved = [split.output_gradients[i] for i in indices]

    def multiply(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(
            curved, split.leaves, [tangents[i] for i in indices], retain_graph=True, materialize_grads=True
        )

    return multiply


GAUSS_NEWTON = Curvature(NAME, "Gauss-Newton matrix", gauss_newton, COST, tangent=tangent)
