"""A bar for whatever takes ``progress=``, at a terminal and in a notebook."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

# What the ``progress=`` of a measurement takes: the stage, how much of it is done, and of how much where it is known.
Progress = Callable[[str, int, int | None], None]


@contextlib.contextmanager
def progress_bar(what: str = "") -> Iterator[Progress]:
    """A bar with the time left for one measurement after another: pass what it yields as ``progress=``.

    One line, which each stage takes over from the last and which is gone at the end: on stderr where that is a
    terminal, beneath the cell in Jupyter (no widgets are needed, and a saved notebook holds nothing of it); silent
    elsewhere.

    Args:
        what: said before each stage.

    >>> import sharpscope
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)  # H = 2 x x': 10 and 0
    >>> data = torch.tensor([[2.0, 1.0]]), torch.zeros(1, 1)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> with sharpscope.progress_bar("one example") as progress:
    ...     result = sharpscope.top_eigenvalues(problem, k=1, progress=progress)
    >>> round(result.lambda_max, 3)
    10.0
    """
    from tqdm import tqdm  # late: whoever measures without a bar need not wait for it

    line = _notebook_line()
    stage, bar = "", tqdm(disable=True)

    def show(now: str, done: int, total: int | None) -> None:
        nonlocal stage, bar
        if now != stage:
            bar.close()
            stage = now
            described = f"{what}: {now}" if what else now
            bar = tqdm(
                total=total, desc=described, unit=" examples", **(line.bar_options if line else terminal_bar_options())
            )
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()
        if line is not None:
            line.clear()


def terminal_bar_options() -> dict[str, Any]:
    """The options of a tqdm bar on stderr."""
    # disable=None: silent where stderr is no terminal. At a terminal that reports no size tqdm would show nothing.
    size = {"dynamic_ncols": True} if _columns() else {"ncols": 80, "nrows": 20}
    return {"disable": None, "leave": False, **size}


def _columns() -> int:
    """Of stderr's terminal; 0 where it does not say, or there is none."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(2).columns
    return 0


class _NotebookLine:
    """A line beneath a notebook's cell, as the file that tqdm writes to.

    Not tqdm's own widget: it needs ipywidgets, warns without them, and leaves a dead one in the saved notebook.
    """

    encoding = "utf-8"

    def __init__(self, publish: Callable[..., None]) -> None:
        self._publish, self._name, self._shown = publish, uuid.uuid4().hex, False

    @property
    def bar_options(self) -> dict[str, Any]:
        """The options of a tqdm bar here."""
        return {"file": self, "ncols": 80, "ascii": False, "leave": False}

    def write(self, text: str) -> None:
        """Show the line ``text`` in place of the last."""
        line = text.strip()
        if line:
            self._put({"text/plain": line})

    def flush(self) -> None:
        """Nothing is held back."""

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._put({})

    def _put(self, data: dict[str, str]) -> None:
        self._publish(data, transient={"display_id": self._name}, update=self._shown)
        self._shown = True


def _notebook_line() -> _NotebookLine | None:
    """Where Jupyter runs this code, else None."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    # As tqdm tells a kernel from IPython at a terminal.
    return _NotebookLine(shell.display_pub.publish) if shell is not None and "IPKernelApp" in shell.config else None
