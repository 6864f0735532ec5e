"""Convolutions whose second derivative is made of the same fast kernels as their first.

torch differentiates a convolution's backward by convolutions with the batch for channels and feature maps for kernels,
which its kernels are slow at, and computes parts that nobody asked for. Here each part is a forward, an input-gradient
or a weight-gradient convolution, and only those that are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Geometry = tuple[list[int], list[int], list[int], int]

DIMENSIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


@contextmanager
def fast_convolutions(model: nn.Module) -> Iterator[None]:
    """Convolutions called in the block are ours, where ``model`` has any; values and gradients are the same bits."""
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        yield
        return
    with _Convolutions():
        yield


class _Convolutions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DIMENSIONS and torch.is_grad_enabled():
            given = _geometry(DIMENSIONS[func], *args, **kwargs)
            if given is not None:
                return _Convolution.apply(*given)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _geometry(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Geometry] | None:
    """Arguments of a convolution in one form, or None for a form that is left to torch."""
    plain = type(input) is Tensor and isinstance(weight, Tensor) and not _transformed()
    if not plain or isinstance(padding, str) or input.dim() != dimensions + 2 or input.numel() == 0:
        return None
    each = [list(value) if isinstance(value, Sequence) else [value] for value in (stride, padding, dilation)]
    stride, padding, dilation = (value * dimensions if len(value) == 1 else value for value in each)
    return input, weight, bias, (stride, padding, dilation, groups)


def _transformed() -> bool:
    """Whether a torch.func transform is running, which takes no autograd function of this form."""
    stack = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    return stack is not None and stack() is not None


def _forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    out: Tensor = torch.ops.aten.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)
    return out


def _backward(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: list[bool]) -> list[Tensor | None]:
    stride, padding, dilation, groups = geometry
    found = torch.ops.aten.convolution_backward(
        g, x, w, [w.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, mask
    )
    return [t if wanted else None for t, wanted in zip(found, mask, strict=True)]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return _forward(x, w, b, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        # Views, since _asked cannot tell of a leaf.
        x, w = (t.view_as(t) for t in ctx.saved_tensors)
        mask = list(ctx.needs_input_grad[:3])
        return *_ConvolutionBackward.apply(g, x, w, ctx.geometry, mask), None  # type: ignore[no-untyped-call]


class _ConvolutionBackward(torch.autograd.Function):
    """The gradient in input, weight and bias: linear in ``g``, and each of the first two in one of ``w`` and ``x``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: list[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return tuple(_backward(g, x, w, geometry, mask))

    @staticmethod
    def backward(ctx: Any, in_x: Tensor | None, in_w: Tensor | None, in_b: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        to_g = to_x = to_w = None
        if _asked(ctx, 0):
            if in_w is not None:
                to_g = _forward(x, in_w, in_b, ctx.geometry)
            elif in_b is not None:
                to_g = in_b.view(1, -1, *[1] * (g.dim() - 2)).expand_as(g)
            if in_x is not None:
                other = _forward(in_x, w, None, ctx.geometry)
                to_g = other if to_g is None else other + to_g
        if _asked(ctx, 1) and in_w is not None:
            to_x = _backward(g, x, in_w, ctx.geometry, [True, False, False])[0]
        if _asked(ctx, 2) and in_x is not None:
            to_w = _backward(g, in_x, w, ctx.geometry, [False, True, False])[1]
        return to_g, to_x, to_w, None, None


def _asked(ctx: Any, position: int) -> bool:
    """Whether the gradient in this input leads to one that the running ``autograd.grad`` was asked for.

    torch's own operations know; for those of Python only this private call does, so its absence is no error.
    """
    if not ctx.needs_input_grad[position]:
        return False
    node = ctx.next_functions[position][0]
    will = getattr(torch._C, "_will_engine_execute_node", None)
    return will is None or bool(will(node))
