"""``sharpscope eigen``: the top of the Hessian's spectrum of one or more checkpoints."""

from __future__ import annotations

import argparse
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
    options.add_measured(parser)
    options.add_seed(parser, "of the solver's random start and of --examples")
    parser.add_argument("--max-passes", type=int, metavar="N", help="give up after N passes (default 100; power 1000)")
    options.add_device(parser)
    parser.add_argument("--vectors", action="store_true", help="with --out: the eigenvectors beside it, as .npz")
    options.add_outputs(parser)
    options.add_model_and_data(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next."""
    import torch

    import sharpscope
    from sharpscope.results import EigenResult, table

    if args.vectors and args.out is None:
        raise sharpscope.ArgumentError("--vectors must come with --out, which says where to. Pass --out PATH.")
    outputs = options.outputs(args, arrays=args.vectors)
    options.load_all(args)
    results: list[EigenResult] = []
    try:
        for path, out in zip(args.checkpoints, outputs, strict=True):
            with terminal.progress_bar(Path(path).name) as progress:
                result = sharpscope.top_eigenvalues(
                    options.load(args, path),
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
        if args.json:
            terminal.emit_json([result.to_dict() for result in results], len(args.checkpoints))
        elif results:
            terminal.emit(table(results))
    return 0 if all(result.converged.all() for result in results) else 3
