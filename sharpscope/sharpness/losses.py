"""The mean loss of some examples at whatever the weights now are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, DataError
from sharpscope.objective import Objective
from sharpscope.objective.data import MicroBatch, map_tensors, micro_batches, rows
from sharpscope.objective.guards import FORWARD, OOMHalving
from sharpscope.precision import wide

# Examples a graph where the objective keeps none of its own.
PIECE = 256


class LossOn:
    """``L_b(w) = sum_i a_i l_i(w) / sum_i a_i`` over the examples of ``parts()``, with the weight decay if asked for.

    To be used within ``objective.measuring()``; everything is counted in ``objective.gradients``. Memory: the graph of
    one part.

    Attributes:
        examples: their number.
    """

    def __init__(self, objective: Objective, parts: Callable[[], Iterable[MicroBatch]], examples: int) -> None:
        self._objective, self._parts, self.examples = objective, parts, examples
        fixed = "BatchNorm takes its statistics from the batch" if objective.keeps_batches else ""
        self._room = OOMHalving(fixed=fixed, device=objective.device)

    @property
    def params(self) -> list[Tensor]:
        """The tensors that form w."""
        return self._objective.terms.params

    @property
    def part(self) -> MicroBatch | None:
        """The examples as one micro-batch, None where they are several."""
        first, *others = self._parts()
        return None if others else first

    @torch.no_grad()
    def value(self) -> float:
        """``L_b``, NaN where there are no loss terms; cost, a forward pass (FORWARD gradients) over the examples."""
        loss = torch.zeros((), dtype=wide(self._objective.device), device=self._objective.device)
        weight = torch.zeros_like(loss)
        for part in self._parts():
            for value, terms in self._room.run(part, self._summed):
                loss += value
                weight += terms
        self._objective.add_cost(FORWARD * self.examples)
        return float(loss / weight) + self._objective.terms.decay()

    def gradient(self) -> tuple[float, list[Tensor]]:
        """``L_b`` and its gradient, a tensor for each of ``params``; cost, a gradient over the examples."""
        loss = torch.zeros((), dtype=wide(self._objective.device), device=self._objective.device)
        weight, sums = torch.zeros_like(loss), [torch.zeros_like(p) for p in self.params]
        for part in self._parts():
            for value, terms, grads in self._room.run(part, self._differentiated):
                loss += value
                weight += terms
                torch._foreach_add_(sums, grads)
        torch._foreach_div_(sums, weight.to(self._objective.dtype))
        if self._objective.problem.weight_decay:
            own = [p.detach() for p in self.params]
            torch._foreach_add_(sums, own, alpha=self._objective.problem.weight_decay)
        return float(loss / weight) + self._objective.terms.decay(), sums

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of targets that are the largest output's place; cost as ``value``.

        Raises: ArgumentError for a loss without classes.
        """
        correct = counted = torch.zeros((), dtype=torch.long, device=self._objective.device)
        for part in self._parts():
            for right, known in self._room.run(part, self._right):
                correct, counted = correct + right, counted + known
        self._objective.add_cost(FORWARD * self.examples)
        return float(correct) / max(1, int(counted))

    def _summed(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        value, weight = self._objective.terms.without_graph(lambda: self._objective.terms.sums(part))
        return value.detach(), weight

    def _differentiated(self, part: MicroBatch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            built = self._objective.graph(part, keep=False)
        return built.loss, built.weight, tuple(built.gradient)

    def _right(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        output, target, _ = self._objective.terms.forward(part)
        require_classes(self._objective)
        if not isinstance(target, Tensor) or target.is_floating_point():
            raise ArgumentError("An accuracy needs labels, got probabilities. Leave pac-bayes out.")
        return self._objective.terms.count_correct(output, target)


def require_classes(objective: Objective) -> None:
    """Raise ArgumentError unless the loss is of classes."""
    if objective.terms.loss.ignore_index is None:
        raise ArgumentError(
            f"An accuracy needs labels and a loss of classes (cross_entropy, nll), got {objective.loss_name}. Leave "
            "pac-bayes out."
        )


def subsets(objective: Objective, m: int | None, generator: torch.Generator) -> Iterator[LossOn]:
    """Disjoint subsets of m examples each, in random order where the data are one batch in memory, else as they come.

    A last one of fewer is left out. None is one subset of all.

    Raises: ArgumentError where there are fewer than m examples; DataError where batches cannot be cut.
    """
    size = piece_size(objective)
    if m is None:
        yield whole(objective)
        return
    if objective.keeps_batches:
        raise ArgumentError(
            "Subsets of m examples need a loss that is the same in every batch, but BatchNorm takes its statistics "
            "from the batch. Measure in eval mode."
        )
    kept, found = in_memory(objective.data), False
    pieces: list[MicroBatch] = []
    for part in micro_batches(shuffled(objective.data, generator) if kept else objective.data, m):
        if not part.splittable:
            raise DataError(f"Subsets of m = {m} examples need batches that can be cut by examples. Pass tensors.")
        start = 0
        while start < part.size:
            take = min(m - sum(piece.size for piece in pieces), part.size - start)
            piece = part if take == part.size else part.slice(start, start + take)
            # A loader may fill the same tensors again.
            pieces.append(piece if kept else replace(piece, batch=map_tensors(piece.batch, torch.clone)))
            start += take
            if sum(piece.size for piece in pieces) == m:
                found = True
                yield _subset(objective, pieces, size)
                pieces = []
    if not found:
        raise ArgumentError(f"m must be at most the number of examples, got {m}.")


def whole(objective: Objective) -> LossOn:
    """L on all the data; each value is a pass."""
    size = None if objective.keeps_batches else piece_size(objective)

    def walk() -> Iterator[MicroBatch]:
        objective.cost_counter.passes += 1
        return micro_batches(objective.data, size)

    assert objective.num_examples is not None
    return LossOn(objective, walk, objective.num_examples)


def _subset(objective: Objective, pieces: list[MicroBatch], size: int) -> LossOn:
    """The loss on ``pieces``, several where batches that are padded to other lengths cannot be joined."""
    parts = [p.slice(i, min(i + size, p.size)) if p.size > size else p for p in pieces for i in range(0, p.size, size)]
    return LossOn(objective, lambda: parts, sum(part.size for part in parts))


def piece_size(objective: Objective) -> int:
    """Examples a graph."""
    return objective.micro_batch if isinstance(objective.micro_batch, int) else PIECE


def in_memory(data: Any) -> bool:
    """Whether the data are one batch whose examples can be taken in any order."""
    if not isinstance(data, list) or len(data) != 1:
        return False
    part = next(micro_batches(data, None), None)
    return part is not None and part.splittable


def shuffled(data: Any, generator: torch.Generator) -> list[Any]:
    """The one batch of ``data``, its examples in random order."""
    part = next(micro_batches(data, None))
    order = torch.randperm(part.size, generator=generator)
    return [rows(part.batch, order)]
