"""In which precision, and where, the computation runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, ProblemError


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums over long vectors: float64, but float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def usable(device: torch.device | str) -> torch.device:
    """``device``, after making sure that a tensor can be there.

    Raises: ArgumentError for a name that is none, or a backend that is not there.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    # torch raises AssertionError for a backend that it was built without.
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"The device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return place


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


def placed(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """``module`` itself where all of it is in ``dtype`` on ``device``, else a copy that is.

    Raises: ProblemError when it cannot be copied.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors):
        return module
    try:
        return copy.deepcopy(module).to(device=device, dtype=dtype)
    except RuntimeError as error:
        raise ProblemError(
            f"The {type(module).__name__} cannot be copied to {dtype} on {device} ({error}). "
            "Convert it yourself: module.to(...)."
        ) from error
