"""Choosing kernels that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpscope.objective.convolutions import fast_convolutions


@contextmanager
def differentiable_kernels(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Plain kernels in place of fused ones without second derivatives; autocast, which would round them, is off.

    Attention runs on the math kernel, torch's attention modules off their fast path for inference, and recurrent
    networks on CUDA off cuDNN, whose backward has no derivative and none at all in eval mode.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_fast_path())
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_without_cudnn())
        stack.enter_context(fast_convolutions(model))
        yield


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
