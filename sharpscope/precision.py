"""In which precision, and where, the computation runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, ProblemError

# Elements of each vector converted to the wide dtype at a time: bounds the extra memory, 512 kB a vector.
CHUNK = 1 << 16

LOW_PRECISION = (torch.float16, torch.bfloat16)


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums over long vectors: float64, but float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def usable(device: torch.device | str) -> torch.device:
    """``device``, after making sure that a tensor can be there.

    Raises: ArgumentError for a name that is none, or a backend that is not there.
    """
    try:
        place = torch.device(device)
        return torch.empty(1, device=place).device  # with its index: "cuda" is "cuda:0"
    # torch raises AssertionError for a backend that it was built without.
    except (RuntimeError, AssertionError) as error:
        # torch's own words list twenty kinds of device.
        raise ArgumentError(f"The device {str(device)!r} cannot be used. Name cpu, cuda, cuda:1 or mps.") from error


def compute_dtype(params: Iterable[Tensor], wanted: torch.dtype | None) -> torch.dtype:
    """``wanted``, or the widest dtype of ``params`` and float32: Hessians in 16 bits would be noise.

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


def converted(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What ``tensor`` becomes in a computation in ``dtype``: real numbers follow it, complex ones keep both parts."""
    if tensor.is_complex():
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() else tensor.dtype


def placed(
    model: nn.Module, loss: Callable[..., Any], dtype: torch.dtype, device: torch.device, *, copied: bool = False
) -> tuple[nn.Module, Callable[..., Any]]:
    """``model`` and ``loss`` themselves where all of them is in ``dtype`` on ``device``, else copies that are.

    One copy of both, so that a loss that holds the model holds the model's copy. ``copied`` asks for a copy anyway.

    Raises: ProblemError when they cannot be copied.
    """
    modules = [module for module in (model, loss) if isinstance(module, nn.Module)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    if not copied and all(t.device == device and t.dtype == converted(t, dtype) for t in tensors):
        return model, loss
    try:
        model, loss = copy.deepcopy((model, loss))
        for module in (model, loss):
            if isinstance(module, nn.Module):
                # What Module.to does, except that it would drop the imaginary parts of complex buffers.
                module._apply(lambda t: t.to(device=device, dtype=converted(t, dtype)))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ProblemError(
            f"The model cannot be copied to {dtype} on {device} ({error}). Convert it yourself: model.to(...)."
        ) from error
    return model, loss
