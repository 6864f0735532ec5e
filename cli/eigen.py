"""``sharpscope eigen``: the top of the Hessian's spectrum of one or more checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from sharpscope.cli import options, terminal

DESCRIPTION = """\
lambda_1 >= ... >= lambda_k, the largest eigenvalues of the Hessian of the mean loss over the data at the checkpoint's
weights, with multiplicity, and lambda_max/lambda_k. Each comes with an interval (value ± half-width); "?" marks what
has not converged to --tol. "gradients" counts everything done in units of one gradient over the whole data set.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eigen",
        help="lambda_max and lambda_max/lambda_k of checkpoints",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    parser.add_argument("--k", type=int, default=5, help="number of eigenvalues (default 5)")
    parser.add_argument("--tol", type=float, default=1e-3, help="relative tolerance of each (default 1e-3)")
    parser.add_argument("--method", default="auto", help="auto, lanczos or power (default auto: lanczos)")
    parser.add_argument("--split", default="train", choices=("train", "test"), help="part of the data (default train)")
    parser.add_argument("--examples", type=int, metavar="N", help="measure on N examples drawn at random, not on all")
    parser.add_argument(
        "--params", action="append", metavar="PATTERN", help="only parameters of such names; may be given again"
    )
    parser.add_argument("--weight-decay", type=float, default=0.0, metavar="C", help="add C to each eigenvalue")
    parser.add_argument("--dtype", choices=options.DTYPES, help="precision of the computation (default: the weights')")
    options.add_seed(parser, "of the solver's random start and of --examples")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="examples a graph (default: measured)")
    parser.add_argument("--max-passes", type=int, metavar="N", help="give up after N passes (default 100; power 1000)")
    options.add_device(parser)
    parser.add_argument(
        "--out", metavar="PATH", help="write the result as JSON to this file; a folder for several CKPT"
    )
    parser.add_argument("--vectors", action="store_true", help="with --out: the eigenvectors beside it, as .npz")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist already")
    parser.add_argument(
        "--json", action="store_true", help="print JSON in place of the table (an array for several CKPT)"
    )
    options.add_model_and_data(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next."""
    import torch

    import sharpscope
    from sharpscope.results import EigenResult, table

    outputs = _outputs(args)
    if ":" in (args.model or "") or args.trust:
        sys.path.insert(0, os.getcwd())  # a console script, unlike python -m, does not look where the user stands
    for path in dict.fromkeys(args.checkpoints):  # every file is read once before the first long measurement
        _load(args, path)
    results: list[EigenResult] = []
    try:
        for path, out in zip(args.checkpoints, outputs, strict=True):
            with terminal.progress_bar(Path(path).name) as progress:
                result = sharpscope.top_eigenvalues(
                    _load(args, path),
                    args.k,
                    args.tol,
                    args.method,
                    torch.Generator().manual_seed(args.seed),
                    progress,
                    dtype=getattr(torch, args.dtype) if args.dtype else None,
                    device=options.device(args.device),
                    micro_batch=args.micro_batch,
                    max_passes=args.max_passes,
                    vectors=args.vectors,
                )
            results.append(result)
            if out is not None:
                result.save(out, vectors=args.vectors)
    finally:
        if args.json and (results or len(args.checkpoints) > 1):
            shown = [result.to_dict() for result in results]
            terminal.emit(json.dumps(shown[0] if len(args.checkpoints) == 1 else shown, indent=2, allow_nan=False))
        elif results:
            terminal.emit(table(results))
    return 0 if all(result.converged.all() for result in results) else 3


def _load(args: argparse.Namespace, path: str) -> Any:
    import sharpscope

    return sharpscope.load(
        path,
        model=args.model,
        model_args=options.key_values(args.model_args),
        data=args.data,
        data_root=args.data_root,
        split=args.split,
        examples=args.examples,
        seed=args.seed,
        params=args.params or "*",
        weight_decay=args.weight_decay,
        loss=args.loss,
        trust=args.trust,
    )


def _outputs(args: argparse.Namespace) -> list[Path | None]:
    """The JSON file of each checkpoint, made sure to be writable and new."""
    from sharpscope.errors import ArgumentError, OutputError
    from sharpscope.files import require_writable

    if args.out is None:
        if args.vectors:
            raise ArgumentError("--vectors must come with --out, which says where to. Pass --out PATH.")
        return [None] * len(args.checkpoints)
    out = Path(args.out)
    if len(args.checkpoints) == 1:
        outputs = [out / f"{Path(args.checkpoints[0]).stem}.json" if out.is_dir() else out]
    else:
        names = [Path(path).stem for path in args.checkpoints]
        if len(set(names)) < len(names):
            names = [f"{i}-{name}" for i, name in enumerate(names, start=1)]
        if out.is_file():
            raise OutputError(f"With several checkpoints --out must be a folder, but {out} is a file.")
        outputs = [out / f"{name}.json" for name in names]
    for out in outputs:
        if out.resolve() in {Path(path).resolve() for path in args.checkpoints}:
            raise OutputError(f"{out} is a checkpoint to be measured. Name another place for the result.")
        if out.suffix == ".npz":
            raise OutputError(f"The result is JSON, and its vectors go beside it as .npz, got {out}. Name it .json.")
        require_writable(out)
        for file in (out, out.with_suffix(".npz")) if args.vectors else (out,):
            if file.exists() and not args.overwrite:
                raise OutputError(f"{file} exists already. Name another place, or pass --overwrite.")
    return list(outputs)
