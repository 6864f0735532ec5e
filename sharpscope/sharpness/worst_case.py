"""Measures from the maximum loss in a ball around the weights, of all the data or of subsets of m examples."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from sharpscope.errors import ArgumentError, DataError, out_of_memory
from sharpscope.objective import Objective, Progress
from sharpscope.objective.cost_and_out_of_memory import FORWARD
from sharpscope.objective.micro_batches import MicroBatch, map_tensors, matches, tensors
from sharpscope.precision import wide
from sharpscope.random_streams import stream
from sharpscope.results import Measure
from sharpscope.results.statistics import Estimate
from sharpscope.resume import Journal, once_with_cost
from sharpscope.sharpness.maximize import Ascent, lost_share, maximum_loss
from sharpscope.sharpness.measure_context import MeasureContext, MeasureSpec, ball_settings, unresolved, with_interval
from sharpscope.sharpness.subset_loss import SubsetLoss, disjoint_subsets, examples_per_graph, is_single_batch
from sharpscope.weights.norm_ball import Ball
from sharpscope.weights.parameters import select, views
from sharpscope.weights.perturbation import Perturbation

# APGD steps of Keskar's measure.
KESKAR_STEPS = 20


def m_sharpness(context: MeasureContext) -> Iterator[Measure]:
    """Mean over disjoint subsets b of m examples of ``max L_b(w + e) - L_b(w)``, for each m and rho."""
    objective, s = context.objective, context.settings
    for m in s.m:
        gradients_before = objective.gradients
        # The same stream for every m, hence the same order of the examples.
        generator = context.generator("m-sharpness")
        found = maximum_rises(objective, m, s.ball, s.rho, s.ascent, generator, context.progress, context.journal)
        each = (objective.gradients - gradients_before) / len(s.rho)
        for rho, subsets in zip(s.rho, found, strict=True):
            rises = np.array(subsets.rises)
            if len(rises) < 2 or not np.isfinite(rises).all():
                mean: tuple[float, float | None, float | None, float | None] = float(rises.mean()), None, None, None
            else:
                mean = with_interval(Estimate.of(rises), len(rises), subsets.rounding(context.loss_rounding))
            yield Measure(
                "m-sharpness",
                *mean,
                settings={
                    "m": m,
                    "rho": rho,
                    **ball_settings(s.ball),
                    "ascent": str(s.ascent),
                    "subsets": len(rises),
                    "order": "random" if is_single_batch(objective.data) else "as loaded",
                    "side by side": subsets.side_by_side,
                    **subsets.unresolved(context.loss_rounding),
                },
                prediction={"first order": float(np.mean(subsets.first_order))},
                gradients=each,
                examples=subsets.examples,
            )


def _require_subsets(context: MeasureContext) -> None:
    count, largest = context.objective.num_examples, max(context.settings.m)
    if count is not None and largest > count:
        raise ArgumentError(f"m must be at most the number of examples ({count}), got {largest}. Lower it.")


def worst_case(context: MeasureContext) -> Iterator[Measure]:
    """``max L(w + e) - L(w)`` over all the data, for each rho."""
    objective, s = context.objective, context.settings
    gradients_before = objective.gradients
    generator = context.generator("worst-case")
    found = maximum_rises(objective, None, s.ball, s.rho, s.worst_case_ascent, generator, context.progress)
    each = (objective.gradients - gradients_before) / len(s.rho)
    for rho, whole in zip(s.rho, found, strict=True):
        prediction, converged, eigenvalue_cost = {"first order": whole.first_order[0]}, True, 0.0
        if s.ball.p == 2:
            gradients_before = objective.gradients
            top = context.top_eigenpairs(s.ball)
            eigenvalue_cost = objective.gradients - gradients_before
            second_order, converged = rho**2 / 2 * float(top.eigenvalues[0]), bool(top.converged[0])
            prediction = {"small rho": second_order, "quadratic bound": second_order + whole.first_order[0]}
        yield Measure(
            "worst-case",
            whole.rises[0],
            settings={
                "rho": rho,
                **ball_settings(s.ball),
                "ascent": str(s.worst_case_ascent),
                "converged": converged,
                **whole.unresolved(context.loss_rounding),
            },
            prediction=prediction,
            gradients=each + eigenvalue_cost,
            examples=whole.examples,
        )


def keskar(context: MeasureContext) -> Iterator[Measure]:
    """``100 (max L - L) / (1 + L)`` over the box ``|e| <= box (|w| + 1)``."""
    objective, box = context.objective, context.settings.box
    ascent, ball = Ascent(KESKAR_STEPS, adaptive=True), Ball(math.inf, "elementwise", 1.0)
    gradients_before = objective.gradients
    (found,) = maximum_rises(objective, None, ball, [box], ascent, context.generator("keskar"), context.progress)
    assert objective.loss is not None
    yield Measure(
        "keskar",
        100 * found.rises[0] / (1 + objective.loss),
        settings={"box": box, "ascent": str(ascent), **found.unresolved(context.loss_rounding)},
        gradients=objective.gradients - gradients_before,
        examples=found.examples,
    )


MEASURES = (
    MeasureSpec("m-sharpness", m_sharpness, requires=_require_subsets),
    MeasureSpec("worst-case", worst_case),
    MeasureSpec("keskar", keskar),
)


@dataclass(frozen=True)
class SubsetRises:
    """Rises of the loss on each of B subsets, at one radius.

    Attributes:
        rises: ``max L_b(w + e) - L_b(w)`` (B,), as far as the ascent found it.
        first_order: ``rho ||D g_b||_q`` (B,), q dual to p: the rise of a linear loss.
        examples: total number in the subsets.
        lost: share of the perturbation that rounding of ``w + e`` takes.
        side_by_side: whether subsets were evaluated together by vmap, which changes the last bits.
    """

    rises: list[float]
    first_order: list[float]
    examples: int
    lost: float
    side_by_side: bool

    def rounding(self, loss_rounding: float) -> float:
        """Rounding error of the mean rise: of the losses, and of the weights to first order."""
        return loss_rounding + self.lost * float(np.mean(self.first_order))

    def unresolved(self, loss_rounding: float) -> dict[str, Any]:
        """Settings that say that the rises are lost in rounding; empty if not, or if no subset has a gradient."""
        rise = float(np.mean(np.abs(self.rises)))
        moved = any(self.first_order) or rise > 0
        return unresolved(self.rounding(loss_rounding), rise) if moved else {}


def maximum_rises(
    objective: Objective,
    m: int | None,
    ball: Ball,
    radii: Sequence[float],
    ascent: Ascent,
    generator: torch.Generator,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[SubsetRises]:
    """``max L_b(w + e) - L_b(w)`` for each of ``radii``, on disjoint subsets b of m examples or, for None, on all.

    The gradient at w is shared by all radii. Subsets without loss terms are skipped. Small subsets are evaluated
    together by vmap if on the first group this is faster and gives the same rises; ``journal`` stores this choice.

    Cost: 1 gradient, and for each radius the cost of ``maximum_loss``.

    Raises: ArgumentError, DataError, see ``disjoint_subsets``.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    restarts = {rho: stream(seed, "restarts") for rho in radii}
    rises: list[list[float]] = [[] for _ in radii]
    first_order: list[list[float]] = [[] for _ in radii]
    done = examples = 0
    with objective.measuring(), Perturbation(objective.terms.params) as perturbation:
        scales = ball.scales(perturbation.weights)
        assert objective.gradient is not None
        whole = views(objective.gradient, perturbation.weights)
        lost = [lost_share(perturbation, ball, scales, rho, whole) for rho in radii]

        def sequential(loss: SubsetLoss) -> tuple[float, float, list[float]]:
            base, grads = loss.gradient()
            # A generator for each radius, so that the restarts at one do not depend on the others.
            maxima = [
                maximum_loss(loss, perturbation, ball, scales, rho, ascent, base, grads, restarts[rho]) for rho in radii
            ]
            return base, ball.dual_norm(grads, scales), maxima

        def sequential_batch(batch: MicroBatch) -> tuple[float, list[float]]:
            base, _, maxima = sequential(SubsetLoss(objective, lambda: [batch], batch.size))
            return base, maxima

        def chosen_by_timing(vectorised: VmapRises, batches: list[MicroBatch]) -> bool:
            def timed() -> dict[str, bool]:
                return {"faster": is_faster(vectorised, sequential_batch, batches)}

            return bool(once_with_cost(objective, journal or Journal(None), "side by side", timed)["faster"])

        vectorised, group_size = None, 1
        if m is not None and m <= min(MAX_VMAP_EXAMPLES, examples_per_graph(objective)) and not ascent.adaptive:
            vectorised = VmapRises(objective, ball, radii, ascent.steps, max(1, examples_per_graph(objective) // m))
            group_size = vectorised.group
        first_batch: MicroBatch | None = None
        for group in _in_groups(disjoint_subsets(objective, m, generator), group_size):
            in_one_sweep = None
            if vectorised is not None:
                batches = [batch for loss in group if (batch := loss.single_batch) is not None]
                if len(batches) == len(group):
                    if first_batch is None:
                        first_batch = batches[0]
                        if not chosen_by_timing(vectorised, batches):
                            vectorised = None
                    if vectorised is not None:
                        in_one_sweep = vectorised.unless_out_of_memory(batches)
            if in_one_sweep is None:
                found = [sequential(loss) for loss in group]
            else:
                bases, norms, all_maxima = (t.tolist() for t in in_one_sweep)
                found = list(zip(bases, norms, all_maxima, strict=True))
            for loss, (base, dual_norm, maxima) in zip(group, found, strict=True):
                done += loss.examples
                if math.isnan(base):
                    continue
                examples += loss.examples
                for i, rho in enumerate(radii):
                    rises[i].append(maxima[i] - base)
                    first_order[i].append(rho * dual_norm)
            if progress is not None:
                progress("all examples" if m is None else f"m = {m}", done, objective.num_examples)
        if vectorised is not None and first_batch is not None:
            # Tensors that the model keeps of its last forward pass must be ordinary ones, not vmap's.
            sequential_batch(first_batch)
    if not examples:
        raise DataError("There are no loss terms in any subset. Check the targets.")
    if m is not None:
        objective.cost_counter.passes += 1
    columns = zip(rises, first_order, lost, strict=True)
    return [SubsetRises(r, f, examples, share, vectorised is not None) for r, f, share in columns]


def _in_groups(losses: Iterable[SubsetLoss], size: int) -> Iterator[list[SubsetLoss]]:
    losses = iter(losses)
    while group := list(itertools.islice(losses, size)):
        yield group


# Largest group of subsets for vmap, bytes for its copies of the weights, and the copies of each subset. For a CNN of
# 52,138 parameters on a CPU, subsets of one example take 0.9 ms each in groups of 32, 1.2 ms in groups of 128 and 7 ms
# one after another.
MAX_GROUP, MAX_GROUP_BYTES, COPIES_PER_SUBSET = 32, 1 << 28, 4

# Larger subsets use the processor fully by themselves, so vmap is not tried.
MAX_VMAP_EXAMPLES = 128

# Tolerance between rises from vmap and one after another: relative to the rise, plus a multiple of eps times the loss.
RISE_TOL, ROUNDING_TOL = 1e-3, 1e3

# Of G subsets: base losses (G,), dual norms of the gradients (G,), maximum losses (G, radii).
GroupRises = tuple[Tensor, Tensor, Tensor]


class VmapRises:
    """Base losses, dual norms and maximum losses of G subsets of equal size in one sweep of ``torch.func.vmap``.

    Does not support APGD, dropout, or operations without a vmap rule; ``is_faster`` detects the last two.

    Args:
        objective: whose loss terms have been checked by a full pass, within ``measuring()``.
        ball, radii, steps: as for ``maximum_rises`` and ``Ascent``.
        max_group: largest number of subsets whose graphs fit in memory.
    """

    def __init__(self, objective: Objective, ball: Ball, radii: Sequence[float], steps: int, max_group: int) -> None:
        terms = objective.terms
        named = select(terms.model, objective.problem.params)
        self._objective, self._ball, self._radii, self._steps = objective, ball, radii, steps
        self._weights = {f"terms.{name}": p.detach() for name, p in named.items()}
        self._scales = dict(zip(self._weights, ball.scales(list(self._weights.values())) or (), strict=False))
        self._loss_module = _LossModule(objective)
        bytes_each = COPIES_PER_SUBSET * sum(p.numel() * p.element_size() for p in self._weights.values())
        # Gradients of an example: one at w, then for each radius one for every step but the last, and a forward pass.
        self._cost = 1.0 + len(radii) * (steps - 1 + FORWARD)
        self.group = max(1, min(MAX_GROUP, max_group, MAX_GROUP_BYTES // max(1, bytes_each)))

    @torch.no_grad()
    def __call__(self, batches: Sequence[MicroBatch]) -> GroupRises:
        """Evaluate the subsets ``batches``."""
        stacked = [torch.stack(column) for column in zip(*(tensors(batch.batch) for batch in batches), strict=True)]
        size = batches[0].size

        def one(*rows: Tensor) -> GroupRises:
            given = iter(rows)
            rows_batch = map_tensors(batches[0].batch, lambda _: next(given))
            return self._rises(MicroBatch(rows_batch, size, batches[0].sources))

        self._objective.add_cost(self._cost * size * len(batches))
        found: GroupRises = vmap(one)(*stacked)
        return found

    def unless_out_of_memory(self, batches: Sequence[MicroBatch]) -> GroupRises | None:
        """Evaluate ``batches``; None when memory runs out or their structure differs."""
        if not _same_structure(batches):
            return None
        try:
            return self(batches)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None

    def _rises(self, batch: MicroBatch) -> GroupRises:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            value, count = functional_call(self._loss_module, weights, (batch,))
            decay = self._objective.problem.weight_decay
            mean: Tensor = value / count
            return mean + decay / 2 * torch.stack([w.square().sum() for w in weights.values()]).sum() if decay else mean

        grads_at_w, base = grad_and_value(loss)(self._weights)
        dual_norm = self._dual_norm(grads_at_w)
        maxima = []
        for rho in self._radii:
            at, grads, best = self._weights, grads_at_w, torch.full_like(base, -torch.inf)
            for i in range(self._steps):
                at = self._stepped(at, grads, rho / self._steps)
                if i + 1 < self._steps:
                    grads, value = grad_and_value(loss)(at)
                else:
                    value = loss(at)
                best = torch.maximum(best, value.nan_to_num(torch.inf, torch.inf, -torch.inf))
            maxima.append(best)
        return base, dual_norm, torch.stack(maxima)

    def _stepped(self, at: dict[str, Tensor], grads: dict[str, Tensor], length: float) -> dict[str, Tensor]:
        if self._ball.p == torch.inf:
            return {k: w + length * self._scaled(k, grads[k].sign()) for k, w in at.items()}
        norm = self._norm({k: self._scaled(k, g) for k, g in grads.items()})
        # A zero gradient leaves the weights unchanged.
        factor = torch.where(norm > 0, length / torch.where(norm > 0, norm, 1.0), 0.0)
        return {k: w + (self._scaled(k, self._scaled(k, grads[k])) * factor).to(w.dtype) for k, w in at.items()}

    def _dual_norm(self, grads: dict[str, Tensor]) -> Tensor:
        scaled = {k: self._scaled(k, g) for k, g in grads.items()}
        if self._ball.p == 2:
            return self._norm(scaled)
        return torch.stack([g.to(wide(g.device)).abs().sum() for g in scaled.values()]).sum()

    def _norm(self, scaled: dict[str, Tensor]) -> Tensor:
        return torch.stack([t.to(wide(t.device)).square().sum() for t in scaled.values()]).sum().sqrt()

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        return tensor * self._scales[name] if self._scales else tensor


class _LossModule(nn.Module):
    """The loss terms as a module, so that ``functional_call`` can replace the model's weights."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.terms = objective.terms.model
        self._loss_terms: Callable[[MicroBatch], tuple[Tensor, Tensor]] = objective.terms.sums

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._loss_terms(batch)


def is_faster(
    vectorised: VmapRises, sequential: Callable[[MicroBatch], tuple[float, list[float]]], batches: Sequence[MicroBatch]
) -> bool:
    """Whether vmap gives the same rises as ``sequential`` on a first group of subsets, in less time a subset.

    ``sequential(batch)`` returns the base loss and the maximum loss for each radius. Two subsets are compared, if
    possible ones with loss terms; losses that are not finite must be the same. Cost: two groups, two subsets.
    """
    if not _same_structure(batches):
        return False
    try:
        vectorised(batches)  # warm-up: the first call also prepares vmap
        started = time.perf_counter()
        base, _, maxima = vectorised(batches)
        group = (time.perf_counter() - started) / len(batches)
    except Exception:  # operations without a vmap rule raise errors of many types
        return False
    seconds = []
    for i in sorted(range(len(batches)), key=lambda i: bool(base[i].isnan()))[:2]:
        started = time.perf_counter()
        expected_base, expected = sequential(batches[i])
        seconds.append(time.perf_counter() - started)
        base_i, eps = float(base[i]), torch.finfo(base.dtype).eps
        for maximum, wanted in zip(maxima[i].tolist(), expected, strict=True):
            rise = wanted - expected_base
            if not math.isfinite(rise):
                if not np.array_equal([maximum, base_i], [wanted, expected_base], equal_nan=True):
                    return False
                continue
            if not abs((maximum - base_i) - rise) <= RISE_TOL * abs(rise) + ROUNDING_TOL * eps * abs(expected_base):
                return False
    return group < min(seconds)


def _same_structure(batches: Sequence[MicroBatch]) -> bool:
    """Whether all batches have the same structure and shapes, and equal values where a leaf has no batch dimension."""
    return all(matches(batches[0].batch, batch.batch, _same_leaf) for batch in batches[1:])


def _same_leaf(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and a.dim():
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b
