"""Precision and device of a computation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, ProblemError

# Entries of a vector that are converted to float64 at a time: limits the extra memory to 512 kB a vector.
CHUNK = 1 << 16

LOW_PRECISION = (torch.float16, torch.bfloat16)


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums over long vectors: float64, but float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def available_device(device: torch.device | str) -> torch.device:
    """``device`` with its index, after allocating a tensor on it.

    Raises: ArgumentError for an unknown name or a backend that is not available.
    """
    try:
        return torch.empty(1, device=torch.device(device)).device  # "cuda" becomes "cuda:0"
    # torch raises AssertionError for a backend that it was built without.
    except (RuntimeError, AssertionError) as error:
        # torch's own message lists twenty kinds of device.
        raise ArgumentError(f"The device {str(device)!r} cannot be used. Name cpu, cuda, cuda:1 or mps.") from error


def compute_dtype(params: Iterable[Tensor], wanted: torch.dtype | None) -> torch.dtype:
    """``wanted``, or the widest dtype of ``params``, at least float32: Hessians in 16 bits would be noise.

    Raises: ArgumentError unless ``wanted`` is float32, float64 or None.
    """
    if wanted is not None:
        if wanted not in (torch.float32, torch.float64):
            raise ArgumentError(f"dtype must be torch.float32 or torch.float64, got {wanted}.")
        return wanted
    widest = torch.float32
    for parameter in params:
        widest = torch.promote_types(widest, parameter.dtype)
    return widest


def matching_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of ``tensor`` in a computation in ``dtype``: complex tensors stay complex, integers unchanged."""
    if tensor.is_complex():
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() else tensor.dtype


def cast_model(
    model: nn.Module, loss: Callable[..., Any], dtype: torch.dtype, device: torch.device, *, copied: bool = False
) -> tuple[nn.Module, Callable[..., Any]]:
    """``model`` and ``loss`` in ``dtype`` on ``device``: themselves if they are already, else copies.

    Both are copied together, so that a loss that holds the model holds the copy.

    Args:
        model: the model.
        loss: the loss function.
        dtype: of parameters and buffers; complex ones stay complex.
        device: of parameters and buffers.
        copied: copy in any case.

    Raises: ProblemError when they cannot be copied.
    """
    modules = [module for module in (model, loss) if isinstance(module, nn.Module)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    if not copied and all(t.device == device and t.dtype == matching_dtype(t, dtype) for t in tensors):
        return model, loss
    try:
        model, loss = copy.deepcopy((model, loss))
        for module in (model, loss):
            if isinstance(module, nn.Module):
                # Like Module.to, which would drop the imaginary parts of complex buffers.
                module._apply(lambda t: t.to(device=device, dtype=matching_dtype(t, dtype)))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ProblemError(
            f"The model cannot be copied to {dtype} on {device} ({error}). Convert it yourself: model.to(...)."
        ) from error
    return model, loss
