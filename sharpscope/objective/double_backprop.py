"""Double backprop: gradient and Hessian-vector products of one micro-batch, on one autograd graph that is kept.

    g = autograd.grad(loss, w, create_graph=True)    1 gradient, and a graph of g as a function of w
    H v = autograd.grad(g, w, grad_outputs=v)        2 gradients for each vector v (Pearlmutter 1994)

The forward pass is in ``forward_loss.py``. ``accumulate.py`` sums over micro-batches, ``Objective`` divides by the
weight ``sum_i a_i`` of all terms and adds weight decay, and ``cost_and_out_of_memory.py`` counts the cost and
translates errors.
The call path from the top:
``top_eigenvalues -> Measurement.products -> Objective.products -> accumulate -> Objective.graph -> products``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope.objective.curvature_interface import Curvature, Graph, Products, zero_graph
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.micro_batches import MicroBatch
from sharpscope.weights.parameters import views


def hessian(terms: ForwardLoss, batch: MicroBatch, keep: bool) -> Graph:
    """Loss, gradient and products ``(sum_i a_i H_i) v`` of ``batch``; cost 1 gradient, and 2 a product.

    Args:
        terms: model and loss at the weights ``terms.params``.
        batch: the micro-batch.
        keep: whether products will be asked for; if not, the graph is freed at once.
    """
    loss, weight = terms.sums(batch)
    if not loss.requires_grad and not float(weight):
        return zero_graph(terms, loss, weight)
    # materialize_grads: a parameter that the loss does not use has zero curvature and is not an error.
    gradient = torch.autograd.grad(loss, terms.params, create_graph=keep, materialize_grads=True)
    products = differentiated(gradient, terms.params)
    return Graph(loss.detach(), weight, [g.detach() for g in gradient], products)


def differentiated(gradient: Sequence[Tensor], params: Sequence[Tensor]) -> Products:
    """H v for each row v: products with the derivative of ``gradient``, which has a graph, in ``params``."""
    # A gradient that is constant in the weights has no graph, and contributes nothing to H v.
    curved = [i for i, g in enumerate(gradient) if g.requires_grad]

    def products(rows: Tensor, last: bool = False) -> Tensor:
        if not curved:
            return torch.zeros_like(rows)
        images = torch.empty_like(rows)
        for k in range(len(rows)):
            v = views(rows[k], params)
            hv = torch.autograd.grad(
                [gradient[i] for i in curved],
                params,
                grad_outputs=[v[i] for i in curved],
                retain_graph=not last or k + 1 < len(rows),
                materialize_grads=True,
            )
            torch._foreach_copy_(views(images[k], params), list(hv))
        return images

    return products


HESSIAN = Curvature("hessian", "Hessian", hessian, cost=2.0, uses_second_derivatives=True)
