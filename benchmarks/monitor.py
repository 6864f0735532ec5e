"""What watching lambda_max costs: training the cnn on Fashion-MNIST with a SharpnessMonitor and without.

Rounds of runs from the same weights over the same batches, the two in turn with the order reversed every second round;
the ratio of their times is taken within each round. The weights at the end are compared bit for bit, and the monitor's
lambda_max, at two of ten records, with a run of Lanczos on the same examples to 1e-4.

    python benchmarks/monitor.py [--rounds 7] [--steps 1000] [--results benchmarks/MONITOR_RESULTS.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import aligned, machine
from torch import Tensor, nn

import sharpscope
from sharpscope import MonitorResult, SharpnessMonitor
from sharpscope.zoo import DataSet, load_data, make_model

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
# Of so many records two are checked.
CHECKED = 10
HEAD = ["batch", "examples", "every", "ms a step", "watched", "products", "same weights", "off by", "in the interval"]
NOTES = """\
- ms a step: without the monitor, median of the rounds. watched: the time of a run with the monitor over that of the
  same round's run without, median (least to most). Its construction and the first measurement, from noise, are in it.
- products: Hessian-vector products a measurement, in the mean.
- same weights: whether all bits of the weights at the end are those of the run without the monitor.
- off by: the largest relative difference of a monitored lambda_max from Lanczos to 1e-4 on the same examples at the
  same weights; in the interval: of how many of these measurements it was in the interval stated."""


@dataclass(frozen=True)
class Setting:
    batch: int
    examples: int
    every: int


SETTINGS = (Setting(64, 32, 100), Setting(64, 64, 100), Setting(128, 64, 100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    data = load_data("fashion-mnist")
    rows = [HEAD]
    for setting in SETTINGS:
        rows.append(row(data, setting, args.steps, args.rounds))
        print(aligned([HEAD, rows[-1]]), flush=True)
    where = [f"- {name}: {value}" for name, value in machine(torch.get_num_threads()).items()]
    about = f"cnn, {args.steps} steps of SGD {OPTIONS}, {args.rounds} rounds, `examples=` and `every=` as in the table."
    text = ["# What watching lambda_max costs", "", *where, "", about, "", NOTES, "", "```", aligned(rows), "```", ""]
    print("\n".join(text))
    if args.results is not None:
        args.results.write_text("\n".join(text), encoding="utf-8")


def row(data: DataSet, setting: Setting, steps: int, rounds: int) -> list[str]:
    """One setting, timed and checked."""
    trained(data, setting, 20, watched=True)  # what is loaded late is loaded
    alone, ratios, same, products = [], [], [], []
    for i in range(rounds):
        order = (False, True) if i % 2 == 0 else (True, False)
        runs = {watched: trained(data, setting, steps, watched=watched) for watched in order}
        (bare, weights, _), (seconds, others, result) = runs[False], runs[True]
        alone.append(1e3 * bare / steps)
        ratios.append(seconds / bare)
        same.append(torch.equal(weights, others))
        if result is not None and result.records:
            products.append(statistics.mean(record.products for record in result.records))
    off, inside = checked(data, setting, steps)
    return [
        str(setting.batch),
        str(setting.examples),
        str(setting.every),
        f"{statistics.median(alone):.2f}",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"{statistics.mean(products):.1f}" if products else "-",
        "yes" if all(same) else "NO",
        f"{max(off):.1e}" if off else "-",
        f"{sum(inside)} of {len(inside)}",
    ]


def trained(
    data: DataSet, setting: Setting, steps: int, *, watched: bool, look: Any = None
) -> tuple[float, Tensor, MonitorResult | None]:
    """Seconds, final weights and records of one run; ``look(model, monitor, record)`` sees each measurement."""
    model = make_model("cnn", seed=0, shape=data.shape, classes=data.classes)
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    generator, monitor = torch.Generator().manual_seed(0), None
    started = time.perf_counter()
    if watched:
        problem = sharpscope.Problem(model=model, loss=nn.CrossEntropyLoss(), data=(data.inputs, data.targets))
        monitor = SharpnessMonitor(problem, optimizer, every=setting.every, examples=setting.examples)
    for _ in range(steps):
        chosen = torch.randint(len(data), (setting.batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs[chosen]), data.targets[chosen]).backward()
        optimizer.step()
        if monitor is not None:
            record = monitor.step()
            if record is not None and look is not None:
                look(model, monitor, record)
    seconds = time.perf_counter() - started
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return seconds, weights, None if monitor is None else monitor.result()


def checked(data: DataSet, setting: Setting, steps: int) -> tuple[list[float], list[bool]]:
    """How far the records are from Lanczos on the same examples, and whether their intervals hold it."""
    off: list[float] = []
    inside: list[bool] = []

    def look(model: nn.Module, monitor: SharpnessMonitor, record: Any) -> None:
        if (record.step // setting.every) % CHECKED not in (1, CHECKED // 2):  # the first, and one on the way
            return
        own = sharpscope.Problem(model=model, loss=nn.CrossEntropyLoss(), data=monitor.sample)
        exact = sharpscope.top_eigenvalues(own, k=1, tol=1e-4, method="lanczos")
        off.append(abs(record.lambda_max / exact.lambda_max - 1))
        inside.append(bool(record.lower <= exact.upper[0] and exact.lower[0] <= record.upper))

    trained(data, setting, steps, watched=True, look=look)
    return off, inside


if __name__ == "__main__":
    main()
