"""Run a user's ``problem()``, a function in a Python file that returns model, loss and data as a Problem."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sharpscope.errors import ArgumentError, ProblemError, SharpscopeError, first_line
from sharpscope.importing import imported
from sharpscope.problem import Problem

# Errors reported with their line in the file; those raised inside another module keep their traceback.
MISTAKES = (ImportError, NameError, SyntaxError, TypeError, AttributeError, LookupError, ValueError, RuntimeError)


def problem_of(source: str | os.PathLike[str], split: str = "train") -> Problem:
    """Call ``problem()`` of a Python file, or a function "package.module:function", and return its Problem.

    A function that takes ``split`` is called with it. While the file runs, its folder is first on the import path, so
    it can import modules next to it.

    Args:
        source: Python file, or "package.module:function".
        split: "train" or "test".

    Raises: ArgumentError if there is no such file or function, if it requires other arguments, or if it takes no
        ``split`` and ``split`` is not "train"; ProblemError if it does not return a Problem, or for an error in the
        file, with its line. Any other SharpscopeError from the file also names its line.
    """
    function = _function(os.fspath(source))
    try:
        parameters = dict(inspect.signature(function).parameters)
    except ValueError:  # a builtin
        parameters = {}
    takes_split = "split" in parameters and parameters["split"].kind is not inspect.Parameter.POSITIONAL_ONLY
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in several and not (takes_split and name == "split")
    ]
    if needed:
        raise ArgumentError(f"problem() of {source} must take no argument except split, but needs {', '.join(needed)}.")
    if split != "train" and not takes_split:
        raise ArgumentError(f"problem() of {source} takes no split, got split={split!r}. Add a split argument.")
    with _running(Path(source)) if Path(source).is_file() else nullcontext():
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
    if not path.is_file():
        raise ArgumentError(f"A problem is a Python file or package.module:function, but there is no file {path}.")
    if path.suffix != ".py":
        raise ArgumentError(f"A problem is a Python file or package.module:function, got {path}. Check the path.")
    spec = importlib.util.spec_from_file_location(f"sharpscope_problem_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up the module of a class
    with _running(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _running(path: Path) -> Iterator[None]:
    """Import from the file's folder first, and add the file's line to errors that come from it."""
    folder, directory = str(path.parent.resolve()), os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    except SystemExit as error:
        raise ProblemError(f"{path} must return a Problem, but ends the program. Remove sys.exit().") from error
    except SharpscopeError as error:
        line = _line(path, error)
        if line is None:
            raise
        raise type(error)(f"{path}, line {line}: {error}") from error
    except OSError as error:  # such as a missing data file, in whichever module
        line = _line(path, error)
        if line is None:
            raise
        where = " Paths are relative to the working directory; Path(__file__).parent is the file's own folder."
        raise ProblemError(f"{path}, line {line}: {first_line(error)}.{where}") from error
    except MISTAKES as error:
        if isinstance(error, SyntaxError):
            line = error.lineno if error.filename is not None and _same(error.filename, path) else None
        else:
            line = _line(path, error, innermost=True)
        if line is None:
            raise
        remedy = (
            " The module must be next to this file, installed, or on PYTHONPATH."
            if isinstance(error, ImportError)
            else ""
        )
        message = error.msg if isinstance(error, SyntaxError) else first_line(error)
        if isinstance(error, KeyError | RuntimeError):
            message = f"{type(error).__name__}: {message}"
        raise ProblemError(f"{path}, line {line}: {message}.{remedy}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        os.chdir(directory)  # paths on the command line are relative to it


def _line(path: Path, error: BaseException, innermost: bool = False) -> int | None:
    """Line of ``path`` in the traceback of ``error``; None without one, or if ``innermost`` and it is not the last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen importlib")]
    here = [frame.lineno for frame in frames if _same(frame.filename, path)]
    if not here or (innermost and not _same(frames[-1].filename, path)):
        return None
    return here[-1]


def _same(filename: str, path: Path) -> bool:
    return Path(filename).resolve() == path.resolve()
