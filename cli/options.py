"""Options, and what their values mean, that several commands share."""

from __future__ import annotations

import argparse
import ast
from typing import Any

DTYPES = ("float32", "float64")


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Options that say what the file is a checkpoint of, for files that do not say so themselves."""
    group = parser.add_argument_group("what the checkpoint is of (files of `sharpscope train` say so themselves)")
    group.add_argument(
        "--model", metavar="NAME", help="bundled model (mlp, cnn, wide_resnet) or package.module:function"
    )
    group.add_argument(
        "--model-args",
        metavar="K=V",
        nargs="+",
        help="the model's arguments, as depth=16 norm=none; CKPT before it",
    )
    group.add_argument("--data", metavar="NAME", help="bundled data set: digits or fashion-mnist")
    group.add_argument("--loss", metavar="NAME", help="cross_entropy, mse, bce_with_logits or nll")
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
