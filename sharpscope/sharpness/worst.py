"""The largest rise of the loss in a ball around the weights, of all the data or of subsets of m examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sharpscope.ball import Ball
from sharpscope.errors import DataError
from sharpscope.objective import Objective, Progress
from sharpscope.perturbation import Perturbation
from sharpscope.sharpness.ascent import Ascent, highest
from sharpscope.sharpness.losses import LossOn, piece_size, subsets
from sharpscope.sharpness.vectorised import BUSY, Vectorised, faster


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
        objective.meter.passes += 1
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
