"""A weighted sample of the data whose curvature approximates that of all the data at a fraction of the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import MAX_CACHED_BYTES, CachedGraphs
from sharpscope.objective.cost_and_out_of_memory import OOMHalving
from sharpscope.objective.forward_loss import ForwardLoss
from sharpscope.objective.losses import output_tensor
from sharpscope.objective.micro_batches import MicroBatch, micro_batches, rows
from sharpscope.random_streams import stream_from

# Cost of ``output_derivatives`` in gradients: measured 0.43 to 0.46 on a small CNN, whose first layer needs no gradient
# of its input, and 0.33 on a WRN.
OUTPUT_DERIVATIVES_COST = 0.45

# Examples from which the mean norms are initialised.
WARMUP_EXAMPLES = 256

# Lower bound on the importance of an example relative to the mean. It limits the weights to its inverse, and gives
# every example a positive probability.
MIN_IMPORTANCE = 0.1

# The sample's fraction of the data, its limits in examples, and the fraction of it that forms the coarse sample. With
# 3,300 of 60,000 images the residual is 3 to 6 %, and some 25 products with them cost 3 gradients; about 25 products
# with the coarse sample come first.
FRACTION, MIN_SIZE, MAX_SIZE, COARSE_FRACTION = 0.055, 512, 8192, 1 / 6

# With fewer examples than this a sample that is large enough is no longer cheap.
MIN_DATA = 4096


class ImportanceSample:
    """Products with ``G = sum_i c_i a_i H_i / sum_i a_i`` over a weighted sample, an unbiased estimate of H.

    Args:
        objective: the objective of all the data.
        batches: micro-batches whose ``scale`` is c.
        weight: ``sum_i a_i`` over all the data.
        max_cached: number of examples whose graphs may be cached.

    Attributes:
        num_examples: number of examples in the sample.
    """

    def __init__(self, objective: Objective, batches: Sequence[MicroBatch], weight: float, max_cached: int) -> None:
        self.num_examples = sum(batch.size for batch in batches)
        self._objective = objective
        self._weight = weight
        self._graphs = CachedGraphs(
            objective.graph, batches, objective.empty_block(), OOMHalving(device=objective.device), max_cached
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """``G`` times each row of ``rows`` (K, n), within ``measuring()``.

        Cost: 2K gradients of the sample, and 1 more of the examples whose graphs are not cached.
        """
        total = self._graphs(rows) / self._weight
        if not bool(torch.isfinite(total).all()):
            self._objective.locate_nonfinite()
        if self._objective.problem.weight_decay:
            total += self._objective.problem.weight_decay * rows
        return total


def worthwhile(objective: Objective) -> bool:
    """Whether the data set is large enough for a sample to pay, and is not bound to the loader's batches."""
    count = objective.num_examples
    return count is not None and count >= MIN_DATA and not objective.keeps_batches


def default_size(objective: Objective) -> int:
    """Default number of examples in the sample."""
    return min(max(round(FRACTION * (objective.num_examples or 0)), MIN_SIZE), MAX_SIZE)


def importance_samples(
    objective: Objective, generator: torch.Generator, progress: Progress | None = None, size: int | None = None
) -> list[ImportanceSample]:
    """Draw two nested importance samples, a coarse one and one of ``size`` examples, in one pass over the data.

    Priority sampling (Duffield, Lund and Thorup 2007): the priority of an example is its importance divided by a
    uniform random number; the ``size`` examples of highest priority form the sample, with weights that make every sum
    unbiased. The importance is the mean of ``||dl/dz||`` and ``||d2l/dz2 u||`` in the model's output z, each relative
    to its running mean, at least MIN_IMPORTANCE, and rounded to a power of 2, so that examples of equal weight can
    share a graph. High-curvature examples, judged by the loss in the model's output, are always included. An example
    with high curvature only through the model's Jacobian may be missed; the solver's random probe covers that case.

    Args:
        objective: the objective of all the data.
        generator: source of the random numbers.
        progress: called with the stage "scouting".
        size: number of examples in the larger sample. Default: ``default_size(objective)``.

    Returns: the coarse and the full sample; an empty list where the data have no more than ``size`` examples, or
        batches that cannot be cut.

    Raises: DataError when a loss is not finite.

    Cost: OUTPUT_DERIVATIVES_COST gradients, and that again of the first WARMUP_EXAMPLES examples. Memory: up to three
    times ``size`` examples.
    """
    size = default_size(objective) if size is None else size
    reservoir = _Reservoir(size, generator)
    # A separate generator, so that neither random sequence depends on the micro-batch size.
    sign_generator = stream_from(generator, "signs")
    examples, weight = 0, 0.0
    with objective.measuring():
        step = objective.choose_micro_batch()
        first = objective.fit_to_memory(objective.first_examples(WARMUP_EXAMPLES))
        if not first.splittable:
            return []
        totals = output_derivatives(objective.terms, first, sign_generator).norms().sum(1, keepdim=True)
        objective.add_cost(first.size * OUTPUT_DERIVATIVES_COST)
        memory, finite = OOMHalving(device=objective.device), True
        for whole in micro_batches(objective.data, step):
            if not whole.splittable:
                return []
            for batch, derivatives in memory.run(
                whole, lambda batch: (batch, output_derivatives(objective.terms, batch, sign_generator))
            ):
                weight += float(derivatives.weight)
                finite = finite and bool(torch.isfinite(derivatives.loss))
                norms = derivatives.norms()
                sums, before = totals + norms.cumsum(1), first.size + examples + 1
                relative = norms / (sums / torch.arange(before, before + batch.size))
                totals, examples = sums[:, -1:], examples + batch.size
                # Where gradient or curvature is zero throughout, its ratio is NaN and the other one decides.
                importance = relative.nan_to_num(1.0, 1.0, 1.0).mean(0).clamp_min(MIN_IMPORTANCE)
                reservoir.add(batch, torch.exp2(torch.log2(importance).round()).double())
                objective.add_cost(batch.size * OUTPUT_DERIVATIVES_COST)
            if progress is not None:
                progress("scouting", examples, objective.num_examples)
        if not finite:
            objective.locate_nonfinite()
        objective.cost_counter.passes += 1
        if weight <= 0 or examples <= size:
            return []
        max_cached = MAX_CACHED_BYTES // max(1, objective.graph_bytes(size) // size)
        counts = max(1, round(COARSE_FRACTION * size)), size
        return [
            ImportanceSample(objective, reservoir.batches(n, step), weight, max_cached * n // sum(counts))
            for n in counts
        ]


class _Reservoir:
    """Copies of the examples of highest priority so far."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size = size
        self._generator = generator
        self._batches: list[MicroBatch] = []
        self._priorities = torch.zeros(0, dtype=torch.float64)
        self._importances = torch.zeros(0, dtype=torch.float64)

    def add(self, batch: MicroBatch, importances: Tensor) -> None:
        """Add the examples of ``batch``, and drop those that can no longer be among the highest."""
        uniform = torch.rand(batch.size, generator=self._generator, dtype=torch.float64).clamp_min(1e-300)
        # A copy, since a loader may reuse the memory of its batches.
        self._batches.append(_select(batch, torch.arange(batch.size)))
        self._priorities = torch.cat([self._priorities, importances / uniform])
        self._importances = torch.cat([self._importances, importances])
        # One more than the size, because the highest priority outside of the sample determines the weights.
        if len(self._priorities) > 2 * (self._size + 1):
            self._keep(self._priorities.topk(self._size + 1).indices.sort().values)

    def batches(self, count: int, step: int | None) -> list[MicroBatch]:
        """The ``count`` examples of highest priority, in micro-batches of at most ``step`` with one ``scale`` each."""
        order = self._priorities.topk(count + 1).indices
        threshold = float(self._priorities[order[-1]])
        chosen = order[:-1].sort().values
        scales = (threshold / self._importances[chosen]).clamp_min(1.0)
        result: list[MicroBatch] = []
        for scale in sorted(set(scales.tolist())):
            same_scale = self._examples(chosen[scales == scale])
            result += [replace(batch, scale=scale) for batch in micro_batches([b.batch for b in same_scale], step)]
        return result

    def _keep(self, indices: Tensor) -> None:
        self._batches = self._examples(indices)
        self._priorities, self._importances = self._priorities[indices], self._importances[indices]

    def _examples(self, indices: Tensor) -> list[MicroBatch]:
        """Copies of the examples at ``indices``, which count through all batches."""
        selected, start = [], 0
        for batch in self._batches:
            inside = indices[(indices >= start) & (indices < start + batch.size)] - start
            start += batch.size
            if len(inside):
                selected.append(_select(batch, inside))
        return selected


def _select(batch: MicroBatch, indices: Tensor) -> MicroBatch:
    return MicroBatch(rows(batch.batch, indices), len(indices), ())


@dataclass(frozen=True)
class OutputDerivatives:
    """The loss of one micro-batch, and the norms of its derivatives in the model's output z, example by example.

    Attributes:
        loss: ``sum_i a_i l_i``.
        weight: ``sum_i a_i``.
        gradient_norms: ``||dl/dz||`` of each example.
        curvature_norms: ``||d2l/dz2 u||`` of each example for a random sign vector u.

    The norms are zero where the loss has no such derivative, or the output is not a tensor with a row for each example.
    """

    loss: Tensor
    weight: Tensor
    gradient_norms: Tensor
    curvature_norms: Tensor

    def norms(self) -> Tensor:
        """Norms of gradients and curvatures as one tensor (2, examples), float64 on the CPU."""
        return torch.stack([self.gradient_norms, self.curvature_norms]).cpu().double()


def output_derivatives(terms: ForwardLoss, batch: MicroBatch, generator: torch.Generator) -> OutputDerivatives:
    """The loss of a micro-batch and the norms of its derivatives in the model's output; cost one forward pass."""
    output, target, inputs = terms.without_graph(lambda: terms.forward(batch))
    tensor = output_tensor(output) if terms.loss.counts_terms else output
    zeros = torch.zeros(batch.size, device=terms.device)
    if (
        not isinstance(tensor, Tensor)
        or not tensor.dim()
        or len(tensor) != batch.size
        or not tensor.is_floating_point()
    ):
        # Evaluated again, since the loss may differentiate through the model.
        loss, weight = terms.without_graph(lambda: terms.sums(batch))
        return OutputDerivatives(loss.detach(), weight, zeros, zeros)
    z = tensor.detach().requires_grad_()
    link = terms.loss.likelihood.link if terms.loss.likelihood is not None else torch.clone
    loss, weight = terms.sums_from_output(batch, link(z).clone(), target, inputs)
    if not loss.requires_grad:
        return OutputDerivatives(loss, weight, zeros, zeros)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True, materialize_grads=True)
    curvature = torch.zeros_like(z)
    if gradient.requires_grad:
        signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
        (curvature,) = torch.autograd.grad(gradient, z, signs, materialize_grads=True)
    norms = (t.detach().reshape(batch.size, -1).float().norm(dim=1) for t in (gradient, curvature))
    return OutputDerivatives(loss.detach(), weight.detach(), *norms)
