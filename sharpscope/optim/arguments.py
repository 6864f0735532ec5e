"""What SAM takes for its radius, its base optimizer and the gradients."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sharpscope.errors import ArgumentError


def check_rho(rho: object) -> None:
    if isinstance(rho, bool) or not isinstance(rho, numbers.Real) or not 0.0 <= float(rho) < math.inf:
        raise ArgumentError(f"rho must be a finite number >= 0, got {rho!r}. Foret et al. use 0.01 to 0.5.")


def check_base(base: object) -> None:
    what = "base_optimizer must be an optimizer class such as torch.optim.SGD"
    if isinstance(base, str):
        raise ArgumentError(f"{what}, got the string {base!r}. Pass the class itself.")
    if isinstance(base, Optimizer):
        name = type(base).__name__
        raise ArgumentError(f"{what}, got a finished {name}. Pass the class and its options: SAM(params, {name}, ...).")
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise ArgumentError(f"{what}, got {base!r}.")
    closure = inspect.signature(base.step).parameters.get("closure")
    nested = hasattr(base, "first_step")
    if nested or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ArgumentError(
            f"{what}, got {base.__name__}, whose own step needs a closure. Pass one whose step does not."
        )


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of ``params``, all of which have one.

    Raises:
        ArgumentError: a gradient is sparse.
    """
    grads = [p.grad for p in params if p.grad is not None]
    sparse = next((g for g in grads if g.layout != torch.strided), None)
    if sparse is not None:
        raise ArgumentError(
            f"SAM needs dense gradients, got one of shape {tuple(sparse.shape)} with layout {sparse.layout}. "
            "Build the embedding with sparse=False."
        )
    return grads
