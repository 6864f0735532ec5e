"""Options, values and progress bars that several commands share."""

from __future__ import annotations

import argparse
import ast
import sys
from typing import Any

from tqdm import tqdm

DTYPES = ("float32", "float64")


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


class Bar:
    """A progress bar on stderr, one line that is reused for every stage; silent where stderr is no terminal."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(
                total=total,
                desc=f"{self._what}: {stage}",
                unit=" examples",
                file=sys.stderr,
                leave=False,
                disable=None,
                dynamic_ncols=True,
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
