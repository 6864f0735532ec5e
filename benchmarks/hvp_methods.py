"""Hessian-vector products made in different ways, each as a function of a block, to be timed against one gradient.

``objective`` has its model in eval mode and its micro-batch size given as a number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharpscope import Objective
from sharpscope.batches import MicroBatch, micro_batches
from sharpscope.params import assign, views

# (n, K) to H V (n, K); K = 1 for the single ones.
Product = Callable[[Tensor], Tensor]


def kept(objective: Objective) -> Product:
    """Double backprop on graphs that were built beforehand and are kept: only the second backward is paid for."""
    parts = _parts(objective)
    graphs, weight = [], 0.0
    with objective.measuring():
        for part in parts:
            value, terms = objective.term_sums(part)
            graphs.append(torch.autograd.grad(value, objective.params, create_graph=True, materialize_grads=True))
            weight += float(terms)

    # The one place to swap for the library's own kept graphs.
    def product(block: Tensor) -> Tensor:
        rows = []
        for vector in block.T:
            split = views(vector.contiguous(), objective.params)
            total = torch.zeros_like(vector, memory_format=torch.contiguous_format)
            targets = views(total, objective.params)
            for grads in graphs:
                live = [i for i, g in enumerate(grads) if g.requires_grad]
                products = torch.autograd.grad(
                    [grads[i] for i in live],
                    objective.params,
                    [split[i] for i in live],
                    retain_graph=True,
                    materialize_grads=True,
                )
                torch._foreach_add_(targets, list(products))
            rows.append(total / weight)
        return torch.stack(rows).T

    return product


def rebuilt(objective: Objective) -> Product:
    """The library's product: each micro-batch's graph is built, every vector goes through it, and it is freed."""
    return objective.hvp


def forward_over_reverse(objective: Objective) -> Product:
    """The derivative of the gradient along the vector, in forward mode beside it."""
    model, loss = objective.model, objective.loss_function
    names = [name for name, _ in model.named_parameters()]
    parts = _parts(objective)
    count = sum(part.size for part in parts)

    def product(block: Tensor) -> Tensor:
        vector = block[:, 0].contiguous()
        values = tuple(p.detach() for p in objective.params)
        total = torch.zeros_like(vector)
        targets = views(total, objective.params)
        for part in parts:
            inputs, labels = part.batch

            def mean(*params: Tensor, x: Tensor = inputs, y: Tensor = labels) -> Tensor:
                return loss(torch.func.functional_call(model, dict(zip(names, params, strict=True)), (x,)), y)

            gradient = torch.func.grad(mean, argnums=tuple(range(len(values))))
            _, tangents = torch.func.jvp(gradient, values, tuple(views(vector, values)))
            torch._foreach_add_(targets, list(tangents), alpha=part.size / count)
        return total[:, None]

    return product


def finite_difference(objective: Objective) -> Product:
    """``(g(w + h v) - g(w - h v)) / 2h`` with ``|h v| = 5e-3``: two gradients and an error.

    The smoothness decides how large: a step that crosses kinks of ReLU counts their jumps, which the Hessian does not.
    """
    parts = _parts(objective)
    count = sum(part.size for part in parts)
    model = copy.deepcopy(objective.model)  # written to, which the graphs kept of the other one would not survive
    params = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().reshape(-1) for p in params])

    def gradient(at: Tensor) -> Tensor:
        assign(params, at)
        total = torch.zeros_like(at)
        targets = views(total, params)
        for part in parts:
            inputs, labels = part.batch
            value = objective.loss_function(model(inputs), labels)
            grads = torch.autograd.grad(value, params, materialize_grads=True)
            torch._foreach_add_(targets, list(grads), alpha=part.size / count)
        return total

    def product(block: Tensor) -> Tensor:
        vector = block[:, 0].contiguous()
        step = 5e-3 / float(vector.norm())
        return ((gradient(flat + step * vector) - gradient(flat - step * vector)) / (2 * step))[:, None]

    return product


def _parts(objective: Objective) -> Sequence[MicroBatch]:
    assert isinstance(objective.micro_batch, int)
    return list(micro_batches(objective.data, objective.micro_batch))
