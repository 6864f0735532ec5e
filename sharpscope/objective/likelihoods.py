"""The distribution of targets whose negative log-likelihood a known loss is, term by term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Likelihood:
    """``-log p(y | z)`` of one loss term, z its share of the output.

    Shapes: "of terms" is that of the output with ``dim`` of size 1, or the output's own where ``dim`` is None.

    Attributes:
        dim: the output's dimension that belongs to one term, None where each element is a term.
        weight: ``weight(output, target)``: ``a_i``, of terms.
        mass: ``mass(output, target)``: the factor ``f_i`` with which term i's curvature in z is that of ``-log p``.
            It is not ``a_i`` where the curvature depends on the target: label smoothing with class weights, pos_weight.
        draw: ``draw(output, uniform)``: a target drawn from p by uniform numbers, of terms.
        score: ``score(output, drawn)``: the derivative of ``-log p(drawn | z)`` in z, like the output.
        link: what the output passes through before the loss without being changed by it.
    """

    dim: int | None
    weight: Terms
    mass: Terms
    draw: Terms
    score: Terms
    link: Callable[[Tensor], Tensor] = lambda output: output

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        """The inner product over each term's share of the output, of terms."""
        product = left * right
        return product if self.dim is None else product.sum(self.dim, keepdim=True)


def categorical(
    weight: Tensor | None, ignore_index: int, label_smoothing: float = 0.0, logarithms: bool = False, dim: int = 1
) -> Likelihood:
    """y is class c with probability softmax(z)_c; f_i is the total weight of the classes in the target.

    ``logarithms``: the output holds log-probabilities, which log_softmax does not change. ``dim`` is that of classes.
    Its ``weight`` is, term by term, what ``losses._total_label_weight`` sums.
    """

    def of(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
        scale = torch.ones(output.shape[dim]).to(output) if weight is None else weight.detach().to(output)
        if target.is_floating_point():
            smooth = target * (1 - smoothing) + smoothing / output.shape[dim]
            return (smooth.movedim(dim, -1) @ scale).unsqueeze(dim)
        counted = target != ignore_index
        label = scale[target.long().clamp(0, len(scale) - 1)]
        return (((1 - smoothing) * label + smoothing * scale.mean()) * counted).unsqueeze(dim)

    def weights(output: Tensor, target: Tensor) -> Tensor:
        # torch divides class probabilities by the examples, weighted or not.
        return torch.ones_like(output.narrow(dim, 0, 1)) if target.is_floating_point() else of(output, target, 0.0)

    def draw(output: Tensor, uniform: Tensor) -> Tensor:
        below = torch.softmax(output, dim).cumsum(dim) < uniform.to(output)
        return below.sum(dim, keepdim=True).clamp(max=output.shape[dim] - 1)

    def score(output: Tensor, drawn: Tensor) -> Tensor:
        return torch.softmax(output, dim).scatter_add(dim, drawn, torch.full_like(output.narrow(dim, 0, 1), -1.0))

    link = (lambda output: F.log_softmax(output, dim)) if logarithms else (lambda output: output)
    return Likelihood(dim, weights, lambda o, t: of(o, t, label_smoothing), draw, score, link)


def gaussian() -> Likelihood:
    """y is normal with mean z and variance 1/2, of which the squared error ``(z - y)^2`` is the ``-log p``."""
    return Likelihood(
        None,
        lambda output, target: torch.ones_like(output),
        lambda output, target: torch.ones_like(output),
        lambda output, uniform: output + (torch.special.ndtri(uniform) * 0.5**0.5).to(output),
        lambda output, drawn: 2 * (output - drawn),
    )


def bernoulli(weight: Tensor | None, pos_weight: Tensor | None) -> Likelihood:
    """y is 1 with probability sigmoid(z), else 0; f_i is the element's weight, times 1 + (pos_weight - 1) target."""

    def mass(output: Tensor, target: Tensor) -> Tensor:
        factor = torch.ones_like(output)
        if pos_weight is not None:
            factor = 1 + (pos_weight.detach().to(output) - 1) * target.to(output)
        return factor if weight is None else factor * weight.detach().to(output)

    return Likelihood(
        None,
        lambda output, target: torch.ones_like(output),  # torch's mean divides by the elements, not by their weights
        mass,
        lambda output, uniform: (uniform.to(output) < torch.sigmoid(output)).to(output),
        lambda output, drawn: torch.sigmoid(output) - drawn,
    )
