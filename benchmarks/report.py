"""Runs as a page of text: what was measured, where, and with which versions and settings. Standard library only."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from roster import ROSTER

PACKAGES = (
    "sharpscope",
    "torch",
    "numpy",
    "scipy",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
    "pyhessian",
    "pytorch_optimizer",
    "loss-landscapes",
    "landscaper",
)
HEAD = ["solver", "stops by", "largest error", "passes", "gradients", "seconds", "seconds / gradient", "peak MiB"]
NOTES = """\
- largest error: relative, over the top 5, against a reference with a bound of its own.
- passes: walks over all data. gradients: work in units of one gradient (forward and backward) over all data; for the
  rivals their calls counted, a product by double backprop or forward over reverse as 3, on a kept graph as 2, by finite
  differences as 2.
- seconds: from the live model and loaded data to the eigenvalues, the tool having made one product on 64 examples
  before; median (least to most) of the rounds. The next column divides by one gradient measured in the same round, at
  its fastest batch size.
- peak MiB: the process's peak memory, the tool's own code included, less that of one that only loads model, data and
  torch.
- `!` marks an error above the accuracy asked for, `*` a result that does not call itself converged."""


def machine(threads: int) -> dict[str, str]:
    """Where it ran, without any name of it."""
    versions = {name: version for name in PACKAGES if (version := _version(name)) != "absent"}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {threads} threads, {_memory()}",
        "python": f"Python {platform.python_version()} on {platform.system()}",
        **versions,
    }


def report(folder: Path, accuracy: float) -> str:
    """All cases whose runs are in ``folder``."""
    cases = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    cases = [case for case in cases if case["accuracy"] == accuracy]
    parts = [f"# Top 5 eigenvalues to a relative {accuracy:g}", "Written by `benchmarks/eigen.py`.", NOTES]
    for described in {json.dumps(case["machine"]): case["machine"] for case in cases}.values():
        names = ", ".join(case["case"] for case in cases if case["machine"] == described)
        where = dict(described)
        first = f"{where.pop('date')}: {where.pop('processor')}; {where.pop('python')}"
        parts.append(f"{names}, {first}; " + ", ".join(f"{name} {version}" for name, version in where.items()) + ".")
    parts += [section(case) for case in cases]
    settings = [f"- {name} ({entry.stops}): {entry.settings}." for name, entry in ROSTER.items()]
    parts.append("\n".join(["## Settings", "", *settings]))
    return "\n\n".join(parts)


def section(case: dict[str, Any]) -> str:
    """One case: what it is, the table, and how many times faster the default is."""
    reference, runs = case["reference"], case["runs"]
    gradients = [run["gradient_seconds"] for runs_of in runs.values() for run in runs_of]
    values = ", ".join(f"{value:.6g}" for value in reference["values"])
    about = f"{reference['about']}. Reference, in {reference.get('dtype', 'float64')} to {reference['tol']:g}: {values}"
    if "check" in reference:
        about += f" (another library's, in float64, differ by {reference['check']:.0e})"
    about += f". One gradient: {statistics.median(gradients):.3g} s."
    order = [name for name in ROSTER if name in runs]
    table = [HEAD, *(row(name, runs[name], case["accuracy"]) for name in order)]
    notes = {name: runs[name][-1].get("failed") or runs[name][-1]["note"] for name in order}
    used = [f"- {name}: {note}." for name, note in notes.items() if note]
    parts = [f"## {case['case']}", about, aligned(table), *ratios(runs, case["accuracy"]), "\n".join(used)]
    return "\n\n".join(part for part in parts if part)


def row(name: str, runs: list[dict[str, Any]], accuracy: float) -> list[str]:
    """One solver: medians over its runs."""
    stops = ROSTER[name].stops
    done = [run for run in runs if "failed" not in run]
    if not done:
        return [name, stops, "none, see below", "", "", "", "", ""]
    error = max(run["error"] for run in done)
    marks = ("!" if error > accuracy else "") + ("*" if any(run["converged"] is False for run in done) else "")
    seconds = [run["seconds"] for run in done]
    spread = f" ({min(seconds):.3g} to {max(seconds):.3g})" if len(done) > 1 else ""
    memory = statistics.median(run["peak"] - run["baseline"] for run in done) / 2**20
    return [
        name,
        stops,
        f"{error:.1e}{marks}",
        f"{statistics.median(run['passes'] for run in done):.0f}",
        f"{statistics.median(run['gradients'] for run in done):.1f}",
        f"{statistics.median(seconds):.3g}{spread}",
        f"{relative(done):.1f}",
        f"{memory:.0f}",
    ]


def relative(runs: list[dict[str, Any]]) -> float:
    """Median of the time in gradients of the same round."""
    return statistics.median(run["seconds"] / run["gradient_seconds"] for run in runs)


def ratios(runs: dict[str, list[dict[str, Any]]], accuracy: float) -> list[str]:
    """How the default compares with the best rival of either kind that reached the accuracy."""
    done = {name: [run for run in of if "failed" not in run] for name, of in runs.items()}
    accurate = {name: relative(of) for name, of in done.items() if of and max(r["error"] for r in of) <= accuracy}
    ours = accurate.get("sharpscope auto")
    if ours is None:
        return []
    lines = []
    for stops, words in (("own tolerance", "that stops by its own tolerance"), ("told", "told when to stop")):
        rivals = {name: time for name, time in accurate.items() if ROSTER[name].stops == stops}
        if rivals:
            best = min(rivals, key=rivals.__getitem__)
            lines.append(
                f"The best rival {words} ({best}) takes {rivals[best] / ours:.2f} times as long as sharpscope auto."
            )
    return ["\n".join(lines)]


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table that also reads as text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for cells in rows:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return found or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"
