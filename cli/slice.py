"""``sharpscope slice``: the loss along lines through the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharpscope.cli import options, slicing

DESCRIPTION = """\
Loss and accuracy along lines w + t d through a checkpoint's weights w. Directions:

  random        the default: --seeds directions of normal numbers, sized by the weights (Li et al. 2018); one alone is
                weak evidence. Several checkpoints get the same numbers, each sized by its own weights
  eigenvectors  of the Hessian, of length 1: the loss bends by lambda along each
  gradient      of the loss, of length 1, and SAM's gradient beside it
  checkpoint    with --to: t = 0 is CKPT and t = 1 the other; the barrier between them is in the table
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "slice",
        help="loss and accuracy along lines through checkpoints",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    parser.add_argument(
        "--directions",
        choices=("random", "eigenvectors", "gradient", "checkpoint"),
        help="default random; checkpoint with --to",
    )
    parser.add_argument("--to", metavar="CKPT2", help="the other end of the line")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="random directions (default 3)")
    parser.add_argument("--points", type=int, default=21, metavar="N", help="of each line (default 21)")
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of t (default -1 1; towards a checkpoint -0.5 1.5)",
    )
    options.add_seed(parser, "of the first random direction and of --examples")
    slicing.add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next."""
    import sharpscope
    from sharpscope.slices import towards

    implied = "eigenvectors" if args.eigenvectors or args.eigen else "random"
    kind = args.directions or (implied if args.to is None else "checkpoint")
    if (kind == "checkpoint") != (args.to is not None):
        raise sharpscope.ArgumentError("--directions checkpoint and --to go together. Pass both, or neither.")
    if args.seeds < 1:
        raise sharpscope.ArgumentError(f"--seeds must be at least 1, got {args.seeds}.")

    def measure(problem: Any, out: Path | None, progress: Any, **given: Any) -> Any:
        marks = {}
        if kind == "checkpoint":
            marks = slicing.others(args, [args.to])
            (name, other) = next(iter(marks.items()))
            directions = [towards(problem, other, name)]
        else:
            directions = _directions(args, kind, problem, out, progress)
        span = None if args.range is None else tuple(args.range)
        return sharpscope.loss_slice(problem, directions, args.points, span, progress, marks=marks, **given)

    def draw(results: list[Any]) -> Any:
        from sharpscope.plot import slice_curves

        return slice_curves(results)

    return slicing.run(args, measure, draw)


def _directions(args: argparse.Namespace, kind: str, problem: Any, out: Path | None, progress: Any) -> list[Any]:
    import torch

    from sharpscope.slices import random_directions

    if kind != "random":
        return slicing.directions(args, kind, problem, args.eigenvectors or [1], out, progress)
    return [
        random_directions(
            problem,
            1,
            torch.Generator().manual_seed(args.seed + i),
            normalisation=args.normalisation,
            one_dimensional=args.one_dimensional,
        )[0]
        for i in range(args.seeds)
    ]
