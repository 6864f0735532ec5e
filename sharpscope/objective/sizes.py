"""Choosing the size of a micro-batch, and how many of its pieces go side by side, by measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from sharpscope.objective.batches import MicroBatch

T = TypeVar("T", bound=Hashable)

# work(parts, vectors, lanes): products of so many vectors. It must have ended on the device when it returns.
Work = Callable[[Sequence[MicroBatch], int, int], object]

# Sizes tried, each on DEFAULT examples at least, and the choice where the data set is too small for the measurement to
# pay.
CANDIDATES = (64, 128, 256, 512)
SMALL_DATA = 4096
DEFAULT = 256

# How much longer than the best another choice takes that is not tried again.
WORSE = 1.2

# Sizes tried after the last of these has won, as in a network of matrices alone whose weights outweigh its activations:
# an mlp of 269,322 parameters is fastest at some thousand examples. None is tried whose graph takes more bytes, nor one
# that is more than this share of the data.
LARGE = (1024, 2048, 4096)
GRAPH, SHARE = 1 << 28, 1 / 16

# Seconds below which one run says little, and the runs that are then made, of which the fastest counts.
SHORT, RUNS = 0.05, 3

# Vectors in a trial of lanes, which share products but not the gradient before them; the rounds of trials; the
# gradients over all data that they may cost; and how much less time than the first choice another must take, lest
# chance choose.
VECTORS, ROUNDS, PRICE, LESS = 1, 2, 1 / 5, 0.95


def chosen(
    work: Work,
    first_examples: Callable[[int], MicroBatch],
    num_examples: int | None,
    graph_bytes: Callable[[int], int],
    threads: int,
) -> tuple[int, int]:
    """The size in which ``work`` takes some hundred examples in the least time, and the number of lanes."""
    if num_examples is None or num_examples < SMALL_DATA:
        return DEFAULT, 1
    sample = first_examples(CANDIDATES[-1])
    if not sample.splittable:
        return DEFAULT, 1
    best = best_size(work, sample)
    if best == CANDIDATES[-1]:
        most = min(SHARE * num_examples, best * GRAPH / max(1, graph_bytes(best)))
        larger = [size for size in LARGE if size <= most]
        if larger:
            sample = first_examples(larger[-1])
            best = best_size(work, sample, (best, *larger))

    choices = with_lanes(best, sample.size, threads, PRICE * num_examples)
    trial = sample.part(0, max(size for size, _ in choices))
    return clearly_fastest(lambda choice: work(_cut(trial, choice[0]), VECTORS, choice[1]), choices)


def best_size(work: Work, sample: MicroBatch, candidates: Sequence[int] = CANDIDATES) -> int:
    """The size of ``candidates`` in which an example's product takes the least time, growing while it helps."""
    best, least = DEFAULT, float("inf")
    for size in candidates:
        if size > sample.size:
            break
        trial = sample.part(0, min(sample.size, max(size, DEFAULT)))
        times: list[float] = []
        while not times or (sum(times) < SHORT and len(times) < RUNS):
            times.append(_seconds(lambda size=size, trial=trial: work(_cut(trial, size), 1, 1)))  # type: ignore[misc]
        seconds = min(times) / trial.size
        if seconds > WORSE * least:
            break
        if seconds < least:
            best, least = size, seconds
    return best


def with_lanes(best: int, most: int, threads: int, price: float) -> list[tuple[int, int]]:
    """Sizes of micro-batches, up to ``most``, and lanes to try once ``best`` has won with one lane, which comes first.

    A lane has as many examples as the best micro-batch, or half as many, and so on, where that is too many. As many
    choices as ``ROUNDS`` trials of each may cost, in gradients of an example.
    """
    choices, lanes = [(best, 1)], 2
    while lanes <= threads:
        for size in (best * lanes // cut for cut in (1, 2, 4, 8) if cut <= lanes):
            larger = max(size, *(known for known, _ in choices))
            if size <= most and ROUNDS * (len(choices) + 1) * larger * (1 + 2 * VECTORS) <= price:
                choices.append((size, lanes))
                break
        lanes *= 2
    return choices


def clearly_fastest(run: Callable[[T], object], choices: Sequence[T]) -> T:
    """The choice whose run takes the least time in ROUNDS; the first unless another is clearly faster."""
    seconds, left = dict.fromkeys(choices, float("inf")), list(choices)
    for _ in range(ROUNDS):
        if len(left) == 1:
            return left[0]
        for choice in left:
            seconds[choice] = min(seconds[choice], _seconds(lambda choice=choice: run(choice)))  # type: ignore[misc]
        best = min(left, key=lambda choice: seconds[choice])
        left = [choice for choice in left if seconds[choice] <= WORSE * seconds[best]]
    return best if seconds[best] < LESS * seconds[choices[0]] else choices[0]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _cut(sample: MicroBatch, size: int) -> list[MicroBatch]:
    """``sample`` in parts of ``size`` examples, the last one smaller."""
    return [sample.part(i, min(i + size, sample.size)) for i in range(0, sample.size, size)]
