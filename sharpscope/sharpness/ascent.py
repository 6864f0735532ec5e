"""How the largest loss in a ball around the weights is looked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.sharpness.losses import LossOn
from sharpscope.weights.norm_ball import Ball, norm_of
from sharpscope.weights.perturbation import Perturbation

# Croce and Hein 2020: the first step is the ball's diameter, the memory of the last move, the share of steps that must
# climb between two checkpoints, and where these are.
MOMENTUM, CLIMBING, FIRST, SHORTER, LEAST = 0.75, 0.75, 0.22, 0.03, 0.06


@dataclass(frozen=True)
class Ascent:
    """What looks for ``max L_b(w + e)`` over the ball; what it finds is a lower bound of the maximum.

    Args:
        steps: points that are looked at. Without ``adaptive`` each is ``rho / steps`` from the last one along the
            steepest direction there, the first from w, and the largest loss on the way counts; of one step, SAM's own
            perturbation, whatever its loss is.
        adaptive: APGD (Croce and Hein 2020): projected steps with momentum, of a length that halves where they stop
            climbing. Its first point is the one of a single step, and w is in the ball, so it never reports less.
        restarts: runs of APGD from random points of the ball beside that from w.

    Raises: ArgumentError for numbers out of range.

    >>> import sharpscope
    >>> import torch
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> _ = torch.nn.init.zeros_(model.weight)  # where the gradient is zero
    >>> for ascent in (sharpscope.Ascent(), sharpscope.Ascent(20, adaptive=True, restarts=1)):
    ...     sharp = sharpscope.measure_sharpness(problem, "worst-case", rho=0.1, ascent=ascent)
    ...     print(f"{ascent}: {sharp.find('worst-case').value:.4f}")
    1 step: 0.0000
    APGD, 20 steps, 1 random restart: 0.0300
    """

    steps: int = 1
    adaptive: bool = False
    restarts: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 0 or (self.restarts and not self.adaptive):
            raise ArgumentError(
                f"An ascent takes at least one step, and restarts go with APGD, got steps={self.steps} and "
                f"restarts={self.restarts}."
            )

    def __str__(self) -> str:
        if not self.adaptive:
            return f"{self.steps} step{'s' if self.steps > 1 else ''}"
        again = f", {self.restarts} random restart{'s' if self.restarts > 1 else ''}" if self.restarts else ""
        return f"APGD, {self.steps} steps{again}"


def highest(
    loss: LossOn,
    moved: Perturbation,
    ball: Ball,
    scales: Sequence[Tensor] | None,
    rho: float,
    ascent: Ascent,
    base: float,
    grads: Sequence[Tensor],
    generator: torch.Generator,
) -> float:
    """The largest ``L_b(w + e)`` that ``ascent`` finds; the weights are at w before and after.

    Not a number counts as infinity. Where the gradient at w is zero, and nothing restarts, it is L_b(w).

    Args:
        loss: L_b.
        moved: of its parameters.
        ball, scales: the ball's shape, and its D at w.
        rho: its radius.
        base, grads: L_b and its gradient at w, which are paid for.
        generator: of the restarts.

    Cost: a gradient for each step but the last, and a forward pass; a restart a gradient more.
    """
    if not ascent.adaptive:
        return _steps(loss, moved, ball, scales, rho, ascent.steps, base, grads)
    search = _Apgd(loss, moved, ball, scales, rho, ascent.steps)
    try:
        found = max(base, search.run(None, grads))
        for _ in range(ascent.restarts):
            found = max(found, search.run(_random_point(grads, ball, rho, generator), None))
    finally:
        moved.restore()
    return found


def _steps(
    loss: LossOn,
    moved: Perturbation,
    ball: Ball,
    scales: Sequence[Tensor] | None,
    rho: float,
    steps: int,
    base: float,
    grads: Sequence[Tensor],
) -> float:
    best = -math.inf
    try:
        for i in range(steps):
            slope = ball.dual_norm(grads, scales)
            if not slope:
                return max(best, base)
            direction, factor = ball.steepest(grads, scales, slope)
            moved.add(moved.weights, direction, rho / steps * factor)
            if i + 1 < steps:
                value, grads = loss.gradient()
            else:
                value = loss.value()
            best = max(best, _known(value))
            if best == math.inf:
                break
        return best
    finally:
        moved.restore()


class _Apgd:
    """In the coordinates ``u = D^-1 e``, in which the ball is round."""

    def __init__(
        self,
        loss: LossOn,
        moved: Perturbation,
        ball: Ball,
        scales: Sequence[Tensor] | None,
        rho: float,
        steps: int,
    ) -> None:
        self.loss, self.moved, self.ball, self.rho, self.steps = loss, moved, ball, rho, steps
        self.scales = None if scales is None else list(scales)

    def run(self, start: list[Tensor] | None, grads: Sequence[Tensor] | None) -> float:
        """From ``start``, or from w, where the gradient is ``grads``."""
        if start is None:
            assert grads is not None
            at, slope, value = [torch.zeros_like(g) for g in grads], self._scaled(grads), -math.inf
        else:
            at = start
            value, slope = self._seen(at)
        before, length = at, 2 * self.rho
        best, best_at, best_slope = value, at, slope
        climbs, checked, checked_best, checked_length = 0, 0, value, length
        interval, mark = FIRST, 0.0
        for k in range(1, self.steps + 1):
            # Once at a point where the gradient vanishes there is nowhere to go.
            if best == math.inf or not norm_of(slope):
                break
            ahead = self._projected(list(torch._foreach_add(at, self._unit(slope), alpha=length)))
            if k > 1:
                ahead = self._projected(
                    [
                        a + MOMENTUM * (z - a) + (1 - MOMENTUM) * (a - b)
                        for a, z, b in zip(at, ahead, before, strict=True)
                    ]
                )
            before, at, old = at, ahead, value
            value, slope = self._seen(at, last=k == self.steps)
            climbs += value > old
            if value > best:
                best, best_at, best_slope = value, at, slope
            if k >= math.ceil((mark + interval) * self.steps):
                few = climbs < CLIMBING * (k - checked)
                stuck = length == checked_length and best == checked_best
                checked, checked_length, checked_best, climbs = k, length, best, 0
                mark, interval = mark + interval, max(interval - SHORTER, LEAST)
                if few or stuck:
                    length /= 2
                    at, before, slope, value = best_at, best_at, best_slope, best
        return best

    def _seen(self, u: list[Tensor], last: bool = False) -> tuple[float, list[Tensor]]:
        self.moved.move_to(self._scaled(u))
        if last:
            return _known(self.loss.value()), u
        value, grads = self.loss.gradient()
        return _known(value), self._scaled(grads)

    def _scaled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self.scales is None else list(torch._foreach_mul(list(tensors), self.scales))

    def _unit(self, slope: list[Tensor]) -> list[Tensor]:
        direction, factor = Ball(self.ball.p).steepest(slope, None)
        return direction if factor == 1.0 else list(torch._foreach_mul(direction, factor))

    def _projected(self, u: list[Tensor]) -> list[Tensor]:
        if self.ball.p == math.inf:
            return [t.clamp(-self.rho, self.rho) for t in u]
        size = norm_of(u)
        return u if size <= self.rho else list(torch._foreach_mul(u, self.rho / size))


def _random_point(like: Sequence[Tensor], ball: Ball, rho: float, generator: torch.Generator) -> list[Tensor]:
    """A point of the round ball: uniform in the cube, or in a uniform direction on the sphere."""
    if ball.p == math.inf:
        return [(2 * torch.rand(g.shape, generator=generator, dtype=torch.float64).to(g) - 1) * rho for g in like]
    drawn = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for g in like]
    return list(torch._foreach_mul(drawn, rho / norm_of(drawn)))


def _known(value: float) -> float:
    """Not a number is beyond all numbers: the loss has left them."""
    return math.inf if math.isnan(value) else value
