"""How much each example curves the loss, from the model's output alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.objective.data import MicroBatch
from sharpscope.objective.forward import LossTerms
from sharpscope.objective.losses import output_tensor


@dataclass(frozen=True)
class Look:
    """What a forward pass shows of one micro-batch.

    Attributes:
        loss, weight: ``sum_i a_i l_i`` and ``sum_i a_i``.
        slopes: each example's ``||dl/dz||`` in the output z, and ``curvatures``: its ``||d2l/dz2 u||`` for a random
            sign vector u; zeros where the loss has none, or its output is no tensor with a row for each example.
    """

    loss: Tensor
    weight: Tensor
    slopes: Tensor
    curvatures: Tensor


def look(terms: LossTerms, part: MicroBatch, generator: torch.Generator) -> Look:
    """The loss of a micro-batch and its derivatives in the model's output; cost one forward pass."""
    output, target, batch = terms.bare(lambda: terms.forward(part))
    known = output_tensor(output) if terms.loss.counted else output
    none = torch.zeros(part.size, device=terms.device)
    if not isinstance(known, Tensor) or not known.dim() or len(known) != part.size or not known.is_floating_point():
        value, weight = terms.bare(lambda: terms.sums(part))  # anew: the loss may differentiate through the model
        return Look(value.detach(), weight, none, none)
    z = known.detach().requires_grad_()
    link = terms.loss.likelihood.link if terms.loss.likelihood is not None else torch.clone
    value, weight = terms.sums_of(part, link(z).clone(), target, batch)
    if not value.requires_grad:
        return Look(value, weight, none, none)
    (slope,) = torch.autograd.grad(value, z, create_graph=True, materialize_grads=True)
    bent = torch.zeros_like(z)
    if slope.requires_grad:
        signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
        (bent,) = torch.autograd.grad(slope, z, signs, materialize_grads=True)
    rows = (t.detach().reshape(part.size, -1).float().norm(dim=1) for t in (slope, bent))
    return Look(value.detach(), weight.detach(), *rows)
