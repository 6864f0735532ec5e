"""Some of the training data, drawn once and kept, so that no loader is touched while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset

from sharpscope.errors import DataError
from sharpscope.objective.micro_batches import MicroBatch, as_batches, map_tensors, micro_batches, rows
from sharpscope.sampling.subsample import underlying_dataset
from sharpscope.weights.restore import preserved

# Examples a graph.
SIZE = 256


@dataclass(frozen=True)
class Sample:
    """Examples in batches of at most SIZE where they can be cut.

    Attributes:
        batches: as the problem's data have them.
        examples: in them, and ``drawn_from``: in the data.
    """

    batches: list[Any]
    examples: int
    drawn_from: int


def draw_sample(data: Any, examples: int | None, generator: torch.Generator) -> Sample:
    """``examples`` of the data at random without replacement, in their order, or all of them.

    Of a Dataset, and of a DataLoader that takes one in order or shuffles it, only those drawn are read, in this
    process. Other data are walked once. Batches that cannot be cut are drawn whole until there are enough examples.
    Every random state is left as it was, those of the loader's generators too.

    Raises: DataError for data that cannot be walked, or hold no example.
    """
    with preserved(data=data):
        dataset = underlying_dataset(data, SequentialSampler, RandomSampler, DistributedSampler)
        if dataset is None:
            found, total = _walked(micro_batches(as_batches(data), None), examples, generator)
        else:
            total, collate = len(dataset), data.collate_fn if isinstance(data, DataLoader) else None
            chosen = torch.arange(total) if examples is None else torch.randperm(total, generator=generator)[:examples]
            own = Subset(dataset, chosen.sort().values.tolist())
            found = list(micro_batches(DataLoader(own, SIZE, collate_fn=collate), None))
    if not found:
        raise DataError("The data must hold at least one example, got none. Check the data set and its filters.")
    parts = list(micro_batches([part.batch for part in found], SIZE))
    return Sample([part.batch for part in parts], sum(part.size for part in parts), total)


def _walked(
    parts: Iterator[MicroBatch], examples: int | None, generator: torch.Generator
) -> tuple[list[MicroBatch], int]:
    """Copies of the examples of smallest random key, or of whole batches that cannot be cut; and how many came."""
    total, held = 0, list[tuple[Tensor, MicroBatch]]()
    for part in parts:
        total += part.size
        keys = torch.rand(part.size if part.splittable else 1, generator=generator, dtype=torch.float64)
        held.append((keys, part))
        # A loader may fill the same tensors again, so the copy is taken before the next batch is asked for.
        held = _smallest(held, total if examples is None else examples)
    return [part for _, part in held], total


def _smallest(held: Sequence[tuple[Tensor, MicroBatch]], examples: int) -> list[tuple[Tensor, MicroBatch]]:
    """What comes first by key until there are ``examples``; a batch with a single key counts whole."""
    keys = torch.cat([own for own, _ in held])
    sizes = torch.cat([torch.full((len(own),), part.size // len(own)) for own, part in held])
    order = keys.argsort()
    before = sizes[order].cumsum(0) - sizes[order]
    last = keys[order[before < examples]].max()
    found = []
    for own, part in held:
        places = (own <= last).nonzero()[:, 0]
        if len(places):
            found.append((own[places], _copied(part, places, whole=len(own) != part.size)))
    return found


def _copied(part: MicroBatch, places: Tensor, whole: bool) -> MicroBatch:
    """The examples at ``places``, or the whole batch, as copies."""
    if whole:
        return MicroBatch(map_tensors(part.batch, lambda t: t.detach().clone()), part.size, ())
    return MicroBatch(rows(part.batch, places), len(places), ())
