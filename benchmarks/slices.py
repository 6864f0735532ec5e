"""What a point of a loss surface costs, in bare forward passes: ours, loss-landscapes' and landscaper's.

Each walks over a grid of one plane of the same weights on the same data. Rounds of surfaces, all tools in turn with the
order reversed every second round; the ratio to a bare forward pass (the model alone, in inference mode, in
micro-batches of our size, as often as there are points) is taken within each round, and its median (least to most) is
reported. Ours takes the accuracy too. A point by itself, without a surface's start, is paired with a bare pass in turns
besides; the median of the ratios (first to third quartile) is reported. The rivals are given the metric that their
documentation shows, the loss of all data in one batch, and, "told", our micro-batches in inference mode.

The rivals need numpy below 2, so they have an environment of their own:

    pip install '.[bench-slices]'
    python benchmarks/slices.py [--rounds 7] [--results benchmarks/SLICE_RESULTS.md]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import aligned, machine
from torch import Tensor, nn

import sharpscope
from sharpscope.slices import random_directions
from sharpscope.slices.evaluation import PointEvaluator
from sharpscope.weights.perturbation import Perturbation
from sharpscope.zoo import load_data, make_model

# Model, arguments, number of Fashion-MNIST images, and points on each axis.
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "cnn": ("cnn", {}, 2000, 5),
    "wide_resnet 10-2": ("wide_resnet", {"depth": 10, "widen": 2}, 500, 5),
    "mlp": ("mlp", {"hidden": (256, 256)}, 2000, 21),
}
Surface = Callable[[], Any]


def in_parts(size: int) -> Callable[[nn.Module, tuple[Tensor, Tensor]], float]:
    """The mean loss in micro-batches of ``size``, in inference mode."""

    def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        total = torch.zeros(())
        with torch.inference_mode():
            for x, y in zip(data[0].split(size), data[1].split(size), strict=True):
                total += nn.functional.cross_entropy(model(x), y, reduction="sum")
        return float(total / len(data[1]))

    return loss


def at_once(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The mean loss of all data in one batch."""
    return nn.functional.cross_entropy(model(data[0]), data[1]).item()


def surfaces(model: nn.Module, data: tuple[Tensor, Tensor], points: int, size: int) -> dict[str, Surface]:
    """What walks over ``points`` x ``points`` of one plane, by tool."""
    problem = sharpscope.Problem(model=model, loss=nn.CrossEntropyLoss(), data=data)
    plane = random_directions(problem, 2)

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(points**2):
                for x in data[0].split(size):
                    model(x)

    def moved(direction: Tensor) -> nn.Module:
        other = copy.deepcopy(model)
        vector = nn.utils.parameters_to_vector(other.parameters()).detach() + direction.float()
        nn.utils.vector_to_parameters(vector, other.parameters())
        return other

    ends = [moved(d.vector) for d in plane]
    lists = [
        [p.detach() - w.detach() for p, w in zip(end.parameters(), model.parameters(), strict=True)] for end in ends
    ]

    def loss_landscapes(metric: Callable[..., float]) -> Surface:
        from loss_landscapes import planar_interpolation
        from loss_landscapes.metrics.metric import Metric

        class Measured(Metric):  # type: ignore[misc]
            def __call__(self, wrapper: Any) -> float:
                return metric(wrapper.modules[0], data)

        own, *others = (copy.deepcopy(m) for m in (model, *ends))
        # deepcopy_model, or the model would be left where the walk ends.
        return lambda: planar_interpolation(own, *others, Measured(), steps=points, deepcopy_model=True)

    def landscaper(metric: Callable[..., float]) -> Surface:
        from landscaper.compute import compute_loss_landscape

        own = copy.deepcopy(model)

        def walk() -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                compute_loss_landscape(own, data, lists, metric, steps=points, distance=1.0, dim=2, device="cpu")

        return walk

    found: dict[str, Surface] = {
        "bare forward pass": bare,
        "sharpscope": lambda: sharpscope.loss_surface(problem, plane, points),
    }
    for name, make in (("loss-landscapes", loss_landscapes), ("landscaper", landscaper)):
        with contextlib.suppress(ImportError):
            found[name] = make(at_once)
            found[f"{name}, told"] = make(in_parts(size))
    return found


def timed(tools: dict[str, Surface], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for turn in range(rounds + 1):
        for name in list(tools) if turn % 2 == 0 else list(tools)[::-1]:
            started = time.perf_counter()
            tools[name]()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def paired(model: nn.Module, data: tuple[Tensor, Tensor], size: int, pairs: int) -> list[float]:
    """Seconds of a point over those of a bare forward pass right before or after it, so many times."""
    problem = sharpscope.Problem(model=model, loss=nn.CrossEntropyLoss(), data=data)
    objective = sharpscope.Objective(problem)
    ratios = []
    with Perturbation(objective.terms.params) as moved, objective.measuring(products=False):
        evaluator = PointEvaluator({"data": objective}, [random_directions(problem, 2)], "frozen", size, moved)
        evaluator.evaluate(0, (0.0, 0.0))

        def bare() -> None:
            with torch.inference_mode():
                for x in data[0].split(size):
                    model(x)

        for i in range(pairs):
            place = (i % 8 / 7 - 0.5, i // 8 % 8 / 7 - 0.5)
            runs = {"bare": bare, "point": lambda place=place: evaluator.evaluate(0, place)}
            seconds = {}
            for name in sorted(runs, reverse=i % 2 == 1):
                started = time.perf_counter()
                runs[name]()
                seconds[name] = time.perf_counter() - started
            ratios.append(seconds["point"] / seconds["bare"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of surfaces; 0 is pairs alone, not written")
    parser.add_argument("--points", type=int, help="on each axis")
    parser.add_argument("--pairs", type=int, default=80, help="of a point and a bare pass (default 80)")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "SLICE_RESULTS.md")
    args = parser.parse_args()
    text = ["# A point of a loss surface", "", *(f"- {k}: {v}" for k, v in machine(torch.get_num_threads()).items())]
    text += ["", " ".join(__doc__.split("\n\n")[1].split()), ""]
    for case in args.only:
        kind, options, examples, points = CASES[case]
        points = args.points or points
        data = load_data("fashion-mnist")
        model = make_model(kind, seed=0, shape=data.shape, classes=data.classes, **options).eval()
        batch = data.inputs[:examples].clone(), data.targets[:examples].clone()
        size = sharpscope.loss_surface(
            sharpscope.Problem(model=model, loss=nn.CrossEntropyLoss(), data=batch), points=2
        ).provenance["micro_batch"]
        low, middle, high = statistics.quantiles(paired(model, batch, size, args.pairs), n=4)
        alone = f"A point by itself: {middle:.3f} bare forward passes ({low:.3f} to {high:.3f}, {args.pairs} pairs)."
        print(f"{case}, {alone}", flush=True)
        if not args.rounds:
            continue
        seconds = timed(surfaces(model, batch, points, size), args.rounds)
        bare = seconds["bare forward pass"]
        rows = [["", "ms a point", "bare forward passes"]]
        for name, each in seconds.items():
            ratios = [a / b for a, b in zip(each, bare, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([name, f"{1e3 * float(np.median(each)) / points**2:.1f}", ratio])
        title = f"## {case}, {examples} images, micro-batches of {size}, {points} x {points} points"
        text += [title, "", alone, "", "```", aligned(rows), "```", ""]
        print("\n".join(text[-8:]), flush=True)
    if not args.rounds:
        return
    args.results.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
