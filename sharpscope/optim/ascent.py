"""The ascent of a SAM step, from w to w + e, and sums of gradients over chunks of m examples."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.weights.norm_ball import Ball, inner_of, norm_on_device, settled_norm, widened
from sharpscope.weights.perturbation import Perturbation
from sharpscope.weights.tensor_lists import is_distributed, multiply

# Maps weights and their gradients to the direction of ascent.
DirectionOf = Callable[[Sequence[Tensor], list[Tensor]], list[Tensor]]


class AscentSteps:
    """Gradient ascent from w in steps of length ``rho / steps``; ``restore`` copies w back.

    Attributes:
        ball: shape of the ball; D is taken at w.
        steps: number of ascent steps.
        normalize: False takes steps ``rho / steps D^2 g``, not divided by a norm.
        rounding: rounding of the last perturbation, see ``Perturbation``; of weights above 16 bits at the first step,
            and again where rho has halved.
    """

    def __init__(self, ball: Ball, steps: int, normalize: bool) -> None:
        self.ball, self.steps, self.normalize = ball, steps, normalize
        self.rounding: Tensor | None = None
        self._perturbation: Perturbation | None = None
        self._scales: dict[Tensor, Tensor] = {}
        self._checked_rho = math.inf

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + e (or at w, after a skipped first step)."""
        return self._perturbation is not None

    def begin_at_w(self) -> None:
        """Start an ascent at e = 0."""
        self._perturbation = Perturbation([])

    def step(self, groups: Sequence[dict[str, Any]], direction_of: DirectionOf, inverse_scale: float) -> str | None:
        """Take one step along ``direction_of(weights, inverse_scale * .grad)``.

        Returns: None, or the reason why there is no step: "is zero" or "is not finite".

        Raises: ArgumentError for sparse gradients, or a rho outside its domain.
        """
        chosen = [[p for p in group["params"] if p.grad is not None] for group in groups]
        if self._perturbation is not None:  # a later step moves the same weights
            perturbed = set(self._perturbation.weights)
            chosen = [[p for p in params if p in perturbed] for params in chosen]
        weights = [p for params in chosen for p in params]
        grads = dense_gradients(weights)
        if inverse_scale != 1.0 and grads:
            grads = multiply(grads, inverse_scale)
        raw, grads = grads, direction_of(weights, grads)
        scales = self._scales_of(weights)
        scaled = grads if scales is None else multiply(grads, scales)
        norm = settled_norm(float(norm_on_device(scaled)), scaled)
        if norm == 0.0 and scaled is not raw and 0.0 < settled_norm(float(norm_on_device(raw)), raw) < math.inf:
            # The direction, or D g, is zero although the gradient is not, as of weights that are zero: e = 0.
            self._perturbation = self._perturbation or Perturbation(weights)
            return None
        if not 0.0 < norm < math.inf:
            return "is zero" if norm == 0.0 else "is not finite"
        for group in groups:
            check_rho(group["rho"])
        # Stored before the first weight changes, so that an interrupt at any point can restore w.
        first = self._perturbation is None
        if self._perturbation is None:
            self._perturbation = Perturbation(weights)
        if self.normalize:
            direction, factor = self.ball.steepest(grads, scales, norm)
        else:
            direction, factor = scaled if scales is None else multiply(scaled, scales), 1.0
        directions, lengths = iter(direction), []
        for group, params in zip(groups, chosen, strict=True):
            if params:
                sign = -1.0 if group.get("maximize") else 1.0
                length = sign * float(group["rho"]) * factor / self.steps
                self._perturbation.add(params, [next(directions) for _ in params], length)
                lengths += [length] * len(params)
        rounding, smallest = self._perturbation.rounding, min(float(group["rho"]) for group in groups)
        if rounding is not None:
            self.rounding = rounding
        # Only at the first step and where rho has fallen since, because it waits for the device.
        elif first and 0.0 < smallest < self._checked_rho / 2:
            self._checked_rho = smallest
            self.rounding = self._rounding_of([d * length for d, length in zip(direction, lengths, strict=True)])
        return None

    def restore(self) -> bool:
        """Copy w back; return whether any weight was perturbed."""
        perturbation, self._scales = self._perturbation, {}
        if perturbation is None:
            return False
        try:
            perturbation.restore()
        except BaseException:
            perturbation.restore()  # an interrupt: again from the start
            raise
        finally:
            self._perturbation = None
        return bool(perturbation.weights)

    @torch.no_grad()
    def _rounding_of(self, requested: Sequence[Tensor]) -> Tensor | None:
        """As ``Perturbation.rounding`` over ``<e, e>``, of weights of any precision; None for sharded ones."""
        perturbation = self._perturbation
        assert perturbation is not None
        if any(map(is_distributed, perturbation.weights)):
            return None
        moved = [w - c for w, c in zip(perturbation.weights, perturbation.centre, strict=True)]
        size = inner_of(requested, requested)
        if not size:
            return None
        return torch.tensor([inner_of(moved, requested) / size, inner_of(moved, moved) / size, 1.0])

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
    """The gradients of those ``params`` that have one. Raises ArgumentError for sparse gradients."""
    grads = [p.grad for p in params if p.grad is not None]
    sparse = next((g for g in grads if g.layout != torch.strided), None)
    if sparse is not None:
        raise ArgumentError(
            f"SAM needs dense gradients, got one of shape {tuple(sparse.shape)} with layout {sparse.layout}. "
            "Build the embedding with sparse=False."
        )
    return grads


# Tensors of a chunk, and its fraction of the batch.
Chunk = tuple[tuple[Tensor, ...], float]


def split_batch(batch: Sequence[Tensor], m: int | None) -> list[Chunk]:
    """Split ``batch`` along the first dimension into chunks of ``m`` rows; None gives one chunk.

    Raises: ArgumentError if the batch is empty, or its tensors differ in the number of rows.
    """
    if m is None:
        return [(tuple(batch), 1.0)]
    sizes = {len(t) if isinstance(t, Tensor) and t.dim() else None for t in batch}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ArgumentError(
            f"With m={m} step() needs the batch, tensors with one row per example: step(closure, inputs, targets), got "
            f"{', '.join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in batch) or 'none'}."
        )
    total = len(batch[0])
    starts = range(0, total, m)
    return [(tuple(t[i : i + m] for t in batch), min(m, total - i) / total) for i in starts]


class GradientSum:
    """``sum_i share_i g_i`` for each of ``params`` that has a gradient, in float32 or better."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = [p for p in params if p.requires_grad]
        self.sums: dict[Tensor, Tensor] = {}

    def add(self, share: float) -> None:
        """Add ``share`` times the current ``.grad``."""
        for p in self._params:
            if p.grad is not None:
                total = self.sums.get(p)
                self.sums[p] = widened(p.grad) * share if total is None else total.add_(widened(p.grad), alpha=share)

    def write_to_grad(self) -> None:
        """Replace ``.grad`` by the sums."""
        for p in self._params:
            p.grad = self.sums[p].to(p.dtype) if p in self.sums else None

    def all_reduce_mean(self, group: Any) -> None:
        """Replace the sums by their mean over all processes, in one all-reduce for each device and dtype.

        Where a process has no gradient of a parameter, it contributes zeros.
        """
        have = torch.tensor([p in self.sums for p in self._params], dtype=torch.int32, device=self._params[0].device)
        torch.distributed.all_reduce(have, group=group)
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p, count in zip(self._params, have.tolist(), strict=True):
            if count:
                dtype = widened(p).dtype
                self.sums.setdefault(p, torch.zeros_like(p, dtype=dtype))
                kinds.setdefault((p.device, dtype), []).append(p)
        for params in kinds.values():
            flat = torch.cat([self.sums[p].flatten() for p in params])
            torch.distributed.all_reduce(flat, group=group)
            flat /= torch.distributed.get_world_size(group)
            for p, mean in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
                self.sums[p] = mean.view_as(p)
