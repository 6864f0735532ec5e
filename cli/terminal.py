"""What several commands show: lines on stdout, progress bars on stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from sharpscope.cli import outputs
from sharpscope.progress import progress_bar, terminal_bar_options

# The true stdout while ``stdout_for_json`` is at work.
_stdout: TextIO | None = None


@contextlib.contextmanager
def stdout_for_json() -> Iterator[None]:
    """Keep stdout for what ``emit`` prints; user's code and child processes that print, print on stderr."""
    global _stdout
    try:
        number, other = sys.stdout.fileno(), sys.stderr.fileno()
        sys.stdout.flush()
        copy = os.dup(number)
    except (AttributeError, OSError, ValueError):  # no file, as in a notebook: child processes do not print on it
        number, _stdout = -1, sys.stdout
    else:
        _stdout = os.fdopen(copy, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        os.dup2(other, number)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if number >= 0:
            os.dup2(_stdout.fileno(), number)
            with contextlib.suppress(OSError):  # already reported by emit
                _stdout.close()
        _stdout = None


def emit(text: str) -> None:
    """Print ``text`` on stdout, now.

    Raises: OutputError when stdout cannot be written; BrokenPipeError when nobody reads it any more.
    """
    from sharpscope.errors import OutputError

    try:
        print(text, file=_stdout or sys.stdout, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"Cannot write to standard output: {error.strerror}.") from error


def emit_json(records: list[dict[str, Any]], wanted: int) -> None:
    """Print the record of the one checkpoint that was asked for, or an array of those of several that are finished."""
    if records or wanted > 1:
        emit(json.dumps(records[0] if wanted == 1 else records, indent=2, allow_nan=False))


def measure_each(
    args: argparse.Namespace,
    files: Sequence[Path | None],
    results: list[Any],
    measure: Callable[[str, Path | None, Any], Any],
    after: Callable[[Any, Path], None] = lambda result, out: None,
    unless: Callable[[Any], bool] = lambda result: False,
    **saved: Any,
) -> None:
    """Append to ``results`` ``measure(checkpoint, output, progress)`` of one checkpoint after another.

    Each is saved as soon as it is there, ``unless`` it must not be, and ``after(result, output)`` called; what is
    finished is shown whatever happens to the next. ``saved``: how.
    """
    try:
        for path, out in zip(args.checkpoints, files, strict=True):
            with progress_bar(Path(path).name) as progress:
                result = measure(path, out, progress)
            results.append(result)
            if out is not None and not unless(result):
                result.save(out, **saved)
                outputs.saved(out)
                say_written(out)
                after(result, out)
    finally:
        if args.json:
            emit_json([result.to_dict() for result in results], len(args.checkpoints))
        elif results:
            from sharpscope.results import side_by_side

            emit(str(side_by_side(results)))


def save_figure(draw: Callable[[], Any], path: Path) -> None:
    """Write the figure of the Axes that ``draw()`` returns to ``path``, atomically, in the format of its suffix."""
    import matplotlib

    matplotlib.use("Agg")  # a file, on a machine that may have no screen
    import matplotlib.pyplot as plt

    from sharpscope.atomic_io import atomic

    axes = draw()
    with atomic(path) as temporary:
        axes.figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(axes.figure)
    say_written(path)


def say_written(path: Path) -> None:
    """Name a file on stderr, to whoever sits at a terminal."""
    if sys.stderr.isatty():
        print(f"{path} written", file=sys.stderr)


@contextlib.contextmanager
def steps_bar(what: str | None = None) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """A bar of training steps with the epoch's mean loss and accuracy so far, for the ``progress`` of ``train``."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=" steps", **terminal_bar_options()) as bar:

        def show(done: int, total: int, metrics: dict[str, float]) -> None:
            bar.total = total
            bar.set_postfix_str(f"loss {metrics['loss']:.4f} accuracy {metrics['accuracy']:.2%}", refresh=False)
            bar.update(done - bar.n)

        yield show
