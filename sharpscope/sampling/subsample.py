"""Random subsets of a data set, without replacement."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler, Subset

from sharpscope.errors import ArgumentError
from sharpscope.objective.micro_batches import batch_size, leaves, rows, walk
from sharpscope.random_streams import stream


def count_examples(data: Any) -> int | None:
    """The number of examples of a ``Problem``'s data, None where it is not known without iterating over them."""
    if _is_batch(data):
        return batch_size(data)
    if isinstance(data, list) and data and all(_is_batch(batch) for batch in data):
        return sum(batch_size(batch) for batch in data)
    dataset = underlying_dataset(data, SequentialSampler)
    return None if dataset is None or (isinstance(data, DataLoader) and data.drop_last) else len(dataset)


def underlying_dataset(data: Any, *samplers: type[Sampler[Any]]) -> Any:
    """The map-style dataset whose examples ``data`` gives once each, None for other data.

    Args:
        data: the dataset itself, or a DataLoader that batches it in the order of one of ``samplers``. A list is a
            dataset only in a loader; otherwise it is a list of batches.
        samplers: the classes of samplers that are accepted.
    """
    dataset: Any = None
    if not isinstance(data, DataLoader):
        dataset = data if isinstance(data, Dataset) else None
    # Not where another sampler selects or weights the examples, the user makes the batches, or a subclass of DataLoader
    # iterates in its own way.
    elif type(data).__iter__ is DataLoader.__iter__ and data.batch_size is not None:
        source = getattr(data.sampler, "data_source", getattr(data.sampler, "dataset", None))
        dataset = data.dataset if isinstance(data.sampler, samplers) and source is data.dataset else None
    return dataset if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None


def random_subset(data: Any, examples: int, seed: int) -> Any:
    """A uniform random subset of ``data`` without replacement, in the same form.

    Args:
        data: data of a ``Problem`` whose number of examples is known. Batches keep their order and the chosen rows.
        examples: number of examples to draw.
        seed: of the draw, from 0 to 2^63 - 1.

    Raises: ArgumentError where the number of examples is not known or too small, or the seed is out of range.
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
    chosen = torch.randperm(total, generator=stream(seed, "examples"))[:examples]
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
    chosen_batches, start = [], 0
    for batch in walk(data):
        stop = start + batch_size(batch)
        inside = chosen[(chosen >= start) & (chosen < stop)].sort().values - start
        if len(inside):
            chosen_batches.append(rows(batch, inside))
        start = stop
    return chosen_batches


def _is_batch(data: Any) -> bool:
    """Whether ``data`` is a tuple or a dict of tensors with a row for each example."""
    tensors = leaves(data) if isinstance(data, tuple | Mapping) else []
    have_rows = bool(tensors) and all(isinstance(tensor, Tensor) and tensor.dim() for tensor in tensors)
    return have_rows and len({len(tensor) for tensor in tensors}) == 1
