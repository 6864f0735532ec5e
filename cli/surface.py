"""``sharpscope surface``: the loss over planes through the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharpscope.cli import options, slicing

DESCRIPTION = """\
Loss and accuracy over a plane w + x d1 + y d2 through a checkpoint's weights w, from a coarse grid to a fine one.
Directions:

  random        the default: two directions of normal numbers at right angles, sized by the weights (Li et al. 2018).
                Several checkpoints get the same numbers, range and grid, and one colour scale in --figure
  eigenvectors  of the Hessian, of length 1: the loss bends by lambda along each
  gradient      the gradient, and across it SAM's gradient, of length 1
  plane         with --through: the plane of three checkpoints, in units of their distance
  trajectory    with --trajectory: the plane through CKPT that is nearest to the steps of its training

With --out the finished points outlive a kill: the command given again goes on. Meanwhile `sharpscope plot` shows what
there is, from the preview.json in the folder OUT.partial.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "surface",
        help="loss and accuracy over planes through checkpoints",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    parser.add_argument(
        "--directions",
        choices=("random", "eigenvectors", "gradient", "plane", "trajectory"),
        help="default random; plane with --through; trajectory with --trajectory",
    )
    parser.add_argument("--through", nargs=2, metavar="CKPT", help="two more checkpoints of the plane; CKPT before it")
    parser.add_argument(
        "--trajectory",
        nargs="+",
        metavar="CKPT",
        help="steps of the training that leads to CKPT, in order, drawn on any plane; CKPT before it",
    )
    parser.add_argument("--points", type=_points, default=(21, 21), metavar="N|NxM", help="of the grid (default 21)")
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of x and y (default -1 1; of a plane or trajectory what shows all checkpoints)",
    )
    parser.add_argument("--range-y", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of y (default that of x)")
    options.add_seed(parser, "of the random directions and of --examples")
    slicing.add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one checkpoint after another; what is finished is shown and kept whatever happens to the next."""
    import sharpscope

    told = {"plane": args.through, "trajectory": args.trajectory, "eigenvectors": args.eigenvectors or args.eigen}
    kind = args.directions or next((name for name, given in told.items() if given), "random")
    for name, given in (("plane", "through"), ("trajectory", "trajectory")):
        if kind == name and not getattr(args, given):
            raise sharpscope.ArgumentError(f"--directions {name} needs --{given}. Pass it.")
    if args.through and kind != "plane":
        raise sharpscope.ArgumentError("--through goes with --directions plane. Leave one of them out.")
    if (args.through or args.trajectory) and len(args.checkpoints) > 1:
        raise sharpscope.ArgumentError("A plane through checkpoints has one centre. Name one CKPT.")

    def measure(problem: Any, out: Path | None, progress: Any, **given: Any) -> Any:
        marks = slicing.others(args, args.through or [])
        steps = slicing.others(args, args.trajectory or [])
        centre = Path(args.checkpoints[0])
        if steps and centre.resolve() not in {Path(step).resolve() for step in args.trajectory}:
            name = centre.name if centre.name not in steps else str(centre)
            steps = _in_order({**steps, name: problem})
        plane = _plane(args, kind, problem, marks, steps, out, progress)
        spans = _spans(args, problem, plane, [*marks.values(), *steps.values()])
        return sharpscope.loss_surface(
            problem, plane, args.points, spans, progress, marks=marks, trajectory=steps, **given
        )

    def draw(results: list[Any]) -> Any:
        from sharpscope.plot import surface_contour, surfaces_side_by_side

        return surface_contour(results[0]) if len(results) == 1 else surfaces_side_by_side(results)[0]

    return slicing.run(args, measure, draw)


def _in_order(steps: dict[str, Any]) -> dict[str, Any]:
    """The steps by the epochs that their files tell, or as they are where one tells none."""
    epochs = {name: step.provenance.get("epoch") for name, step in steps.items()}
    if None in epochs.values():
        return steps
    return dict(sorted(steps.items(), key=lambda step: epochs[step[0]]))


def _plane(
    args: argparse.Namespace, kind: str, problem: Any, marks: Any, steps: Any, out: Path | None, progress: Any
) -> list[Any]:
    import torch

    from sharpscope.slices import orthonormalised, plane_through, random_directions, trajectory_plane

    if kind in ("eigenvectors", "gradient"):
        found = slicing.directions(args, kind, problem, args.eigenvectors or [1, 2], out, progress)
        return orthonormalised(found) if kind == "gradient" else found
    if kind == "plane":
        return plane_through(problem, marks)
    if kind == "trajectory":
        return trajectory_plane(problem, list(steps.values()))
    return random_directions(
        problem,
        2,
        torch.Generator().manual_seed(args.seed),
        normalisation=args.normalisation,
        one_dimensional=args.one_dimensional,
    )


def _spans(args: argparse.Namespace, problem: Any, plane: list[Any], networks: list[Any]) -> Any:
    """The ranges of x and y that were asked for, or that show all ``networks`` and the centre."""
    from sharpscope.slices import span_of

    shown = span_of(problem, plane, networks) if networks else ((-1.0, 1.0), (-1.0, 1.0))
    x = shown[0] if args.range is None else tuple(args.range)
    y = tuple(args.range_y) if args.range_y is not None else (shown[1] if args.range is None else x)
    return x, y


def _points(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    try:
        return int(first), int(second or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be N or NxM, as 51x31, got {text!r}") from None
