"""The size of a micro-batch: chosen by measuring, and how much memory its graph takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sharpscope.objective.data import MicroBatch

# One product with each of these micro-batches. It must have ended on the device when it returns.
Work = Callable[[Sequence[MicroBatch]], object]

# Sizes tried, each on DEFAULT examples at least, and the choice where the data set is too small for the measurement to
# pay.
CANDIDATES = (64, 128, 256, 512)
SMALL_DATA = 4096
DEFAULT = 256

# A candidate that takes more than this many times the best time ends the search.
WORSE = 1.2

# Sizes tried after the last of these has won, as in a network of matrices alone whose weights outweigh its activations:
# an mlp of 269,322 parameters is fastest at some thousand examples. None is tried whose graph takes more bytes, nor one
# that is more than this share of the data.
LARGE = (1024, 2048, 4096)
GRAPH, SHARE = 1 << 28, 1 / 16

# Seconds below which one run says little, and the runs that are then made, of which the fastest counts.
SHORT, RUNS = 0.05, 3

# Examples of the small graph whose bytes are counted; its half is counted too, so that what does not grow with the
# examples is known.
SAMPLE = 16


def autotuned(
    work: Work,
    first_examples: Callable[[int], MicroBatch],
    num_examples: int | None,
    graph_bytes: Callable[[int], int],
) -> int:
    """The micro-batch size in which ``work`` takes the least time an example, DEFAULT for small data."""
    if num_examples is None or num_examples < SMALL_DATA:
        return DEFAULT
    sample = first_examples(CANDIDATES[-1])
    if not sample.splittable:
        return DEFAULT
    best = fastest_size(work, sample)
    if best == CANDIDATES[-1]:
        most = min(SHARE * num_examples, best * GRAPH / max(1, graph_bytes(best)))
        larger = [size for size in LARGE if size <= most]
        if larger:
            best = fastest_size(work, first_examples(larger[-1]), (best, *larger))
    return best


def fastest_size(work: Work, sample: MicroBatch, candidates: Sequence[int] = CANDIDATES) -> int:
    """The size of ``candidates`` in which an example's product takes the least time, growing while it helps."""
    best, least = DEFAULT, float("inf")
    for size in candidates:
        if size > sample.size:
            break
        trial = sample.part(0, min(sample.size, max(size, DEFAULT)))
        times: list[float] = []
        while not times or (sum(times) < SHORT and len(times) < RUNS):
            started = time.perf_counter()
            work([trial.part(i, min(i + size, trial.size)) for i in range(0, trial.size, size)])
            times.append(time.perf_counter() - started)
        seconds = min(times) / trial.size
        if seconds > WORSE * least:
            break
        if seconds < least:
            best, least = size, seconds
    return best


def saved_bytes(build: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of all distinct storages that autograd saves while ``build`` runs, without those of ``besides``.

    Everything that a kept graph holds. What operations need only while they run is not counted: most often about the
    largest layer's inputs and outputs.
    """
    known = {t.untyped_storage().data_ptr() for t in besides}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # The tensor is held, so that no address is given out twice while we count.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build()
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)


def extrapolated(count: Callable[[int], int], sample: int, size: int) -> int:
    """``count(size)`` from ``count`` at ``sample`` examples and at half as many, as a straight line."""
    half = sample // 2
    whole = count(sample)
    if half < 1 or size == sample:
        return whole
    return max(0, round(whole + (whole - count(half)) / (sample - half) * (size - sample)))
