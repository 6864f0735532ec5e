"""Options, and what their values mean, that several commands share."""

from __future__ import annotations

import argparse
import ast
import os
import sys
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
    group.add_argument(
        "--problem",
        metavar="FILE.py",
        help="your own file: its problem() returns sharpscope.Problem(model=, loss=, data=); it is run",
    )
    group.add_argument("--weights", metavar="KEY", help="of the state dict in a file of several, as ema or ema.module")
    group.add_argument("--prefix", help="of the names in the state dict, as module. (default: found)")
    group.add_argument("--data", metavar="NAME", help="bundled data set: digits or fashion-mnist")
    group.add_argument(
        "--loss",
        metavar="NAME",
        help="cross_entropy, mse, bce_with_logits, nll; of sequences token_cross_entropy or next_token",
    )
    group.add_argument(
        "--trust", action="store_true", help="import the model factory that the file names: runs its code"
    )
    group.add_argument(
        "--partial", action="store_true", help="what the file lacks stays as the model is built (adapters' files)"
    )
    group.add_argument(
        "--trust-pickle", action="store_true", help="unpickle whatever the file holds: runs its code; a pickled model"
    )
    add_data_root(group)


def add_data_root(parser: Any) -> None:
    parser.add_argument(
        "--data-root", metavar="DIR", help="folder of the data files; else $SHARPSCOPE_DATA, else Debian's"
    )


def add_measured(
    parser: argparse.ArgumentParser,
    computed: bool = True,
    splits: tuple[str, ...] = ("train", "test"),
    decay: str = "add C to each eigenvalue",
    micro_batch: str = "examples a graph (default: measured)",
) -> None:
    """Options that say which examples and parameters are measured, and how unless that is not ``computed`` freely.

    ``decay`` and ``micro_batch`` are what the help says of these two.
    """
    parser.add_argument("--split", default="train", choices=splits, help="part of the data (default train)")
    parser.add_argument("--examples", type=int, metavar="N", help="measure on N examples drawn at random, not on all")
    parser.add_argument(
        "--params", action="append", metavar="PATTERN", help="only parameters of such names; may be given again"
    )
    parser.add_argument("--weight-decay", type=float, metavar="C", help=decay)
    if not computed:
        return
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the computation (default: the weights')")
    parser.add_argument("--micro-batch", type=int, metavar="N", help=micro_batch)


def add_operator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--operator",
        default="hessian",
        metavar="NAME",
        help="hessian, ggn (Gauss-Newton), fisher (targets drawn from the model), empirical-fisher (summed "
        "over loss terms: with mse and bce_with_logits each output element, not each example), or "
        "finite-difference (approximate, for models without second derivatives) (default hessian)",
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Options that say where the results of one or more checkpoints go."""
    parser.add_argument(
        "--out", metavar="PATH", help="write the result as JSON to this file; a folder for several CKPT"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results, and saved passes of another command")
    parser.add_argument(
        "--json", action="store_true", help="print JSON in place of the table (an array for several CKPT)"
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


def precision(args: argparse.Namespace) -> dict[str, Any]:
    """In which precision, and where, everything is computed."""
    import torch

    return {"dtype": getattr(torch, args.dtype) if args.dtype else None, "device": device(args.device)}


def computation(args: argparse.Namespace) -> dict[str, Any]:
    """In which precision, where and in which micro-batches everything is computed."""
    return {**precision(args), "micro_batch": args.micro_batch}


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


def load(args: argparse.Namespace, path: str, **instead: Any) -> Any:
    """The Problem of the checkpoint at ``path``, of its training data where both splits are asked for.

    ``instead``: arguments of ``sharpscope.load`` in place of what the options say.
    """
    import sharpscope

    given = {
        "model": args.model,
        "model_args": key_values(args.model_args),
        "data": args.data,
        "data_root": args.data_root,
        "split": "train" if args.split == "both" else args.split,
        "examples": args.examples,
        "seed": args.seed,
        "params": args.params,
        "weight_decay": args.weight_decay,
        "loss": args.loss,
        "trust": args.trust,
        "weights": args.weights,
        "prefix": args.prefix,
        "problem": args.problem,
        "partial": args.partial,
        "trust_pickle": args.trust_pickle,
    }
    return sharpscope.load(path, **{**given, **instead})


def load_all(args: argparse.Namespace) -> None:
    """Read every checkpoint once, before the first long measurement.

    Raises: DataError where a problem() gives other data for one checkpoint than for another.
    """
    from sharpscope.errors import DataError
    from sharpscope.fingerprint import fingerprint

    import_from_here(args)
    first, known = "", ""
    for path in dict.fromkeys(args.checkpoints):
        problem = load(args, path)
        if args.problem is None or len(args.checkpoints) < 2:
            continue
        found = fingerprint(problem.data)
        first, known = first or path, known or found
        if found != known:
            raise DataError(
                f"Checkpoints must be measured on the same data, but {args.problem} gives others for {path} than for "
                f"{first}. Let problem() return the same examples at every call: seed what draws or splits them."
            )


def import_from_here(args: argparse.Namespace) -> None:
    """Let code be imported from the working directory, where the user's own is named."""
    if ":" in f"{args.model or ''}{args.problem or ''}" or args.trust or args.trust_pickle:
        sys.path.insert(0, os.getcwd())  # a console script, unlike python -m, does not look where the user stands
