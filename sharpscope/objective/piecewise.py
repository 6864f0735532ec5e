"""ReLU and max-pooling without the zeros that torch makes, and adds, of their vanishing second derivative.

Both are linear between their kinks: the derivative of their backward in the input is zero, which torch writes out as a
tensor of the activations' size in every Hessian-vector product, and adds (a tenth of one with an mlp or a small CNN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
