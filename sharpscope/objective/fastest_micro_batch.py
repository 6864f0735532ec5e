"""Auto-tuning of the micro-batch size, and the memory that a graph takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sharpscope.objective.micro_batches import MicroBatch
from sharpscope.weights.restore import strided

# Multiplies one vector with each of these micro-batches, and returns when the device has finished.
Work = Callable[[Sequence[MicroBatch]], object]

# Sizes that are timed, each on at least DEFAULT examples. Data sets of fewer than SMALL_DATA examples get DEFAULT
# without timing, which would cost more than it saves.
CANDIDATES = (64, 128, 256, 512)
SMALL_DATA = 4096
DEFAULT = 256

# The search ends at a candidate that takes more than this many times the best time.
STOP_RATIO = 1.2

# Sizes that are timed if the largest candidate is the fastest, as in a fully connected network with more weights than
# activations: an mlp of 269,322 parameters is fastest at some thousand examples. Limited by the bytes of the graph and
# by a fraction of the data.
LARGE_CANDIDATES = (1024, 2048, 4096)
MAX_GRAPH_BYTES, MAX_FRACTION = 1 << 28, 1 / 16

# A candidate is timed until it has run this many seconds or times; the fastest run counts.
MIN_SECONDS, MAX_RUNS = 0.05, 3

# The bytes of a graph are counted for this many examples and for half as many, and extrapolated linearly.
COUNTED_EXAMPLES = 16


def autotune(
    work: Work,
    first_examples: Callable[[int], MicroBatch],
    num_examples: int | None,
    graph_bytes: Callable[[int], int],
) -> int:
    """The micro-batch size at which ``work`` takes the least time per example; DEFAULT for small data.

    Args:
        work: multiplies one vector with a sequence of micro-batches.
        first_examples: gives the first examples of the data, as many as asked for.
        num_examples: of the data set, None where it is not known.
        graph_bytes: gives the bytes of the graph of a number of examples.
    """
    if num_examples is None or num_examples < SMALL_DATA:
        return DEFAULT
    sample = first_examples(CANDIDATES[-1])
    if not sample.splittable:
        return DEFAULT
    best = fastest_size(work, sample)
    if best == CANDIDATES[-1]:
        largest = min(MAX_FRACTION * num_examples, best * MAX_GRAPH_BYTES / max(1, graph_bytes(best)))
        larger = [size for size in LARGE_CANDIDATES if size <= largest]
        if larger:
            best = fastest_size(work, first_examples(larger[-1]), (best, *larger))
    return best


def fastest_size(work: Work, sample: MicroBatch, candidates: Sequence[int] = CANDIDATES) -> int:
    """The one of ``candidates`` (ascending) with the least time per example on ``sample``; stops at STOP_RATIO."""
    best, least = DEFAULT, float("inf")
    for size in candidates:
        if size > sample.size:
            break
        trial = sample.slice(0, min(sample.size, max(size, DEFAULT)))
        times: list[float] = []
        while not times or (sum(times) < MIN_SECONDS and len(times) < MAX_RUNS):
            started = time.perf_counter()
            work(trial.split(size))
            times.append(time.perf_counter() - started)
        seconds = min(times) / trial.size
        if seconds > STOP_RATIO * least:
            break
        if seconds < least:
            best, least = size, seconds
    return best


def saved_bytes(build: Callable[[], object], excluded: Iterable[Tensor] = ()) -> int:
    """Bytes of all distinct storages that autograd saves while ``build`` runs, except those of ``excluded``.

    This is what a kept graph holds. Temporary memory of operations is not counted: typically the inputs and outputs of
    the largest layer.
    """
    known = {part.untyped_storage().data_ptr() for t in excluded for part in strided(t)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # The tensor is held, so that no address is reused during the count.
        for part in strided(tensor):
            saved.setdefault(part.untyped_storage().data_ptr(), part)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build()
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in known)


def extrapolate(count: Callable[[int], int], sample: int, size: int) -> int:
    """``count(size)``, extrapolated linearly from ``count`` at ``sample`` examples and at half as many."""
    half = sample // 2
    whole = count(sample)
    if half < 1 or size == sample:
        return whole
    return max(0, round(whole + (whole - count(half)) / (sample - half) * (size - sample)))
