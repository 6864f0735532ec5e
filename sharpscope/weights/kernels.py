"""Kernels that can be differentiated twice, in place of torch's. H v itself is in objective/double_backprop.py."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as gradient_checkpointing
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

DIMENSIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

# Patches are cached if they take at most this many times the memory of the layer's output. With one input channel a
# matrix product with patches is 4 to 13 times as fast as the convolution (28x28 images, 8 to 64 channels, CPU); with
# three channels it is no faster.
MAX_PATCH_RATIO = 8


@dataclass
class _ConvolutionCall:
    """One call of a convolution: its geometry, and the patches of its input if second derivatives are needed."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    patches: Tensor | None = None


def convolution(dimensions: int, *args: Any, **kwargs: Any) -> Tensor | None:
    """``torch.conv{dimensions}d`` with the same values bit for bit; None for arguments that are left to torch."""
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
) -> tuple[Tensor, Tensor, Tensor | None, _ConvolutionCall] | None:
    plain = type(input) is Tensor and isinstance(weight, Tensor)
    # Left to torch, which computes a complex convolution from three real ones.
    if input.is_complex() or weight.is_complex():
        return None
    if not plain or isinstance(padding, str) or input.dim() != dimensions + 2 or input.numel() == 0:
        return None
    each = [list(value) if isinstance(value, Sequence) else [value] for value in (stride, padding, dilation)]
    stride, padding, dilation = (value * dimensions if len(value) == 1 else value for value in each)
    return input, weight, bias, _ConvolutionCall(stride, padding, dilation, groups)


def _forward(x: Tensor, w: Tensor, b: Tensor | None, call: _ConvolutionCall) -> Tensor:
    out: Tensor = torch.ops.aten.convolution(
        x, w, b, call.stride, call.padding, call.dilation, False, [0] * len(call.stride), call.groups
    )
    return out


def _backward(g: Tensor, x: Tensor, w: Tensor, call: _ConvolutionCall, mask: list[bool]) -> list[Tensor | None]:
    grads = torch.ops.aten.convolution_backward(
        g,
        x,
        w,
        [w.shape[0]],
        call.stride,
        call.padding,
        call.dilation,
        False,
        [0] * len(call.stride),
        call.groups,
        mask,
    )
    return [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]


def _patches(x: Tensor, w: Tensor, g: Tensor, call: _ConvolutionCall) -> Tensor | None:
    """Image patches (im2col) of one-channel data (batch, kernel entries, output pixels); None where they are slower."""
    if x.shape[1] != 1 or math.prod(w.shape[2:]) > MAX_PATCH_RATIO * w.shape[0]:
        return None
    windows = F.pad(x[:, 0], [p for p in reversed(call.padding) for _ in range(2)])
    for axis, (size, step, dilation) in enumerate(zip(w.shape[2:], call.stride, call.dilation, strict=True)):
        windows = windows.unfold(1 + axis, (size - 1) * dilation + 1, step)[..., ::dilation]
    kernel = range(1 + len(call.stride), windows.dim())
    pixels = range(1, 1 + len(call.stride))
    return windows.permute(0, *kernel, *pixels).reshape(len(x), -1, math.prod(g.shape[2:]))


def _forward_of_patches(patches: Tensor, w: Tensor, b: Tensor | None, shape: torch.Size) -> Tensor:
    out = w.flatten(1) @ patches
    return (out if b is None else out + b[:, None]).view(shape)


def _backward_of_patches(g: Tensor, patches: Tensor, w: Tensor, mask: list[bool]) -> list[Tensor | None]:
    rows = g.flatten(2)
    to_w = (rows @ patches.transpose(1, 2)).sum(0).view(w.shape) if mask[1] else None
    return [None, to_w, rows.sum((0, 2)) if mask[2] else None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, call: _ConvolutionCall) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.call = call
        return _forward(x, w, b, call)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        call, mask = ctx.call, list(ctx.needs_input_grad[:3])
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: this backward will be differentiated
            if call.patches is None and not mask[0]:
                call.patches = _patches(x, w, g, call)
            # Views, since _gradient_needed works only for tensors that are not leaves.
            grads = _ConvolutionBackward.apply(  # type: ignore[no-untyped-call]
                g.view_as(g), x.view_as(x), w.view_as(w), call.patches, call, mask
            )
        elif call.patches is not None:
            grads = _backward_of_patches(g, call.patches, w, mask)
        else:
            grads = _backward(g, x, w, call, mask)
        return *grads, None


class _ConvolutionBackward(torch.autograd.Function):
    """The gradient in input, weight and bias: linear in ``g``, and each of the first two in one of ``w`` and ``x``."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, patches: Tensor | None, call: _ConvolutionCall, mask: list[bool]
    ) -> Any:
        ctx.save_for_backward(g, x, w, patches)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(_backward(g, x, w, call, mask))

    @staticmethod
    def backward(ctx: Any, in_x: Tensor | None, in_w: Tensor | None, in_b: Tensor | None) -> Any:
        g, x, w, patches = ctx.saved_tensors
        to_g = to_x = to_w = None
        if _gradient_needed(ctx, 0):
            if in_w is not None and patches is not None:
                to_g = _forward_of_patches(patches, in_w, in_b, g.shape)
            elif in_w is not None:
                to_g = _forward(x, in_w, in_b, ctx.call)
            elif in_b is not None:
                to_g = in_b.view(1, -1, *[1] * (g.dim() - 2)).expand_as(g)
            if in_x is not None:
                other = _forward(in_x, w, None, ctx.call)
                to_g = other if to_g is None else other + to_g
        if _gradient_needed(ctx, 1) and in_w is not None:
            to_x = _backward(g, x, in_w, ctx.call, [True, False, False])[0]
        if _gradient_needed(ctx, 2) and in_x is not None:
            to_w = _backward(g, in_x, w, ctx.call, [False, True, False])[1]
        return to_g, to_x, to_w, None, None, None


def _gradient_needed(ctx: Any, position: int) -> bool:
    """Whether the running ``autograd.grad`` needs the gradient in this input.

    torch's own operations know this. A Python function must use a private call, so a torch without it is no error.
    """
    if not ctx.needs_input_grad[position]:
        return False
    node = ctx.next_functions[position][0]
    will_execute = getattr(torch._C, "_will_engine_execute_node", None)
    return will_execute is None or bool(will_execute(node))


POOL = torch.ops.aten.max_pool2d_with_indices
POOL_BACKWARD = torch.ops.aten.max_pool2d_with_indices_backward


def relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    """``torch.relu`` with the same values bit for bit; None for arguments that are left to torch."""
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
    """``torch.max_pool2d`` with the same values bit for bit; None for arguments that are left to torch."""
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
    """The gradient in the input: linear in ``g``, constant in the positions of the maxima."""

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
    """``torch._weight_norm``: ``g v / |v|``. The fused kernel's second derivative is wrong (torch 2.13, CPU)."""
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
    """``F.embedding`` with a dense gradient, because sparse gradients cannot be added up or differentiated.

    torch rescales rows longer than ``max_norm`` in the weights themselves; here the rows are rescaled after the lookup.
    """
    rows = F.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq)
    return rows if max_norm is None else _limit_norm(rows, max_norm, norm_type)


def _limit_norm(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """``rows``, scaled down to the norm ``max_norm`` where they are longer, as a differentiable function of them."""
    beyond = torch.linalg.vector_norm(rows.detach(), norm_type, dim=-1, keepdim=True) > max_norm
    # Rows that are not scaled are replaced by ones, because a norm has no second derivative at zero.
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
    """``F.embedding_bag``, whose backward cannot be differentiated; None for arguments that are left to torch."""
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


# Faster second derivatives of torch's functions. A replacement returns None for arguments that are left to torch.
FAST_DOUBLE_BACKWARD: dict[Any, Callable[..., Tensor | None]] = {
    **{function: partial(convolution, dimensions) for function, dimensions in DIMENSIONS.items()},
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), relu),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), max_pool2d),
}
FAST_LAYERS = (nn.modules.conv._ConvNd, nn.ReLU, nn.MaxPool2d)

# Correct second derivatives of torch's functions that lack them or have wrong ones.
TWICE_DIFFERENTIABLE: dict[Any, Callable[..., Tensor | None]] = {
    torch._weight_norm: weight_norm,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}


@contextmanager
def differentiable_kernels(model: nn.Module, device: torch.device, *, faster: bool = True) -> Iterator[None]:
    """Use kernels that can be differentiated twice; switch off autocast, which would round loss and derivatives.

    Attention uses the math kernel, and torch's attention modules do not use their inference fast path. Recurrent
    networks on CUDA do not use cuDNN, whose backward cannot be differentiated and does not exist in eval mode. Weight
    norm, embedding bags and sparse embeddings are replaced (TWICE_DIFFERENTIABLE). Gradient
    checkpoints are plain calls, and what ``torch.compile`` has compiled runs as it was written.

    Args:
        model: replaces only the functions that its layers use.
        device: of the computation.
        faster: also use the faster second derivatives of FAST_DOUBLE_BACKWARD.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_without_autocast_inside())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_fast_path())
        stack.enter_context(_without_gradient_checkpointing())
        stack.enter_context(_without_compiling())
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_without_cudnn())
        if any(map(_needs_replacement, model.modules())):
            stack.enter_context(_ReplaceFunctions(TWICE_DIFFERENTIABLE))
        if faster:
            stack.enter_context(faster_kernels(model))
        yield


@contextmanager
def faster_kernels(model: nn.Module) -> Iterator[None]:
    """Use FAST_DOUBLE_BACKWARD where ``model`` has such layers; values and gradients keep every bit."""
    if not any(isinstance(m, FAST_LAYERS) for m in model.modules()):
        yield
        return
    with _ReplaceFunctions(FAST_DOUBLE_BACKWARD):
        yield


def _needs_replacement(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return module.sparse or module.max_norm is not None
    old = any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
    return old or isinstance(module, nn.EmbeddingBag | _WeightNorm)


class _ReplaceFunctions(TorchFunctionMode):
    def __init__(self, table: dict[Any, Callable[..., Tensor | None]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.table and torch.is_grad_enabled() and not _in_functorch_transform():
            result = self.table[func](*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _in_functorch_transform() -> bool:
    """Whether a torch.func transform is running, which does not support this form of autograd functions."""
    stack = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    return stack is not None and stack() is not None


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def _without_gradient_checkpointing() -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` call the functions that it is given, and record them as any others.

    A reentrant checkpoint, which is also torch's default, hides the weights inside from ``autograd.grad``: they have no
    gradient, and no error says so. Another one runs its function again in each backward pass, outside of
    ``float64_mode``, and saves no memory where the backward pass is recorded. Both are replaced by what
    ``torch.utils.checkpoint.checkpoint`` calls, since models may hold that function itself.
    """
    replacements = {"CheckpointFunction": _PlainCall, "_checkpoint_without_reentrant_generator": _plain_call}
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            if hasattr(gradient_checkpointing, name):
                stack.callback(setattr, gradient_checkpointing, name, getattr(gradient_checkpointing, name))
                setattr(gradient_checkpointing, name, replacement)
        yield


class _PlainCall:
    """Replace the autograd function of reentrant checkpoints by a direct call."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _plain_call(
    function: Any, preserve_rng_state: Any, context_fn: Callable[[], Any], /, *options: Any, **kwargs: Any
) -> Iterator[None]:
    """Replace the generator of other checkpoints, which runs up to its ``yield`` before the call of the function."""
    with context_fn()[0]:
        yield


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Run compiled modules and functions, also those of the loss, as they were written.

    A compiled graph has no second derivative, and after a training step not even a first that can be taken twice.
    """
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    # Whoever has compiled has imported this module, which takes seconds.
    if stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with stance("force_eager"):
        yield


@contextmanager
def _without_autocast_inside() -> Iterator[None]:
    """Let the blocks of ``torch.autocast`` that the model or the loss enter have no effect."""
    enter = torch.autocast.__enter__

    def disabled(self: torch.autocast) -> Any:
        wanted, self._enabled = self._enabled, False
        try:
            return enter(self)  # type: ignore[no-untyped-call]
        finally:
            self._enabled = wanted

    torch.autocast.__enter__ = disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
