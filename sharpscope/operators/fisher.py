"""The Fisher matrix, with targets sampled from the model, and the empirical Fisher, with the targets of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope.errors import ProblemError
from sharpscope.objective.curvature_interface import Curvature, Graph
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.micro_batches import MicroBatch
from sharpscope.operators.jacobian import COST, OutputMatrix, Split, graph_through_output, tangent

NAME, EMPIRICAL = "fisher", "empirical-fisher"


def fisher(seed: int) -> Curvature:
    """``F = sum_i f_i s_i s_i' / sum_i a_i``, ``s_i`` the gradient of ``-log p(y_i | x_i, w)`` at one sampled ``y_i``.

    p is categorical for cross_entropy and nll, Bernoulli for bce_with_logits, and normal with variance 1/2 for mse,
    whose ``-log p`` is the squared error. The weight ``f_i`` is ``a_i``, adjusted for label smoothing and pos_weight
    so that the expectation of F over samples is the Gauss-Newton matrix of the loss. The sample of an example depends
    on ``seed`` and its position in the data only: it is the same in every pass and for every micro-batch size.

    Raises: ProblemError for a loss without a known distribution.

    Cost: 1 gradient, and 4/3 a product.
    """

    def graph(terms: ForwardLoss, batch: MicroBatch, keep: bool) -> Graph:
        return graph_through_output(terms, batch, keep, lambda terms, split: _sampled_scores(terms, split, seed), NAME)

    return Curvature(NAME, "Fisher matrix", graph, COST, tangent=tangent)


def _sampled_scores(terms: ForwardLoss, split: Split, seed: int) -> OutputMatrix:
    likelihood = terms.loss.likelihood
    if likelihood is None:
        raise ProblemError(
            f"operator={NAME!r} draws targets from the distribution that the loss states, and {terms.loss.name} states "
            "none. Use cross_entropy, nll, mse or bce_with_logits, or operator='ggn'."
        )
    z = split.outputs[0].detach()
    scale = likelihood.curvature_weight(z, split.target) * split.batch.scale
    shape = z.shape if likelihood.dim is None else z.narrow(likelihood.dim, 0, 1).shape
    score = likelihood.score(z, likelihood.draw(z, uniform(seed, split.batch, shape)))

    def multiply(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return [score * (scale * likelihood.inner(score, tangents[0]))]

    return multiply


def empirical_fisher(terms: ForwardLoss, batch: MicroBatch, keep: bool) -> Graph:
    """``E = sum_i a_i g_i g_i' / sum_i a_i``, ``g_i`` the gradient of the loss ``l_i`` of term i at the data's target.

    Not an approximation of the Fisher matrix except near a good fit (Kunstner et al. 2019). The terms are those of a
    known loss: each element of the output for MSE and BCE, each label or token for cross-entropy. For any other loss
    they are the examples, which must contribute to it independently. Per example, as other tools define it, E of MSE
    and BCE with several outputs is another matrix: wrap the loss in a function, and its terms are the examples.

    Raises: ProblemError for a loss with terms(batch), whose single terms are not known, and for an unknown loss whose
        output does not have one row per example.

    Cost: 1 gradient, and 4/3 a product.
    """
    return graph_through_output(terms, batch, keep, _outer_products, EMPIRICAL)


def _outer_products(terms: ForwardLoss, split: Split) -> OutputMatrix:
    gradient, likelihood = split.output_gradients[0].detach(), terms.loss.likelihood
    if likelihood is not None:
        weight = likelihood.weight(split.outputs[0].detach(), split.target) * split.batch.scale
        if not terms.checked and bool(((weight == 0) & (likelihood.inner(gradient, gradient) != 0)).any()):
            raise ProblemError(
                "Every term of a loss must have a positive weight where its gradient is not zero: label smoothing "
                f"gives a loss to labels of class weight 0. operator={EMPIRICAL!r} is infinite there."
            )
        # gradient is a_i g_i; a term of weight zero has a zero gradient.
        inverse = torch.where(weight == 0, weight, 1 / weight)

        def multiply(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
            return [gradient * (inverse * likelihood.inner(gradient, tangents[0]))]

        return multiply
    if terms.loss.has_terms_method or len(split.output_gradients) != 1 or gradient.shape[:1] != (split.batch.size,):
        raise ProblemError(
            f"operator={EMPIRICAL!r} needs each loss term's gradient, but {terms.loss.name} gives only their mean. "
            "Use a loss that is known here, or one that is a mean over the rows of one output tensor."
        )

    def multiply_rows(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        projection = (gradient * tangents[0]).flatten(1).sum(1) if gradient.dim() > 1 else gradient * tangents[0]
        return [gradient * projection.reshape(-1, *[1] * (gradient.dim() - 1)) / split.batch.scale]

    return multiply_rows


EMPIRICAL_FISHER = Curvature(EMPIRICAL, "empirical Fisher matrix", empirical_fisher, COST, tangent=tangent)


# The multipliers and the increment of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_STEP = -0x61C8864680B583EB
# Uniform numbers have 24 significant bits, so that they are exact in float32, and none is 0 or 1.
_BITS = 23


def uniform(seed: int, micro_batch: MicroBatch, shape: torch.Size) -> Tensor:
    """Independent uniform numbers in (0, 1), float64 on the CPU, that depend on the example and not on the micro-batch.

    ``shape`` has one row per example. Where it does not, the batch cannot be cut, and gets numbers as a whole.
    """
    batches, examples = [], []
    for batch, start, count in micro_batch.sources:
        batches.append(torch.full((count,), batch))
        examples.append(torch.arange(start, start + count))
    rows = _splitmix64(_splitmix64(torch.cat(batches) + seed) + torch.cat(examples))
    if not shape or shape[0] != micro_batch.size:
        rows, columns = rows[:1], shape.numel()
    else:
        columns = shape[1:].numel()
    bits = _splitmix64(rows[:, None] + torch.arange(columns)).reshape(shape)
    numbers: Tensor = (_logical_shift_right(bits, 64 - _BITS).double() + 0.5) / 2**_BITS
    return numbers


def _splitmix64(value: Tensor) -> Tensor:
    """The output function of SplitMix64; torch's integers overflow by wrapping around, as it requires."""
    value = (value + 1) * _STEP
    for shift, factor in _MIX:
        value = (value ^ _logical_shift_right(value, shift)) * factor
    return value ^ _logical_shift_right(value, 31)


def _logical_shift_right(value: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros; torch's own shift is arithmetic."""
    return (value >> by) & ((1 << (64 - by)) - 1)
