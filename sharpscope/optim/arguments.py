"""What SAM takes for its radius and its base optimizer."""

from __future__ import annotations

import inspect
import math
import numbers

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
