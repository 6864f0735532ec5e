"""One task in an interpreter of its own, so that its peak memory is its own; prints one line of JSON.

    python benchmarks/worker.py TASK CASE.pt [--name NAME] [--settings JSON] [--accuracy A] [--quick]

TASK is build, reference, tune, baseline, gradient or solve.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import batching
import cases
import solvers
import torch
import tuning
from roster import K

# The least tolerance of a reference for which float32 will do: its bounds hold rounding of 4e-6 of lambda_max.
SINGLE = 1e-4


def main() -> None:
    """Run the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("build", "reference", "tune", "baseline", "gradient", "solve"))
    parser.add_argument("case", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--reference", type=json.loads, default=[])
    parser.add_argument("--accuracy", type=float, default=1e-3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--reference-tol", type=float, default=1e-8)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")  # one tool's way
    if args.task == "build":
        cases.build(args.case.stem, args.case, args.quick)
        print(json.dumps({}))
        return
    case = cases.load(args.case)
    if args.task == "reference":
        answer = reference(case, args.reference_tol, args.check)
    elif args.task == "tune":
        answer = {"gradient": tuning.gradient_batch(case)} if args.name == "gradient" else {}
        if args.name != "gradient":
            answer = {args.name: tuning.TUNERS[args.name](case, args.reference, args.accuracy)}
    else:
        answer = run(case, args.task, args.name, args.settings, args.accuracy)
    print(json.dumps(answer))


def reference(case: cases.Case, tol: float, check: bool) -> dict[str, Any]:
    """Eigenvalues with a bound, in float64 unless SINGLE will do; with ``check`` held against another library's.

    The rivals' own runs hold them against other products too: their errors are against these.
    """
    from sharpscope import top_eigenvalues

    dtype = torch.float32 if tol >= SINGLE else torch.float64
    result = top_eigenvalues(case.problem(), k=K, tol=tol, dtype=dtype)
    if not result.converged.all():
        raise SystemExit(f"The reference has not converged: {result.summary()}")
    answer = {"values": result.eigenvalues.tolist(), "tol": tol, "about": case.about, "dtype": str(dtype)[6:]}
    if check:
        from scipy.sparse.linalg import eigsh

        double = dataclasses.replace(case, model=case.model.double(), inputs=_double(case.inputs))
        operator = solvers.curvlinops_operator(double, batching.batches(double, min(256, len(case.targets))))
        others = eigsh(
            operator,
            k=K,
            which="LA",
            tol=1e-7,
            v0=solvers.start(case.num_params).double().numpy(),
            return_eigenvectors=False,
        )
        answer["check"] = tuning.error(others, result.eigenvalues)
    return answer


def _double(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def run(case: cases.Case, task: str, name: str, settings: dict[str, Any], accuracy: float) -> dict[str, Any]:
    """A measurement: seconds from the live model to the answer, and the process's peak memory."""
    few = batching.batches(case, 64, 64)
    batching.gradient(case, few)  # the libraries under torch start up at the first gradient
    answer: dict[str, Any] = {}
    if task == "gradient":
        data = batching.batches(case, settings["batch"])
        times = [batching.clock(lambda: batching.gradient(case, data)) for _ in range(3)]
        answer = {"seconds": statistics.median(times), "threads": torch.get_num_threads()}
    elif task == "solve":
        solvers.warm_up(name, case)
        work = solvers.prepare(name, case, settings, accuracy)
        started = time.perf_counter()
        answer = dataclasses.asdict(work())
        answer["seconds"] = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**answer, "peak": peak * (1 if sys.platform == "darwin" else 1024)}


if __name__ == "__main__":
    main()
