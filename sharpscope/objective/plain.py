"""Functions whose second derivative torch lacks or has wrong, in operations that it differentiates twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: ``g v / |v|``. The second derivative of its fused kernel is wrong (torch 2.13, CPU)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding`` with a dense gradient: of a sparse one there are no sums and no derivative.

    torch shortens rows beyond ``max_norm`` in the weights themselves; here the rows that are looked up are shortened.
    """
    rows = F.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq)
    return rows if max_norm is None else _shortened(rows, max_norm, norm_type)


def _shortened(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """``rows`` at most ``max_norm`` long, as a function of them: beyond, its derivative is that of the shortening."""
    beyond = torch.linalg.vector_norm(rows.detach(), norm_type, dim=-1, keepdim=True) > max_norm
    # A length has no second derivative at zero, where it is not asked for.
    long = torch.where(beyond, rows, torch.ones_like(rows))
    short = long * (max_norm / (torch.linalg.vector_norm(long, norm_type, dim=-1, keepdim=True) + 1e-7))
    return torch.where(beyond, short, rows)


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
    if mode == "max" or scale_grad_by_freq:
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
    rows = embedding(ids, weight, padding, max_norm, norm_type) * scale[:, None]
    sums = rows.new_zeros(count, weight.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return sums
    return sums / kept.new_zeros(count).index_add(0, bags, kept).clamp(min=1)[:, None]
