"""Perturbation of weights in place to ``w + e``, restored bit for bit, for optimizers and measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.precision import LOW_PRECISION, wide
from sharpscope.weights import tensor_lists
from sharpscope.weights.norm_ball import inner_of, norm_of
from sharpscope.weights.tensor_lists import local, total


class Perturbation:
    """Exact copies of ``weights`` and in-place moves away from them, until ``restore``.

    As a context manager it restores on exceptions too. Sums are computed in float32 or better and rounded once. Memory:
    one copy of the weights.

    Attributes:
        weights: the tensors that are written to.
        centre: copies of the original weights w.
        rounding: ``(<a, e>, <a, a>, <e, e>)`` over the float16 and bfloat16 weights, where ``e`` is the perturbation
            requested by ``add`` and ``a`` what remains of it after rounding; on the device. None without such weights.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self.centre = [w.detach().clone() for w in self.weights]
        self.rounding: Tensor | None = None

    @torch.no_grad()
    def add(self, weights: Sequence[Tensor], direction: Sequence[Tensor], scale: float) -> None:
        """Add ``scale * direction`` to the current values of ``weights``, some of ``self.weights``."""
        pairs = list(zip(weights, direction, strict=True))
        exact = [(w, d) for w, d in pairs if w.dtype not in LOW_PRECISION]
        if exact:
            tensor_lists.add_([w for w, _ in exact], [d for _, d in exact], scale)
        rounded = [(w, d) for w, d in pairs if w.dtype in LOW_PRECISION]
        if rounded:
            sums = []
            for w, d in rounded:
                shard = local(w)
                before, requested = shard.float(), local(d, like=w) * scale
                shard.copy_(before + requested)
                achieved = shard.float() - before
                sums.append(
                    torch.stack([(achieved * requested).sum(), achieved.square().sum(), requested.square().sum()])
                )
            lost = total(sums, [w for w, _ in rounded])
            self.rounding = lost if self.rounding is None else self.rounding + lost.to(self.rounding)
        # An autocast region around several passes would otherwise reuse its cached low-precision copy of w.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def move_to(self, e: Sequence[Tensor], scale: float = 1.0) -> None:
        """Set the weights to ``w + scale * e``, computed from the copies, so that repeated moves do not drift."""
        self.rounding = None
        if any(w.dtype in LOW_PRECISION for w in self.weights):
            tensor_lists.copy_(self.weights, self.centre)
            self.add(self.weights, e, scale)
            return
        for w, c, d in zip(self.weights, self.centre, e, strict=True):
            torch.add(c, d, alpha=scale, out=w)  # a third less of memory traffic than a copy and a sum
        torch.clear_autocast_cache()

    @torch.no_grad()
    def achieved(self, requested: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """``||a||_2`` of the current perturbation ``a``, and its cosine with ``requested``.

        The cosine is 1 where nothing was requested, 0 where rounding left nothing of it. Waits for the device.
        """
        moved = [w.to(wide(w.device)) - c.to(wide(w.device)) for w, c in zip(self.weights, self.centre, strict=True)]
        length = norm_of(moved)
        if requested is None:
            return length, 1.0
        return length, cosine(inner_of(moved, requested), length**2, norm_of(requested) ** 2)

    @torch.no_grad()
    def lost(self, e: Sequence[Tensor], scale: float = 1.0) -> float:
        """Share of a perturbation that rounding takes: ``||fl(w + scale e) - w - scale e|| / ||scale e||``.

        1 where ``w + scale e`` rounds to w, 0 where e is 0. The weights are at ``w + scale e`` afterwards.
        """
        self.move_to(e, scale)
        wanted = [scale * d.to(wide(d.device)) for d in e]
        moved = [w.to(wide(w.device)) - c.to(wide(w.device)) for w, c in zip(self.weights, self.centre, strict=True)]
        length = norm_of(wanted)
        return norm_of(list(torch._foreach_sub(moved, wanted))) / length if length else 0.0

    @torch.no_grad()
    def restore(self) -> None:
        """Put w back, bit for bit, whatever failed before; needs no other process."""
        if self.weights:
            tensor_lists.copy_(self.weights, self.centre)
            torch.clear_autocast_cache()

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


# Largest share of a perturbation that rounding may take, where only the perturbed weights count.
MAX_LOST = 0.1


def require_length(name: str, number: float, dtype: torch.dtype) -> None:
    """Raise ArgumentError for a length whose square the dtype does not hold."""
    largest = torch.finfo(dtype).max ** 0.5
    if number > largest:
        what = str(dtype).removeprefix("torch.")
        raise ArgumentError(f"{name} must be at most {largest:.2g}, whose square {what} holds, got {number:g}.")


def require_kept(lost: float, what: str, dtype: torch.dtype) -> None:
    """Raise ArgumentError where rounding takes more than MAX_LOST of the perturbation that ``what`` gives."""
    if lost > MAX_LOST:
        lift = ", or pass dtype=torch.float64 (--dtype float64)" if dtype != torch.float64 else ""
        raise ArgumentError(
            f"{what} must move the weights by more than {str(dtype).removeprefix('torch.')} rounds, but rounding takes "
            f"{100 * min(lost, 1.0):.0f} % of the move. Raise it{lift}."
        )


def cosine(dot: float, achieved: float, requested: float) -> float:
    """``<a, e> / (||a|| ||e||)`` from these three sums; 0 for ``a = 0``, 1 for ``e = 0``."""
    if requested == 0.0:
        return 1.0
    return dot / math.sqrt(achieved) / math.sqrt(requested) if achieved > 0.0 else 0.0
