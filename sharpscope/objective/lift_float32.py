"""A computation in float64 of models that ask for float32 in their own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch._grouped_mm``: each group of rows times its expert's matrix. torch has no float64 kernel for it."""
    if offs is None or bias is not None or mat_a.dim() != 2 or mat_b.dim() != 3:
        result: Tensor = torch._grouped_mm(mat_a, mat_b, offs, bias, out_dtype)
        return result
    stops = [int(stop) for stop in offs]
    rows = [mat_a[start:stop] @ b for start, stop, b in zip([0, *stops[:-1]], stops, mat_b, strict=True)]
    # Rows in no group have undefined values, but must be present.
    return torch.cat([*rows, mat_a.new_zeros(len(mat_a) - stops[-1], mat_b.shape[2])])


# Functions that return random numbers, and methods that fill a tensor with them. Their numbers depend on the dtype.
RANDOM = tuple(
    getattr(torch, n) for n in ("rand", "randn", "normal", "rand_like", "randn_like", "bernoulli", "poisson")
)
RANDOM_IN_PLACE = tuple(
    getattr(Tensor, f"{name}_")
    for name in ("normal", "uniform", "exponential", "bernoulli", "cauchy", "geometric", "log_normal", "random")
)
SINGLE = (torch.float32, torch.complex64)
LIFTED: dict[Any, Any] = {
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
    Tensor.float: Tensor.double,
}
if hasattr(torch, "_grouped_mm"):  # torch 2.8 and later
    LIFTED[torch._grouped_mm] = grouped_mm


@contextmanager
def float64_mode(dtype: torch.dtype) -> Iterator[None]:
    """If ``dtype`` is float64, use float64 wherever code in the block asks for float32 or gives no dtype.

    Language models often compute norms and softmax in float32, which would round a float64 computation to 1e-7, too
    coarse for finite differences; a recurrent network's ``torch.zeros`` would not match the dtype of its weights.
    Random numbers are drawn in float32 and converted; so are tensors that are created without a dtype. A float32
    tensor that the model keeps in an attribute, not as a buffer, is left alone, because code may write to it.
    """
    if dtype != torch.float64:
        yield
        return
    with _Float64Mode():
        yield


class _Float64Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM_IN_PLACE and args[0].dtype is torch.float64:
            values = args[0].detach().float()
            func(values, *args[1:], **kwargs)
            with torch.no_grad():
                return args[0].copy_(values)
        # Not for Tensor.view, which would reinterpret the bits.
        if func is not Tensor.view and func not in RANDOM:
            func = LIFTED.get(func, func)
            args = tuple(_lift(value) for value in args)
            kwargs = {name: _lift(value) for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        new = func in RANDOM or not any(map(_single, (*args, *kwargs.values())))
        if isinstance(out, Tensor) and out.dtype in SINGLE and new:
            return out.to(LIFTED[out.dtype])
        return out


def _lift(value: Any) -> Any:
    return LIFTED[value] if isinstance(value, torch.dtype) and value in SINGLE else value


def _single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in SINGLE
