"""``sharpscope plot``: draws saved slices and monitored runs again, without computing anything."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpscope.cli import outputs, terminal

if TYPE_CHECKING:
    from sharpscope.results import SliceResult

DESCRIPTION = """\
Draws saved results of sharpscope slice and sharpscope surface again, or writes them for other programs; of
sharpscope train --monitor and SharpnessMonitor, lambda_max against the steps of one or more runs. The name of
FIGURE says what: .png, .pdf and .svg are figures, .html is an interactive surface (needs pip install
'sharpscope[interactive]'), .vtk is for ParaView, .csv for tables. Several results share one figure, with one scale,
levels and limits; they must be measured alike. A RESULT named .h5 is one of github.com/tomgoldstein/loss-landscape
(needs pip install 'sharpscope[h5]').
"""

DATA = (".html", ".vtk", ".csv")
H5 = (".h5", ".hdf5")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plot",
        help="draw saved slices, surfaces and monitored runs again",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="RESULT",
        help="JSON of slice, surface or monitor, a folder of several or of an unfinished one (OUT.partial), or an .h5",
    )
    parser.add_argument("--out", required=True, metavar="FIGURE", help=".png, .pdf, .svg, .html, .vtk or .csv")
    parser.add_argument("--split", metavar="NAME", help="train or test (default: curves both, surfaces the first)")
    parser.add_argument("--quantity", default="loss", choices=("loss", "accuracy"), help="of surfaces (default loss)")
    parser.add_argument("--kind", default="contour", choices=("contour", "3d"), help="of surfaces (default contour)")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--log", action="store_true", default=None, help="logarithmic loss (default of surfaces)")
    scale.add_argument("--linear", action="store_false", dest="log", help="linear loss (default of curves)")
    parser.add_argument("--clip", type=float, metavar="LOSS", help="highest loss that is told apart")
    parser.add_argument(
        "--levels", type=_levels, metavar="N", help="about so many contours, or their values with commas between"
    )
    parser.add_argument("--width", type=_inches, metavar="INCHES", help="of the figure: 3.3 for a column of print")
    parser.add_argument("--style", metavar="NAME", help="a style of matplotlib, as dark_background")
    parser.add_argument("--overwrite", action="store_true", help="replace the figure if it exists already")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from sharpscope.atomic_io import atomic
    from sharpscope.errors import ArgumentError, OutputError, nearest
    from sharpscope.results import side_by_side
    from sharpscope.results.slice_exchange import to_csv, to_vtk

    out = Path(args.out)
    if out.suffix not in (*outputs.FIGURES, *DATA):
        raise OutputError(f"FIGURE must be one of {', '.join((*outputs.FIGURES, *DATA))}, got {out}. Name it so.")
    outputs.claim(args, out)
    paths = [path for given in args.checkpoints for path in _files(given)]
    if all(_is_monitor(path) for path in paths):
        return _monitors(args, paths, out)
    results = [_read(path) for path in paths]
    _refuse_unused(args, out.suffix, lines=any(r.dimensions == 1 for r in results))
    if out.suffix in (".vtk", ".csv"):
        if len(results) > 1:
            raise ArgumentError(f"A {out.suffix} file holds one result, got {len(results)}. Write one at a time.")
        (to_vtk if out.suffix == ".vtk" else to_csv)(results[0], out)
        terminal.say_written(out)
    elif out.suffix == ".html":
        if any(r.dimensions == 1 for r in results):
            raise ArgumentError("An .html page is of surfaces, but a result is of lines. Choose .png, .pdf or .svg.")
        from sharpscope.plot.interactive import interactive_surface

        log = args.log is not False
        page = interactive_surface(results, split=args.split, quantity=args.quantity, log=log, clip=args.clip)
        with atomic(out) as temporary:
            temporary.write_text(page, encoding="utf-8")
        terminal.say_written(out)
    else:
        import matplotlib.style

        if args.style not in (None, "default", *matplotlib.style.available):
            raise ArgumentError(nearest("style", args.style, matplotlib.style.available))
        with matplotlib.style.context(args.style or []):
            terminal.save_figure(lambda: _drawn(args, results), out)
    terminal.emit(str(side_by_side(results)))
    return 0


def _refuse_unused(args: argparse.Namespace, suffix: str, lines: bool, runs: bool = False) -> None:
    """Raise ArgumentError for an option that FIGURE would not show."""
    from sharpscope.errors import ArgumentError

    given = {
        "--split": args.split is not None,
        "--quantity": args.quantity != "loss",
        "--kind": args.kind != "contour",
        "--log or --linear": args.log is not None,
        "--clip": args.clip is not None,
        "--levels": args.levels is not None,
        "--width": args.width is not None,
        "--style": args.style is not None,
    }
    shown = set(given)
    if suffix in (".vtk", ".csv") or runs:
        shown = set()
    elif suffix == ".html":
        shown -= {"--kind", "--levels", "--width", "--style"}
    elif lines:
        shown -= {"--quantity", "--kind", "--levels"}
    for name in given:
        if given[name] and name not in shown:
            what = (
                "a training run has"
                if runs
                else "curves have"
                if lines and suffix in outputs.FIGURES
                else f"a {suffix} file has"
            )
            raise ArgumentError(f"{name} is of something that {what} not. Leave it out.")
    if args.levels is not None and not isinstance(args.levels, int) and args.clip is not None:
        raise ArgumentError("--clip and the values of --levels both say where the scale ends. Leave one of them out.")


def _files(given: str) -> list[str]:
    """The results in a folder: those of several checkpoints, or the preview of an unfinished one."""
    if not Path(given).is_dir():
        return [given]
    found = sorted(str(path) for path in Path(given).glob("*.json") if path.name != "asked.json")
    return found or [str(Path(given) / "preview.json")]


def _read(path: str) -> SliceResult:
    from sharpscope.results import SliceResult

    if Path(path).suffix in H5:
        from sharpscope.results.slice_exchange import read_loss_landscape

        return read_loss_landscape(path)
    return SliceResult.load(path)


def _is_monitor(path: str) -> bool:
    from sharpscope.results.serialization import read_json

    said = None if Path(path).suffix in H5 else read_json(path)
    return isinstance(said, dict) and said.get("analysis") == "monitor"


def _monitors(args: argparse.Namespace, paths: Sequence[str], out: Path) -> int:
    """lambda_max of one or more training runs against their steps."""
    from sharpscope.errors import OutputError
    from sharpscope.plot import sharpness_over_steps
    from sharpscope.results import MonitorResult

    if out.suffix not in outputs.FIGURES:
        raise OutputError(f"A run's FIGURE must be one of {', '.join(outputs.FIGURES)}, got {out}. Name it so.")
    _refuse_unused(args, out.suffix, lines=True, runs=True)
    names = [Path(path).name for path in paths]
    runs = dict(zip(names if len(set(names)) == len(names) else paths, map(MonitorResult.load, paths), strict=True))
    terminal.save_figure(lambda: sharpness_over_steps(runs), out)
    terminal.emit("\n\n".join(f"{name}\n{run}" for name, run in runs.items()))
    return 0


def _drawn(args: argparse.Namespace, results: Sequence[SliceResult]) -> Any:
    """The Axes of the figure."""
    from sharpscope.plot.levels import shared_levels
    from sharpscope.plot.slice import slice_curves
    from sharpscope.plot.surface import surface_3d, surface_contour, surfaces_side_by_side

    if all(r.dimensions == 1 for r in results):
        log = args.log is True
        return slice_curves(results, split=args.split, log=log, clip=args.clip, width=args.width)
    chosen: dict[str, Any] = {"split": args.split, "quantity": args.quantity, "log": args.log is not False}
    chosen["clip"] = args.clip
    levels = args.levels
    if isinstance(levels, int):
        levels = shared_levels(results, count=levels, **chosen)
    chosen |= {"levels": levels, "width": args.width}
    if len(results) > 1:
        return surfaces_side_by_side(results, kind=args.kind, **chosen)[0]
    return (surface_3d if args.kind == "3d" else surface_contour)(results[0], **chosen)


def _levels(text: str) -> int | tuple[float, ...]:
    try:
        count = None if "," in text or "." in text else int(text)
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or values with commas between, got {text!r}") from None
    if count is None and len(values) < 2:
        raise argparse.ArgumentTypeError(f"must be at least two values, got {text!r}")
    if count is not None and count < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text!r}")
    return values if count is None else count


def _inches(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 50:
        raise argparse.ArgumentTypeError(f"must be from 1 to 50 inches, got {text}")
    return value
