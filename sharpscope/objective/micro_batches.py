"""Iterating over a data set in micro-batches, independently of the loader's batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from sharpscope.errors import (
    DataError,
    ProblemError,
    SharpscopeError,
    cause_of,
    dead_worker,
    out_of_memory,
    worker_died,
)

TARGET_KEYS = ("target", "targets", "label", "labels", "y")


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive examples, and their positions in the loader's batches.

    Attributes:
        batch: the data, with the same structure as the loader's batches.
        size: number of examples.
        sources: ``(loader batch, first example in it, number of examples)`` of each run of examples.
        scale: weight of each loss term, 1 except in an importance sample.
    """

    batch: Any
    size: int
    sources: tuple[tuple[int, int, int], ...]
    scale: float = 1.0

    @property
    def splittable(self) -> bool:
        """Whether every tensor has one row per example, so that the batch can be cut and joined."""
        for leaf in leaves(self.batch):
            if isinstance(leaf, Tensor):
                if leaf.dim() and len(leaf) != self.size:
                    return False
            elif leaf is not None and not isinstance(leaf, bool | int | float):
                return False
        return True

    def where(self, example: int) -> str:
        """ "example 17 of batch 3", both counted from 0 in the loader's terms."""
        for batch, start, count in self.sources:
            if example < count:
                return f"example {start + example} of batch {batch}"
            example -= count
        return f"batch {self.sources[0][0]}"

    def slice(self, start: int, stop: int) -> MicroBatch:
        """The micro-batch of examples ``start`` to ``stop`` (exclusive), as views."""
        sources, position = [], 0
        for batch, first, count in self.sources:
            low, high = max(start, position), min(stop, position + count)
            if low < high:
                sources.append((batch, first + low - position, high - low))
            position += count
        cut = map_tensors(self.batch, lambda t: _select(t, range(start, stop)) if _is_sparse(t) else t[start:stop])
        return MicroBatch(cut, stop - start, tuple(sources), self.scale)

    def split(self, size: int) -> list[MicroBatch]:
        """Micro-batches of at most ``size`` consecutive examples, as views; itself where it is no larger."""
        if self.size <= size:
            return [self]
        return [self.slice(i, min(i + size, self.size)) for i in range(0, self.size, size)]


def as_batches(data: Any) -> Iterable[Any]:
    """``data`` as an iterable that gives the same batches at every pass.

    Raises: DataError for an iterator, which gives its batches only once, a shuffling loader, or an unknown type.
    """
    if isinstance(data, tuple | Mapping) and all(isinstance(t, Tensor | np.ndarray) for t in _values(data)):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=256)
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise DataError(
            "The data must come in the same order at every pass, but this DataLoader shuffles. Pass shuffle=False."
        )
    if isinstance(data, Tensor) or not hasattr(data, "__iter__"):
        raise DataError(
            f"data must be (inputs, target) tensors, batches, a Dataset or a DataLoader, got {type(data).__name__}."
        )
    if isinstance(data, Iterator):
        raise DataError(
            f"The data must be walked several times, but a {type(data).__name__} can be walked once. "
            "Pass list(data), a DataLoader, or an object whose __iter__ starts anew."
        )
    return data  # type: ignore[no-any-return]


def walk(batches: Iterable[Any]) -> Iterator[Any]:
    """Each of ``batches``, in one walk over the data.

    Raises: DataError where the data raise an error of their own or a worker process dies.
    """
    count = 0
    try:
        for batch in batches:
            count += 1
            yield batch
    except SharpscopeError:
        raise
    except Exception as error:
        if worker_died(error):
            raise dead_worker(error) from error
        if out_of_memory(error):
            raise
        raise DataError(
            f"The data must give every batch, but reading batch {count} failed: {cause_of(error)}."
        ) from error


def num_examples_hint(batches: Iterable[Any]) -> int | None:
    """The number of examples where it is known without a pass over the data, else None."""
    if isinstance(batches, DataLoader):
        if batches.batch_size is None or isinstance(batches.dataset, IterableDataset):
            return None  # the user makes the batches
        try:
            count = len(batches.sampler)  # type: ignore[arg-type]
        except TypeError:
            return None
        return count - count % batches.batch_size if batches.drop_last else count
    if isinstance(batches, list | tuple):
        return sum(batch_size(batch) for batch in batches)
    return None


def micro_batches(batches: Iterable[Any], size: int | None) -> Iterator[MicroBatch]:
    """Regroup ``batches`` into micro-batches of ``size`` examples, the last one smaller; None keeps them as they come.

    Batches that cannot be joined (for example padded to different lengths) are only split. Batches without a common
    first dimension are kept whole.
    """
    pending: list[MicroBatch] = []
    pending_size = 0
    for index, raw in enumerate(walk(batches)):
        batch = map_leaves(raw, lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf)
        count = batch_size(batch)
        whole = MicroBatch(batch, count, ((index, 0, count),))
        if count == 0:
            continue
        if size is None or not whole.splittable:
            yield from _flush(pending)
            pending_size = 0
            yield whole
            continue
        if pending and not matches(pending[0].batch, batch, _joinable):
            yield from _flush(pending)
            pending_size = 0
        start = 0
        while start < count:
            take = min(size - pending_size, count - start)
            pending.append(whole if take == count else whole.slice(start, start + take))
            start, pending_size = start + take, pending_size + take
            if pending_size == size:
                yield from _flush(pending)
                pending_size = 0
        if pending:  # copied, since a loader may reuse the memory of its batches
            last = pending[-1]
            pending[-1] = replace(last, batch=map_tensors(last.batch, torch.clone))
    yield from _flush(pending)


def forward_arguments(batch: Any, accepts: Callable[[str], bool]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Split a batch into ``(args, kwargs, target)`` for ``loss(model(*args, **kwargs), target)``.

    Raises: ProblemError when the batch is neither a pair nor a dict with a target.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in TARGET_KEYS if key in batch), None)
        if key is None:
            raise ProblemError(
                f"A dict batch must have its target under one of {', '.join(TARGET_KEYS)}, "
                f"got the keys {', '.join(map(str, batch))}."
            )
        return (), {name: value for name, value in batch.items() if name != key or accepts(name)}, batch[key]
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        if isinstance(batch[-1], int | float) or (isinstance(batch[-1], Tensor) and batch[-1].dim() == 0):
            raise ProblemError(
                "The data must come in batches, but these look like single examples: the target is one number. "
                "Wrap them in a DataLoader with a batch_size."
            )
        return tuple(batch[:-1]), {}, batch[-1]
    given = f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise ProblemError(f"A batch must be (input, ..., target) or a dict with a target, got {given}.")


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure with ``function`` applied to each tensor that has a first dimension."""
    return map_leaves(batch, lambda leaf: function(leaf) if isinstance(leaf, Tensor) and leaf.dim() else leaf)


def map_leaves(batch: Any, function: Callable[[Any], Any]) -> Any:
    """The same structure of mappings, tuples and lists with ``function`` applied to everything else in it."""
    if isinstance(batch, Mapping):
        return {key: map_leaves(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = map(map_leaves, batch, repeat(function))
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return function(batch)


def rows(batch: Any, indices: Tensor) -> Any:
    """The examples of ``batch`` at ``indices`` (int64), as copies without autograd's graph."""
    return map_tensors(
        batch, lambda t: _select(t.detach(), indices.tolist()) if _is_sparse(t) else t.detach()[indices.to(t.device)]
    )


# Sparse layouts whose rows can be selected, by conversion to the first, and those whose rows cannot.
SELECTABLE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
IN_BLOCKS = (torch.sparse_bsr, torch.sparse_bsc)


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout in SELECTABLE + IN_BLOCKS


def _select(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a sparse tensor, in its layout. torch selects them in the coordinate layout only."""
    if tensor.layout in (torch.sparse_bsr, torch.sparse_bsc):
        raise DataError(
            "Sparse inputs must have rows that can be selected, but these are in blocks. Use to_sparse_csr()."
        )
    indices = torch.tensor(list(rows), dtype=torch.long, device=tensor.device)
    selected: Tensor = tensor.to_sparse(layout=torch.sparse_coo).index_select(0, indices)
    return selected if tensor.layout == torch.sparse_coo else selected.to_sparse(layout=tensor.layout)


def leaves(batch: Any) -> list[Any]:
    """All entries of ``batch`` that are not mappings, tuples or lists, in order."""
    result: list[Any] = []
    map_leaves(batch, result.append)
    return result


def matches(first: Any, second: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether two batches have the same types, keys and order of keys, and ``same`` holds for each pair of leaves."""
    pairs = zip(leaves(first), leaves(second), strict=True)
    return _structure(first) == _structure(second) and all(same(left, right) for left, right in pairs)


def _structure(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return [(key, _structure(value)) for key, value in batch.items()]
    if isinstance(batch, tuple | list):
        return type(batch), [_structure(value) for value in batch]
    return None


def batch_size(batch: Any) -> int:
    """Number of examples: the first dimension of the first tensor, else 1."""
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim:
            return len(leaf)
    return 1


def _flush(pending: list[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield ``pending`` joined into one micro-batch, and empty it."""
    if len(pending) == 1:
        yield pending[0]
    elif pending:
        joined = iter([torch.cat(parts) for parts in zip(*(tensors(p.batch) for p in pending), strict=True)])
        sources = tuple(source for p in pending for source in p.sources)
        yield MicroBatch(map_tensors(pending[0].batch, lambda _: next(joined)), sum(p.size for p in pending), sources)
    pending.clear()


def _joinable(left: Any, right: Any) -> bool:
    """Whether two leaves can be concatenated, or are identical and no tensors."""
    if isinstance(left, Tensor) and left.dim():
        if not isinstance(right, Tensor) or _is_sparse(left) or _is_sparse(right):
            return False
        return left.shape[1:] == right.shape[1:] and left.dtype == right.dtype
    return not isinstance(left, Tensor) and left is right


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of ``batch`` that have a first dimension, in order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]


def _values(batch: Any) -> Iterable[Any]:
    return batch.values() if isinstance(batch, Mapping) else batch
