"""A user's own ``problem()``: ten lines in a file of his that give model, loss and data."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from sharpscope.errors import ArgumentError, ProblemError
from sharpscope.importing import imported
from sharpscope.problem import Problem


def problem_of(source: str | os.PathLike[str], split: str = "train") -> Problem:
    """The Problem that ``problem()`` of a Python file, or a function given as "package.module:function", returns.

    A function that takes ``split`` is called with it. The file runs, with its own folder first on the import path
    while it does, so that it can import what lies beside it.

    Raises: ArgumentError when there is no such file or function, or it takes other arguments, or no split but one other
    than "train" is asked for; ProblemError when it returns something else.
    """
    function = _function(os.fspath(source))
    parameters = inspect.signature(function).parameters
    takes_split = "split" in parameters
    needed = [name for name, p in parameters.items() if p.default is p.empty and name != "split"]
    if needed:
        raise ArgumentError(f"problem() of {source} must take nothing, or split alone, but needs {', '.join(needed)}.")
    if split != "train" and not takes_split:
        raise ArgumentError(f"problem() of {source} takes no split, so that there is none but its own, got {split!r}.")
    found = function(split=split) if takes_split else function()
    if not isinstance(found, Problem):
        raise ProblemError(f"problem() of {source} must return a sharpscope.Problem, got {type(found).__name__}.")
    return found


def _function(source: str) -> Any:
    if ":" in source and not Path(source).exists():
        return imported(source)
    function = getattr(_executed(Path(source)), "problem", None)
    if not callable(function):
        raise ArgumentError(f"{source} must define problem(), which returns a sharpscope.Problem.")
    return function


def _executed(path: Path) -> Any:
    if not path.is_file() or path.suffix != ".py":
        raise ArgumentError(f"A problem is a Python file or package.module:function, got {path}. Check the path.")
    spec = importlib.util.spec_from_file_location(f"sharpscope_problem_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module
