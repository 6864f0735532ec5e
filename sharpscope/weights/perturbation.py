"""Weights moved to ``w + e`` in place, and put back to the bit: for the optimizers and for the measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from sharpscope.precision import LOW_PRECISION, wide
from sharpscope.weights.norm_ball import inner_of, norm_of


class Perturbation:
    """Holds exact copies of ``weights`` (one more set of them in memory) until ``restore``.

    As a context it restores however the block ends. Sums are formed in float32 or better and rounded once.

    Attributes:
        weights: the tensors that are written to.
        centre: their copies, w.
        rounding: over the float16 and bfloat16 weights ``(<a, e>, <a, a>, <e, e>)`` of what was asked for by ``add``,
            ``e``, and is left of it after rounding, ``a``; on the device. None where there are no such weights.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self.centre = [w.detach().clone() for w in self.weights]
        self.rounding: Tensor | None = None

    @torch.no_grad()
    def add(self, weights: Sequence[Tensor], direction: Sequence[Tensor], scale: float) -> None:
        """Add ``scale * direction`` to ``weights``, which are among its own, where they are now."""
        low = [w.dtype in LOW_PRECISION for w in weights]
        exact = [w for w, is_low in zip(weights, low, strict=True) if not is_low]
        if exact:
            torch._foreach_add_(exact, [d for d, is_low in zip(direction, low, strict=True) if not is_low], alpha=scale)
        rounded = [w for w, is_low in zip(weights, low, strict=True) if is_low]
        if rounded:
            before = [w.float() for w in rounded]
            wished = torch._foreach_mul([d for d, is_low in zip(direction, low, strict=True) if is_low], scale)
            torch._foreach_copy_(rounded, list(torch._foreach_add(before, wished)))
            achieved = torch._foreach_sub([w.float() for w in rounded], before)
            device = rounded[0].device
            sums = [
                torch.stack([(a * e).sum(), (a * a).sum(), (e * e).sum()]).to(device)
                for a, e in zip(achieved, wished, strict=True)
            ]
            total = torch.stack(sums).sum(0)
            self.rounding = total if self.rounding is None else self.rounding + total.to(self.rounding)
        # Under an autocast that encloses several passes, the next would take w's cached low-precision copy.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def move_to(self, e: Sequence[Tensor], scale: float = 1.0) -> None:
        """Make the weights ``w + scale * e``, from the copies: however many moves came before, nothing drifts."""
        self.rounding = None
        if any(w.dtype in LOW_PRECISION for w in self.weights):
            torch._foreach_copy_(self.weights, self.centre)
            self.add(self.weights, e, scale)
            return
        for w, c, d in zip(self.weights, self.centre, e, strict=True):
            torch.add(c, d, alpha=scale, out=w)  # a third less of memory traffic than a copy and a sum
        torch.clear_autocast_cache()

    @torch.no_grad()
    def achieved(self, wished: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """``||a||_2`` of the perturbation ``a`` that the weights now show, and its cosine with ``wished``.

        The cosine is 1 where nothing was wished for, 0 where nothing is left of what was. Waits for the device.
        """
        moved = [w.to(wide(w.device)) - c.to(wide(w.device)) for w, c in zip(self.weights, self.centre, strict=True)]
        length = norm_of(moved)
        if wished is None:
            return length, 1.0
        return length, cosine(inner_of(moved, wished), length**2, norm_of(wished) ** 2)

    @torch.no_grad()
    def restore(self) -> None:
        """Put w back, bit for bit."""
        if self.weights:
            torch._foreach_copy_(self.weights, self.centre)
            torch.clear_autocast_cache()

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def cosine(dot: float, achieved: float, wished: float) -> float:
    """``<a, e> / (||a|| ||e||)`` from those three sums; 0 where nothing was left of ``e``, 1 for ``e = 0``."""
    if wished == 0.0:
        return 1.0
    return dot / math.sqrt(achieved) / math.sqrt(wished) if achieved > 0.0 else 0.0
