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
        # A module that the user's own module fails to import is another matter: it keeps its traceback.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ArgumentError(f"There is no module {error.name} to import {source} from. Check PYTHONPATH.") from error
    named: Callable[..., Any] | None = getattr(found, function, None)
    if not callable(named):
        raise ArgumentError(f"{module} has no function {function!r}. Name one, as package.module:function.")
    return named
