"""The command line on a file of weights and a ``problem.py``, both on disk, as a user has them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sharpscope import Problem
from sharpscope.cli import main

EXACT = ("--dtype", "float64", "--tol", "1e-8")


def saved(folder: Path, problem: Callable[[], Problem], seed: int = 7) -> Path:
    """The state dict of the problem's model, drawn with ``seed``, as torch.save writes it."""
    torch.manual_seed(seed)
    path = folder / f"{problem.__name__}.pt"
    torch.save(problem().model.state_dict(), path)
    return path


def printed(command: str, path: Path, problem: Callable[[], Problem], *options: str, status: int = 0) -> Any:
    """What ``sharpscope COMMAND path --problem FILE --json`` prints, the file's ``problem()`` being ``problem``.

    Where ``status`` is not 0 or 3 it is what stderr says.
    """
    source = path.with_name(f"problem_{problem.__name__}.py")
    source.write_text(f"from {problem.__module__} import {problem.__name__} as problem\n")
    torch.manual_seed(99)  # the weights must come from the file, not from how problem() draws them
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        came = main([command, str(path), "--problem", str(source), "--json", *options])
    assert came == status, (came, err.getvalue(), out.getvalue()[:1500])
    return json.loads(out.getvalue()) if status in (0, 3) else err.getvalue()


def eigenvalues(path: Path, problem: Callable[[], Problem], *options: str) -> list[float]:
    """The top five that ``sharpscope eigen`` finds in float64."""
    found: list[float] = printed("eigen", path, problem, *EXACT, *options)["eigenvalues"]
    return found
