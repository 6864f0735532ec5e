"""``sharpscope demo``: SGD against SAM on real digits, in one go."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharpscope.cli import options, outputs, terminal

DESCRIPTION = """\
Trains the bundled cnn on 1,437 real handwritten digits with SGD, with SAM, and (the fairness rule of Foret et al.
2021: SAM takes two gradients a step) with SGD for twice the epochs; then measures lambda_max and lambda_max/lambda_5
at the start, the middle and the end of each run, and the loss along the eigenvector of lambda_max at the end. A run
that was interrupted is gone on with.
"""

EPOCHS = 40
RHO = 0.1
REACH = 0.3  # of the slices: three times rho


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="SGD against SAM on real digits: table, figure, checkpoints (one to two minutes)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default="sharpscope-demo", metavar="DIR", help="folder to write (default sharpscope-demo)"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of SGD and of SAM (default {EPOCHS})")
    options.add_seed(parser, "of training and of the solver's start")
    parser.add_argument("--overwrite", action="store_true", help="train anew in place of runs in DIR")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, measure, and write table, figure, JSON and checkpoints."""
    from sharpscope.atomic_io import atomic
    from sharpscope.training import Recipe

    folder = Path(args.out)
    sgd = Recipe(model="cnn", data="digits", epochs=args.epochs, seed=args.seed)
    runs = {
        "SGD": ("sgd.pt", sgd),
        f"SAM rho={RHO:g}": ("sam.pt", replace(sgd, rho=RHO)),
        "SGD, 2x epochs": ("sgd-2x.pt", replace(sgd, epochs=2 * args.epochs)),
    }
    numbers, figure = folder / "demo.json", folder / "demo.png"
    outputs.claim(args, numbers, figure, own=lambda: _is_of(numbers, [recipe for _, recipe in runs.values()]))
    files = {label: _train(label, recipe, folder / name, args.overwrite) for label, (name, recipe) in runs.items()}
    results = {label: [_measure(label, path, args.seed) for path in paths] for label, paths in files.items()}

    flat = [{"run": label, **result.to_dict()} for label, measured in results.items() for result in measured]
    with atomic(numbers) as temporary:
        temporary.write_text(json.dumps(flat, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    ends = [_slice(label, paths[-1], results[label][-1]) for label, paths in files.items()]
    _draw(results, ends, figure)
    terminal.emit(
        f"{_table(results)}\n{_said(results)}\n\n"
        f"Figure {figure}, every number {numbers}, checkpoints {folder}/*.pt\n"
        f"Next: sharpscope eigen {folder / 'sgd.pt'} {folder / 'sam.pt'} --split test"
    )
    return 0 if all(r.converged.all() for measured in results.values() for r in measured) else 3


def _is_of(numbers: Path, recipes: list[Any]) -> bool:
    """Whether every record in ``numbers`` is of one of these runs."""
    from sharpscope.training import differing_setting

    try:
        found = [record["recipe"] for record in json.loads(numbers.read_text(encoding="utf-8"))]
        return all(any(differing_setting(recipe, known) is None for recipe in recipes) for known in found)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _train(label: str, recipe: Any, out: Path, overwrite: bool) -> list[Path]:
    """Train, or go on with, one run; the checkpoints at its start, middle and end."""
    from sharpscope.training import parse_epochs, snapshot_path, train

    epochs = sorted(parse_epochs("0,50%,last", recipe.epochs))
    with terminal.steps_bar(f"train {label}") as progress:
        train(
            recipe,
            out,
            resume=not overwrite,
            overwrite=overwrite,
            save_epochs=epochs,
            progress=progress,
        )
    return [snapshot_path(out, epoch) for epoch in epochs]


def _measure(label: str, path: Path, seed: int) -> Any:
    import torch

    import sharpscope

    source = torch.Generator().manual_seed(seed)
    with terminal.progress_bar(f"measure {label} {path.stem}") as progress:
        return sharpscope.top_eigenvalues(sharpscope.load(path), generator=source, vectors=True, progress=progress)


def _slice(label: str, path: Path, top: Any) -> Any:
    """The loss along the eigenvector of lambda_max, under the run's name."""
    import sharpscope
    from sharpscope.slices import eigenvector_directions

    problem = sharpscope.load(path)
    named = replace(problem, provenance={**problem.provenance, "checkpoint": label})
    with terminal.progress_bar(f"slice {label}") as progress:
        return sharpscope.loss_slice(named, eigenvector_directions(top, [1]), 31, (-REACH, REACH), progress)


def _table(results: dict[str, Any]) -> str:
    from sharpscope.formatting import aligned, with_bound

    rows = [["run", "epoch", "train loss", "test accuracy", "lambda_max", "lambda_max/lambda_5", "2/eta"]]
    for label, measured in results.items():
        for result in measured:
            metrics, ratio = result.provenance["metrics"], result.ratio
            rows.append(
                [
                    label,
                    str(result.provenance["epoch"]),
                    f"{metrics['train_loss']:.2g}",
                    f"{metrics['test_accuracy']:.2%}",
                    with_bound(result.lambda_max, result.lower[0], result.upper[0]),
                    "-" if ratio.value is None else with_bound(ratio.value, ratio.lower, ratio.upper),
                    f"{2 / metrics['lr']:.4g}",
                ]
            )
    return aligned(rows)


def _said(results: dict[str, Any]) -> str:
    """What this run shows, and no more."""
    sgd, sam, double = (measured[-1] for measured in results.values())
    fair = min((sgd, double), key=lambda r: r.lambda_max)
    name = "SGD" if fair is sgd else "SGD with twice the epochs"
    times = fair.lambda_max / sam.lambda_max
    more = f"{times:.1f} times lower" if times > 1 else f"{1 / times:.1f} times higher"
    return (
        f"\nIn this run, at the end, lambda_max of SAM ({sam.lambda_max:.3g}) is {more} than that of the flatter\n"
        f"of the two SGD runs ({name}, {fair.lambda_max:.3g}). It is one seed of one small network, and says nothing\n"
        "about which generalises better. 2/eta is the edge of stability of plain gradient descent at the\n"
        "learning rate then in force, which the cosine schedule takes to zero."
    )


def _draw(results: dict[str, Any], ends: list[Any], path: Path) -> None:
    def panels() -> Any:
        import matplotlib.pyplot as plt

        from sharpscope.plot import sharpness_over_training, slice_curves

        figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
        sharpness_over_training(results, axes[:2])
        slice_curves(ends, axes[2], accuracy=False)
        figure.suptitle("Sharpness over training, and the loss at the end: cnn on digits, full training set, eval mode")
        return axes[0]

    terminal.save_figure(panels, path)
