"""The data as batches of equal size, and which size is fastest for a given product."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from cases import Case
from torch import Tensor

Batches = list[tuple[Tensor, Tensor]]

WANTED = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Measured on so many examples that one gradient of them takes about this long, within these limits.
SAMPLE_SECONDS, SAMPLE_LIMITS = 0.5, (256, 8192)


def batches(case: Case, size: int, examples: int | None = None) -> Batches:
    """Views of the data, or of its first examples, in batches of ``size``."""
    inputs, targets = case.inputs[:examples], case.targets[:examples]
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def sizes(total: int) -> list[int]:
    """Divisors of ``total`` near the powers of two: some tools weigh every batch alike, whatever its size."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    return sorted({min(divisors, key=lambda d: abs(math.log(d / wanted))) for wanted in WANTED})


def gradient(case: Case, data: Batches) -> None:
    """Loss and backward over ``data``, into ``.grad``, which is dropped."""
    for x, y in data:
        case.loss(case.model(x), y).backward()
    case.model.zero_grad()


def clock(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def sample_size(case: Case) -> int:
    """How many examples to measure batch sizes on."""
    few = min(128, len(case.targets))
    data = batches(case, few, few)
    gradient(case, data)
    each = clock(lambda: gradient(case, data)) / few
    return min(len(case.targets), max(SAMPLE_LIMITS[0], min(SAMPLE_LIMITS[1], round(SAMPLE_SECONDS / each))))


def fastest(case: Case, product: Callable[[Batches], Callable[[], Any]]) -> tuple[int, float]:
    """The batch size with the least time an example for one call of ``product(batches)``, and that time.

    Larger sizes are tried while they help; each is the better of two calls, after one to warm up.
    """
    sample = sample_size(case)
    best, least = 0, float("inf")
    for size in sizes(len(case.targets)):
        if size > sample and best:
            break
        examples = max(sample // size, 1) * size
        work = product(batches(case, size, examples))
        work()
        each = min(clock(work), clock(work)) / examples
        if each > 1.2 * least:
            break
        if each < least:
            best, least = size, each
    return best, least
