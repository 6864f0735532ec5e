"""How often the intervals for the sampling error hold the eigenvalues of all the data.

Random subsets of a trained checkpoint's data, without replacement; the top eigenpairs of each by ``top_eigenvalues``,
the intervals by ``sampling_error``, counted against the eigenvalues on all the data. Each subset's line goes to WORK at
once, so that a run that was stopped goes on.

    python benchmarks/coverage.py sgd.pt --work WORK [--subsets 200] [--examples 1000] [--reference 9.2 4.5 ...]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from report import aligned
from torch import Tensor

import sharpscope
from sharpscope.sampling.sampling_error import sampling_error


def subset(inputs: Tensor, targets: Tensor, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """``examples`` of them without replacement, in random order."""
    chosen = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))[:examples]
    return inputs[chosen], targets[chosen]


def measure(
    whole: sharpscope.Problem, seed: int, examples: int, k: int, tol: float, confidence: float
) -> dict[str, Any]:
    """One subset's eigenvalues and their sampling error, as plain values."""
    problem = sharpscope.Problem(model=whole.model, loss=whole.loss, data=subset(*whole.data, examples, seed))
    found = sharpscope.top_eigenvalues(problem, k=k, tol=tol, vectors=True)
    assert found.eigenvectors is not None
    error = sampling_error(sharpscope.Objective(problem), found.eigenvectors, found.eigenvalues, confidence)
    return {"subset": seed, "eigenvalues": found.eigenvalues.tolist(), "sampling": error.to_dict()}


def intervals(line: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Lower and upper ends and standard errors of each eigenvalue and the ratio; of none, the whole line."""
    sampling = line["sampling"]
    ratio = sampling["ratio"] or {"lower": -math.inf, "upper": math.inf, "se": math.nan}
    lower, upper, se = ([*sampling[name], ratio[name]] for name in ("lower", "upper", "se"))
    return lower, upper, se


def wilson(hits: int, count: int) -> str:
    """A share of hits in %, and the 95 % interval of Wilson 1927 for what it would be in the long run."""
    z, share = 1.96, hits / count
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return f"{100 * share:.1f} ({100 * (middle - half) / scale:.0f} to {100 * (middle + half) / scale:.0f})"


def table(lines: list[dict[str, Any]], reference: list[float]) -> str:
    """For each eigenvalue and the ratio: how the subsets' scatter, what the intervals say of it, and how many hold."""
    k = len(reference)
    true = [*reference, reference[0] / reference[-1]]
    rows = [
        ["", "all data", "subsets, mean - 1 %", "sd %", "stated se %", "width %", "covered %", "too low", "too high"]
    ]
    ends = [intervals(line) for line in lines]
    for i, value in enumerate(true):
        seen = [x["eigenvalues"][i] if i < k else x["eigenvalues"][0] / x["eigenvalues"][-1] for x in lines]
        low, high, se = ([end[part][i] for end in ends] for part in range(3))
        below, above = sum(end < value for end in high), sum(end > value for end in low)
        rows.append(
            [
                f"lambda_{i + 1}" if i < k else f"lambda_1/lambda_{k}",
                f"{value:.4g}",
                f"{100 * (statistics.fmean(seen) / value - 1):+.1f}",
                f"{100 * statistics.pstdev(seen) / value:.1f}",
                f"{100 * statistics.fmean(se) / value:.1f}",
                f"{100 * statistics.median(b - a for a, b in zip(low, high, strict=True)) / value:.0f}",
                wilson(len(lines) - below - above, len(lines)),
                str(below),
                str(above),
            ]
        )
    return aligned(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the lines and the reference")
    parser.add_argument("--subsets", type=int, default=200)
    parser.add_argument("--examples", type=int, default=1000, help="of each subset (default 1000)")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--tol", type=float, default=1e-2, help="relative, of a subset's eigenvalues (default 1e-2)")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--reference", type=float, nargs="+", help="the k eigenvalues on all the data, if known")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    whole = sharpscope.load(args.checkpoint)
    name = f"{args.checkpoint.stem}-{args.examples}-k{args.k}-{args.confidence:g}"
    reference = args.reference
    if reference is None:
        kept = args.work / f"{args.checkpoint.stem}-k{args.k}-reference.json"
        if not kept.exists():
            sharpscope.top_eigenvalues(whole, k=args.k).save(kept)
        reference = sharpscope.EigenResult.load(kept).eigenvalues.tolist()
    if len(reference) != args.k:
        parser.error(f"--reference needs k = {args.k} eigenvalues, got {len(reference)}.")
    path = args.work / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in sorted(set(range(args.subsets)) - {line["subset"] for line in lines}):
        lines.append(measure(whole, seed, args.examples, args.k, args.tol, args.confidence))
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(f"subset {seed}: {', '.join(f'{x:.3f}' for x in lines[-1]['eigenvalues'])}", flush=True)
    lines = [line for line in lines if line["subset"] < args.subsets]
    print(f"\n{len(lines)} subsets of {args.examples} examples, {100 * args.confidence:g} % intervals\n")
    print(table(lines, reference))


if __name__ == "__main__":
    main()
