"""The examples on which the rounding of float32 is measured: some at random, and those of the largest outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from sharpscope.objective import Objective
from sharpscope.objective.audit import ROUNDING_EXAMPLES, float32_rounding
from sharpscope.objective.cost_and_out_of_memory import OOMHalving
from sharpscope.objective.losses import output_tensor
from sharpscope.objective.micro_batches import MicroBatch, as_batches, micro_batches, rows
from sharpscope.sampling.subsample import count_examples, random_subset

# Random examples, and those of the largest outputs: with the forward pass they cost what 256 examples cost at k = 5.
RANDOM, LARGEST = 176, 48

# Examples up to which the outputs of all are compared, and the cost of that in gradients.
MAX_COMPARED, FORWARD_COST = 4096, 1 / 3

# Safety factor on the rounding error measured on some examples: on others it may be larger.
FLOAT32_SAFETY = 4.0

T = TypeVar("T")


def float32_error(objective: Objective, vectors: Tensor, generator: torch.Generator) -> float:
    """Error of ``v'Hv``, for each of ``vectors`` (n, k), from the model's float32 arithmetic; 0 in float64.

    Cost: ``1 + 2k`` gradients of at most ROUNDING_EXAMPLES examples, twice, and that of ``rounding_sample``.
    """
    if objective.dtype != torch.float32:
        return 0.0
    return FLOAT32_SAFETY * float32_rounding(objective, vectors, rounding_sample(objective, generator))


def rounding_sample(objective: Objective, generator: torch.Generator) -> list[list[MicroBatch]]:
    """RANDOM examples of all the data, and the LARGEST by ``max |z|``, z the model's output, in batches of each.

    A softmax resolves p to about ``eps |z|``: examples with large logits, the saturated ones, have the largest errors.
    The first examples alone where there are no more than ROUNDING_EXAMPLES; where there are more than MAX_COMPARED,
    only the random ones. Where batches cannot be cut, one at random and the one of the largest output.

    Cost: FORWARD_COST gradients of up to MAX_COMPARED examples; a walk over larger data whose examples have no index.
    """
    total, first = objective.num_examples, objective.first_examples(ROUNDING_EXAMPLES)
    if total is not None and total <= ROUNDING_EXAMPLES:
        return [[first]]
    cut = first.splittable and not objective.keeps_batches
    if cut and total is not None and total > MAX_COMPARED and count_examples(objective.problem.data) == total:
        seed = int(torch.randint(2**62, (), generator=generator))
        data = as_batches(random_subset(objective.problem.data, RANDOM, seed))
        return [list(micro_batches(data, objective.choose_micro_batch()))]
    chosen, extreme = (_Highest(count if cut else 1, cut) for count in (RANDOM, LARGEST))
    compare, memory = total is not None and total <= MAX_COMPARED, OOMHalving(device=objective.device)
    for whole in micro_batches(objective.data, objective.choose_micro_batch()):
        chosen.add(whole, torch.rand(chosen.units(whole), generator=generator, dtype=torch.float64))
        if compare:
            measured = memory.run if extreme.units(whole) == whole.size else _at_once
            for batch, sizes in measured(whole, lambda batch: (batch, _output_sizes(objective, batch))):
                extreme.add(batch, sizes if extreme.units(batch) == batch.size else sizes.amax(0, keepdim=True))
                objective.add_cost(batch.size * FORWARD_COST)
    found = [highest.batches for highest in (chosen, extreme) if highest.batches]
    if not cut:
        return found
    step = objective.choose_micro_batch()  # the copies of few examples each, joined again
    return [list(micro_batches([batch.batch for batch in batches], step)) for batches in found]


def _at_once(batch: MicroBatch, work: Callable[[MicroBatch], T]) -> list[T]:
    return [work(batch)]


def _output_sizes(objective: Objective, batch: MicroBatch) -> Tensor:
    """``max |z|`` of each example, float64 on the CPU; 0 where the output has no row for each."""
    output, _, _ = objective.terms.without_graph(lambda: objective.terms.forward(batch))
    z = output_tensor(output) if objective.terms.loss.counts_terms else output
    if not isinstance(z, Tensor) or not z.numel() or not z.dim() or len(z) != batch.size:
        return torch.zeros(batch.size, dtype=torch.float64)
    return z.detach().abs().reshape(batch.size, -1).amax(1).double().cpu()


@dataclass
class _Highest:
    """Copies of the ``count`` examples of highest key so far, or of as many batches where these are not to be cut."""

    count: int
    cut: bool
    batches: list[MicroBatch] = field(default_factory=list)
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def units(self, batch: MicroBatch) -> int:
        """How many keys the batch has."""
        return batch.size if self.cut and batch.splittable else 1

    def add(self, batch: MicroBatch, keys: Tensor) -> None:
        """Add the examples of ``batch``, and drop those that are no longer among the highest."""
        joined, start = torch.cat([self.keys, keys]), 0
        highest = joined.topk(min(self.count, len(joined))).indices.sort().values
        kept = []
        for one in (*self.batches, batch):
            units = self.units(one)
            inside = highest[(highest >= start) & (highest < start + units)] - start
            start += units
            if len(inside):  # copies, since a loader may reuse the memory of its batches
                one = MicroBatch(rows(one.batch, inside), len(inside), ()) if self.cut and one.splittable else one
                kept.append(one)
        self.batches, self.keys = kept, joined[highest]
