"""Random numbers that belong to an example, not to the order in which the examples are walked."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpscope.objective.data import MicroBatch

# The multipliers and the increment of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_STEP = -0x61C8864680B583EB
# Uniform numbers have 24 significant bits, so that every dtype holds the same ones, and none is 0 or 1.
_BITS = 23


def uniform(seed: int, part: MicroBatch, shape: torch.Size) -> Tensor:
    """Independent uniform numbers in (0, 1), float64 on the CPU, the same for an example however the data are cut.

    ``shape`` has one row an example. Where it has not, the batch is one that cannot be cut, and is drawn as a whole.
    """
    batches, examples = [], []
    for batch, start, count in part.pieces:
        batches.append(torch.full((count,), batch))
        examples.append(torch.arange(start, start + count))
    rows = _mixed(_mixed(torch.cat(batches) + seed) + torch.cat(examples))
    if not shape or shape[0] != part.size:
        rows, columns = rows[:1], shape.numel()
    else:
        columns = shape[1:].numel()
    bits = _mixed(rows[:, None] + torch.arange(columns)).reshape(shape)
    numbers: Tensor = (_shifted(bits, 64 - _BITS).double() + 0.5) / 2**_BITS
    return numbers


def _mixed(value: Tensor) -> Tensor:
    """SplitMix64's output function; torch's integers wrap around as it needs."""
    value = (value + 1) * _STEP
    for shift, factor in _MIX:
        value = (value ^ _shifted(value, shift)) * factor
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's own carries the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)
