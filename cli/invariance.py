"""``sharpscope invariance``: which measures move when a network is rescaled without changing its function."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharpscope.cli import options, outputs, terminal

DESCRIPTION = """\
ReLU passes a positive factor on, so a network whose layer is multiplied by FACTOR and whose next layer is divided by it
is the same function at other weights. Shows what each measure of sharpness says of both: those that are properties of
the function stand still, the others measure the coordinates too.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "invariance",
        help="which measures move when the network is rescaled",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    parser.add_argument("--factor", type=float, default=4.0, help="what layers are multiplied by (default 4)")
    parser.add_argument("--rho", type=float, default=0.05, help="radius (default 0.05)")
    parser.add_argument("--m", type=int, default=64, help="examples a subset (default 64)")
    parser.add_argument("--draws", type=int, default=4, help="of average-case (default 4)")
    parser.add_argument("--probes", type=int, default=4, help="of trace and relative flatness (default 4)")
    options.add_measured(parser, computed=False)
    options.add_seed(parser, "of subsets, noise, probes and --examples")
    options.add_device(parser)
    options.add_outputs(parser)
    options.add_model_and_data(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another."""
    import torch

    import sharpscope
    from sharpscope.results import InvarianceResult

    files = outputs.outputs(args)
    options.load_all(args)
    results: list[InvarianceResult] = []

    def measure(path: str, out: Path | None, progress: Any) -> InvarianceResult:
        return sharpscope.rescaling_invariance(
            options.load(args, path),
            args.factor,
            torch.Generator().manual_seed(args.seed),
            progress,
            rho=args.rho,
            m=args.m,
            draws=args.draws,
            probes=args.probes,
            device=options.device(args.device),
        )

    terminal.measure_each(args, files, results, measure)
    return 0 if all(result.converged for result in results) else 3
