"""Import functions by name, as "package.module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sharpscope.errors import ArgumentError


def imported(source: str) -> Callable[..., Any]:
    """Import the function ``source``, given as "package.module:function"; this runs the module's code.

    Raises: ArgumentError if there is no such module or function.
    """
    module, _, function = source.rpartition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not is_missing_module(error, module):
            raise
        raise ArgumentError(f"Cannot import {source}: there is no module {error.name}. Check PYTHONPATH.") from error
    named: Callable[..., Any] | None = getattr(found, function, None)
    if not callable(named):
        raise ArgumentError(f"{module} has no function {function!r}. Pass one as package.module:function.")
    return named


def is_missing_module(error: ModuleNotFoundError, module: str) -> bool:
    """Whether ``module`` or its package is missing, rather than a module that it imports."""
    return error.name is not None and f"{module}.".startswith(f"{error.name}.")
