"""The command line: ``sharpscope COMMAND``, one command a module."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

from sharpscope.cli import (
    compare,
    demo,
    density,
    eigen,
    init,
    inspect,
    invariance,
    outputs,
    plot,
    sharpness,
    slice,
    surface,
    terminal,
    train,
)
from sharpscope.errors import ConvergenceWarning, SharpscopeError, dead_worker, worker_died
from sharpscope.version import __version__

COMMANDS = (demo, train, compare, eigen, density, sharpness, invariance, slice, surface, plot, inspect, init)

EPILOG = """\
exit status: 0 done, 1 the input is wrong (one sentence on stderr), 2 wrong usage,
3 a number has not converged, 130 interrupted.

examples:
  sharpscope demo
  sharpscope train --model cnn --data digits --optimizer sam --rho 0.05 --out sam.pt
  sharpscope compare sgd.pt sam.pt --quick --out sgd-sam
  sharpscope eigen sgd.pt sam.pt
  sharpscope density sgd.pt sam.pt --figure density.png
  sharpscope sharpness sgd.pt sam.pt --examples 1024 --figure m.png
  sharpscope slice sgd.pt --to sam.pt --figure between.png
  sharpscope surface sgd.pt sam.pt --examples 1000 --out surfaces --figure surfaces.png
  sharpscope plot surfaces/sgd.json --out sgd.pdf --width 3.3
  sharpscope inspect sam.pt
  sharpscope init weights.pt && sharpscope eigen weights.pt --problem problem.py
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line's parser."""
    main_parser = argparse.ArgumentParser(
        prog="sharpscope",
        description="How sharp is this minimum, and did SAM make it flatter?",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main_parser.add_argument("--version", action="version", version=f"sharpscope {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. An exception that nobody foresaw keeps its traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    args.argv = words
    with warnings.catch_warnings():
        # The table and the exit status say so already.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.showwarning = _one_line
        try:
            with (
                terminal.stdout_for_json() if getattr(args, "json", False) else contextlib.nullcontext(),
                outputs.released_at_end(),
            ):
                status: int = args.run(args)
            return status
        except SharpscopeError as error:
            print(f"sharpscope: {error}", file=sys.stderr)
            return 1
        except RuntimeError as error:
            if not worker_died(error):
                raise
            print(f"sharpscope: {dead_worker(error)}", file=sys.stderr)
            return 1
        except BrokenPipeError:
            # Whoever read stdout has had enough; the interpreter must not try to flush the rest at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # 128 + SIGPIPE, what a shell shows for a program that this signal ended
        except KeyboardInterrupt:
            resumed = args.command in ("compare", "slice", "surface") or (
                args.command == "eigen" and not args.per_layer
            )
            again = resumed and args.out
            trained = args.command in ("train", "demo")
            kept = "; what was finished is kept" if again or trained else ""
            then = " The same command goes on from there." if again else ""
            print(f"sharpscope: interrupted{kept}.{then}", file=sys.stderr)
            return 130


def _one_line(message: Warning | str, category: type[Warning], *args: object, **kwargs: object) -> None:
    print(f"sharpscope: warning: {message}", file=sys.stderr)
