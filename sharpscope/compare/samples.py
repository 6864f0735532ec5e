"""A sample of a problem's examples, in whatever form it has its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from sharpscope.problem import Problem


def sampled(problem: Problem, examples: int | None, seed: int) -> Problem:
    """``problem`` on ``examples`` of its examples, drawn without replacement, the same from the same seed.

    On all of them where there are no more, or where they are batches of the user's own making, which cannot be drawn
    from.
    """
    count = count_of(problem.data)
    if examples is None or count is None or examples >= count:
        return problem
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:examples]
    said = {"split_examples": count, **problem.provenance, "examples_seed": seed}
    return replace(problem, data=_taken(problem.data, chosen), provenance=said)


def count_of(data: Any) -> int | None:
    """The number of examples that can be drawn from; None where none can."""
    if isinstance(data, DataLoader):
        # Batches by another sampler or of the user's own size may be no plain walk over the data set.
        plain = data.batch_size is not None and isinstance(data.sampler, torch.utils.data.SequentialSampler)
        return count_of(data.dataset) if plain and not data.drop_last else None
    if isinstance(data, Dataset):
        return None if isinstance(data, IterableDataset) or not hasattr(data, "__len__") else len(data)
    tensors = _tensors(data)
    return len(tensors[0]) if tensors and len({len(t) for t in tensors}) == 1 else None


def _tensors(data: Any) -> list[Tensor]:
    """The tensors of one batch that is all the data; none where it is something else."""
    values = list(data.values()) if isinstance(data, Mapping) else list(data) if isinstance(data, tuple) else []
    return values if all(isinstance(value, Tensor) and value.dim() for value in values) else []


def _taken(data: Any, chosen: Tensor) -> Any:
    if isinstance(data, DataLoader):
        drawn: Dataset[Any] = Subset(data.dataset, chosen.tolist())
        return DataLoader(drawn, batch_size=data.batch_size, num_workers=data.num_workers, collate_fn=data.collate_fn)
    if isinstance(data, Dataset):
        return Subset(data, chosen.tolist())
    if isinstance(data, Mapping):
        return {name: value[chosen.to(value.device)] for name, value in data.items()}
    return tuple(value[chosen.to(value.device)] for value in data)
