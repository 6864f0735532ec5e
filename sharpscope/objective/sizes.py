"""Choosing the size of a micro-batch by measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from sharpscope.objective.batches import MicroBatch

# Sizes tried, on as many examples as the last of them, and the choice where the data set is too small for the
# measurement to pay.
CANDIDATES = (64, 128, 256, 512)
SMALL_DATA = 4096
DEFAULT = 256

# Sizes tried after the last of these has won, as in a network of matrices alone whose weights outweigh its activations:
# an mlp of 269,322 parameters is fastest at some thousand examples. None is tried whose graph takes more bytes, nor one
# that is more than this share of the data.
LARGE = (1024, 2048, 4096)
GRAPH, SHARE = 1 << 28, 1 / 16

# Seconds below which one run says little, and the runs that are then made, of which the fastest counts.
SHORT, RUNS = 0.05, 3


def fastest(
    work: Callable[[Iterable[MicroBatch]], object], sample: MicroBatch, candidates: Sequence[int] = CANDIDATES
) -> int:
    """The size of ``candidates`` in which ``work`` takes ``sample`` in the least time, growing while it helps.

    ``work`` must have ended on the device when it returns.
    """
    best, least = DEFAULT, float("inf")
    for size in candidates:
        if size > sample.size:
            break
        times: list[float] = []
        while not times or (sum(times) < SHORT and len(times) < RUNS):
            started = time.perf_counter()
            work([sample.part(i, min(i + size, sample.size)) for i in range(0, sample.size, size)])
            times.append(time.perf_counter() - started)
        seconds = min(times)
        if seconds > 1.2 * least:
            break
        if seconds < least:
            best, least = size, seconds
    return best
