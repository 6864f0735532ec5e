"""An approximate Hessian for models without a second derivative: central differences of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpscope.objective.curvature_interface import Curvature, Graph, zero_graph
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.micro_batches import MicroBatch
from sharpscope.precision import wide
from sharpscope.weights.parameters import padding_rows, views
from sharpscope.weights.perturbation import Perturbation

# Factor of the step, which balances rounding against the third derivative. The third derivative is large along the top
# eigenvectors: with a factor of 1 the error there exceeds 10 %.
STEP_SCALE = 1 / 500

# Error of eigenvalues from products in float32, relative to the largest: five times the largest observed error.
FLOAT32_ERROR = 2e-3


def finite_difference(terms: ForwardLoss, batch: MicroBatch, keep: bool) -> Graph:
    """``H v`` as ``(g(w + h v) - g(w - h v)) / 2h``, ``h = eps^(1/3) |w| / 500 |v|``, eps that of the dtype.

    ``|w|`` is taken as 1 where w is zero. The default dtype is float64 where the device supports it. On a trained CNN,
    MLP and LSTM the relative error along the top eigenvector is 1e-9 in float64 and 1e-4 to 4e-4 in float32; along a
    random direction, where the product is small, up to 4e-7 and 0.2. With ReLU and max-pooling the longer step in
    float32 crosses kinks, and products are asymmetric by 2 % of the norm. The parameters are changed and then restored
    from exact copies, also on exceptions.

    Raises: ProblemError when the loss does not depend on the parameters.

    Cost: 1 gradient, and 2 a product; no graph is kept.
    """
    loss, weight = terms.sums(batch)
    if not loss.requires_grad and not float(weight):
        return zero_graph(terms, loss, weight)
    grads = torch.autograd.grad(loss, terms.params, materialize_grads=True)

    padding = padding_rows(terms.model, terms.params, tied=False)

    def products(rows: Tensor, last: bool = False) -> Tensor:
        images = torch.empty_like(rows)
        with Perturbation(terms.params) as moved:
            for k, row in enumerate(rows):
                step, vector = _step(moved.centre, row), views(row, terms.params)
                for i, padding_row in padding:
                    vector[i] = vector[i].clone()
                    vector[i][padding_row] = 0
                gradients = []
                for signed in (step, -step):
                    # The step stays on the device.
                    moved.move_to([signed.to(v) * v for v in vector])
                    gradients.append(torch.autograd.grad(terms.sums(batch)[0], terms.params, materialize_grads=True))
                difference = torch._foreach_sub(gradients[0], gradients[1])
                torch._foreach_copy_(views(images[k], terms.params), difference)
                images[k] /= 2 * step.to(row)
        return images

    return Graph(loss.detach(), weight, list(grads), products)


def _step(weights: list[Tensor], row: Tensor) -> Tensor:
    """The step h for the direction ``row``, as a tensor on the device."""
    dtype = wide(row.device)
    size = torch.stack([torch.linalg.vector_norm(w, dtype=dtype) for w in weights]).norm()
    length = torch.linalg.vector_norm(row, dtype=dtype)
    eps = torch.finfo(row.dtype).eps
    # A zero vector has a zero product whatever the step.
    step: Tensor = STEP_SCALE * eps ** (1 / 3) * torch.where(size > 0, size, 1.0) / torch.where(length > 0, length, 1.0)
    return step


FINITE_DIFFERENCE = Curvature(
    "finite-difference",
    "finite-difference Hessian",
    finite_difference,
    2.0,
    dtype=torch.float64,
    exact=False,
    float32_error=FLOAT32_ERROR,
)
