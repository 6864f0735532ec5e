"""Kernels that can be differentiated twice, in place of torch's fused ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from sharpscope.weights.double_backward import (
    DIMENSIONS,
    convolution,
    embedding,
    embedding_bag,
    max_pool2d,
    relu,
    weight_norm,
)

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
    """Use kernels that can be differentiated twice; switch off autocast, which would round the derivatives.

    Attention uses the math kernel, and torch's attention modules do not use their inference fast path. Recurrent
    networks on CUDA do not use cuDNN, whose backward cannot be differentiated and does not exist in eval mode. Weight
    norm, embedding bags and sparse embeddings are replaced (TWICE_DIFFERENTIABLE).

    Args:
        model: replaces only the functions that its layers use.
        device: of the computation.
        faster: also use the faster second derivatives of FAST_DOUBLE_BACKWARD.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_fast_path())
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
