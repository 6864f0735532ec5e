"""The way from w to w + e: every parameter group moved by its own rho, along one gradient of global norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpscope.optim.replay import check_rho, dense_gradients
from sharpscope.weights.norm_ball import Ball, norm_on_device, settled_norm
from sharpscope.weights.perturbation import Perturbation

Followed = Callable[[Sequence[Tensor], list[Tensor]], list[Tensor]]


class Climb:
    """Moves weights up their gradients, in steps of ``rho / steps``, until ``restore`` puts them back by copy.

    Attributes:
        ball: its shape, with D taken where the first step starts.
        steps: of which a climb consists.
        normalize: False steps by ``rho / steps D^2 g`` without a norm.
        rounding: of the last climb, see ``Perturbation``.
    """

    def __init__(self, ball: Ball, steps: int, normalize: bool) -> None:
        self.ball, self.steps, self.normalize = ball, steps, normalize
        self.rounding: Tensor | None = None
        self._moved: Perturbation | None = None
        self._scales: dict[Tensor, Tensor] = {}

    @property
    def begun(self) -> bool:
        """Whether weights are away from w, or a climb was refused and not yet ended."""
        return self._moved is not None

    def stay(self) -> None:
        """Begin a climb that moves nothing."""
        self._moved = Perturbation([])

    def up(self, groups: Sequence[dict[str, Any]], followed: Followed, unscale: float) -> str | None:
        """One step along ``followed(weights, .grad times unscale)``; or why there is none.

        Raises: ArgumentError for sparse gradients, or a rho outside its domain.
        """
        chosen = [[p for p in group["params"] if p.grad is not None] for group in groups]
        if self._moved is not None:  # of the later steps
            known = set(self._moved.weights)
            chosen = [[p for p in params if p in known] for params in chosen]
        weights = [p for params in chosen for p in params]
        grads = dense_gradients(weights)
        if unscale != 1.0 and grads:
            grads = list(torch._foreach_mul(grads, unscale))
        raw, grads = grads, followed(weights, grads)
        scales = self._scales_of(weights)
        scaled = grads if scales is None else list(torch._foreach_mul(grads, scales))
        norm = settled_norm(float(norm_on_device(scaled)), scaled)
        if norm == 0.0 and grads is not raw and 0.0 < settled_norm(float(norm_on_device(raw)), raw) < math.inf:
            # Nothing to follow is no gradient of zero: e = 0.
            self._moved = self._moved or Perturbation(weights)
            return None
        if not 0.0 < norm < math.inf:
            return "is zero" if norm == 0.0 else "is not finite"
        for group in groups:
            check_rho(group["rho"])
        # Stored before the first weight is touched, so that an interrupt at any point finds it.
        if self._moved is None:
            self._moved = Perturbation(weights)
        if self.normalize:
            direction, factor = self.ball.steepest(grads, scales, norm)
        else:
            direction, factor = scaled if scales is None else list(torch._foreach_mul(scaled, scales)), 1.0
        pieces = iter(direction)
        for group, params in zip(groups, chosen, strict=True):
            if params:
                sign = -1.0 if group.get("maximize") else 1.0
                step = sign * float(group["rho"]) * factor / self.steps
                self._moved.add(params, [next(pieces) for _ in params], step)
        self.rounding = self._moved.rounding
        return None

    def restore(self) -> bool:
        """Put the weights back; whether any had been moved."""
        moved, self._moved, self._scales = self._moved, None, {}
        if moved is None:
            return False
        moved.restore()
        return bool(moved.weights)

    def _scales_of(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        if self.ball.scaling is None:
            return None
        if not self._scales:
            self._scales = dict(zip(weights, self.ball.scales(weights) or (), strict=True))
        return [self._scales[w] for w in weights]
