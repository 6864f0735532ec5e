"""Split a batch into chunks of m examples, each with its own perturbation, and sum their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.weights.norm_ball import widened

# Tensors of a chunk, and its fraction of the batch.
Chunk = tuple[tuple[Tensor, ...], float]


def split_batch(batch: Sequence[Tensor], m: int | None) -> list[Chunk]:
    """Split ``batch`` along the first dimension into chunks of ``m`` rows; None is one chunk.

    Raises: ArgumentError if there is no batch, or its tensors differ in the number of rows.
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
