"""Functions of other people's modules, named as "package.module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sharpscope.errors import ArgumentError


def imported(source: str) -> Callable[..., Any]:
    """The function that ``source`` names; its module is imported, which runs it.

    Raises: ArgumentError when there is no such module or function.
    """
    module, _, function = source.rpartition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not is_missing_module(error, module):
            raise
        raise ArgumentError(f"There is no module {error.name} to import {source} from. Check PYTHONPATH.") from error
    named: Callable[..., Any] | None = getattr(found, function, None)
    if not callable(named):
        raise ArgumentError(f"{module} has no function {function!r}. Name one, as package.module:function.")
    return named


def is_missing_module(error: ModuleNotFoundError, module: str) -> bool:
    """Whether ``module`` itself is missing, or a package that it is in.

    What it fails to import in turn is another matter, which keeps its traceback.
    """
    return error.name is not None and f"{module}.".startswith(f"{error.name}.")
