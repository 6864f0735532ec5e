"""How many bytes a graph holds, counted on a small one before a large one is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Examples of the small graph; its half is counted too, so that what does not grow with the examples is known.
SAMPLE = 16


def saved_bytes(build: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of all distinct storages that autograd saves while ``build`` runs, without those of ``besides``.

    Everything that a kept graph holds. What operations need only while they run is not in it: most often about the
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
