"""A batch cut into pieces with a perturbation each, and gradients summed over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.weights.norm_ball import widened

Piece = tuple[tuple[Tensor, ...], float]


def pieces_of(batch: Sequence[Tensor], m: int | None) -> list[Piece]:
    """``batch`` cut along the first dimension into ``m`` rows at a time, each with its share of the rows.

    Raises: ArgumentError where there is no batch to cut, or its tensors have not as many rows each.
    """
    if m is None:
        return [(tuple(batch), 1.0)]
    sizes = {len(t) if isinstance(t, Tensor) and t.dim() else None for t in batch}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ArgumentError(
            f"With m={m} step() needs the batch, tensors with one row an example: step(closure, inputs, targets), got "
            f"{', '.join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in batch) or 'none'}."
        )
    total = len(batch[0])
    starts = range(0, total, m)
    return [(tuple(t[i : i + m] for t in batch), min(m, total - i) / total) for i in starts]


class GradientSum:
    """``sum_i share_i g_i`` for each of ``params``, in float32 or better; of those without a gradient nothing."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = [p for p in params if p.requires_grad]
        self.sums: dict[Tensor, Tensor] = {}

    def add(self, share: float) -> None:
        """Add what is in ``.grad`` now."""
        for p in self._params:
            if p.grad is not None:
                known = self.sums.get(p)
                self.sums[p] = widened(p.grad) * share if known is None else known.add_(widened(p.grad), alpha=share)

    def write(self) -> None:
        """Make the sums the gradients."""
        for p in self._params:
            p.grad = self.sums[p].to(p.dtype) if p in self.sums else None

    def average(self, group: Any) -> None:
        """The mean over all processes in place of the sums, in one exchange for each device and dtype.

        Where a process has no gradient of a parameter its zeros count; what none has stays without.
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
