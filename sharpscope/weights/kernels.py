"""Choosing kernels that can be differentiated twice."""

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

# torch's functions whose second derivative we take faster; each of ours gives None for a form that it leaves to torch.
FASTER: dict[Any, Callable[..., Tensor | None]] = {
    **{function: partial(convolution, dimensions) for function, dimensions in DIMENSIONS.items()},
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), relu),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), max_pool2d),
}
LAYERS = (nn.modules.conv._ConvNd, nn.ReLU, nn.MaxPool2d)

# Those whose second derivative it lacks or has wrong, and the modules that call them.
PLAIN: dict[Any, Callable[..., Tensor | None]] = {
    torch._weight_norm: weight_norm,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}


@contextmanager
def differentiable_kernels(model: nn.Module, device: torch.device, *, faster: bool = True) -> Iterator[None]:
    """Plain kernels in place of fused ones without second derivatives; autocast, which would round them, is off.

    Attention runs on the math kernel, torch's attention modules off their fast path for inference, recurrent networks
    on CUDA off cuDNN, whose backward has no derivative and none at all in eval mode; weight norm, bags of embeddings
    and sparse embeddings are PLAIN.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_fast_path())
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_without_cudnn())
        if any(map(_needs_plain, model.modules())):
            stack.enter_context(_Replaced(PLAIN))
        if faster:
            stack.enter_context(faster_kernels(model))
        yield


@contextmanager
def faster_kernels(model: nn.Module) -> Iterator[None]:
    """FASTER in place of torch's functions, where ``model`` has such layers; values and gradients are the same bits."""
    if not any(isinstance(m, LAYERS) for m in model.modules()):
        yield
        return
    with _Replaced(FASTER):
        yield


def _needs_plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return module.sparse or module.max_norm is not None
    old = any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
    return old or isinstance(module, nn.EmbeddingBag | _WeightNorm)


class _Replaced(TorchFunctionMode):
    def __init__(self, table: dict[Any, Callable[..., Tensor | None]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.table and torch.is_grad_enabled() and not _transformed():
            found = self.table[func](*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _transformed() -> bool:
    """Whether a torch.func transform is running, which takes no autograd function of this form."""
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
