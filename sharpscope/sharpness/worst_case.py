"""The largest rise of the loss in a ball around the weights, for all the data or for subsets of m examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from sharpscope.errors import DataError, out_of_memory
from sharpscope.objective import Objective, Progress
from sharpscope.objective.data import MicroBatch, leaves, map_tensors, structure, tensors
from sharpscope.objective.guards import FORWARD
from sharpscope.precision import wide
from sharpscope.sharpness.ascent import Ascent, highest
from sharpscope.sharpness.losses import LossOn, piece_size, subsets
from sharpscope.weights.norm_ball import Ball
from sharpscope.weights.parameters import select
from sharpscope.weights.perturbation import Perturbation


@dataclass(frozen=True)
class Rises:
    """What each of B subsets showed at one radius.

    Attributes:
        rises: ``max L_b(w + e) - L_b(w)`` (B,), as far as the ascent found it.
        first_order: ``rho ||D g_b||_q`` (B,), q dual to p: what a loss without curvature would rise by.
        examples: in all subsets.
        side_by_side: whether subsets went through one sweep of vmap, which gives other last bits.
    """

    rises: list[float]
    first_order: list[float]
    examples: int
    side_by_side: bool


def worst_rises(
    objective: Objective,
    m: int | None,
    ball: Ball,
    radii: Sequence[float],
    ascent: Ascent,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[Rises]:
    """For each of ``radii`` the rises of disjoint subsets of m examples, or of all of them at once.

    The gradient at w serves all radii. A subset without loss terms is left out. Small subsets are taken side by side
    where a first group of them is measured to be faster so, and gives the same.

    Cost: 1 gradient and for each radius what ``highest`` says, over the examples.

    Raises: ArgumentError, DataError, see ``subsets``.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    restarts = {rho: torch.Generator().manual_seed(seed) for rho in radii}
    rises: list[list[float]] = [[] for _ in radii]
    first: list[list[float]] = [[] for _ in radii]
    done = examples = 0
    with objective.measuring(), Perturbation(objective.terms.params) as moved:
        scales = ball.scales(moved.weights)

        def alone(loss: LossOn) -> tuple[float, float, list[float]]:
            base, grads = loss.gradient()
            # Restarts at one radius do not depend on the others.
            found = [highest(loss, moved, ball, scales, rho, ascent, base, grads, restarts[rho]) for rho in radii]
            return base, ball.dual_norm(grads, scales), found

        together = None
        if m is not None and m <= min(BUSY, piece_size(objective)) and not ascent.adaptive:
            together = Vectorised(objective, ball, radii, ascent.steps, max(1, piece_size(objective) // m))
        untried = True
        for group in _grouped(subsets(objective, m, generator), 1 if together is None else together.group):
            parts = [part for loss in group if (part := loss.part) is not None] if together is not None else []
            single = len(parts) == len(group)
            if untried and single and together is not None:
                tried = parts[0]
                if not faster(together, lambda part: alone(LossOn(objective, lambda: [part], part.size))[::2], parts):
                    together = None
                untried = False
            swept = together.where_it_fits(parts) if together is not None and single else None
            if swept is None:
                found = [alone(loss) for loss in group]
            else:
                base, slopes, tops = (t.tolist() for t in swept)
                found = list(zip(base, slopes, tops, strict=True))
            for loss, (at_w, slope, top) in zip(group, found, strict=True):
                done += loss.examples
                if math.isnan(at_w):
                    continue
                examples += loss.examples
                for i, rho in enumerate(radii):
                    rises[i].append(top[i] - at_w)
                    first[i].append(rho * slope)
            if progress is not None:
                progress("all examples" if m is None else f"m = {m}", done, objective.num_examples)
        if together is not None and not untried:
            # What the model keeps of its last forward pass must not be of vmap's own kind, which outlives it.
            alone(LossOn(objective, lambda: [tried], tried.size))
    if not examples:
        raise DataError("There are no loss terms in any subset. Check the targets.")
    if m is not None:
        objective.cost_counter.passes += 1
    return [Rises(up, slope, examples, together is not None) for up, slope in zip(rises, first, strict=True)]


def _grouped(losses: Iterable[LossOn], size: int) -> Iterator[list[LossOn]]:
    group: list[LossOn] = []
    for loss in losses:
        group.append(loss)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


# Subsets at a time, and the bytes that their weights, gradients and moves may take. Of a CNN of 52,138 parameters on a
# CPU, subsets of one example take 0.9 ms each in groups of 32, 1.2 ms in groups of 128 and 7 ms one after another.
GROUP, BYTES, COPIES = 32, 1 << 28, 4

# Examples beyond which a subset keeps the processor busy by itself, so that nothing is tried.
BUSY = 128

# How far a rise may be off what it is one after another and be taken for the same: relative to it, and for rounding
# relative to the loss in units of the dtype's eps.
SAME, ROUNDING = 1e-3, 1e3

# ``found(batch)`` of G subsets: base losses (G,), dual norms of the gradients (G,), highest losses (G, radii).
Found = tuple[Tensor, Tensor, Tensor]


class Vectorised:
    """The rises of G subsets of equal size in one sweep of ``torch.func.vmap``.

    Not for APGD, for dropout, or for operations that vmap does not know, which ``faster`` finds out.

    Args:
        objective: whose loss terms have been checked by a full pass, within ``measuring()``.
        ball, radii, steps: as for ``worst_rises`` and ``Ascent``.
        most: subsets whose graph may be in memory.
    """

    def __init__(self, objective: Objective, ball: Ball, radii: Sequence[float], steps: int, most: int) -> None:
        terms = objective.terms
        named = select(terms.model, objective.problem.params)
        self._objective, self._ball, self._radii, self._steps = objective, ball, radii, steps
        self._weights = {f"terms.{name}": p.detach() for name, p in named.items()}
        self._scales = dict(zip(self._weights, ball.scales(list(self._weights.values())) or (), strict=False))
        self._sums = _Sums(objective)
        bytes_each = COPIES * sum(p.numel() * p.element_size() for p in self._weights.values())
        # Gradients of an example: one at w, then for each radius one for every step but the last, and a forward pass.
        self._cost = 1.0 + len(radii) * (steps - 1 + FORWARD)
        self.group = max(1, min(GROUP, most, BYTES // max(1, bytes_each)))

    @torch.no_grad()
    def __call__(self, parts: Sequence[MicroBatch]) -> Found:
        """Of the subsets ``parts``, in order."""
        stacked = [torch.stack(column) for column in zip(*(tensors(part.batch) for part in parts), strict=True)]
        size = parts[0].size

        def one(*rows: Tensor) -> Found:
            given = iter(rows)
            batch = map_tensors(parts[0].batch, lambda _: next(given))
            return self._rises(MicroBatch(batch, size, parts[0].sources))

        self._objective.add_cost(self._cost * size * len(parts))
        found: Found = vmap(one)(*stacked)
        return found

    def where_it_fits(self, parts: Sequence[MicroBatch]) -> Found | None:
        """As a call, None where memory does not suffice or ``parts`` differ in more than their tensors' values."""
        if not _alike(parts):
            return None
        try:
            return self(parts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None

    def _rises(self, part: MicroBatch) -> Found:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            value, count = functional_call(self._sums, weights, (part,))
            decay = self._objective.problem.weight_decay
            mean: Tensor = value / count
            return mean + decay / 2 * torch.stack([w.square().sum() for w in weights.values()]).sum() if decay else mean

        first, base = grad_and_value(loss)(self._weights)
        dual = self._dual(first)
        highest = []
        for rho in self._radii:
            at, grads, best = self._weights, first, torch.full_like(base, -torch.inf)
            for i in range(self._steps):
                at = self._moved(at, grads, rho / self._steps)
                if i + 1 < self._steps:
                    grads, value = grad_and_value(loss)(at)
                else:
                    value = loss(at)
                best = torch.maximum(best, value.nan_to_num(torch.inf, torch.inf, -torch.inf))
            highest.append(best)
        return base, dual, torch.stack(highest)

    def _moved(self, at: dict[str, Tensor], grads: dict[str, Tensor], length: float) -> dict[str, Tensor]:
        if self._ball.p == torch.inf:
            return {k: w + length * self._scaled(k, grads[k].sign()) for k, w in at.items()}
        norm = self._norm({k: self._scaled(k, g) for k, g in grads.items()})
        # A gradient of zeros moves nothing.
        factor = torch.where(norm > 0, length / torch.where(norm > 0, norm, 1.0), 0.0)
        return {k: w + (self._scaled(k, self._scaled(k, grads[k])) * factor).to(w.dtype) for k, w in at.items()}

    def _dual(self, grads: dict[str, Tensor]) -> Tensor:
        scaled = {k: self._scaled(k, g) for k, g in grads.items()}
        if self._ball.p == 2:
            return self._norm(scaled)
        return torch.stack([g.to(wide(g.device)).abs().sum() for g in scaled.values()]).sum()

    def _norm(self, scaled: dict[str, Tensor]) -> Tensor:
        return torch.stack([t.to(wide(t.device)).square().sum() for t in scaled.values()]).sum().sqrt()

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        return tensor * self._scales[name] if self._scales else tensor


class _Sums(nn.Module):
    """The loss terms as a module, so that ``functional_call`` can put other weights into the model."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.terms = objective.terms.model
        self._of: Callable[[MicroBatch], tuple[Tensor, Tensor]] = objective.terms.sums

    def forward(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._of(part)


def faster(
    together: Vectorised, alone: Callable[[MicroBatch], tuple[float, list[float]]], parts: Sequence[MicroBatch]
) -> bool:
    """Whether a first group of subsets gives, side by side, what they give one after another, in less time a subset.

    ``alone(part)`` is its base and highest losses. Cost: two groups, and two subsets.
    """
    if not _alike(parts):
        return False
    try:
        together(parts)  # the first call prepares more than it does
        started = time.perf_counter()
        base, _, highest = together(parts)
        group = (time.perf_counter() - started) / len(parts)
    except Exception:  # whatever an operation says that vmap does not know
        return False
    seconds = []
    for i in range(min(2, len(parts))):
        started = time.perf_counter()
        expected_base, expected = alone(parts[i])
        seconds.append(time.perf_counter() - started)
        at_w, eps = float(base[i]), torch.finfo(base.dtype).eps
        for top, wanted in zip(highest[i].tolist(), expected, strict=True):
            rise = wanted - expected_base
            if not abs((top - at_w) - rise) <= SAME * abs(rise) + ROUNDING * eps * abs(expected_base):
                return False
    return group < min(seconds)


def _alike(parts: Sequence[MicroBatch]) -> bool:
    """Whether all are of the same structure and shapes, and what has no row an example is the same in all."""
    first = parts[0].batch
    return all(
        structure(part.batch) == structure(first)
        and all(_same(a, b) for a, b in zip(leaves(first), leaves(part.batch), strict=True))
        for part in parts[1:]
    )


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and a.dim():
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b
