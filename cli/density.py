"""``sharpscope density``: how the Hessian's eigenvalues are distributed, its trace and its Frobenius norm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharpscope.cli import options, outputs, terminal

DESCRIPTION = """\
The density of all eigenvalues of the Hessian of the mean loss over the data at the checkpoint's weights, by stochastic
Lanczos quadrature, with its trace (the sum of the eigenvalues), Frobenius norm (the root of the sum of their squares),
mean, and the share below zero. Each comes with one standard error over the random vectors (value ± error). It takes
(1 + 2 PROBES) (STEPS + 1) gradients over the data in STEPS + 1 passes.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "density",
        help="spectral density, trace and Frobenius norm of checkpoints",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    parser.add_argument("--probes", type=int, default=6, metavar="K", help="random vectors (default 6)")
    parser.add_argument(
        "--steps", type=int, default=32, metavar="S", help="Lanczos steps; the range over S is resolved (default 32)"
    )
    parser.add_argument(
        "--eigen",
        action="append",
        metavar="JSON",
        help="result of `sharpscope eigen` for a CKPT: marked in the figure, and, where measured with --vectors, taken "
        "out so that the rest shows on its own scale; may be given again",
    )
    options.add_operator(parser)
    options.add_measured(parser)
    options.add_seed(parser, "of the random vectors and of --examples")
    options.add_device(parser)
    parser.add_argument("--figure", metavar="PATH", help="draw all densities on one log scale (.png, .pdf or .svg)")
    options.add_outputs(parser)
    options.add_model_and_data(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next."""
    import torch

    import sharpscope
    from sharpscope.results import DensityResult

    files, figure = outputs.outputs(args), outputs.figure(args)
    options.load_all(args)
    eigen = _eigen(args)
    results: list[DensityResult] = []

    def measure(path: str, out: Path | None, progress: Any) -> DensityResult:
        problem = options.load(args, path)
        known = eigen.get(problem.provenance["sha256"])
        return sharpscope.spectral_density(
            problem,
            args.probes,
            args.steps,
            torch.Generator().manual_seed(args.seed),
            progress,
            operator=args.operator,
            known=known if known is not None and known.eigenvectors is not None else None,
            **options.computation(args),
        )

    try:
        terminal.measure_each(args, files, results, measure)
    finally:
        if figure is not None and results:
            _draw(results, eigen, figure)
    return 0


def _eigen(args: argparse.Namespace) -> dict[str, Any]:
    """The results named by ``--eigen``, by the hash of the checkpoint that they are of."""
    from sharpscope import ArgumentError, EigenResult
    from sharpscope.measurement import Measurement
    from sharpscope.results.measured_alike import another_matrix

    results: dict[str, Any] = {}
    if not args.eigen:
        return results
    problems = [options.load(args, path) for path in args.checkpoints]
    known = {
        p.provenance["sha256"]: Measurement(p, **options.computation(args)).provenance(operator=args.operator)
        for p in problems
    }
    for path in args.eigen:
        result = EigenResult.load(path)
        came = result.provenance
        if result.eigenvectors is None and args.figure is None:
            raise ArgumentError(
                f"--eigen takes eigenvalues out with their vectors, or marks them in a --figure, but {path} has no "
                "vectors. Measure it with --vectors."
            )
        if came.get("sha256") not in known:
            raise ArgumentError(
                f"--eigen must be a result for one of these checkpoints, but {path} is of {came.get('checkpoint')}."
            )
        differ = another_matrix(result, known[came["sha256"]])
        if differ is not None:
            raise ArgumentError(
                f"--eigen must be measured on the same data in the same way, but {differ} in {path}. Pass the same "
                "--operator, --split, --examples, --seed, --params and --weight-decay."
            )
        results[came["sha256"]] = result
    return results


def _draw(results: list[Any], eigen: dict[str, Any], path: Path) -> None:
    from sharpscope.plot import COLOURS, density_curve

    def curves() -> Any:
        axes = None
        for i, result in enumerate(results):
            provenance = result.provenance
            axes = density_curve(
                result,
                eigen.get(provenance["sha256"]),
                axes,
                label=Path(provenance["checkpoint"]).name,
                colour=COLOURS[i % len(COLOURS)],
            )
        return axes

    terminal.save_figure(curves, path)
