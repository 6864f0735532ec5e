"""Operations whose second derivative is missing, wrong or slow in torch, written so that it is right and fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIMENSIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

# Patches are kept where they take at most so many times the bytes of the layer's output. With one input channel a
# product with them is 4 to 13 times as fast as a convolution of 28x28 images to 8 to 64 channels on the CPU, with three
# channels no faster.
PATCHES = 8


@dataclass
class _Site:
    """One call of a convolution: its geometry, and the patches of its input once second derivatives are wanted."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    patches: Tensor | None = None


def convolution(dimensions: int, *args: Any, **kwargs: Any) -> Tensor | None:
    """``torch.conv{dimensions}d`` of the same arguments, to the bit, or None for a form that is left to torch."""
    given = _arguments(dimensions, *args, **kwargs)
    return None if given is None else _Convolution.apply(*given)  # type: ignore[no-untyped-call]


def _arguments(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _Site] | None:
    plain = type(input) is Tensor and isinstance(weight, Tensor)
    # torch makes a complex convolution of three real ones.
    if input.is_complex() or weight.is_complex():
        return None
    if not plain or isinstance(padding, str) or input.dim() != dimensions + 2 or input.numel() == 0:
        return None
    each = [list(value) if isinstance(value, Sequence) else [value] for value in (stride, padding, dilation)]
    stride, padding, dilation = (value * dimensions if len(value) == 1 else value for value in each)
    return input, weight, bias, _Site(stride, padding, dilation, groups)


def _forward(x: Tensor, w: Tensor, b: Tensor | None, site: _Site) -> Tensor:
    out: Tensor = torch.ops.aten.convolution(
        x, w, b, site.stride, site.padding, site.dilation, False, [0] * len(site.stride), site.groups
    )
    return out


def _backward(g: Tensor, x: Tensor, w: Tensor, site: _Site, mask: list[bool]) -> list[Tensor | None]:
    found = torch.ops.aten.convolution_backward(
        g,
        x,
        w,
        [w.shape[0]],
        site.stride,
        site.padding,
        site.dilation,
        False,
        [0] * len(site.stride),
        site.groups,
        mask,
    )
    return [t if wanted else None for t, wanted in zip(found, mask, strict=True)]


def _patches(x: Tensor, w: Tensor, g: Tensor, site: _Site) -> Tensor | None:
    """What each of the kernel's places sees of one-channel data (batch, places, output pixels), where that pays."""
    if x.shape[1] != 1 or math.prod(w.shape[2:]) > PATCHES * w.shape[0]:
        return None
    seen = F.pad(x[:, 0], [p for p in reversed(site.padding) for _ in range(2)])
    for axis, (size, step, apart) in enumerate(zip(w.shape[2:], site.stride, site.dilation, strict=True)):
        windows = seen.unfold(1 + axis, (size - 1) * apart + 1, step)
        seen = windows[..., ::apart]
    kernel = range(1 + len(site.stride), seen.dim())
    pixels = range(1, 1 + len(site.stride))
    return seen.permute(0, *kernel, *pixels).reshape(len(x), -1, math.prod(g.shape[2:]))


def _forward_of_patches(patches: Tensor, w: Tensor, b: Tensor | None, shape: torch.Size) -> Tensor:
    out = w.flatten(1) @ patches
    return (out if b is None else out + b[:, None]).view(shape)


def _backward_of_patches(g: Tensor, patches: Tensor, w: Tensor, mask: list[bool]) -> list[Tensor | None]:
    rows = g.flatten(2)
    to_w = (rows @ patches.transpose(1, 2)).sum(0).view(w.shape) if mask[1] else None
    return [None, to_w, rows.sum((0, 2)) if mask[2] else None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, site: _Site) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.site = site
        return _forward(x, w, b, site)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        site, mask = ctx.site, list(ctx.needs_input_grad[:3])
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of this backward is wanted, to be differentiated
            if site.patches is None and not mask[0]:
                site.patches = _patches(x, w, g, site)
            # Views, since _asked cannot tell of a leaf.
            found = _ConvolutionBackward.apply(  # type: ignore[no-untyped-call]
                g.view_as(g), x.view_as(x), w.view_as(w), site.patches, site, mask
            )
        elif site.patches is not None:
            found = _backward_of_patches(g, site.patches, w, mask)
        else:
            found = _backward(g, x, w, site, mask)
        return *found, None


class _ConvolutionBackward(torch.autograd.Function):
    """The gradient in input, weight and bias: linear in ``g``, and each of the first two in one of ``w`` and ``x``."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, patches: Tensor | None, site: _Site, mask: list[bool]
    ) -> Any:
        ctx.save_for_backward(g, x, w, patches)
        ctx.site = site
        ctx.set_materialize_grads(False)
        return tuple(_backward(g, x, w, site, mask))

    @staticmethod
    def backward(ctx: Any, in_x: Tensor | None, in_w: Tensor | None, in_b: Tensor | None) -> Any:
        g, x, w, patches = ctx.saved_tensors
        to_g = to_x = to_w = None
        if _asked(ctx, 0):
            if in_w is not None and patches is not None:
                to_g = _forward_of_patches(patches, in_w, in_b, g.shape)
            elif in_w is not None:
                to_g = _forward(x, in_w, in_b, ctx.site)
            elif in_b is not None:
                to_g = in_b.view(1, -1, *[1] * (g.dim() - 2)).expand_as(g)
            if in_x is not None:
                other = _forward(in_x, w, None, ctx.site)
                to_g = other if to_g is None else other + to_g
        if _asked(ctx, 1) and in_w is not None:
            to_x = _backward(g, x, in_w, ctx.site, [True, False, False])[0]
        if _asked(ctx, 2) and in_x is not None:
            to_w = _backward(g, in_x, w, ctx.site, [False, True, False])[1]
        return to_g, to_x, to_w, None, None, None


def _asked(ctx: Any, position: int) -> bool:
    """Whether the gradient in this input leads to one that the running ``autograd.grad`` was asked for.

    torch's own operations know; for those of Python only this private call does, so its absence is no error.
    """
    if not ctx.needs_input_grad[position]:
        return False
    node = ctx.next_functions[position][0]
    will = getattr(torch._C, "_will_engine_execute_node", None)
    return will is None or bool(will(node))


POOL = torch.ops.aten.max_pool2d_with_indices
POOL_BACKWARD = torch.ops.aten.max_pool2d_with_indices_backward


def relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    """``torch.relu``, to the bit, or None for a form that is left to torch."""
    if inplace or type(input) is not Tensor or not input.requires_grad:
        return None
    return _Relu.apply(input)  # type: ignore[no-untyped-call, no-any-return]


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.relu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.ops.aten.threshold_backward(g, out, 0)
        return _ReluBackward.apply(g, out.detach())  # type: ignore[no-untyped-call]


class _ReluBackward(torch.autograd.Function):
    """The gradient in the input: linear in ``g``, constant in the output."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        found: Tensor = torch.ops.aten.threshold_backward(g, out, 0)
        return found

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(h, out, 0), None


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """``torch.max_pool2d``, to the bit, or None for a form that is left to torch."""
    if return_indices or type(input) is not Tensor or input.dim() != 4 or not input.requires_grad:
        return None
    sizes = [list(s) if isinstance(s, Sequence) else [s] for s in (kernel_size, stride or (), padding, dilation)]
    return _MaxPool.apply(input, [*sizes, ceil_mode])  # type: ignore[no-untyped-call, no-any-return]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: list[Any]) -> Tensor:
        out, indices = POOL(x, *options)
        ctx.save_for_backward(x, indices)
        ctx.options = options
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, indices = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return POOL_BACKWARD(g, x, *ctx.options, indices), None
        return _MaxPoolBackward.apply(g, x.detach(), indices, ctx.options), None  # type: ignore[no-untyped-call]


class _MaxPoolBackward(torch.autograd.Function):
    """The gradient in the input: linear in ``g``, constant in the places of the maxima."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, indices: Tensor, options: list[Any]) -> Tensor:
        ctx.save_for_backward(indices)
        found: Tensor = POOL_BACKWARD(g, x, *options, indices)
        return found

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return h.flatten(2).gather(2, indices.flatten(2)).view_as(indices), None, None, None


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
