"""Processes of their own, for tests that kill one or need several.

A server that has imported torch and sharpscope once starts them: an import takes some five seconds of a core.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

METHOD = "spawn" if sys.platform == "win32" else "forkserver"
_PRELOADED = ["torch", "torch.multiprocessing", "matplotlib.pyplot", "sharpscope.comparing", "sharpscope.training"]


def prepare() -> Any:
    """The context that starts the processes."""
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    return context


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start ``target(*args)``, a function of a module."""
    process: BaseProcess = prepare().Process(target=target, args=args)
    process.start()
    return process


def command(*argv: str, page: bool = True, quick: Any = None) -> BaseProcess:
    """Start ``sharpscope ARGV`` without output; its ``exitcode`` is the command's, or minus a signal.

    ``page``: False for a ``compare`` without the page's figures, which take most of its time. ``quick``: the level that
    ``--quick`` means there.
    """
    return start(_main, argv, page, quick)


def finished(*argv: str, page: bool = True, quick: Any = None) -> None:
    """Run ``sharpscope ARGV`` in a process of its own, to its end."""
    process = command(*argv, page=page, quick=quick)
    process.join()
    assert process.exitcode == 0, (argv, process.exitcode)


def _main(argv: tuple[str, ...], page: bool, quick: Any) -> None:
    from sharpscope import report
    from sharpscope.cli import main
    from sharpscope.comparing import LEVELS

    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    if not page:
        report.page = lambda _: ""  # type: ignore[assignment, misc]
    if quick is not None:
        LEVELS["quick"] = quick
    sys.exit(main(list(argv)))


def saved_by_ranks(process: Callable[[int, str], None], ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What ``process(rank, folder)``, run in a process of its own for each rank, saved as ``<rank>.pt``."""
    prepare()
    torch.multiprocessing.start_processes(process, (str(folder),), ranks, start_method=METHOD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
