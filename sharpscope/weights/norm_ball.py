"""The ball ``||D^-1 e||_p <= rho`` around the weights, with D = 1 or adaptive, and its steepest-ascent direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.precision import LOW_PRECISION, wide
from sharpscope.weights import tensor_lists
from sharpscope.weights.tensor_lists import is_distributed, local, multiply, total

SCALINGS = ("elementwise", "filter")

# Below this norm, rho / norm may overflow in float32 (3.4e38).
_TINY = 1e-30


@dataclass(frozen=True)
class Ball:
    """The ball ``||D^-1 e||_p <= rho``, with D computed at its centre, the weights w.

    Args:
        p: 2 or inf.
        scaling: None is D = 1. "elementwise" is ``D = |w| + offset`` (T in Kwon et al. 2021); "filter" is
            ``D = ||w_f||_2 + offset`` for each slice f of a tensor's first dimension, and elementwise for tensors with
            one dimension. Both include biases and norm layers, without which they are not invariant to rescaling of
            layers.
        offset: eta in Kwon et al. 2021; if positive, weights of 0 move too.

    Nothing is divided by D, so that a weight with D = 0 does not move.

    Raises: ArgumentError for an argument outside its domain.
    """

    p: float = 2.0
    scaling: str | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.p not in (2, math.inf, "inf"):
            raise ArgumentError(f"p must be 2 or inf, got {self.p!r}. Pass p=2, p=float('inf') or p='inf'.")
        object.__setattr__(self, "p", float(self.p))
        if self.scaling is not None and self.scaling not in SCALINGS:
            raise ArgumentError(f"An adaptive ball must be one of {', '.join(SCALINGS)}, got {self.scaling!r}.")
        if not 0 <= self.offset < math.inf:
            raise ArgumentError(f"eta must be a finite number >= 0, got {self.offset!r}.")

    def scales(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """D as a list of tensors that broadcast with ``weights``; None for D = 1."""
        if self.scaling is None:
            return None
        return [self._scale(widened(w)) for w in weights]

    def steepest(
        self, grads: Sequence[Tensor], scales: Sequence[Tensor] | None, norm: float | None = None
    ) -> tuple[list[Tensor], float]:
        """``d`` and ``c`` such that ``e = rho c d`` maximises ``g'e`` over the ball.

        p = 2: ``c d = D^2 g / ||D g||_2``; p = inf: ``c d = D sign(g)``; Foret et al. 2021, Eq. 2, and Kwon et al.
        2021, Eq. 4. No epsilon in the denominator, so ``||D^-1 c d||_p = 1`` however small the gradient.

        Args:
            grads: g, not zero, and finite.
            scales: D.
            norm: ``||D g||_2`` where it is known, as from ``dual_norm``; p = inf needs none.
        """
        wide_grads = [widened(g) for g in grads]
        if self.p == math.inf:
            signs = tensor_lists.sign(wide_grads)
            return (signs if scales is None else multiply(signs, scales)), 1.0
        scaled = wide_grads if scales is None else multiply(wide_grads, scales)
        size = norm_of(scaled) if norm is None else norm
        factor = 1.0
        if size < _TINY:
            # A power of two: exact, and 2**126 is a float32.
            factor = 2.0 ** min(126, -math.frexp(size)[1])
            scaled = multiply(scaled, factor)
        if scales is not None:
            scaled = multiply(scaled, scales)
        return scaled, 1.0 / (size * factor)

    def dual_norm(self, grads: Sequence[Tensor], scales: Sequence[Tensor] | None) -> float:
        """``max g'e`` over the ball of radius 1: ``||D g||_2`` for p = 2, ``||D g||_1`` for p = inf."""
        scaled = list(grads) if scales is None else multiply([widened(g) for g in grads], scales)
        if self.p == 2:
            return norm_of(scaled)
        return float(total([torch.linalg.vector_norm(local(g), 1, dtype=wide(g.device)) for g in scaled], scaled))

    def _scale(self, weight: Tensor) -> Tensor:
        if self.scaling == "filter" and weight.dim() > 1:
            size: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1) + self.offset
            return size.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight).contiguous()
        return weight.abs().add_(self.offset)


def widened(tensor: Tensor) -> Tensor:
    """``tensor``, detached, in float32 where it is in 16 bits."""
    return tensor.detach().float() if tensor.dtype in LOW_PRECISION else tensor.detach()


def norm_on_device(tensors: Sequence[Tensor], dtype: torch.dtype | None = torch.float64) -> Tensor:
    """``||g||_2`` over all tensors as a tensor of one element, accumulated in ``dtype``; waits for no device.

    Float64 because the squares of gradients below 1e-23 underflow in float32, and those below 1e-4 in float16. MPS has
    no float64: float32 there. None is each tensor's own.
    """
    if not tensors:
        return torch.zeros(1, dtype=torch.float64)
    if dtype is not None and any(g.device.type == "mps" for g in tensors):
        dtype = torch.float32
    if any(map(is_distributed, tensors)):
        norms = tensor_lists.norms(tensors, torch.float64)
        return total([n.square() for n in norms], tensors).sqrt().reshape(1)
    norms = tensor_lists.norms(tensors, dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
    return norm.reshape(1)


def settled_norm(norm: float, tensors: Sequence[Tensor]) -> float:
    """``norm``, recomputed with scaled tensors if it is 0 or not finite, since the squares may under- or overflow.

    Costs nothing except in that rare case, which waits for the device again.
    """
    if 0.0 < norm < math.inf or not tensors:
        return norm
    largest = float(total([_largest(local(g)) for g in tensors], tensors, largest=True))
    if not 0.0 < largest < math.inf:
        return norm
    if any(g.device.type == "mps" for g in tensors):
        tensors = [g.cpu() for g in tensors]
    return largest * float(norm_on_device([g.double() / largest for g in tensors]))


def _largest(tensor: Tensor) -> Tensor:
    """Largest absolute value, infinite if there is a NaN; 0 for a tensor without elements."""
    if not tensor.numel():
        return torch.zeros((), dtype=wide(tensor.device), device=tensor.device)
    return tensor.abs().nan_to_num(nan=math.inf, posinf=math.inf).max().to(wide(tensor.device))


def inner_of(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """``<a, b>`` over all tensors, in float64 where the device has it."""
    sums = [
        (local(a).to(wide(a.device)) * local(b, like=a).to(a.device, wide(a.device))).sum()
        for a, b in zip(left, right, strict=True)
    ]
    return float(total(sums, left)) if sums else 0.0


def norm_of(tensors: Sequence[Tensor]) -> float:
    """``||g||_2`` over all tensors, safe against under- and overflow."""
    return settled_norm(float(norm_on_device(tensors)), tensors)
