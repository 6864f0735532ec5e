"""Options, values and progress bars that several commands share."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DTYPES = ("float32", "float64")

# disable=None: silent where stderr is no terminal.
TQDM: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "leave": False}


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Options that say what the file is a checkpoint of, for files that do not say so themselves."""
    group = parser.add_argument_group("what the checkpoint is of (files of `sharpscope train` say so themselves)")
    group.add_argument(
        "--model", metavar="NAME", help="bundled model (mlp, cnn, wide_resnet) or package.module:function"
    )
    group.add_argument(
        "--model-args", metavar="K=V", nargs="+", help="arguments of the model, such as depth=16 norm=none"
    )
    group.add_argument("--data", metavar="NAME", help="bundled data set: digits or fashion-mnist")
    group.add_argument(
        "--trust", action="store_true", help="import the model factory that the file names: runs its code"
    )
    add_data_root(group)


def add_data_root(parser: Any) -> None:
    parser.add_argument(
        "--data-root", metavar="DIR", help="folder of the data files; else $SHARPSCOPE_DATA, else Debian's"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps; default: cuda where there is one, else cpu"
    )


def add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=seed, default=0, help=f"{what} (default 0)")


def seed(text: str) -> int:
    """The seed meant by ``--seed``."""
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"a seed must be from 0 to 2^63 - 1, got {text}")
    return value


def emit(text: str) -> None:
    """Print ``text`` on stdout, now.

    Raises: OutputError when stdout cannot be written; BrokenPipeError when nobody reads it any more.
    """
    from sharpscope.errors import OutputError

    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"Cannot write to standard output: {error.strerror}.") from error


def device(name: str) -> str:
    """The device meant by ``--device``."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def key_values(pairs: list[str] | None) -> dict[str, Any]:
    """``["depth=16", "norm=none", "channels=8,16"]`` as a dict of Python values.

    Raises: ArgumentError for an entry without "=".
    """
    from sharpscope.errors import ArgumentError

    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals:
            raise ArgumentError(f"An argument of the model must be KEY=VALUE, got {pair!r}.")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr with the time left, one line that is reused for every stage; silent where that is no terminal."""
    stage, bar = "", tqdm(disable=True)

    def show(now: str, done: int, total: int | None) -> None:
        nonlocal stage, bar
        if now != stage:
            bar.close()
            stage = now
            bar = tqdm(total=total, desc=f"{what}: {now}", unit=" examples", **TQDM)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()
