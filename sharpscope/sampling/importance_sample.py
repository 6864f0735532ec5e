"""A weighted sample of the data whose curvature resembles that of all of it, at a fraction of the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import KEPT, CachedGraphs
from sharpscope.objective.data import MicroBatch, micro_batches, rows
from sharpscope.objective.forward import LossTerms
from sharpscope.objective.guards import OOMHalving
from sharpscope.objective.losses import output_tensor

# A forward pass with the loss's slope and curvature, in gradients: 0.43 to 0.46 as measured on a small CNN, whose first
# layer needs no input's gradient, and 0.33 on a WRN.
FORWARD = 0.45

# Examples whose mean importance is known before the first is judged.
FIRST = 256

# The least importance of an example, in units of the mean: no weight exceeds its inverse, and nothing is out of reach.
FLOOR = 0.1

# The sample's share of the data, and its bounds in examples. Of 60,000 images 3,300 leave 3 to 6 % of residual, and
# some 25 products with them cost 3 gradients; the first 25 or so are with COARSE of those.
SHARE, FEWEST, MOST, COARSE = 0.055, 512, 8192, 1 / 6

# Below this many examples a sample that says enough is no longer cheap.
WORTHWHILE = 4096


class Subset:
    """``G = sum_i c_i a_i H_i / sum_i a_i`` over a weighted sample, an estimate of H, by its products.

    Attributes:
        num_examples: in the sample.

    Args:
        objective: whose curvature it is.
        parts: micro-batches whose ``scale`` is c.
        weight: ``sum_i a_i`` over all the data.
        most: examples whose graphs may be kept.
    """

    def __init__(self, objective: Objective, parts: Sequence[MicroBatch], weight: float, most: int) -> None:
        self.num_examples = sum(part.size for part in parts)
        self._objective = objective
        self._weight = weight
        self._graphs = CachedGraphs(
            objective.graph, parts, objective.no_vectors(), OOMHalving(device=objective.device), most
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """``G`` times each row of ``rows`` (K, n), within ``measuring()``.

        Cost: 2K gradients of the sample, and 1 more of what is not kept.
        """
        total = self._graphs(rows) / self._weight
        if not bool(torch.isfinite(total).all()):
            self._objective.locate_nonfinite()
        if self._objective.problem.weight_decay:
            total += self._objective.problem.weight_decay * rows
        return total


def worthwhile(objective: Objective) -> bool:
    """Whether the data are many enough for a sample to be cheap, and not tied to the loader's batches."""
    count = objective.num_examples
    return count is not None and count >= WORTHWHILE and not objective.keeps_batches


def usual_size(objective: Objective) -> int:
    """Examples in the sample unless told otherwise."""
    return min(max(round(SHARE * (objective.num_examples or 0)), FEWEST), MOST)


def sample(
    objective: Objective, generator: torch.Generator, progress: Progress | None = None, size: int | None = None
) -> list[Subset]:
    """Two nested Subsets, the coarse one and that of ``size`` examples, from one forward pass over the data.

    None at all where the data are not more than that, or their batches cannot be cut.

    Priority sampling (Duffield, Lund and Thorup 2007): each example's importance over a uniform random number is its
    priority; the ``size`` highest are taken, with weights that make every sum unbiased. The importance is the mean of
    ``||dl/dz||`` and ``||d2l/dz2 u||`` in the model's output z, each in units of its mean so far, at least FLOOR, and
    rounded to a power of 2, so that examples of equal weight can share a graph. An example whose loss alone is curved
    in the output as much as that of many others is in the sample with certainty; one that is far out in the weights'
    directions alone need not be, and is the solver's random vector's to find.

    Cost: a forward pass, FORWARD gradients, and that again of the first FIRST examples. Memory: up to three times
    ``size`` examples.

    Raises: DataError when a loss is not finite.
    """
    size = usual_size(objective) if size is None else size
    reservoir = _Reservoir(size, generator)
    # A source of its own, so that neither sequence depends on how many examples a micro-batch has.
    signs = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    seen, weight = 0, 0.0
    with objective.measuring():
        step = objective.settle_micro_batch()
        first = objective.fitting(objective.first_examples(FIRST))
        if not first.splittable:
            return []
        totals = _both(look(objective.terms, first, signs)).sum(1, keepdim=True)
        objective.charge(first.size * FORWARD)
        room, finite = OOMHalving(device=objective.device), True
        for part in micro_batches(objective.data, step):
            if not part.splittable:
                return []
            for piece, shown in room.run(part, lambda piece: (piece, look(objective.terms, piece, signs))):
                weight += float(shown.weight)
                finite = finite and bool(torch.isfinite(shown.loss))
                both = _both(shown)
                sums, before = totals + both.cumsum(1), first.size + seen + 1
                units = both / (sums / torch.arange(before, before + piece.size))
                totals, seen = sums[:, -1:], seen + piece.size
                # Where the loss is not curved in its output, or its slope is zero, the other one decides.
                importance = units.nan_to_num(1.0, 1.0, 1.0).mean(0).clamp_min(FLOOR)
                reservoir.add(piece, torch.exp2(torch.log2(importance).round()).double())
                objective.charge(piece.size * FORWARD)
            if progress is not None:
                progress("scouting", seen, objective.num_examples)
        if not finite:
            objective.locate_nonfinite()
        objective.meter.passes += 1
        if weight <= 0 or seen <= size:
            return []
        kept = KEPT // max(1, objective.graph_bytes(size) // size)
        counts = max(1, round(COARSE * size)), size
        return [Subset(objective, reservoir.parts(n, step), weight, kept * n // sum(counts)) for n in counts]


def _both(shown: Look) -> Tensor:
    """Slopes and curvatures (2, examples)."""
    return torch.stack([shown.slopes, shown.curvatures]).cpu().double()


class _Reservoir:
    """The examples of highest priority so far, copied out of the batches that they came in."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size = size
        self._generator = generator
        self._held: list[MicroBatch] = []
        self._priorities = torch.zeros(0, dtype=torch.float64)
        self._importances = torch.zeros(0, dtype=torch.float64)

    def add(self, part: MicroBatch, importances: Tensor) -> None:
        """Offer the examples of ``part``; those that cannot be among the highest any more are let go."""
        drawn = torch.rand(part.size, generator=self._generator, dtype=torch.float64).clamp_min(1e-300)
        # A copy at once: a loader may fill the same tensors again.
        self._held.append(_rows(part, torch.arange(part.size)))
        self._priorities = torch.cat([self._priorities, importances / drawn])
        self._importances = torch.cat([self._importances, importances])
        # One more than the size: the first that is left out says what the others count.
        if len(self._priorities) > 2 * (self._size + 1):
            self._keep(self._priorities.topk(self._size + 1).indices.sort().values)

    def parts(self, count: int, step: int | None) -> list[MicroBatch]:
        """The ``count`` of highest priority in micro-batches of at most ``step`` examples of one weight, ``scale``."""
        order = self._priorities.topk(count + 1).indices
        threshold = float(self._priorities[order[-1]])
        chosen = order[:-1].sort().values
        scales = (threshold / self._importances[chosen]).clamp_min(1.0)
        found: list[MicroBatch] = []
        for scale in sorted(set(scales.tolist())):
            held = self._chosen(chosen[scales == scale])
            found += [replace(part, scale=scale) for part in micro_batches([p.batch for p in held], step)]
        return found

    def _keep(self, places: Tensor) -> None:
        self._held = self._chosen(places)
        self._priorities, self._importances = self._priorities[places], self._importances[places]

    def _chosen(self, places: Tensor) -> list[MicroBatch]:
        """Those of the held examples, counted through all parts, as copies."""
        found, start = [], 0
        for part in self._held:
            own = places[(places >= start) & (places < start + part.size)] - start
            start += part.size
            if len(own):
                found.append(_rows(part, own))
        return found


def _rows(part: MicroBatch, places: Tensor) -> MicroBatch:
    return MicroBatch(rows(part.batch, places), len(places), ())


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
