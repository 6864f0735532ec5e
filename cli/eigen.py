"""``sharpscope eigen``: the top of the Hessian's spectrum of one or more checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharpscope.cli import blocks, options, outputs, terminal

DESCRIPTION = """\
lambda_1 >= ... >= lambda_k, the largest eigenvalues of the Hessian of the mean loss over the data at the checkpoint's
weights, with multiplicity, and lambda_max/lambda_k. Each comes with an interval (value ± half-width); "?" marks what
has not converged to --tol. "gradients" counts everything done in units of one gradient over the whole data set.
With --out, a run that is killed goes on where it was when the same command is given again, and one that has not
converged when it is given again with more --max-passes; till then its passes stay in OUT.partial (not --per-layer),
and other commands need --overwrite.
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
    parser.add_argument(
        "--which",
        default="largest",
        choices=("largest", "smallest", "both", "magnitude"),
        help="which end of the spectrum; both gives k at each (default largest)",
    )
    options.add_operator(parser)
    parser.add_argument(
        "--certify",
        type=float,
        metavar="EPS",
        help="go on until an eigenvalue above lambda_k + EPS lambda_max was missed with probability at most 1%%",
    )
    parser.add_argument(
        "--method",
        default="auto",
        help="guided (few passes, by a subset of the data), lanczos, power (default auto: guided for the largest of "
        "4096 examples or more, else lanczos)",
    )
    options.add_measured(parser)
    parser.add_argument(
        "--population",
        action="store_true",
        help="the data are a sample: give intervals for all data like these, at one more pass; so does --examples",
    )
    blocks.add_options(parser)
    options.add_seed(parser, "of the solver's random start and of --examples")
    parser.add_argument(
        "--max-passes",
        type=int,
        metavar="N",
        help="give up after N passes (default 100, at each of both ends; power 1000)",
    )
    parser.add_argument(
        "--max-basis", type=int, metavar="N", help="vectors that the solver keeps (default 6 to 9 (k + 1))"
    )
    options.add_device(parser)
    parser.add_argument(
        "--basis-device", metavar="NAME", help="where the solver's vectors live, as cpu (default: --device)"
    )
    parser.add_argument("--vectors", action="store_true", help="with --out: the eigenvectors beside it, as .npz")
    options.add_outputs(parser)
    options.add_model_and_data(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next."""
    import torch

    import sharpscope

    if args.per_layer:
        _refuse(args)
        return blocks.run(args)
    if args.probes is not None:
        raise sharpscope.ArgumentError("--probes goes with --per-layer. Leave it out, or pass --per-layer.")
    from sharpscope.results import EigenResult

    if args.vectors and args.out is None:
        raise sharpscope.ArgumentError("--vectors must come with --out, which says where to. Pass --out PATH.")
    files = outputs.outputs(args, arrays=args.vectors, resumes=True)
    options.load_all(args)
    results: list[EigenResult] = []

    def measure(path: str, out: Path | None, progress: Any) -> EigenResult:
        return sharpscope.top_eigenvalues(
            options.load(args, path),
            args.k,
            args.tol,
            args.method,
            torch.Generator().manual_seed(args.seed),
            progress,
            which=args.which,
            operator=args.operator,
            certify=args.certify,
            population=args.population or args.examples is not None,
            basis_device=args.basis_device,
            **options.computation(args),
            max_basis=args.max_basis,
            max_passes=args.max_passes,
            vectors=args.vectors,
            journal=None if out is None else outputs.state(out),
        )

    terminal.measure_each(args, files, results, measure, vectors=args.vectors)
    done = all(result.converged.all() and result.certified for result in results)
    # Not before all are safe, and sure: given again, the command must find those that are done, and may go on.
    for out in files:
        if done and out is not None:
            outputs.finished(out)
    return 0 if done else 3


def _refuse(args: argparse.Namespace) -> None:
    """Raise ArgumentError for options that mean nothing beside --per-layer."""
    from sharpscope.errors import ArgumentError

    alone = {"k": 5, "which": "largest", "method": "auto", "certify": None, "population": False, "vectors": False}
    for name, default in {**alone, "max_basis": None, "basis_device": None}.items():
        if getattr(args, name) != default:
            raise ArgumentError(f"--{name.replace('_', '-')} does not go with --per-layer. Leave one of them out.")
