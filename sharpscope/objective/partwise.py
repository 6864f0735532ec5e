"""What each micro-batch by itself says of a block of vectors, for the sampling error of what their sum says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.precision import CHUNK, wide


@dataclass(frozen=True)
class Partwise:
    """Numbers of B micro-batches and K vectors ``v_k``, ``H_b = sum_i a_i H_i`` over micro-batch b, no mean.

    In float64, on the device (float32 on MPS). Weight decay, which no example carries, is left out. A micro-batch that
    did not fit into memory counts as its pieces.

    Attributes:
        weights: (B,), ``A_b = sum_i a_i``.
        forms: (B, K, K), ``v_j' H_b v_k``.
        squares: (B, K), ``||H_b v_k||^2``.
        sizes: the examples of each micro-batch.
    """

    weights: Tensor
    forms: Tensor
    squares: Tensor
    sizes: tuple[int, ...]


class PartwiseRecord:
    """Collects ``Partwise`` for ``block`` (K, n), at K^2 + K inner products a micro-batch, and waits for no device."""

    def __init__(self, block: Tensor) -> None:
        self._block = block
        self._dtype = wide(block.device)
        self._rows: list[tuple[Tensor, ...]] = []
        self._sizes: list[int] = []

    def add(self, weight: Tensor, products: Tensor, size: int) -> None:
        """One micro-batch's sums; ``products`` is (K, n)."""
        count = len(self._block)
        forms = torch.zeros(count, count, dtype=self._dtype, device=self._block.device)
        squares = forms.new_zeros(count)
        for start in range(0, self._block.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            vectors, pushed = (t[:, part].to(self._dtype) for t in (self._block, products))
            forms += vectors @ pushed.T
            squares += pushed.square().sum(1)
        self._rows.append((weight.to(self._dtype), forms, squares))
        self._sizes.append(size)

    def result(self) -> Partwise:
        """Everything added so far."""
        columns = [torch.stack(column) for column in zip(*self._rows, strict=True)]
        if not columns:
            count, empty = len(self._block), torch.zeros(0, dtype=self._dtype, device=self._block.device)
            columns = [empty, empty.view(0, count, count), empty.view(0, count)]
        weights, forms, squares = columns
        return Partwise(weights, forms, squares, tuple(self._sizes))
