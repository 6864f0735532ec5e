"""Precision and device of a computation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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


# Where torch >= 2.9 has an ``fp32_precision``, below torch.backends, parents first: what products are rounded to.
_FP32_FLAGS = (
    "",
    "cudnn",
    "cuda.matmul",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn",
    "mkldnn.matmul",
    "mkldnn.conv",
    "mkldnn.rnn",
)

# Flags of torch.backends.cuda.matmul that let products of 16-bit numbers be summed in 16 bits.
_SUMS_IN_16_BITS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Turn off TF32 and bfloat16 inside float32 products, convolutions and RNNs, and 16-bit sums of 16-bit products.

    By default, torch rounds the inputs of cuDNN's convolutions and RNNs to TF32, which has 10 bits of mantissa in place
    of 23. The flags are global to the process. All read as before when the block has ended, on exceptions too.
    """
    with ExitStack() as stack:

        def change(holder: Any, name: str, value: Any) -> None:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)

        holders = [holder for name in _FP32_FLAGS if (holder := _flag_holder(name)) is not None]
        stack.callback(_restore, [(holder, holder.fp32_precision) for holder in holders])
        # First the older flags, which change the newer ones. torch raises RuntimeError where the newer flags contradict
        # them; then they have no effect, and stay.
        with suppress(RuntimeError):
            if torch.backends.cudnn.allow_tf32:
                change(torch.backends.cudnn, "allow_tf32", False)
        with suppress(RuntimeError):
            if (before := torch.get_float32_matmul_precision()) != "highest":
                stack.callback(torch.set_float32_matmul_precision, before)
                torch.set_float32_matmul_precision("highest")
        # Then the newer ones. A flag without a value of its own reads as its parent, so parents first, then what does
        # not follow them.
        for holder in holders:
            if holder.fp32_precision != "ieee":
                change(holder, "fp32_precision", "ieee")
        for name in _SUMS_IN_16_BITS:
            if getattr(torch.backends.cuda.matmul, name, False):
                change(torch.backends.cuda.matmul, name, False)
        yield


def _restore(before: list[tuple[Any, str]]) -> None:
    """Undo what restoring the older flags changes: float32_matmul_precision sets the CPU's flag, too."""
    for holder, value in before:
        if holder.fp32_precision != value:
            holder.fp32_precision = value


def _flag_holder(name: str) -> Any:
    """``torch.backends.<name>`` if it has an ``fp32_precision``, else None."""
    holder: Any = torch.backends
    for part in name.split(".") if name else ():
        holder = getattr(holder, part, None)
    return holder if hasattr(holder, "fp32_precision") else None


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
        # Without grad, since parameters of scripted modules would be copied as functions of the parameters copied.
        with torch.no_grad():
            # torch copies no compressed sparse tensors.
            memo = {id(t): t.clone() for t in tensors if t.layout not in (torch.strided, torch.sparse_coo)}
            model, loss = copy.deepcopy((model, loss), memo)
        copies = [module for module in (model, loss) if isinstance(module, nn.Module)]
        for module, original in zip(copies, modules, strict=True):
            for parameter, given in zip(module.parameters(), original.parameters(), strict=True):
                parameter.requires_grad_(given.requires_grad)
            # Like Module.to, which would drop the imaginary parts of complex buffers.
            module._apply(lambda t: t.to(device=device, dtype=matching_dtype(t, dtype)))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ProblemError(
            f"The model cannot be copied to {dtype} on {device} ({error}). Convert it yourself: model.to(...)."
        ) from error
    return model, loss


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
