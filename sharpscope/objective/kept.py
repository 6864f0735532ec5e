"""Sums over micro-batches whose graphs are kept, so that vector after vector can be pushed through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sharpscope.objective.batches import MicroBatch
from sharpscope.objective.derivatives import Graph
from sharpscope.objective.memory import Room
from sharpscope.objective.sums import PointSum, Sums

# Bytes of graphs that are kept; those beyond are built again for every block, at 1 gradient of theirs.
KEPT = 1 << 30


class KeptGraphs:
    """``rows -> sum_b (sum_i a_i H_i) rows`` (K, n) over ``parts``, and their loss and gradient on the way.

    Cost of the first call: 1 + 2K gradients; of the others 2K, and 1 more of the parts that are not kept.

    Args:
        graph: differentiates a micro-batch.
        parts: in the order of summation; they are held.
        like: (0, n), for n, dtype and device.
        room: where a part that does not fit is halved.
        most: examples whose graphs may be kept.
    """

    def __init__(
        self, graph: Callable[[MicroBatch], Graph], parts: Iterable[MicroBatch], like: Tensor, room: Room, most: int
    ) -> None:
        self._graph, self._room, self._left = graph, room, most
        self._rebuilt = list(parts)
        self._kept: list[Graph] = []
        self._like = like
        self._sums: Sums | None = None

    @property
    def sums(self) -> Sums:
        """Loss and gradient, from the first call's graphs, at the cost of 1 gradient where there was none."""
        if self._sums is None:
            self(self._like)
        assert self._sums is not None
        return self._sums

    def __call__(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for kept in self._kept:
            total += kept.products(rows)
        first = PointSum(rows) if self._sums is None else None
        parts, self._rebuilt = self._rebuilt, []
        for part in parts:
            for piece, graph, keep, products in self._room.run(part, lambda piece: self._pushed(piece, rows)):
                total += products
                if first is not None:
                    first.add(graph.loss, graph.weight, graph.gradient, graph.examples)
                if keep:
                    self._left -= piece.size
                    self._kept.append(graph)
                else:
                    self._rebuilt.append(piece)
        if first is not None:
            self._sums = first.sums(self._like)
        return total

    def _pushed(self, part: MicroBatch, rows: Tensor) -> tuple[MicroBatch, Graph, bool, Tensor]:
        """A micro-batch, its graph, whether that is to be kept, and its products."""
        graph, keep = self._graph(part), part.size <= self._left
        return part, graph, keep, graph.products(rows, last=not keep)
