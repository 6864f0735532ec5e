"""What ``sharpscope slice`` and ``sharpscope surface`` share: options, networks, directions, and how they are run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sharpscope.cli import options, outputs, terminal

# Seconds between two looks at an unfinished result that are saved.
PREVIEW = 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the directions, of the grid, and of what is measured on it."""
    group = parser.add_argument_group("directions")
    group.add_argument(
        "--eigenvectors", type=places, metavar="LIST", help="which, as 1,2, with --directions eigenvectors"
    )
    group.add_argument(
        "--eigen", metavar="JSON", help="result of `sharpscope eigen CKPT --vectors`, to measure none anew"
    )
    group.add_argument("--rho", type=float, default=0.05, help="of SAM's gradient (default 0.05)")
    group.add_argument(
        "--normalisation",
        default="filter",
        choices=("filter", "layer", "model", "none"),
        help="random directions: each filter, each tensor, or all together as long as the weights (default filter)",
    )
    group.add_argument(
        "--one-dimensional",
        default="fixed",
        choices=("fixed", "scaled"),
        help="random directions: biases and norms stay, or are each scaled as a filter (default fixed)",
    )
    parser.add_argument("--spacing", default="linear", choices=("linear", "log"), help="of the points (default linear)")
    parser.add_argument(
        "--refine", type=int, default=0, metavar="N", help="N coordinates more on each axis, where the loss bends most"
    )
    parser.add_argument(
        "--batchnorm",
        default="frozen",
        choices=("frozen", "interpolate", "recalibrate"),
        help="running statistics: those of CKPT, between checkpoints, or anew at each point (default frozen)",
    )
    parser.add_argument("--quadratic", action="store_true", help="measure slope and curvature, and what they predict")
    options.add_measured(
        parser,
        splits=("train", "test", "both"),
        decay="add C/2 |w|^2 to the loss",
        micro_batch="examples a forward pass (default: by the size of the model's activations)",
    )
    options.add_device(parser)
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="take every N-th point from the I-th on; the last one to end writes"
    )
    parser.add_argument("--figure", metavar="PATH", help="draw the result (.png, .pdf or .svg)")
    options.add_outputs(parser)
    options.add_model_and_data(parser)


def run(
    args: argparse.Namespace,
    measure: Callable[..., Any],
    draw: Callable[[list[Any]], Any],
) -> int:
    """Measure one checkpoint after another by ``measure(problem, out, progress, **options)``, and draw them all."""
    from sharpscope import ArgumentError
    from sharpscope.results import SliceResult

    if args.shard is not None and args.out is None:
        raise ArgumentError("--shard needs --out, where the processes meet. Pass the same --out to each.")
    files = outputs.outputs(args, arrays=True, resumes=True, shared=args.shard is not None)
    figure = outputs.figure(args)
    options.load_all(args)
    results: list[SliceResult] = []

    def one(path: str, out: Path | None, progress: Any) -> SliceResult:
        problem, also = _loaded(args, path)
        saved = [time.monotonic()]

        def preview(unfinished: Callable[[], SliceResult]) -> None:
            if out is not None and args.shard is None and time.monotonic() > saved[0] + PREVIEW:
                unfinished().save(outputs.state(out) / "preview.json")
                saved[0] = time.monotonic()

        result: SliceResult = measure(
            problem,
            out,
            progress,
            spacing=args.spacing,
            also=also,
            batchnorm=args.batchnorm,
            refine=args.refine,
            curvature=True if args.quadratic else None,
            **options.computation(args),
            journal=None if out is None else outputs.state(out),
            shard=args.shard,
            preview=preview,
        )
        return result

    def after(result: SliceResult, out: Path) -> None:
        # Not before the last is done: given again, the command must find those that are, and know them for its own.
        for each in files if len(results) == len(files) else ():
            if each is not None and each.exists():  # of the others, other shards are still at work
                outputs.finished(each)

    try:
        # A shard that ends before the others writes nothing, lest it write over what the last one wrote.
        terminal.measure_each(args, files, results, one, after, lambda result: not result.complete)
    finally:
        if figure is not None and results and all(result.complete for result in results):
            terminal.save_figure(lambda: draw(results), figure)
    return 0


def directions(
    args: argparse.Namespace, kind: str, problem: Any, which: Sequence[int], out: Path | None, progress: Any
) -> list[Any]:
    """Directions that are measured: "eigenvectors" or "gradient"; those of the run that was killed where there are any.

    Measured anew they would differ in their last bits, and no finished point could be used.
    """
    from sharpscope import ArgumentError, EigenResult, Objective
    from sharpscope.fingerprint import key_of
    from sharpscope.measurement import Measurement
    from sharpscope.results.measured_alike import another_matrix
    from sharpscope.slices import eigenvector_directions, read_directions, write_directions

    if kind == "eigenvectors" and args.eigen is not None:
        result = EigenResult.load(args.eigen)
        differ = another_matrix(result, Measurement(problem, **options.computation(args)).provenance())
        if differ is not None:
            raise ArgumentError(
                f"--eigen must be measured on this checkpoint and these data, but {differ} in {args.eigen}. Pass the "
                "same checkpoint, --split, --examples, --seed, --params and --weight-decay."
            )
        return eigenvector_directions(result, which)
    if out is None:
        return _measured(args, kind, problem, which, None, progress)
    objective = Objective(problem, **options.computation(args))
    asked = {"key": key_of(objective), "kind": kind, "which": list(which), "rho": args.rho, "seed": args.seed}
    path = outputs.state(out) / "directions.npz"
    found: list[Any] | None = read_directions(path, asked)
    if found is None:
        write_directions(path, _measured(args, kind, problem, which, out, progress), asked)
        # Those of the process that was first, where several shards have begun at once.
        found = read_directions(path, asked)
        assert found is not None
    return found


def _measured(
    args: argparse.Namespace, kind: str, problem: Any, which: Sequence[int], out: Path | None, progress: Any
) -> list[Any]:
    import torch

    import sharpscope
    from sharpscope.slices import eigenvector_directions, gradient_directions

    if kind == "gradient":
        return gradient_directions(problem, args.rho, **options.computation(args))
    result = sharpscope.top_eigenvalues(
        problem,
        max(which),
        generator=torch.Generator().manual_seed(args.seed),
        progress=progress,
        vectors=True,
        **options.computation(args),
        journal=None if out is None else outputs.state(out),
    )
    return eigenvector_directions(result, which)


def others(args: argparse.Namespace, paths: Sequence[str]) -> dict[str, Any]:
    """The Problems of further checkpoints by the shortest name that tells them apart."""
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    return {name: options.load(args, path) for name, path in zip(names, paths, strict=True)}


def places(text: str) -> list[int]:
    """``1,2`` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None


def _shard(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not slash or not first.isdigit() or not second.isdigit():
        raise argparse.ArgumentTypeError(f"must be I/N, as 1/4, got {text!r}")
    return int(first), int(second)


def _loaded(args: argparse.Namespace, path: str) -> tuple[Any, dict[str, Any]]:
    """The Problem of a checkpoint on its first split, and with ``--split both`` the test set beside it."""
    problem = options.load(args, path)
    if args.split != "both":
        return problem, {}
    test = options.load(args, path, split="test", examples=None)
    if args.examples is not None and args.examples < test.provenance["split_examples"]:
        test = options.load(args, path, split="test")
    return problem, {"test": test.data}
