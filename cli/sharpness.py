"""``sharpscope sharpness``: m-sharpness and the other measures of one or more checkpoints."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from sharpscope.cli import options, outputs, terminal

DESCRIPTION = """\
How much the loss rises around the checkpoint's weights. By default m-sharpness for several m: the mean over disjoint
subsets of m examples of the largest rise of the subset's loss within distance RHO, as far as one ascent step finds it.
Beside each number stands what a small perturbation predicts, for m-sharpness rho ||gradient||: of a network that is not
at a minimum the slope is most of it. Checkpoints are measured on the same subsets, noise and probes.

--measures takes names after one another with commas, or all:
  m-sharpness        by subsets of --m examples, within --rho
  worst-case         the same of all examples at once, by APGD unless --ascent says otherwise
  average-case       mean rise under normal noise of standard deviation --sigma
  pac-bayes          1/sigma^2 of the largest noise that costs at most 0.1 of accuracy
  lambda-max, trace  of the Hessian (of D H D with --adaptive)
  relative-flatness  of each weight matrix
  keskar             100 (max L - L)/(1 + L) in a box of --box times (|weight| + 1)
  edge               lambda_max over SGD's edge of stability 2 (1 + momentum)/lr; above 1 training diverges
  alignment          of gradient and SAM's gradient with the top eigenvector
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sharpness",
        help="m-sharpness and other measures of checkpoints",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    parser.add_argument("--measures", default="m-sharpness", metavar="LIST", help="default m-sharpness")
    parser.add_argument("--m", type=_whole, metavar="LIST", help="default 1,4,16,64,256, up to the number of examples")
    parser.add_argument("--rho", type=_numbers, default=(0.05,), metavar="LIST", help="radii (default 0.05)")
    parser.add_argument("--p", default="2", choices=("2", "inf"), help="norm of the ball (default 2)")
    parser.add_argument(
        "--adaptive",
        nargs="?",
        const="elementwise",
        choices=("elementwise", "filter"),
        help="scale the ball by weights or by filters: D = |w|, or a filter's norm (default |w|; CKPT before it)",
    )
    parser.add_argument("--eta", type=float, default=0.0, help="with --adaptive: added to the sizes (default 0)")
    parser.add_argument(
        "--ascent",
        metavar="HOW",
        help="number of steps, apgd or apgd:STEPS (default: 1 for m-sharpness, apgd:20 for worst-case)",
    )
    parser.add_argument("--restarts", type=int, metavar="N", help="random restarts of apgd (default 1)")
    parser.add_argument("--sigma", type=float, default=0.01, help="of average-case (default 0.01)")
    parser.add_argument("--draws", type=int, default=8, help="of average-case and pac-bayes (default 8)")
    parser.add_argument("--probes", type=int, default=16, help="of trace and relative-flatness (default 16)")
    parser.add_argument("--box", type=float, default=1e-3, help="Keskar's epsilon (default 0.001)")
    parser.add_argument("--lr", type=float, help="for edge (default: that in force when the checkpoint was written)")
    options.add_measured(parser)
    options.add_seed(parser, "of subsets, noise, probes and --examples")
    options.add_device(parser)
    parser.add_argument("--figure", metavar="PATH", help="draw m-sharpness against m (.png, .pdf or .svg)")
    options.add_outputs(parser)
    options.add_model_and_data(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next."""
    import torch

    import sharpscope
    from sharpscope.results import SharpnessResult

    files, figure = outputs.outputs(args), outputs.figure(args)
    names = [name.strip() for name in args.measures.split(",")]
    if figure is not None and not {"m-sharpness", "all"} & set(names):
        raise sharpscope.ArgumentError("--figure is of m-sharpness, which --measures leaves out. Add it to them.")
    ascent = _ascent(args)
    options.load_all(args)
    results: list[SharpnessResult] = []

    def measure(path: str, out: Path | None, progress: Any) -> SharpnessResult:
        return sharpscope.measure_sharpness(
            options.load(args, path),
            names,
            torch.Generator().manual_seed(args.seed),
            progress,
            m=args.m,
            rho=args.rho,
            p=math.inf if args.p == "inf" else 2,
            adaptive=args.adaptive,
            eta=args.eta,
            ascent=ascent,
            sigma=args.sigma,
            draws=args.draws,
            probes=args.probes,
            box=args.box,
            lr=args.lr,
            **options.computation(args),
        )

    try:
        terminal.measure_each(args, files, results, measure)
    finally:
        if figure is not None and results:
            from sharpscope.plot import m_sharpness_curves

            terminal.save_figure(lambda: m_sharpness_curves(results), figure)
    return 0 if all(result.converged for result in results) else 3


def _ascent(args: argparse.Namespace) -> Any:
    """The Ascent that ``--ascent`` and ``--restarts`` say, None for each measure's own."""
    from sharpscope import ArgumentError, Ascent
    from sharpscope.sharpness import WORST

    name, _, count = (args.ascent or "").partition(":")
    if args.restarts is not None and name != "apgd":
        raise ArgumentError("--restarts goes with --ascent apgd. Leave it out, or pass both.")
    try:
        if name != "apgd":
            return None if args.ascent is None else Ascent(int(args.ascent))
        steps = int(count) if count else WORST.steps
    except ValueError:
        raise ArgumentError(f"--ascent must be a number of steps, apgd, or apgd:STEPS, got {args.ascent!r}.") from None
    return Ascent(steps, adaptive=True, restarts=WORST.restarts if args.restarts is None else args.restarts)


def _whole(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None
