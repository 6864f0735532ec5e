"""The Fisher matrix, with targets drawn from the model, and the empirical Fisher, with those of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope.errors import ProblemError
from sharpscope.objective.data import MicroBatch
from sharpscope.objective.forward import LossTerms
from sharpscope.objective.graph import Curvature, Graph
from sharpscope.operators.jacobian import COST, OutputMatrix, Split, graph_through_output, tangent

NAME, EMPIRICAL = "fisher", "empirical-fisher"


def fisher(seed: int) -> Curvature:
    """``F = sum_i f_i s_i s_i' / sum_i a_i``, ``s_i`` the gradient of ``-log p(y_i | x_i, w)`` at one drawn ``y_i``.

    p is categorical for cross_entropy and nll, Bernoulli for bce_with_logits, and for mse normal with variance 1/2,
    of which the squared error is the ``-log p``. ``f_i`` is ``a_i``, or what it must be with label smoothing or
    pos_weight, so that the expectation of F over draws is the Gauss-Newton matrix of the loss. An example's draw is a
    function of ``seed`` and its place in the data: the same in every pass and every micro-batch.
    Cost: 1 gradient, and 4/3 a product.

    Raises: ProblemError for a loss that states no distribution.
    """

    def graph(terms: LossTerms, part: MicroBatch, keep: bool) -> Graph:
        return graph_through_output(terms, part, keep, lambda terms, split: _drawn(terms, split, seed), NAME)

    return Curvature(NAME, "Fisher matrix", graph, COST, tangent=tangent)


def _drawn(terms: LossTerms, split: Split, seed: int) -> OutputMatrix:
    likelihood = terms.loss.likelihood
    if likelihood is None:
        raise ProblemError(
            f"operator={NAME!r} draws targets from the distribution that the loss states, and {terms.loss.name} states "
            "none. Use cross_entropy, nll, mse or bce_with_logits, or operator='ggn'."
        )
    z = split.outputs[0].detach()
    scale = likelihood.curvature_weight(z, split.target) * split.part.scale
    shape = z.shape if likelihood.dim is None else z.narrow(likelihood.dim, 0, 1).shape
    score = likelihood.score(z, likelihood.draw(z, uniform(seed, split.part, shape)))

    def push(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return [score * (scale * likelihood.inner(score, tangents[0]))]

    return push


def empirical_fisher(terms: LossTerms, part: MicroBatch, keep: bool) -> Graph:
    """``E = sum_i a_i g_i g_i' / sum_i a_i``, ``g_i`` the gradient of the loss ``l_i`` of term i at the data's target.

    Not the Fisher, nor near it away from a good fit (Kunstner et al. 2019). The terms of a known loss are those that it
    counts; of another, the examples, which that loss must not compare with each other.
    Cost: 1 gradient, and 4/3 a product.

    Raises: ProblemError for a loss with terms(batch), whose single terms are not known, or one of the examples of an
    output that has not one row an example.
    """
    return graph_through_output(terms, part, keep, _outer_products, EMPIRICAL)


def _outer_products(terms: LossTerms, split: Split) -> OutputMatrix:
    slope, likelihood = split.slopes[0].detach(), terms.loss.likelihood
    if likelihood is not None:
        weight = likelihood.weight(split.outputs[0].detach(), split.target) * split.part.scale
        if not terms.checked and bool(((weight == 0) & (likelihood.inner(slope, slope) != 0)).any()):
            raise ProblemError(
                "Every term of a loss must have a positive weight where its gradient is not zero: label smoothing "
                f"gives a loss to labels of class weight 0. operator={EMPIRICAL!r} is infinite there."
            )
        # slope is a_i times g_i; a term without weight has no slope either.
        inverse = torch.where(weight == 0, weight, 1 / weight)

        def push(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
            return [slope * (inverse * likelihood.inner(slope, tangents[0]))]

        return push
    if terms.loss.has_terms_method or len(split.slopes) != 1 or slope.shape[:1] != (split.part.size,):
        raise ProblemError(
            f"operator={EMPIRICAL!r} needs each loss term's gradient, but {terms.loss.name} gives only their mean. "
            "Use a loss that is known here, or one that is a mean over the rows of one output tensor."
        )

    def rows(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        along = (slope * tangents[0]).flatten(1).sum(1) if slope.dim() > 1 else slope * tangents[0]
        return [slope * along.reshape(-1, *[1] * (slope.dim() - 1)) / split.part.scale]

    return rows


EMPIRICAL_FISHER = Curvature(EMPIRICAL, "empirical Fisher matrix", empirical_fisher, COST, tangent=tangent)


# The multipliers and the increment of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_STEP = -0x61C8864680B583EB
# Uniform numbers have 24 significant bits, so that every dtype holds the same ones, and none is 0 or 1.
_BITS = 23


def uniform(seed: int, part: MicroBatch, shape: torch.Size) -> Tensor:
    """Independent uniform numbers in (0, 1), float64 on the CPU, the same for an example however the data are cut.

    ``shape`` has one row an example. Where it has not, the batch is one that cannot be cut, and is drawn as a whole.
    """
    batches, examples = [], []
    for batch, start, count in part.sources:
        batches.append(torch.full((count,), batch))
        examples.append(torch.arange(start, start + count))
    rows = _mixed(_mixed(torch.cat(batches) + seed) + torch.cat(examples))
    if not shape or shape[0] != part.size:
        rows, columns = rows[:1], shape.numel()
    else:
        columns = shape[1:].numel()
    bits = _mixed(rows[:, None] + torch.arange(columns)).reshape(shape)
    numbers: Tensor = (_shifted(bits, 64 - _BITS).double() + 0.5) / 2**_BITS
    return numbers


def _mixed(value: Tensor) -> Tensor:
    """SplitMix64's output function; torch's integers wrap around as it needs."""
    value = (value + 1) * _STEP
    for shift, factor in _MIX:
        value = (value ^ _shifted(value, shift)) * factor
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's own carries the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)
