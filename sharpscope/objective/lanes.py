"""Products with several pieces of a micro-batch at a time, each on its share of the processor's threads.

A network's operations are often too small to keep all threads of a CPU busy, while whole pieces of a batch do not wait
for each other. The model itself, which may keep what it likes in its attributes, is run on one piece at a time: only
the differentiation of the graphs that it leaves goes side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from sharpscope.objective.batches import MicroBatch
from sharpscope.objective.derivatives import Graph

# Examples that a piece must have: of fewer, the calls cost more than the work.
LEAST = 16


def in_lanes(build: Callable[[MicroBatch], Graph], part: MicroBatch, lanes: int) -> Graph:
    """``build(part)`` as the sum of so many graphs of its pieces, whose products are made at the same time.

    Memory: the graphs together hold what the whole one would; each lane has products (K, n) of its own. Sums are taken
    in the order of the pieces, so equal calls give equal bits. A part that may not be cut is one graph.
    """
    count = min(lanes, part.size // LEAST)
    if count < 2 or not part.splittable:
        return build(part)
    cuts = [part.size * lane // count for lane in range(count + 1)]
    graphs = [build(part.part(start, stop)) for start, stop in pairwise(cuts)]

    def products(block: Tensor, last: bool = False) -> Tensor:
        with _threads(max(1, torch.get_num_threads() // count)), ThreadPoolExecutor(count - 1) as pool:
            others = [pool.submit(graph.products, block, last) for graph in graphs[1:]]
            rows = graphs[0].products(block, last)
            for other in others:
                rows += other.result()
        return rows

    return Graph(
        loss=torch.stack([graph.loss for graph in graphs]).sum(),
        weight=torch.stack([graph.weight for graph in graphs]).sum(),
        gradient=[torch.stack(pieces).sum(0) for pieces in zip(*(graph.gradient for graph in graphs), strict=True)],
        products=products,
        examples=part.size,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """``count`` threads an operation in the block, in threads that start in it too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
