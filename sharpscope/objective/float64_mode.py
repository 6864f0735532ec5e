"""A computation in float64 whose model says float32 in its own code."""

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
    """``torch._grouped_mm`` of each group of rows with its expert's matrix; torch's own has no kernel in float64."""
    if offs is None or bias is not None or mat_a.dim() != 2 or mat_b.dim() != 3:
        other: Tensor = torch._grouped_mm(mat_a, mat_b, offs, bias, out_dtype)
        return other
    stops = [int(stop) for stop in offs]
    rows = [mat_a[start:stop] @ b for start, stop, b in zip([0, *stops[:-1]], stops, mat_b, strict=True)]
    # Rows in no group are not defined, but must be there.
    return torch.cat([*rows, mat_a.new_zeros(len(mat_a) - stops[-1], mat_b.shape[2])])


# What draws numbers: those of a generator depend on the precision that they are drawn in.
DRAWN = tuple(getattr(torch, n) for n in ("rand", "randn", "normal", "rand_like", "randn_like", "bernoulli", "poisson"))
DRAWS = tuple(
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
    """float64 wherever the code in the block asks for float32 or makes numbers of no given dtype, if ``dtype`` is that.

    Norms and softmax that are written in float32, as language models have them, would round a computation in float64
    to 1e-7, on which differences are noise; a recurrent network's ``torch.zeros`` would not even meet its weights.
    Random numbers are drawn, and others made without a dtype rounded, as in float32, then lifted. A float32 tensor that
    the model keeps in an attribute, not as a buffer, stays as it is: code may write into it.
    """
    if dtype != torch.float64:
        yield
        return
    with _Float64Mode():
        yield


class _Float64Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS and args[0].dtype is torch.float64:
            drawn = args[0].detach().float()
            func(drawn, *args[1:], **kwargs)
            with torch.no_grad():
                return args[0].copy_(drawn)
        # A view would take the bits of its numbers for others.
        if func is not Tensor.view and func not in DRAWN:
            func = LIFTED.get(func, func)
            args = tuple(_lift(value) for value in args)
            kwargs = {name: _lift(value) for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        new = func in DRAWN or not any(map(_single, (*args, *kwargs.values())))
        if isinstance(out, Tensor) and out.dtype in SINGLE and new:
            return out.to(LIFTED[out.dtype])
        return out


def _lift(value: Any) -> Any:
    return LIFTED[value] if isinstance(value, torch.dtype) and value in SINGLE else value


def _single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in SINGLE
