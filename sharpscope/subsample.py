"""Some examples of a data set, drawn at random without replacement."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler, Subset

from sharpscope.errors import ArgumentError
from sharpscope.objective.data import batch_size, leaves, rows


def count_examples(data: Any) -> int | None:
    """The number of examples of whatever ``Problem`` takes as data, None where only a walk would tell."""
    if _is_batch(data):
        return batch_size(data)
    if isinstance(data, list) and data and all(_is_batch(batch) for batch in data):
        return sum(batch_size(batch) for batch in data)
    dataset = dataset_of(data, SequentialSampler)
    return None if dataset is None or (isinstance(data, DataLoader) and data.drop_last) else len(dataset)


def dataset_of(data: Any, *samplers: type[Sampler[Any]]) -> Any:
    """The dataset of which ``data`` gives each example once, where each can be read by itself; None for other data.

    ``data`` is that dataset, or a DataLoader that puts it into batches in the order of one of ``samplers``. A list is a
    dataset only in a loader: by itself it is a list of batches.
    """
    found: Any = None
    if not isinstance(data, DataLoader):
        found = data if isinstance(data, Dataset) else None
    # Another sampler, or one of other data, says which examples count; batches of the user's own making are his, and a
    # loader that iterates in its own way may change them.
    elif type(data).__iter__ is DataLoader.__iter__ and data.batch_size is not None:
        source = getattr(data.sampler, "data_source", getattr(data.sampler, "dataset", None))
        found = data.dataset if isinstance(data.sampler, samplers) and source is data.dataset else None
    return found if isinstance(found, Sized) and not isinstance(found, IterableDataset) else None


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
        return rows(data, chosen)
    if isinstance(data, DataLoader):
        return DataLoader(
            Subset(data.dataset, chosen.tolist()),
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
            found.append(rows(batch, inside))
        start = stop
    return found


def _is_batch(data: Any) -> bool:
    """Whether ``data`` is a tuple or a dict of tensors with a row for each example."""
    tensors = leaves(data) if isinstance(data, tuple | Mapping) else []
    whole = bool(tensors) and all(isinstance(tensor, Tensor) and tensor.dim() for tensor in tensors)
    return whole and len({len(tensor) for tensor in tensors}) == 1
