"""Convolutions whose second derivative is made of the same fast kernels as their first.

torch differentiates a convolution's backward by convolutions with the batch for channels and feature maps for kernels,
which its kernels are slow at, and computes parts that nobody asked for. Here each part is a forward, an input-gradient
or a weight-gradient convolution, and only those that are needed. Where a layer of one input channel reads the data
themselves, both parts that are left are products of matrices with the data's patches.
"""

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
