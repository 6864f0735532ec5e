"""SAM's perturbation from w to w + e: one direction of global norm, and each parameter group's own rho."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.weights.norm_ball import Ball, norm_on_device, settled_norm
from sharpscope.weights.perturbation import Perturbation

# Maps weights and their gradients to the direction of ascent.
DirectionOf = Callable[[Sequence[Tensor], list[Tensor]], list[Tensor]]


class AscentSteps:
    """Gradient ascent from w in steps of length ``rho / steps``; ``restore`` copies w back.

    Attributes:
        ball: shape of the ball; D is taken at w.
        steps: number of ascent steps.
        normalize: False takes steps ``rho / steps D^2 g`` without dividing by a norm.
        rounding: rounding of the last perturbation, see ``Perturbation``.
    """

    def __init__(self, ball: Ball, steps: int, normalize: bool) -> None:
        self.ball, self.steps, self.normalize = ball, steps, normalize
        self.rounding: Tensor | None = None
        self._perturbation: Perturbation | None = None
        self._scales: dict[Tensor, Tensor] = {}

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + e (or at w, after a skipped first step)."""
        return self._perturbation is not None

    def begin_at_w(self) -> None:
        """Begin an ascent with e = 0."""
        self._perturbation = Perturbation([])

    def step(self, groups: Sequence[dict[str, Any]], direction_of: DirectionOf, inverse_scale: float) -> str | None:
        """Take one step along ``direction_of(weights, inverse_scale * .grad)``; return the reason if there is none.

        Raises: ArgumentError for sparse gradients, or a rho outside its domain.
        """
        chosen = [[p for p in group["params"] if p.grad is not None] for group in groups]
        if self._perturbation is not None:  # a later step moves the same weights
            perturbed = set(self._perturbation.weights)
            chosen = [[p for p in params if p in perturbed] for params in chosen]
        weights = [p for params in chosen for p in params]
        grads = dense_gradients(weights)
        if inverse_scale != 1.0 and grads:
            grads = list(torch._foreach_mul(grads, inverse_scale))
        raw, grads = grads, direction_of(weights, grads)
        scales = self._scales_of(weights)
        scaled = grads if scales is None else list(torch._foreach_mul(grads, scales))
        norm = settled_norm(float(norm_on_device(scaled)), scaled)
        if norm == 0.0 and grads is not raw and 0.0 < settled_norm(float(norm_on_device(raw)), raw) < math.inf:
            # The direction is zero although the gradient is not: e = 0.
            self._perturbation = self._perturbation or Perturbation(weights)
            return None
        if not 0.0 < norm < math.inf:
            return "is zero" if norm == 0.0 else "is not finite"
        for group in groups:
            check_rho(group["rho"])
        # Stored before the first weight is touched, so that an interrupt at any point finds it.
        if self._perturbation is None:
            self._perturbation = Perturbation(weights)
        if self.normalize:
            direction, factor = self.ball.steepest(grads, scales, norm)
        else:
            direction, factor = scaled if scales is None else list(torch._foreach_mul(scaled, scales)), 1.0
        directions = iter(direction)
        for group, params in zip(groups, chosen, strict=True):
            if params:
                sign = -1.0 if group.get("maximize") else 1.0
                length = sign * float(group["rho"]) * factor / self.steps
                self._perturbation.add(params, [next(directions) for _ in params], length)
        self.rounding = self._perturbation.rounding
        return None

    def restore(self) -> bool:
        """Copy w back; return whether any weight was perturbed."""
        perturbation, self._perturbation, self._scales = self._perturbation, None, {}
        if perturbation is None:
            return False
        perturbation.restore()
        return bool(perturbation.weights)

    def _scales_of(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        if self.ball.scaling is None:
            return None
        if not self._scales:
            self._scales = dict(zip(weights, self.ball.scales(weights) or (), strict=True))
        return [self._scales[w] for w in weights]


def check_rho(rho: object) -> None:
    """Raise ArgumentError unless ``rho`` is a finite number >= 0."""
    if isinstance(rho, bool) or not isinstance(rho, numbers.Real) or not 0.0 <= float(rho) < math.inf:
        raise ArgumentError(f"rho must be a finite number >= 0, got {rho!r}. Foret et al. use 0.01 to 0.5.")


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of ``params`` that have one. Raises ArgumentError for sparse gradients."""
    grads = [p.grad for p in params if p.grad is not None]
    sparse = next((g for g in grads if g.layout != torch.strided), None)
    if sparse is not None:
        raise ArgumentError(
            f"SAM needs dense gradients, got one of shape {tuple(sparse.shape)} with layout {sparse.layout}. "
            "Build the embedding with sparse=False."
        )
    return grads
