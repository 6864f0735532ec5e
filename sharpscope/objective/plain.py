"""Functions whose second derivative torch lacks or has wrong, in operations that it differentiates twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: ``g v / |v|``. The second derivative of its fused kernel is wrong (torch 2.13, CPU)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """``F.embedding`` with a dense gradient: of a sparse one there are no sums and no derivative."""
    return F.embedding(input, weight, padding_idx, *args, **{**kwargs, "sparse": False})


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """``F.embedding_bag``, whose backward has no derivative; None for a form that is left to torch."""
    if mode == "max" or max_norm is not None or scale_grad_by_freq:
        return None
    ids = input.flatten()
    if input.dim() == 2:
        count = len(input)
        bags = torch.arange(count, device=ids.device).repeat_interleave(input.shape[1])
    elif offsets is not None:
        count = len(offsets) - include_last_offset
        bags = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets[:count], right=True) - 1
    else:
        return None
    padding = None if padding_idx is None else padding_idx % len(weight)
    kept = torch.ones_like(ids, dtype=weight.dtype) if padding is None else (ids != padding).to(weight.dtype)
    scale = kept if per_sample_weights is None else kept * per_sample_weights.flatten()
    rows = F.embedding(ids, weight, padding) * scale[:, None]
    sums = rows.new_zeros(count, weight.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return sums
    return sums / kept.new_zeros(count).index_add(0, bags, kept).clamp(min=1)[:, None]
