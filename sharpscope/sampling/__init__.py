"""Samples of the data: random subsets, importance samples that guide a solver, and sampling errors."""

import warnings
from typing import Any

from sharpscope.sampling.sampling_error import sampling_error, sampling_error_of_batches, trace_error

__all__ = ["sampling_error", "sampling_error_of_batches", "trace_error"]


def __getattr__(name: str) -> Any:
    if name != "sampling_of":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = "sampling_error_of_batches"
    warnings.warn(f"sharpscope.sampling.{name} is now {new}. Use that.", FutureWarning, stacklevel=2)
    return sampling_error_of_batches
