"""Products ``J' M J v`` of one micro-batch: J the Jacobian of the model's output, M a matrix on the output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ProblemError
from sharpscope.objective.curvature_interface import Graph, zero_graph
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.losses import find_logits, output_tensor
from sharpscope.objective.micro_batches import MicroBatch
from sharpscope.weights.parameters import views

# Cost of a product on the kept graph in gradients, from counting matrix products: a gradient takes three for each layer
# (forward, and backward into inputs and weights), J two and J' two.
COST = 4 / 3


@dataclass(frozen=True)
class Split:
    """The graph of one micro-batch, split at the model's output.

    Attributes:
        outputs: the output tensors z, with the model's graph.
        leaves: detached copies of z, the inputs of the loss's graph.
        output_gradients: the derivative of the loss in ``leaves``, itself differentiable.
        loss: ``sum_i a_i l_i``, times the micro-batch's scale.
        weight: ``sum_i a_i``, times the micro-batch's scale.
        target: of the loss, on the device.
        batch: the micro-batch.
    """

    outputs: list[Tensor]
    leaves: list[Tensor]
    output_gradients: Sequence[Tensor]
    loss: Tensor
    weight: Tensor
    target: Any
    batch: MicroBatch


# Multiplies the matrix M with a vector that has the shapes of ``outputs``.
OutputMatrix = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def graph_through_output(
    terms: ForwardLoss,
    batch: MicroBatch,
    keep: bool,
    output_matrix: Callable[[ForwardLoss, Split], OutputMatrix],
    name: str,
) -> Graph:
    """The graph of gradient and products ``J' M J v``; cost 1 gradient, and 4/3 a product.

    J v is the derivative of J'u in u, in which J'u is linear (Townsend 2017). For u the loss's derivative in the output
    J'u is the gradient, so its graph costs nothing extra.

    Args:
        terms: model and loss.
        batch: the micro-batch.
        keep: whether products will be asked for.
        output_matrix: ``output_matrix(terms, split)`` gives the function ``x -> M x`` on the output.
        name: of the operator, for messages.

    Raises: ProblemError when the loss does not see the parameters through the output alone.
    """
    split = split_at_output(terms, batch, keep, name)
    if not split.outputs:
        return zero_graph(terms, split.loss, split.weight)
    cotangents = [g.detach().requires_grad_(keep) for g in split.output_gradients]
    grads = torch.autograd.grad(
        split.outputs, terms.params, cotangents, create_graph=keep, retain_graph=keep, materialize_grads=True
    )
    multiply = output_matrix(terms, split) if keep else None
    linear = [i for i, g in enumerate(grads) if g.requires_grad]

    def products(rows: Tensor, last: bool = False) -> Tensor:
        images = torch.zeros_like(rows)
        for k in range(len(rows) if linear and multiply is not None else 0):
            vector = views(rows[k], terms.params)
            tangents = torch.autograd.grad(
                [grads[i] for i in linear],
                cotangents,
                [vector[i] for i in linear],
                retain_graph=True,
                materialize_grads=True,
            )
            assert multiply is not None
            image = torch.autograd.grad(
                split.outputs,
                terms.params,
                list(multiply(tangents)),
                retain_graph=not last or k + 1 < len(rows),
                materialize_grads=True,
            )
            torch._foreach_copy_(views(images[k], terms.params), list(image))
        return images

    return Graph(split.loss.detach(), split.weight, [g.detach() for g in grads], products)


def tangent(terms: ForwardLoss, batch: MicroBatch, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The flat output and ``J v`` as the products compute it, for the audit; cost 2 gradients."""
    split = split_at_output(terms, batch, False, "ggn")
    if not split.outputs:
        return vector[:0], vector[:0]
    cotangents = [torch.ones_like(z).requires_grad_() for z in split.outputs]
    grads = torch.autograd.grad(split.outputs, terms.params, cotangents, create_graph=True, materialize_grads=True)
    linear = [i for i, g in enumerate(grads) if g.requires_grad]
    direction = views(vector, terms.params)
    tangents = [torch.zeros_like(z) for z in cotangents]
    if linear:
        tangents = list(
            torch.autograd.grad(
                [grads[i] for i in linear], cotangents, [direction[i] for i in linear], materialize_grads=True
            )
        )
    return torch.cat([z.detach().flatten() for z in split.outputs]), torch.cat([t.flatten() for t in tangents])


def split_at_output(terms: ForwardLoss, batch: MicroBatch, keep: bool, name: str) -> Split:
    """Split the graph of one micro-batch at the output; ``outputs`` is empty where there are no loss terms."""
    output, target, inputs = terms.forward(batch)
    tensors, rebuild = _output_tensors(output, known=terms.loss.counts_terms)
    outputs = [z for z in tensors if z.requires_grad]
    leaves = [z.detach().requires_grad_() for z in outputs]
    remaining = iter(leaves)
    # Clones, since a loss may write to its input, which is an error for a leaf.
    loss_inputs = [next(remaining).clone() if z.requires_grad else z for z in tensors]
    link = terms.loss.likelihood.link if terms.loss.likelihood is not None else (lambda z: z)
    if not terms.checked:
        _require_unchanged(link, tensors)
    try:
        loss, weight = terms.sums_from_output(batch, rebuild([link(z) for z in loss_inputs]), target, inputs)
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error):
            raise
        raise ProblemError(
            f"The loss must be a function of the model's output alone for operator={name!r}, but takes derivatives of "
            "it in the inputs. Take them in the model's forward, or pass operator='hessian' (--operator hessian)."
        ) from error
    if not loss.requires_grad and not float(weight):
        return Split([], [], [], loss, weight, target, batch)
    if not terms.checked:
        _require_only_through_output(terms, loss, name)
    output_gradients = torch.autograd.grad(loss, leaves, create_graph=keep, materialize_grads=True)
    return Split(outputs, leaves, output_gradients, loss, weight, target, batch)


def _output_tensors(output: Any, known: bool) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors in ``output`` that the loss is applied to, and a function that puts others in their place."""
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


def _require_only_through_output(terms: ForwardLoss, loss: Tensor, name: str) -> None:
    if not loss.requires_grad:
        raise ProblemError(
            f"For operator={name!r} the loss must depend on the model's output, and that on the chosen parameters, but "
            "it does not. Check params=, and that neither model nor loss runs under no_grad or detaches its output."
        )
    own = torch.autograd.grad(loss, terms.params, retain_graph=True, allow_unused=True)
    if any(g is not None for g in own):
        raise ProblemError(
            f"The loss must see the weights through the model's output alone for operator={name!r}, but it reads them "
            "itself or takes a loss from the output. Pass penalties as weight_decay=, or operator='hessian'."
        )


def _require_unchanged(link: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> None:
    for z in tensors:
        same = link(z.detach())
        if same is not z and not torch.allclose(same, z.detach(), rtol=1e-3, atol=1e-3):
            raise ProblemError(
                "The output must hold log-probabilities for this loss, but their exponentials do not sum to 1. "
                "End the model with log_softmax, or use CrossEntropyLoss."
            )
