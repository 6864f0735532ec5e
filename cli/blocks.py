"""``sharpscope eigen --per-layer``: lambda_max and trace of each diagonal block of the Hessian."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharpscope.cli import options, outputs, terminal


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that ask for blocks."""
    by = parser.add_mutually_exclusive_group()
    by.add_argument(
        "--per-layer",
        dest="per_layer",
        action="store_const",
        const="module",
        help="instead, a row for each diagonal block of the Hessian: lambda_max, trace and share of the whole trace; a "
        "block is the parameters of one module",
    )
    by.add_argument(
        "--per-parameter", dest="per_layer", action="store_const", const="parameter", help="the same for each tensor"
    )
    parser.add_argument(
        "--probes", type=int, metavar="K", help="with --per-layer: random vectors for a trace (default 8)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next.

    To be called by ``eigen`` where ``args.per_layer`` is set, after it has refused what does not go with it.
    """
    import torch

    import sharpscope
    from sharpscope.results import BlockResult

    files = outputs.outputs(args)
    options.load_all(args)
    results: list[BlockResult] = []

    def measure(path: str, out: Path | None, progress: Any) -> BlockResult:
        return sharpscope.block_spectra(
            options.load(args, path),
            args.per_layer,
            args.tol,
            8 if args.probes is None else args.probes,
            torch.Generator().manual_seed(args.seed),
            progress,
            operator=args.operator,
            **options.computation(args),
            max_passes=args.max_passes,
        )

    terminal.measure_each(args, files, results, measure)
    return 0 if all(result.converged.all() for result in results) else 3
