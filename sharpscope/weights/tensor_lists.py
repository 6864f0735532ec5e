"""Arithmetic over lists of tensors: foreach functions where they apply, one by one otherwise; sums over shards.

torch's foreach functions take plain tensors. Distributed tensors (``DTensor``, from ``fully_shard`` or tensor
parallelism) have no ``_foreach_copy_``, other subclasses may have none. Elementwise work needs this process's shards
alone; a sum needs those of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; does not import ``torch.distributed``."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """This process's shard of a distributed tensor, which shares its memory; any other tensor as it is.

    Args:
        like: a distributed tensor of the same shape, if the shard must hold the same elements as that of ``like``.
    """
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    t: Any = tensor
    model: Any = like if like is not None and is_distributed(like) else tensor
    wanted = [Replicate() if p.is_partial() else p for p in model.placements]
    if list(t.placements) != wanted:
        t = t.redistribute(placements=wanted)
    shard: Tensor = t.to_local()
    return shard


def multiply(tensors: Sequence[Tensor], by: float | Sequence[Tensor]) -> list[Tensor]:
    """The products of ``tensors`` and a number, or of each tensor and its own factor."""
    if isinstance(by, float | int):
        return list(torch._foreach_mul(list(tensors), by)) if _plain(tensors) else [t * by for t in tensors]
    if _plain(tensors, by):
        return list(torch._foreach_mul(list(tensors), list(by)))
    return [t * b for t, b in zip(tensors, by, strict=True)]


def sign(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The signs of the elements."""
    return list(torch._foreach_sign(list(tensors))) if _plain(tensors) else [t.sign() for t in tensors]


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor], scale: float) -> None:
    """Add ``scale`` times ``others`` to ``tensors`` in place."""
    into, source = _shards(tensors, others)
    if _plain(into, source):
        torch._foreach_add_(into, source, alpha=scale)
        return
    for t, o in zip(into, source, strict=True):
        t.add_(o, alpha=scale)


def copy_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Copy ``others`` into ``tensors``; if that fails or is interrupted, again one by one."""
    into, source = _shards(tensors, others)
    try:
        (torch._foreach_copy_ if _plain(into, source) else _copy_each)(into, source)
    except BaseException as error:
        _copy_each(into, source)
        if not isinstance(error, Exception):
            raise


def norms(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """``||t||_2`` of this process's shard of each tensor, accumulated in ``dtype``; None is each tensor's own."""
    shards = [local(t) for t in tensors]
    if _plain(shards):
        return list(torch._foreach_norm(shards, 2, dtype))
    return [torch.linalg.vector_norm(t, dtype=dtype) for t in shards]


def total(parts: Sequence[Tensor], tensors: Sequence[Tensor], largest: bool = False) -> Tensor:
    """The sum (or the maximum) of ``parts``, tensors of one shape, over all tensors and all of their shards.

    Every process that holds shards must call it, with tensors in the same order.

    Args:
        parts: for each of ``tensors``, what was computed from ``local(tensor)``.
    """
    kinds: dict[tuple[str, ...], tuple[list[Any], list[Tensor]]] = {}
    for part, tensor in zip(parts, tensors, strict=True):
        groups = _sharing(tensor)
        kinds.setdefault(tuple(g.group_name for g in groups), (groups, []))[1].append(part)
    sums = []
    for groups, of in kinds.values():
        stacked = torch.stack([part.to(of[0]) for part in of])
        sums.append(stacked.amax(0) if largest else stacked.sum(0))
        for group in groups:
            op = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(sums[-1], op=op, group=group)
    if len(sums) == 1:
        return sums[0]
    stacked = torch.stack([s.to(sums[0]) for s in sums])
    return stacked.amax(0) if largest else stacked.sum(0)


def _sharing(tensor: Tensor) -> list[Any]:
    """Process groups over which a distributed tensor is sharded."""
    if not is_distributed(tensor):
        return []
    t: Any = tensor
    return [t.device_mesh.get_group(i) for i, p in enumerate(t.placements) if not (p.is_replicate() or p.is_partial())]


def _plain(*lists: Sequence[Tensor]) -> bool:
    return all(type(t) in _PLAIN for tensors in lists for t in tensors)


def _shards(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [local(t) for t in tensors], [local(o, like=t) for t, o in zip(tensors, others, strict=True)]


def _copy_each(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    errors = []
    for t, o in zip(tensors, others, strict=True):
        try:
            t.copy_(o)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
