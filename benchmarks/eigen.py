"""Compare eigensolvers on the same models, data and accuracy: error, passes, gradients, seconds and peak memory.

    pip install -c constraints.txt '.[bench]'
    python benchmarks/eigen.py --work FOLDER [--repeat 3] [--only NAME ...] [--quick]

Every run has an interpreter of its own; rounds go through all solvers in turn, each round in another order, with one
gradient measured beside them. Checkpoints, references and the rivals' settings are kept in FOLDER, as are the runs, so
that --only measures some anew and the report holds the others as they were; remove FOLDER/tune to have the settings
found anew. Cases: cnn-sgd, cnn-sam, wrn, mlp, transformer. Solvers: see benchmarks/roster.py.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report
from roster import ROSTER, TUNED, K

CASES = ("cnn-sgd", "cnn-sam", "wrn", "mlp", "transformer")
# What --quick runs unless --only names cases.
QUICK = ("transformer",)
HERE = Path(__file__).parent


class Worker:
    """Starts the tasks of one case, and keeps what is worked out once."""

    def __init__(self, work: Path, case: str, args: argparse.Namespace) -> None:
        self.case, self.args, self.work = case, args, work
        self.path = work / "cases" / f"{case}.pt"
        self.flags = ["--accuracy", str(args.accuracy), *(["--quick"] if args.quick else [])]

    def run(self, task: str, *options: str, limit: float | None = None) -> dict[str, Any]:
        """What the task prints, or why there is nothing: {"failed": ...}."""
        command = [sys.executable, str(HERE / "worker.py"), task, str(self.path), *self.flags, *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {limit:g} s"}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {"failed": lines[-1], "stderr": done.stderr}
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def once(self, name: str, task: str, *options: str) -> dict[str, Any]:
        """``run``, kept in the work folder under ``name``."""
        path = self.work / task / f"{self.case}-{name}.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        say(f"{self.case}: {task} {name}")
        answer = self.run(task, *options)
        if "failed" in answer:
            raise SystemExit(f"{self.case}: {task} {name} failed.\n{answer.get('stderr', answer['failed'])}")
        write(path, answer)
        return answer


def main() -> None:
    """Run what was asked for and report it."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C, so that the running task is ended too
    work = args.work / "quick" if args.quick else args.work
    for case in args.cases:
        worker = Worker(work, case, args)
        if not worker.path.exists():
            say(f"{case}: training")
            built = worker.run("build")
            if "failed" in built:
                raise SystemExit(f"{case}: {built.get('stderr', built['failed'])}")
        check = ["--check"] if args.check or args.quick else []
        reference = worker.once("reference", "reference", "--reference-tol", str(args.reference_tol), *check)
        settings = found_settings(worker, reference["values"], args)
        measure(worker, reference, settings, args)
    text = report.report(work / "runs", args.accuracy)
    print(text)
    target = work / "RESULTS.md" if args.quick else args.results
    target.write_text(text + "\n", encoding="utf-8")
    say(f"written to {target}")


def found_settings(worker: Worker, reference: list[float], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The batch size of a gradient, and the settings of the rivals that are to run."""
    wanted = ["gradient", *(t for t in TUNED if any(ROSTER[name].tuned == t for name in args.solvers))]
    found: dict[str, dict[str, Any]] = {}
    for tool in wanted:
        options = ["--name", tool, "--reference", json.dumps(reference)]
        found |= worker.once(f"{tool}-{args.accuracy:g}", "tune", *options)
    return found


def measure(
    worker: Worker, reference: dict[str, Any], settings: dict[str, dict[str, Any]], args: argparse.Namespace
) -> None:
    """All rounds, each run kept as soon as it is there."""
    path = worker.work / "runs" / f"{worker.case}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    kept |= {"case": worker.case, "reference": reference, "settings": settings, "accuracy": args.accuracy}
    anew = set()
    for turn in range(args.repeat):
        unit = worker.run("gradient", "--settings", json.dumps(settings["gradient"]))
        baseline = worker.run("baseline")
        for answer in (unit, baseline):
            if "failed" in answer:
                raise SystemExit(f"{worker.case}: {answer.get('stderr', answer['failed'])}")
        kept["machine"] = report.machine(unit["threads"])
        names = [name for name in args.solvers if turn == 0 or not ROSTER[name].slow]
        for name in order(names, turn):
            limit = longest(kept["runs"], args) if ROSTER[name].slow else None
            run = solve(worker, name, settings, reference["values"], args.accuracy, limit)
            run |= {"gradient_seconds": unit["seconds"], "baseline": baseline["peak"]}
            if name not in anew:
                kept["runs"][name] = []
                anew.add(name)
            kept["runs"][name].append(run)
            write(path, kept)
            say(f"{worker.case} round {turn + 1}: {name}: {described(run)}")


def longest(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> float | None:
    """Seconds that a slow solver is given, if any run has reached the accuracy."""
    done = [run for of in runs.values() for run in of if "failed" not in run]
    seconds = [run["seconds"] for run in done if run["error"] <= args.accuracy]
    # Half a minute at least, lest a small case starve while its interpreter starts.
    return max(30.0, args.patience * min(seconds)) if seconds else None


def described(run: dict[str, Any]) -> str:
    """A run in a line."""
    if "failed" in run:
        return str(run["failed"])
    return f"{run['seconds']:.2f} s, error {run['error']:.1e}, {run['gradients']:.0f} gradients ({run['note']})"


def order(names: list[str], turn: int) -> list[str]:
    """Each round begins with another solver, so that none is always the one after another; the slow ones are last."""
    quick = [name for name in names if not ROSTER[name].slow]
    shift = 2 * turn % max(len(quick), 1)
    return quick[shift:] + quick[:shift] + [name for name in names if ROSTER[name].slow]


def solve(
    worker: Worker,
    name: str,
    settings: dict[str, dict[str, Any]],
    reference: list[float],
    accuracy: float,
    limit: float | None,
) -> dict[str, Any]:
    """One run of one solver; where it has rungs, the first that reaches the accuracy, else the last."""
    entry = ROSTER[name]
    found = settings.get(entry.tuned or "", {})
    before: dict[str, Any] = {}
    for given in ({**found, **rung} for rung in entry.rungs):
        if before and given == found:
            break
        run = worker.run("solve", "--name", name, "--settings", json.dumps(given), limit=limit)
        if "failed" in run:
            return run if not before else run | {"failed": f"{run['failed']}; before that {described(before)}"}
        run["error"] = relative_error(run["values"], reference)
        # Where a rung has not halved the error, the next would not either.
        if run["error"] <= accuracy or (before and run["error"] > before["error"] / 2):
            break
        before = run
    return run


def relative_error(values: list[float], reference: list[float]) -> float:
    """The largest relative error over the top K; infinite when there are fewer."""
    if len(values) < K:
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(values[:K], reference[:K], strict=True))


def arguments() -> argparse.Namespace:
    """The command line, with the cases and solvers that ``--only`` leaves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, references, settings, runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases and solvers; a tool's name is all")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--accuracy", type=float, default=1e-3, help="relative, of each eigenvalue (default 1e-3)")
    parser.add_argument(
        "--reference-tol", type=float, default=1e-8, help="of a new reference (default 1e-8); from 1e-4 on in float32"
    )
    parser.add_argument(
        "--patience", type=float, default=4, help="a power iteration may take so many times the fastest run (default 4)"
    )
    parser.add_argument("--quick", action="store_true", help="small data, one round, in WORK/quick: a smoke test")
    parser.add_argument("--check", action="store_true", help="check a new reference with another library")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    known = {*CASES, *ROSTER, *(name.partition(" ")[0] for name in ROSTER)}
    for name in args.only:
        if name not in known:
            parser.error(f"--only takes cases ({', '.join(CASES)}) and solvers ({', '.join(ROSTER)}), got {name!r}.")
    named = [name for name in ROSTER if name in args.only or name.partition(" ")[0] in args.only]
    args.solvers = named or list(ROSTER)
    args.cases = [case for case in CASES if case in args.only] or list(QUICK if args.quick else CASES)
    if args.quick:
        args.repeat = 1
    return args


def write(path: Path, value: Any) -> None:
    """JSON, replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def say(line: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
