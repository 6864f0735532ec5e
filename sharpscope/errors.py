"""Every exception and warning that sharpscope raises on purpose, and what several of their messages are made of.

Each message says what must hold, what came, and what to do. Each child also derives from the builtin that
a caller who does not know sharpscope would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

# Items of a list in a message.
SHOWN = 3

# How the allocators that have no exception of their own say it: CPU, older CPU, MPS.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class SharpscopeError(Exception):
    """Anything wrong with what sharpscope was given; the command line prints it and exits with status 1."""


class ArgumentError(SharpscopeError, ValueError):
    """An argument outside its domain, such as ``k=0`` or an unknown method."""


class ProblemError(SharpscopeError, ValueError):
    """Model, loss and data do not fit together, or the loss has no Hessian that can be computed."""


class DataError(SharpscopeError, ValueError):
    """The data set is missing, empty, not finite, or not the one the loss can take."""


class AuditError(SharpscopeError, RuntimeError):
    """The loss is not one fixed function of the weights: two looks at the same batch disagree."""


class CheckpointError(SharpscopeError, ValueError):
    """A checkpoint file that cannot be read, trusted, or matched to its model."""


class OutputError(SharpscopeError, OSError):
    """A place that cannot be written, or that would be overwritten."""


class ConvergenceWarning(UserWarning):
    """A returned number whose bound does not meet the tolerance that was asked for."""


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what came, the nearest known name, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ArgumentError where ``value`` is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {value!r}.")


def first_few(items: Sequence[str], separator: str = ", ") -> str:
    """The first SHOWN of a list, for a message."""
    return separator.join(items[:SHOWN]) + (f"{separator}..." if len(items) > SHOWN else "")


def first_line(error: BaseException) -> str:
    """What ``error`` says first, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocator's, on whatever device; by torch's name for it, since torch is not imported."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in OUT_OF_MEMORY)
