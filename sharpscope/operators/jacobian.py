"""Products ``J' M J v`` of one micro-batch: J the Jacobian of the model's output, M a matrix on the output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ProblemError
from sharpscope.objective.data import MicroBatch
from sharpscope.objective.forward import LossTerms
from sharpscope.objective.graph import Graph, zero_graph
from sharpscope.objective.losses import find_logits, output_tensor
from sharpscope.weights.parameters import views

# Gradients a product on the kept graph, counted in matrix products: of a gradient's three (forward, and backward into
# inputs and weights) J takes two and J' takes two.
COST = 4 / 3


@dataclass(frozen=True)
class Split:
    """One micro-batch cut at the model's output.

    Attributes:
        outputs: the tensors z that the model gives, on its graph.
        leaves: the same numbers, cut off, of which the loss is a function.
        slopes: the loss's derivative in ``leaves``, itself differentiable.
        loss, weight: ``sum_i a_i l_i`` and ``sum_i a_i``, with the micro-batch's scale.
        target: of the loss, on the device.
        part: the micro-batch.
    """

    outputs: list[Tensor]
    leaves: list[Tensor]
    slopes: Sequence[Tensor]
    loss: Tensor
    weight: Tensor
    target: Any
    part: MicroBatch


OutputMatrix = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def graph_through_output(
    terms: LossTerms, part: MicroBatch, keep: bool, middle: Callable[[LossTerms, Split], OutputMatrix], name: str
) -> Graph:
    """The graph of gradient and products ``J' M J v``; cost 1 gradient, and 4/3 a product.

    ``middle(terms, split)`` gives the function ``x -> M x`` on the output. J v is had by differentiating J'u, which is
    linear in u, in u (Townsend 2017), with u the loss's slope: that J'u is the gradient, so the linear graph is free.

    Raises: ProblemError when the loss does not see the parameters through the output alone.
    """
    split = split_at_output(terms, part, keep, name)
    if not split.outputs:
        return zero_graph(terms, split.loss, split.weight)
    seeds = [s.detach().requires_grad_(keep) for s in split.slopes]
    grads = torch.autograd.grad(
        split.outputs, terms.params, seeds, create_graph=keep, retain_graph=keep, materialize_grads=True
    )
    push = middle(terms, split) if keep else None
    live = [i for i, g in enumerate(grads) if g.requires_grad]

    def products(rows: Tensor, last: bool = False) -> Tensor:
        images = torch.zeros_like(rows)
        for k in range(len(rows) if live and push is not None else 0):
            vector = views(rows[k], terms.params)
            tangents = torch.autograd.grad(
                [grads[i] for i in live],
                seeds,
                [vector[i] for i in live],
                retain_graph=True,
                materialize_grads=True,
            )
            assert push is not None
            found = torch.autograd.grad(
                split.outputs,
                terms.params,
                list(push(tangents)),
                retain_graph=not last or k + 1 < len(rows),
                materialize_grads=True,
            )
            torch._foreach_copy_(views(images[k], terms.params), list(found))
        return images

    return Graph(split.loss.detach(), split.weight, [g.detach() for g in grads], products)


def tangent(terms: LossTerms, part: MicroBatch, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The output and ``J v`` as products use it, flat, for a check; cost 2 gradients."""
    split = split_at_output(terms, part, False, "ggn")
    if not split.outputs:
        return vector[:0], vector[:0]
    seeds = [torch.ones_like(z).requires_grad_() for z in split.outputs]
    grads = torch.autograd.grad(split.outputs, terms.params, seeds, create_graph=True, materialize_grads=True)
    live = [i for i, g in enumerate(grads) if g.requires_grad]
    pieces = views(vector, terms.params)
    found = [torch.zeros_like(z) for z in seeds]
    if live:
        found = list(
            torch.autograd.grad([grads[i] for i in live], seeds, [pieces[i] for i in live], materialize_grads=True)
        )
    return torch.cat([z.detach().flatten() for z in split.outputs]), torch.cat([t.flatten() for t in found])


def split_at_output(terms: LossTerms, part: MicroBatch, keep: bool, name: str) -> Split:
    """Model and loss of one micro-batch, cut apart; no ``outputs`` where there are no loss terms."""
    output, target, batch = terms.forward(part)
    found, rebuild = _taken_apart(output, known=terms.loss.counts_terms)
    outputs = [z for z in found if z.requires_grad]
    leaves = [z.detach().requires_grad_() for z in outputs]
    given = iter(leaves)
    # A clone, since a loss may write into what it is given, and a leaf refuses that.
    whole = [next(given).clone() if z.requires_grad else z for z in found]
    link = terms.loss.likelihood.link if terms.loss.likelihood is not None else (lambda z: z)
    if not terms.checked:
        _require_unchanged(link, found)
    try:
        value, weight = terms.sums_from_output(part, rebuild([link(z) for z in whole]), target, batch)
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error):
            raise
        raise ProblemError(
            f"The loss must be a function of the model's output alone for operator={name!r}, but takes derivatives of "
            "it in the inputs. Take them in the model's forward, or pass operator='hessian' (--operator hessian)."
        ) from error
    if not value.requires_grad and not float(weight):
        return Split([], [], [], value, weight, target, part)
    if not terms.checked:
        _require_only_through_output(terms, value, name)
    slopes = torch.autograd.grad(value, leaves, create_graph=keep, materialize_grads=True)
    return Split(outputs, leaves, slopes, value, weight, target, part)


def _taken_apart(output: Any, known: bool) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of ``output`` that a loss looks at, and how to put others in their place."""
    if known:
        return [output_tensor(output)], lambda new: new[0]
    if isinstance(output, Tensor):
        return [output], lambda new: new[0]
    if find_logits(output) is not None:

        def with_logits(new: list[Tensor]) -> Any:
            other = copy.copy(output)
            if isinstance(other, dict):
                other["logits"] = new[0]
            if hasattr(other, "logits"):
                other.logits = new[0]
            return other

        return [output_tensor(output)], with_logits
    if type(output) in (tuple, list) and all(isinstance(z, Tensor) for z in output):
        return list(output), type(output)
    if type(output) is dict and all(isinstance(z, Tensor) for z in output.values()):
        return list(output.values()), lambda new: dict(zip(output, new, strict=True))
    raise ProblemError(
        "The model must return a tensor, a tuple, list or dict of tensors, or an object with .logits, to be cut apart "
        f"from its loss; got {type(output).__name__}. Wrap the model, or pass operator='hessian'."
    )


def _require_only_through_output(terms: LossTerms, value: Tensor, name: str) -> None:
    if not value.requires_grad:
        raise ProblemError(
            f"For operator={name!r} the loss must depend on the model's output, and that on the chosen parameters, but "
            "it does not. Check params=, and that neither model nor loss runs under no_grad or detaches its output."
        )
    own = torch.autograd.grad(value, terms.params, retain_graph=True, allow_unused=True)
    if any(g is not None for g in own):
        raise ProblemError(
            f"The loss must see the weights through the model's output alone for operator={name!r}, but it reads them "
            "itself or takes a loss from the output. Pass penalties as weight_decay=, or operator='hessian'."
        )


def _require_unchanged(link: Callable[[Tensor], Tensor], found: list[Tensor]) -> None:
    for z in found:
        same = link(z.detach())
        if same is not z and not torch.allclose(same, z.detach(), rtol=1e-3, atol=1e-3):
            raise ProblemError(
                "The output must hold log-probabilities for this loss, but their exponentials do not sum to 1. "
                "End the model with log_softmax, or use CrossEntropyLoss."
            )
