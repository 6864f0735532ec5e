"""Exceptions and warnings of sharpscope, and helpers for their messages.

Each message says what must hold, what was given, and what to do. Each exception also derives from the closest builtin
exception.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Items of a list shown in a message.
SHOWN = 3

# Messages of allocators that raise a plain RuntimeError: CPU, older CPU, MPS.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class SharpscopeError(Exception):
    """Base class of all exceptions of sharpscope; the command line prints the message and exits with status 1."""


class ArgumentError(SharpscopeError, ValueError):
    """An argument outside its domain, such as ``k=0`` or an unknown method."""


class ProblemError(SharpscopeError, ValueError):
    """Model, loss and data do not fit together, or the Hessian of the loss cannot be computed."""


class DataError(SharpscopeError, ValueError):
    """The data set is missing, empty, not finite, or does not fit the loss."""


class AuditError(SharpscopeError, RuntimeError):
    """The loss is not a fixed function of the weights: two evaluations of the same batch disagree."""


class CheckpointError(SharpscopeError, ValueError):
    """A checkpoint file cannot be read, is not trusted, or does not match its model."""


class OutputError(SharpscopeError, OSError):
    """An output cannot be written, or would be overwritten."""


class ConvergenceWarning(UserWarning):
    """The error bound of a returned number exceeds the requested tolerance."""


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name: the name, the closest known name, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ArgumentError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {value!r}.")


def first_few(items: Sequence[str], separator: str = ", ") -> str:
    """The first SHOWN of ``items``, joined; an ellipsis stands for the others."""
    return separator.join(items[:SHOWN]) + (f"{separator}..." if len(items) > SHOWN else "")


def first_line(error: BaseException) -> str:
    """First line of the message of ``error``, or the name of its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def cause_of(error: BaseException) -> str:
    """Type and message of ``error``, and the line of the user's code that raised it: "KeyError: 'a' (x.py, line 3)".

    Of an error that a DataLoader's worker process raised, those of the original error.
    """
    text = str(error).strip()
    if "Original Traceback" in text:
        places = re.findall(r'File "(.+)", line (\d+)', text)
        message = re.split(r"\n(?=[A-Za-z_][\w.]*(?:: |$))", text)[-1].splitlines()[0]
    else:
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        message = f"{type(error).__name__}: {first_line(error)}" if text else type(error).__name__
    # The standard library, the folder of installed packages, and sharpscope.
    files = [os.__file__, *(getattr(sys.modules.get(name), "__file__", None) for name in ("torch", "sharpscope"))]
    up = (0, 1, 0)
    folders = [Path(file).parents[level] for file, level in zip(files, up, strict=True) if file]
    theirs = [(file, line) for file, line in places if not any(folder in Path(file).parents for folder in folders)]
    where = f" ({theirs[-1][0]}, line {theirs[-1][1]})" if theirs else ""
    return f"{message.rstrip('.')}{where}"


def worker_died(error: BaseException) -> bool:
    """Whether ``error`` says that a DataLoader's worker process died; torch may raise it at any time, by a signal."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def dead_worker(error: BaseException) -> DataError:
    """The error to raise for a DataLoader's worker process that died."""
    return DataError(
        f"The workers must live as long as the data are read, but a {first_line(error).split('. ')[0].rstrip('.')}. "
        "Pass num_workers=0 to see its error; a worker that the system killed has often run out of (shared) memory."
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means out of memory, on any device; recognised by name, since torch is not imported here."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in OUT_OF_MEMORY)
