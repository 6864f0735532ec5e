"""Hessian-vector products made in different ways, each as a function of a block, to be timed against one gradient.

``objective`` has its model in eval mode and its micro-batch size given as a number.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharpscope import Objective
from sharpscope.objective.micro_batches import MicroBatch, micro_batches
from sharpscope.operators import curvature
from sharpscope.weights.parameters import views

# (n, K) to H V (n, K); K = 1 for the single ones.
Product = Callable[[Tensor], Tensor]


def kept(objective: Objective) -> Product:
    """The library's kept graphs: built beforehand, so that only the second backward is paid for."""
    with objective.measuring():
        graphs = [objective.graph(part) for part in _parts(objective)]
    weight = float(sum(graph.weight for graph in graphs))

    def product(block: Tensor) -> Tensor:
        rows = block.T.contiguous()
        with objective.measuring():
            return sum((graph.products(rows) for graph in graphs), torch.zeros_like(rows)).T / weight

    return product


def rebuilt(objective: Objective) -> Product:
    """The library's product: each micro-batch's graph is built, every vector goes through it, and it is freed."""
    return objective.hvp


def forward_over_reverse(objective: Objective) -> Product:
    """The derivative of the gradient along the vector, in forward mode beside it."""
    model, loss = objective.terms.model, objective.terms.loss_function
    names = [name for name, _ in model.named_parameters()]
    parts = _parts(objective)
    count = sum(part.size for part in parts)

    def product(block: Tensor) -> Tensor:
        vector = block[:, 0].contiguous()
        values = tuple(p.detach() for p in objective.terms.params)
        total = torch.zeros_like(vector)
        targets = views(total, objective.terms.params)
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
    """The library's central differences of gradients, in the precision of the others: two gradients and an error."""
    # A copy is written to, which the graphs kept of the other one would not survive.
    return Objective(
        dataclasses.replace(objective.problem, model=copy.deepcopy(objective.problem.model)),
        dtype=objective.dtype,
        micro_batch=objective.micro_batch,
        curvature=curvature("finite-difference"),
    ).hvp


def _parts(objective: Objective) -> Sequence[MicroBatch]:
    assert isinstance(objective.micro_batch, int)
    return list(micro_batches(objective.data, objective.micro_batch))
