"""Mean loss, gradient and accuracy of a subset of the data at the current weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, DataError
from sharpscope.objective import Objective
from sharpscope.objective.cost_and_out_of_memory import FORWARD, OOMHalving
from sharpscope.objective.micro_batches import MicroBatch, map_tensors, micro_batches, rows
from sharpscope.precision import wide

# Examples per autograd graph where the objective does not set a micro-batch size.
EXAMPLES_PER_GRAPH = 256


class SubsetLoss:
    """``L_b(w) = sum_i a_i l_i(w) / sum_i a_i`` over the micro-batches of a subset b, plus the problem's weight decay.

    Use within ``objective.measuring()``. Costs are counted in ``objective.gradients``. Memory: the graph of one
    micro-batch.

    Args:
        objective: the loss of all the data.
        batches: called for each evaluation; returns the subset's micro-batches.
        examples: number of examples in the subset.
    """

    def __init__(self, objective: Objective, batches: Callable[[], Iterable[MicroBatch]], examples: int) -> None:
        self._objective, self._batches, self.examples = objective, batches, examples
        fixed = "BatchNorm takes its statistics from the batch" if objective.keeps_batches else ""
        self._oom = OOMHalving(fixed=fixed, device=objective.device)

    @property
    def params(self) -> list[Tensor]:
        """The parameters w."""
        return self._objective.terms.params

    @property
    def single_batch(self) -> MicroBatch | None:
        """The subset as one micro-batch; None if it consists of several."""
        first, *others = self._batches()
        return None if others else first

    @torch.no_grad()
    def value(self) -> float:
        """Evaluate ``L_b``; NaN if it has no loss terms. Cost: a forward pass (FORWARD gradients)."""
        loss = torch.zeros((), dtype=wide(self._objective.device), device=self._objective.device)
        weight = torch.zeros_like(loss)
        for batch in self._batches():
            for value, terms in self._oom.run(batch, self._loss_sum):
                loss += value
                weight += terms
        self._objective.add_cost(FORWARD * self.examples)
        return float(loss / weight) + self._objective.terms.decay()

    def gradient(self) -> tuple[float, list[Tensor]]:
        """Evaluate ``L_b`` and its gradient, a tensor for each of ``params``. Cost: a gradient over the subset."""
        loss = torch.zeros((), dtype=wide(self._objective.device), device=self._objective.device)
        weight, sums = torch.zeros_like(loss), [torch.zeros_like(p) for p in self.params]
        for batch in self._batches():
            for value, terms, grads in self._oom.run(batch, self._gradient_sum):
                loss += value
                weight += terms
                torch._foreach_add_(sums, grads)
        torch._foreach_div_(sums, weight.to(self._objective.dtype))
        if self._objective.problem.weight_decay:
            torch._foreach_add_(sums, [p.detach() for p in self.params], alpha=self._objective.problem.weight_decay)
        return float(loss / weight) + self._objective.terms.decay(), sums

    @torch.no_grad()
    def accuracy(self) -> float:
        """Evaluate the fraction of targets that have the largest output. Cost: as ``value``.

        Raises: ArgumentError for a loss without classes.
        """
        correct = counted = torch.zeros((), dtype=torch.long, device=self._objective.device)
        for batch in self._batches():
            for right, labelled in self._oom.run(batch, self._correct):
                correct, counted = correct + right, counted + labelled
        self._objective.add_cost(FORWARD * self.examples)
        return float(correct) / max(1, int(counted))

    def _loss_sum(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        value, weight = self._objective.terms.without_graph(lambda: self._objective.terms.sums(batch))
        return value.detach(), weight

    def _gradient_sum(self, batch: MicroBatch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            graph = self._objective.graph(batch, keep=False)
        return graph.loss, graph.weight, tuple(graph.gradient)

    def _correct(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        output, target, _ = self._objective.terms.forward(batch)
        require_classes(self._objective)
        if not isinstance(target, Tensor) or target.is_floating_point():
            raise ArgumentError("An accuracy needs labels, got probabilities. Leave pac-bayes out.")
        return self._objective.terms.count_correct(output, target)


def require_classes(objective: Objective) -> None:
    """Raise ArgumentError unless the loss is a classification loss."""
    if objective.terms.loss.ignore_index is None:
        raise ArgumentError(
            f"An accuracy needs labels and a loss of classes (cross_entropy, nll), got {objective.loss_name}. Leave "
            "pac-bayes out."
        )


def disjoint_subsets(objective: Objective, m: int | None, generator: torch.Generator) -> Iterator[SubsetLoss]:
    """Disjoint subsets of m examples, in random order if the data are one batch in memory, else in the loader's order.

    A last subset of fewer examples is dropped. m=None yields one subset of all examples.

    Raises: ArgumentError for fewer than m examples; DataError for batches that cannot be split by examples.
    """
    size = examples_per_graph(objective)
    if m is None:
        yield full_loss(objective)
        return
    if objective.keeps_batches:
        raise ArgumentError(
            "Subsets of m examples need a loss that is the same in every batch, but BatchNorm takes its statistics "
            "from the batch. Measure in eval mode."
        )
    single_batch, found = is_single_batch(objective.data), False
    chunks: list[MicroBatch] = []
    for batch in micro_batches(_shuffled(objective.data, generator) if single_batch else objective.data, m):
        if not batch.splittable:
            raise DataError(f"Subsets of m = {m} examples need batches that can be cut by examples. Pass tensors.")
        start = 0
        while start < batch.size:
            count = min(m - sum(chunk.size for chunk in chunks), batch.size - start)
            chunk = batch if count == batch.size else batch.slice(start, start + count)
            # Cloned, since a loader may reuse its tensors for the next batch.
            chunks.append(chunk if single_batch else replace(chunk, batch=map_tensors(chunk.batch, torch.clone)))
            start += count
            if sum(chunk.size for chunk in chunks) == m:
                found = True
                yield _subset(objective, chunks, size)
                chunks = []
    if not found:
        raise ArgumentError(f"m must be at most the number of examples, got {m}.")


def full_loss(objective: Objective) -> SubsetLoss:
    """The loss of all the data; each evaluation is a pass."""
    size = None if objective.keeps_batches else examples_per_graph(objective)

    def batches() -> Iterator[MicroBatch]:
        objective.cost_counter.passes += 1
        return micro_batches(objective.data, size)

    assert objective.num_examples is not None
    return SubsetLoss(objective, batches, objective.num_examples)


def _subset(objective: Objective, chunks: list[MicroBatch], size: int) -> SubsetLoss:
    """The loss of ``chunks``; there are several if batches are padded to different lengths and cannot be joined."""
    batches = [batch for chunk in chunks for batch in chunk.split(size)]
    return SubsetLoss(objective, lambda: batches, sum(batch.size for batch in batches))


def examples_per_graph(objective: Objective) -> int:
    """Number of examples per autograd graph."""
    return objective.micro_batch if isinstance(objective.micro_batch, int) else EXAMPLES_PER_GRAPH


def is_single_batch(data: Any) -> bool:
    """Whether the data are one batch in memory, which can be split by examples."""
    if not isinstance(data, list) or len(data) != 1:
        return False
    part = next(micro_batches(data, None), None)
    return part is not None and part.splittable


def _shuffled(data: Any, generator: torch.Generator) -> list[Any]:
    """The one batch of ``data``, its examples in random order."""
    part = next(micro_batches(data, None))
    order = torch.randperm(part.size, generator=generator)
    return [rows(part.batch, order)]
