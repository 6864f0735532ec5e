"""Gradient and Hessian-vector products of a sum over micro-batches, by double backprop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.batches import MicroBatch
from sharpscope.errors import ProblemError
from sharpscope.params import views
from sharpscope.precision import wide

# Costs in gradients (forward and backward): a gradient on a graph that is kept, and a product on that graph.
GRADIENT, PRODUCT = 1.0, 2.0


@dataclass(frozen=True)
class Sums:
    """Sums over examples, not means.

    Attributes:
        loss: ``sum_i a_i l_i``, and ``weight``: ``sum_i a_i``, both in float64 where the device has it.
        gradient: (n,), and ``products``: (K, n), of the loss.
        spread: the sum of the micro-batches' gradient norms: what rounding errors of the gradient are relative to.
        examples: their number.
    """

    loss: Tensor
    weight: Tensor
    gradient: Tensor
    products: Tensor
    spread: Tensor
    examples: int

    @property
    def finite(self) -> bool:
        """Whether loss, gradient and products are all finite."""
        return all(bool(torch.isfinite(t).all()) for t in (self.loss, self.gradient, self.products))


def accumulate(
    term_sums: Callable[[MicroBatch], tuple[Tensor, Tensor]],
    parts: Iterable[MicroBatch],
    params: Sequence[Tensor],
    block: Tensor,
    progress: Callable[[int], None] | None = None,
) -> Sums:
    """Loss, gradient and Hessian products with the rows of ``block`` (K, n), summed over ``parts``.

    ``term_sums(part)`` is the pair ``(sum_i a_i l_i, sum_i a_i)``. Each part's graph is built once, every row goes
    through it, and it is freed. Cost: 1 + 2K gradients.

    Raises: ProblemError when an operation has no second derivative, or the loss does not depend on ``params``.
    """
    count, device = len(block), block.device
    loss = torch.zeros((), dtype=wide(device), device=device)
    weight, spread = torch.zeros_like(loss), torch.zeros_like(loss)
    sums = torch.zeros(1 + count, block.shape[1], dtype=block.dtype, device=device)
    targets = [views(row, params) for row in sums]
    vectors = [views(row, params) for row in block]
    examples = 0
    for part in parts:
        with _derivative_errors():
            value, terms = term_sums(part)
            examples += part.size
            if not value.requires_grad and not float(terms):
                continue  # no loss terms in this part, so no graph either
            # materialize_grads: a parameter that the loss does not use has zero curvature, it is no error.
            grads = torch.autograd.grad(value, params, create_graph=count > 0, materialize_grads=True)
            detached = [g.detach() for g in grads]
            torch._foreach_add_(targets[0], detached)
            live = [i for i, g in enumerate(grads) if g.requires_grad]
            for k in range(count if live else 0):
                products = torch.autograd.grad(
                    [grads[i] for i in live],
                    params,
                    [vectors[k][i] for i in live],
                    retain_graph=k + 1 < count,
                    materialize_grads=True,
                )
                torch._foreach_add_(targets[1 + k], list(products))
        loss += value.detach()
        weight += terms
        spread += torch.stack(torch._foreach_norm(detached)).to(loss).norm()
        if progress is not None:
            progress(examples)
    return Sums(loss, weight, sums[0], sums[1:], spread, examples)


@contextmanager
def _derivative_errors() -> Iterator[None]:
    """What torch says of a model that cannot be differentiated twice, as a ProblemError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "does not require grad" in text:
            raise ProblemError(
                "The loss must depend on the chosen parameters, but it does not. Check params=, and that neither model "
                "nor loss runs under no_grad or detaches its output."
            ) from error
        if "derivative for" in text or "once_differentiable" in text or "double backward" in text.lower():
            raise ProblemError(
                f"The model must have a second derivative, but torch says: {text.splitlines()[0]} "
                "Replace that operation by one that can be differentiated twice."
            ) from error
        raise
