"""``sharpscope compare``: how sharp checkpoints are, side by side, and whether SAM made them flatter."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sharpscope.cli import comparing, options, outputs, terminal

# The folder of what is finished.
PARTS = "parts"

DESCRIPTION = """\
How sharp is each checkpoint, and how do they differ? Measures each alike: loss and accuracy on train and test,
lambda_max and lambda_max/lambda_5, spectral density with trace, m-sharpness against m, the edge of stability, lines and
a plane in random directions; and the loss on the straight line between minima. A table with intervals, a few sentences
of what differs and how surely, DIR/index.html with all figures, and DIR/compare.json with every number.

  --quick      on samples: two Fashion-MNIST checkpoints in a minute or two on two cores, 95 % intervals over examples
  (default)    eigenvalues of all the training data to 1e-3, the rest on samples: some minutes
  --thorough   eigenvalues to 1e-4 with a certificate, finer grids, more probes: most of an hour

Several runs of each kind as groups tell SAM's effect from chance: means, differences and ratios come with 95 %
intervals over runs, paired where both groups have the same seeds, or without recipes the same numbers in their file
names. Interrupted or killed, the same command goes on.
"""

EPILOG = """\
examples:
  sharpscope compare sgd.pt sam.pt --quick --out sgd-sam
  sharpscope compare sgd.pt sam.pt --out sgd-sam
  sharpscope compare --sgd 'sgd-*.pt' --sam 'sam-*.pt' --out seeds
  sharpscope compare --group adam='adam-?.pt' --group adam+sam='adamsam-?.pt' --out adam
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="everything of several checkpoints side by side: table, findings, one HTML page",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints", nargs="*", metavar="CKPT", help="checkpoint file; all are compared with the first"
    )
    parser.add_argument("--sgd", nargs="+", metavar="PATTERN", help="runs of the group sgd, as 'sgd-*.pt'")
    parser.add_argument("--sam", nargs="+", metavar="PATTERN", help="runs of the group sam")
    parser.add_argument(
        "--group",
        nargs="+",
        action="append",
        metavar="NAME=PATTERN",
        help="runs of a group of that name; may be given again; the first group is the reference",
    )
    parser.add_argument(
        "--out", default="sharpscope-compare", metavar="DIR", help="folder to write (default sharpscope-compare)"
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="samples, coarse slices")
    level.add_argument(
        "--thorough", dest="level", action="store_const", const="thorough", help="tighter, larger, finer"
    )
    # What options.load asks for: the training data, and the bare loss.
    parser.set_defaults(level="default", split="train", weight_decay=0.0)
    parser.add_argument("--examples", type=int, metavar="N", help="measure nothing on more than N examples of a split")
    parser.add_argument(
        "--params", action="append", metavar="PATTERN", help="only parameters of such names; may be given again"
    )
    parser.add_argument("--rho", type=float, default=0.05, help="radius of m-sharpness (default 0.05)")
    parser.add_argument("--dtype", choices=options.DTYPES, help="precision of the computation (default: the weights')")
    options.add_seed(parser, "of samples, starts, probes and directions")
    options.add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the report of another command in DIR")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options.add_model_and_data(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure what is not done yet, then show and write all of it."""
    from sharpscope import compare
    from sharpscope.comparing.steps import resolve_level
    from sharpscope.errors import ArgumentError

    options.import_from_here(args)
    groups = comparing.groups(args)
    paths = [path for members in groups.values() for path in members] or args.checkpoints
    folder, level = Path(args.out), resolve_level(args.level).within(args.examples)
    if not paths:
        raise ArgumentError("A comparison needs checkpoints. Name some, or groups by --sgd and --sam.")
    named = dict(zip(comparing.names(paths), paths, strict=True))
    asked = _asked(args, paths)
    _claim(args, paths, folder, asked)
    # Samples are drawn part by part.
    loaders = iter([(name, partial(comparing.loaded, args, path, name)) for name, path in named.items()])
    with terminal.progress_bar("compare") as progress:
        comparison = compare(
            {group: dict(islice(loaders, len(members))) for group, members in groups.items()} or dict(loaders),
            test=comparing.test_data(args, named),
            level=level,
            seed=args.seed,
            rho=args.rho,
            folder=folder / PARTS,
            progress=progress,
            **options.precision(args),
        )
    comparison = replace(comparison, command=comparing.command(args))
    _write(folder, replace(comparison, provenance={"asked": asked}))
    if args.json:
        terminal.emit(json.dumps(comparison.to_dict(), indent=2, allow_nan=False))
    else:
        terminal.emit(_shown(comparison, folder))
    results = [subject.eigen for subject in comparison.subjects if subject.eigen is not None]
    return 0 if all(r.converged.all() and r.certified for r in results) else 3


def _asked(args: argparse.Namespace, paths: list[str]) -> dict[str, Any]:
    """What a report is of, as far as it decides its numbers."""
    from sharpscope.checkpoint import read_checkpoint

    left = ("run", "argv", "command", "out", "overwrite", "json", "checkpoints", "sgd", "sam", "group")
    groups = comparing.groups(args)
    given = {key: str(value) for key, value in vars(args).items() if key not in left and value is not None}
    hashes = [read_checkpoint(path, args.weights, trust_pickle=args.trust_pickle).sha256 for path in paths]
    return {**given, "groups": groups, "checkpoints": list(map(list, zip(map(str, paths), hashes, strict=True)))}


def _claim(args: argparse.Namespace, paths: list[str], folder: Path, asked: dict[str, Any]) -> None:
    """Claim the files of ``folder``, unless it holds the report of another command or what that has finished."""
    from sharpscope.errors import OutputError

    if folder.is_file():
        raise OutputError(f"--out must be a folder, but {folder} is a file. Name another place.")
    report = folder / "compare.json"
    read = argparse.Namespace(checkpoints=paths, overwrite=args.overwrite)
    outputs.claim(
        read, report, folder / "index.html", state=folder / PARTS, asked=asked, own=lambda: _asked_in(report) == asked
    )


def _asked_in(report: Path) -> Any:
    try:
        return json.loads(report.read_text(encoding="utf-8")).get("asked")
    except (OSError, ValueError, AttributeError):
        return None


def _write(folder: Path, comparison: Any) -> None:
    from sharpscope.atomic_io import atomic
    from sharpscope.report import page

    with atomic(folder / "index.html") as temporary:
        temporary.write_text(page(comparison), encoding="utf-8")
    comparison.save(folder / "compare.json")


def _shown(comparison: Any, folder: Path) -> str:
    said = "\n".join(comparison.findings)
    return f"{comparison.summary()}\n\n{said}\n\nPage {folder / 'index.html'}, every number {folder / 'compare.json'}"
