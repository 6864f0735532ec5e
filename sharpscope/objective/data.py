"""Walking a data set in micro-batches whose size is independent of the loader's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from sharpscope.errors import DataError, ProblemError

TARGET_KEYS = ("target", "targets", "label", "labels", "y")


@dataclass(frozen=True)
class MicroBatch:
    """Some consecutive examples, and where in the loader's batches they came from.

    Attributes:
        batch: the same structure as the loader's batches.
        size: number of examples.
        pieces: ``(loader batch, first example in it, number)`` of each run of examples.
        scale: what each of its loss terms counts, 1 unless it stands for others in a weighted subset.
    """

    batch: Any
    size: int
    pieces: tuple[tuple[int, int, int], ...]
    scale: float = 1.0

    @property
    def splittable(self) -> bool:
        """Whether every tensor has one row an example, so that the batch may be cut and joined."""
        for leaf in leaves(self.batch):
            if isinstance(leaf, Tensor):
                if leaf.dim() and len(leaf) != self.size:
                    return False
            elif leaf is not None and not isinstance(leaf, bool | int | float):
                return False
        return True

    def where(self, example: int) -> str:
        """ "example 17 of batch 3", both counted from 0 in the loader's terms."""
        for batch, start, count in self.pieces:
            if example < count:
                return f"example {start + example} of batch {batch}"
            example -= count
        return f"batch {self.pieces[0][0]}"

    def part(self, start: int, stop: int) -> MicroBatch:
        """Examples ``start`` to ``stop`` of this micro-batch, as views."""
        pieces, position = [], 0
        for batch, first, count in self.pieces:
            low, high = max(start, position), min(stop, position + count)
            if low < high:
                pieces.append((batch, first + low - position, high - low))
            position += count
        cut = map_tensors(self.batch, lambda t: t[start:stop])
        return MicroBatch(cut, stop - start, tuple(pieces), self.scale)


def walkable(data: Any) -> Iterable[Any]:
    """``data`` as an iterable of batches that gives the same batches at every walk.

    Raises: DataError for a generator, which can be walked only once, a shuffled loader, or what is no data at all.
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


def num_examples_hint(batches: Iterable[Any]) -> int | None:
    """The number of examples where it is known without a walk, for a progress bar and the choice of sizes."""
    if isinstance(batches, DataLoader):
        if batches.batch_size is None or isinstance(batches.dataset, IterableDataset):
            return None  # batches of the user's own making
        try:
            count = len(batches.sampler)  # type: ignore[arg-type]
        except TypeError:
            return None
        return count - count % batches.batch_size if batches.drop_last else count
    if isinstance(batches, list | tuple):
        return sum(batch_size(batch) for batch in batches)
    return None


def micro_batches(batches: Iterable[Any], size: int | None) -> Iterator[MicroBatch]:
    """Regroup ``batches`` into micro-batches of ``size`` examples, the last one smaller; None keeps the loader's.

    Batches that cannot be joined (padded to other lengths, say) are only split, and what has no common first
    dimension is kept whole.
    """
    pending: list[MicroBatch] = []
    held = 0  # examples in it
    for index, raw in enumerate(batches):
        batch = map_leaves(raw, lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf)
        count = batch_size(batch)
        whole = MicroBatch(batch, count, ((index, 0, count),))
        if count == 0:
            continue
        if size is None or not whole.splittable:
            yield from _flush(pending)
            held = 0
            yield whole
            continue
        if pending and not _joinable(pending[0].batch, batch):
            yield from _flush(pending)
            held = 0
        start = 0
        while start < count:
            take = min(size - held, count - start)
            pending.append(whole if take == count else whole.part(start, start + take))
            start, held = start + take, held + take
            if held == size:
                yield from _flush(pending)
                held = 0
        if pending:  # what is held over is a copy: a loader may fill the same tensors again
            last = pending[-1]
            pending[-1] = replace(last, batch=map_tensors(last.batch, torch.clone))
    yield from _flush(pending)


def arguments(batch: Any, accepts: Callable[[str], bool]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """``(args, kwargs, target)`` for ``loss(model(*args, **kwargs), target)``.

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
    came = f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise ProblemError(f"A batch must be (input, ..., target) or a dict with a target, got {came}.")


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


def rows(batch: Any, places: Tensor) -> Any:
    """The examples of ``batch`` at ``places`` (int64), as copies without autograd's graph."""
    return map_tensors(batch, lambda t: t.detach()[places.to(t.device)])


def leaves(batch: Any) -> list[Any]:
    """The leaves of ``batch`` in order."""
    found: list[Any] = []
    map_leaves(batch, found.append)
    return found


def structure(batch: Any) -> Any:
    """What must be equal for the leaves of two batches to mean the same in the same order: types, keys, their order."""
    if isinstance(batch, Mapping):
        return [(key, structure(value)) for key, value in batch.items()]
    if isinstance(batch, tuple | list):
        return type(batch), [structure(value) for value in batch]
    return None


def batch_size(batch: Any) -> int:
    """Number of examples: the first dimension of the first tensor, else 1."""
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim:
            return len(leaf)
    return 1


def _flush(pending: list[MicroBatch]) -> Iterator[MicroBatch]:
    if len(pending) == 1:
        yield pending[0]
    elif pending:
        columns = iter([torch.cat(parts) for parts in zip(*(tensors(p.batch) for p in pending), strict=True)])
        pieces = tuple(piece for p in pending for piece in p.pieces)
        yield MicroBatch(map_tensors(pending[0].batch, lambda _: next(columns)), sum(p.size for p in pending), pieces)
    pending.clear()


def _joinable(first: Any, second: Any) -> bool:
    if structure(first) != structure(second):
        return False
    for left, right in zip(leaves(first), leaves(second), strict=True):
        if isinstance(left, Tensor) and left.dim():
            if not isinstance(right, Tensor) or left.shape[1:] != right.shape[1:] or left.dtype != right.dtype:
                return False
        elif isinstance(left, Tensor) or left is not right:
            return False
    return True


def tensors(batch: Any) -> list[Tensor]:
    """The tensors that ``map_tensors`` maps, in its order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]


def _values(batch: Any) -> Iterable[Any]:
    return batch.values() if isinstance(batch, Mapping) else batch
