"""Gradient ascent to the maximum of the loss in a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.sharpness.subset_loss import SubsetLoss
from sharpscope.weights.norm_ball import Ball, norm_of
from sharpscope.weights.perturbation import Perturbation

# APGD's constants (Croce and Hein 2020): momentum; the fraction of steps that must increase the loss between two
# checkpoints; the first interval between checkpoints, its decrement and its minimum, as fractions of all steps.
MOMENTUM, MIN_INCREASES, FIRST_INTERVAL, INTERVAL_DECREMENT, MIN_INTERVAL = 0.75, 0.75, 0.22, 0.03, 0.06


@dataclass(frozen=True)
class Ascent:
    """Settings of the ascent to ``max L_b(w + e)`` over the ball; its result is a lower bound of the maximum.

    Args:
        steps: number of points at which the loss is evaluated. Without ``adaptive``, each step has length
            ``rho / steps`` along the direction of steepest ascent, starting at w, and the result is the largest loss
            on the way; one step is SAM's perturbation.
        adaptive: use APGD (Croce and Hein 2020): projected steps with momentum, whose length halves when the loss
            stops increasing. It includes w and the result of a single step.
        restarts: additional APGD runs from random points of the ball.

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


def maximum_loss(
    loss: SubsetLoss,
    perturbation: Perturbation,
    ball: Ball,
    scales: Sequence[Tensor] | None,
    rho: float,
    ascent: Ascent,
    base: float,
    grads: Sequence[Tensor],
    generator: torch.Generator,
) -> float:
    """Largest ``L_b(w + e)`` found by ``ascent``; the weights are at w before and after.

    NaN counts as infinity. If the gradient at w is zero and there are no restarts, the result is L_b(w).

    Args:
        loss: L_b.
        perturbation: of the parameters of ``loss``.
        ball, scales: the shape of the ball, and its D at w.
        rho: radius of the ball.
        base, grads: L_b and its gradient at w.
        generator: random numbers of the restarts.

    Cost: ``steps - 1`` gradients and a forward pass; each restart one gradient more.
    """
    if not ascent.adaptive:
        return _steps(loss, perturbation, ball, scales, rho, ascent.steps, base, grads)
    search = _Apgd(loss, perturbation, ball, scales, rho, ascent.steps)
    try:
        best = max(base, search.run(None, grads))
        for _ in range(ascent.restarts):
            best = max(best, search.run(_random_point(grads, ball, rho, generator), None))
    finally:
        perturbation.restore()
    return best


def lost_share(
    perturbation: Perturbation, ball: Ball, scales: Sequence[Tensor] | None, rho: float, grads: Sequence[Tensor]
) -> float:
    """Share of the perturbation ``e`` of length rho along ``grads`` that rounding of ``w + e`` takes; 0 for a zero e.

    The weights are at w before and after. Cost: two passes over the weights.
    """
    norm = ball.dual_norm(grads, scales)
    if not norm or not math.isfinite(norm):
        grads = [torch.ones_like(g) for g in grads]  # any direction of that length is rounded alike
        norm = ball.dual_norm(grads, scales)
    if not norm:
        return 0.0
    direction, factor = ball.steepest(grads, scales, norm)
    if rho * factor > torch.finfo(grads[0].dtype).max:
        return 0.0  # rounding takes nothing of so long a move
    try:
        return perturbation.lost(direction, rho * factor)
    finally:
        perturbation.restore()


def _steps(
    loss: SubsetLoss,
    perturbation: Perturbation,
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
            dual_norm = ball.dual_norm(grads, scales)
            if not dual_norm:
                return max(best, base)
            direction, factor = ball.steepest(grads, scales, dual_norm)
            perturbation.add(perturbation.weights, direction, rho / steps * factor)
            if i + 1 < steps:
                value, grads = loss.gradient()
            else:
                value = loss.value()
            best = max(best, _nan_to_inf(value))
            if best == math.inf:
                break
        return best
    finally:
        perturbation.restore()


class _Apgd:
    """APGD in the coordinates ``u = D^-1 e``, in which D = 1."""

    def __init__(
        self,
        loss: SubsetLoss,
        perturbation: Perturbation,
        ball: Ball,
        scales: Sequence[Tensor] | None,
        rho: float,
        steps: int,
    ) -> None:
        self.loss, self.perturbation, self.ball, self.rho, self.steps = loss, perturbation, ball, rho, steps
        self.scales = None if scales is None else list(scales)

    def run(self, start: list[Tensor] | None, grads: Sequence[Tensor] | None) -> float:
        """Largest loss found from ``start``; None starts at w, where the gradient is ``grads``."""
        if start is None:
            assert grads is not None
            u, gradient, value = [torch.zeros_like(g) for g in grads], self._scaled(grads), -math.inf
        else:
            u = start
            value, gradient = self._evaluate(u)
        previous, step = u, 2 * self.rho
        best, best_u, best_gradient = value, u, gradient
        increases, checkpoint, checkpoint_best, checkpoint_step = 0, 0, value, step
        interval, checkpoint_fraction = FIRST_INTERVAL, 0.0
        for k in range(1, self.steps + 1):
            # A zero gradient gives no direction.
            if best == math.inf or not norm_of(gradient):
                break
            following = self._projected(list(torch._foreach_add(u, self._unit(gradient), alpha=step)))
            if k > 1:
                following = self._projected(
                    [
                        a + MOMENTUM * (z - a) + (1 - MOMENTUM) * (a - b)
                        for a, z, b in zip(u, following, previous, strict=True)
                    ]
                )
            previous, u, previous_value = u, following, value
            value, gradient = self._evaluate(u, last=k == self.steps)
            increases += value > previous_value
            if value > best:
                best, best_u, best_gradient = value, u, gradient
            if k >= math.ceil((checkpoint_fraction + interval) * self.steps):
                few_increases = increases < MIN_INCREASES * (k - checkpoint)
                no_progress = step == checkpoint_step and best == checkpoint_best
                checkpoint, checkpoint_step, checkpoint_best, increases = k, step, best, 0
                checkpoint_fraction += interval
                interval = max(interval - INTERVAL_DECREMENT, MIN_INTERVAL)
                if few_increases or no_progress:
                    step /= 2
                    u, previous, gradient, value = best_u, best_u, best_gradient, best
        return best

    def _evaluate(self, u: list[Tensor], last: bool = False) -> tuple[float, list[Tensor]]:
        """Loss at ``u`` and its gradient in these coordinates; the gradient is not needed after the last step."""
        self.perturbation.move_to(self._scaled(u))
        if last:
            return _nan_to_inf(self.loss.value()), u
        value, grads = self.loss.gradient()
        return _nan_to_inf(value), self._scaled(grads)

    def _scaled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self.scales is None else list(torch._foreach_mul(list(tensors), self.scales))

    def _unit(self, gradient: list[Tensor]) -> list[Tensor]:
        direction, factor = Ball(self.ball.p).steepest(gradient, None)
        return direction if factor == 1.0 else list(torch._foreach_mul(direction, factor))

    def _projected(self, u: list[Tensor]) -> list[Tensor]:
        if self.ball.p == math.inf:
            return [t.clamp(-self.rho, self.rho) for t in u]
        norm = norm_of(u)
        return u if norm <= self.rho else list(torch._foreach_mul(u, self.rho / norm))


def _random_point(like: Sequence[Tensor], ball: Ball, rho: float, generator: torch.Generator) -> list[Tensor]:
    """A random point of the ball with D = 1: uniform in the cube (p = inf), or on the sphere (p = 2)."""
    if ball.p == math.inf:
        return [(2 * torch.rand(g.shape, generator=generator, dtype=torch.float64).to(g) - 1) * rho for g in like]
    directions = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for g in like]
    return list(torch._foreach_mul(directions, rho / norm_of(directions)))


def _nan_to_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
