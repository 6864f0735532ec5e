"""Some examples of a data set, drawn at random without replacement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from sharpscope.errors import ArgumentError
from sharpscope.objective.batches import batch_size, leaves, map_tensors


def count_examples(data: Any) -> int | None:
    """The number of examples of whatever ``Problem`` takes as data, None where only a walk would tell."""
    if _is_batch(data):
        return batch_size(data)
    if isinstance(data, list) and data and all(_is_batch(batch) for batch in data):
        return sum(batch_size(batch) for batch in data)
    if isinstance(data, DataLoader):
        ordered = isinstance(data.sampler, torch.utils.data.SequentialSampler) and data.batch_size is not None
        return count_examples(data.dataset) if ordered and not data.drop_last else None
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        return len(data)
    return None


def some_examples(data: Any, examples: int, seed: int) -> Any:
    """``examples`` of ``data``, in the same form; batches keep their order and lose what was not drawn.

    Raises: ArgumentError where their number is not known, or too few, or the seed is out of range.
    """
    total = count_examples(data)
    if total is None:
        raise ArgumentError(
            "examples needs data whose number of examples is known (tensors, a list of batches of tensors, a Dataset, "
            f"an unshuffled DataLoader of one), got {type(data).__name__}. Draw the subset before passing it."
        )
    if not 1 <= examples <= total:
        raise ArgumentError(f"examples must be from 1 to the {total} of the data, got {examples}.")
    if not 0 <= seed < 1 << 63:
        raise ArgumentError(f"seed must be an integer from 0 to 2^63 - 1, got {seed}.")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:examples]
    if _is_batch(data):
        return _rows(data, chosen)
    if isinstance(data, DataLoader):
        return DataLoader(
            some_examples(data.dataset, examples, seed),
            batch_size=data.batch_size,
            collate_fn=data.collate_fn,
            num_workers=data.num_workers,
            worker_init_fn=data.worker_init_fn,
        )
    if isinstance(data, Dataset):
        return Subset(data, chosen.tolist())
    found, start = [], 0
    for batch in data:
        stop = start + batch_size(batch)
        inside = chosen[(chosen >= start) & (chosen < stop)].sort().values - start
        if len(inside):
            found.append(_rows(batch, inside))
        start = stop
    return found


def _is_batch(data: Any) -> bool:
    """Whether ``data`` is a tuple or a dict of tensors with a row for each example."""
    tensors = leaves(data) if isinstance(data, tuple | Mapping) else []
    whole = bool(tensors) and all(isinstance(tensor, Tensor) and tensor.dim() for tensor in tensors)
    return whole and len({len(tensor) for tensor in tensors}) == 1


def _rows(batch: Any, chosen: Tensor) -> Any:
    return map_tensors(batch, lambda tensor: tensor[chosen.to(tensor.device)])
