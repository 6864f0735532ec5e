"""Comparisons of small made-up results, for the tests of pages, and what the numbers of a slice's status mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharpscope.results import (
    Cost,
    DensityResult,
    EigenResult,
    Estimate,
    Measure,
    SharpnessResult,
    SliceResult,
    TraceResult,
)
from sharpscope.results.comparison import Comparison, Performance, Subject

# Of SliceResult.status, as files hold it.
PENDING, DONE, DIVERGED = 0, 1, 2

COST = Cost(3, 12, 30.5, 1.25)


def known(name: str, **more: Any) -> dict[str, Any]:
    return {
        "checkpoint": f"{name}.pt",
        "sha256": f"{sum(map(ord, name)):064x}",
        "model": "mlp",
        "data": "digits",
        "split": "train",
        "num_examples": 100,
        "split_examples": 1437,
        "examples_seed": 3,
        "num_params": 50,
        "mode": "eval",
        "dtype": "float32",
        "batchnorm": "none",
        "statistics": "frozen",
        "loss_function": "cross_entropy",
        "recipe": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "seed": 7},
        "versions": {"sharpscope": "0.1.0", "torch": "2.9.0"},
        "seed": 0,
        "also": {"test": 50},
        **more,
    }


def eigen(name: str, scale: float) -> EigenResult:
    values = scale * np.array([8.0, 5.0, 3.5, 2.0, 1.0])
    half = 1e-3 * values
    sure = np.array([True] * 4 + [scale < 2])
    ends = {"lower": values - half, "upper": values + half, "missed_probability": np.full(5, 1e-4)}
    return EigenResult(
        values, half, converged=sure, loss=0.1, gradient_norm=0.2, cost=COST, provenance=known(name), **ends
    )


def density(name: str, scale: float) -> DensityResult:
    rng = np.random.default_rng(0)
    nodes = scale * np.sort(rng.normal(0, 1, (3, 8)) ** 3, axis=1)
    weights = np.full((3, 8), 1 / 8)
    trace, norm = Estimate(20 * scale, 1.0), Estimate(10 * scale, 0.5)
    return DensityResult(nodes, weights, 0, trace, norm, 0.1, 0.2, COST, known(name))


def trace(name: str, scale: float) -> TraceResult:
    return TraceResult(Estimate(20 * scale, 1.0), Estimate(10 * scale, 0.5), 0.1, 0.2, COST, known(name))


def sharpness(name: str, scale: float) -> SharpnessResult:
    ball = {"rho": 0.05, "p": 2, "adaptive": None, "ascent": "1 step"}
    measures = [
        Measure("m-sharpness", v, 0.1 * v, 0.8 * v, 1.2 * v, {"m": m, **ball}, {"first order": v}, 3.0, 100)
        for m, v in ((8, 0.2 * scale), (32, 0.1 * scale))
    ]
    settings = {"lr": 0.05, "momentum": 0.9, "lambda_max": 8 * scale, "SGD's edge": 76.0}
    measures.append(Measure("edge", 8 * scale / 76, None, 0.1 * scale, 0.11 * scale, settings, {}, 5.0, 100))
    return SharpnessResult(tuple(measures), 0.1, 0.2, COST, known(name))


def line(name: str, scale: float, kind: str = "random", **settings: Any) -> SliceResult:
    """A line of train and test; towards a checkpoint with a hump of 1 on its way."""
    t = np.linspace(-0.5, 1.5, 9) if kind == "checkpoint" else np.linspace(-1, 1, 9)
    loss = 0.1 + np.sin(np.pi * t) ** 2 if kind == "checkpoint" else 0.1 + scale * t**2
    count = 1 if kind == "checkpoint" else 3
    both = np.stack([np.stack([(1 + 0.1 * i) * loss for i in range(count)])] * 2) * np.array([1, 1.5])[:, None, None]
    entry = {"kind": kind, "label": f"{kind} direction", "normalisation": "filter", "one_dimensional": "fixed"}
    lines = tuple(({**entry, "seed": i, "index": 1, "length": 1.0, **settings},) for i in range(count))
    return _slice(name, (t,), both, lines)


def plane(name: str, scale: float, wrong: bool = False, seed: int = 7) -> SliceResult:
    t = np.linspace(-1, 1, 7)
    x, y = np.meshgrid(t, t)
    loss = np.stack([0.1 + scale * (x**2 + 2 * y**2)] * 2)[:, None]
    if wrong:
        loss[..., 0, 0] = np.nan
    entry = {"kind": "random", "normalisation": "filter", "one_dimensional": "fixed", "seed": seed, "length": 2.0}
    pair = tuple({**entry, "label": f"random direction {i}", "index": i} for i in (1, 2))
    return _slice(name, (t, t), loss, (pair,))


def _slice(name: str, axes: tuple[Any, ...], loss: Any, directions: Any) -> SliceResult:
    count, dimensions = len(directions), len(axes)
    return SliceResult(
        axes=axes,
        loss=loss,
        accuracy=np.exp(-loss),
        status=np.where(np.isfinite(loss[0]), DONE, DIVERGED).astype(np.int8),
        splits=("train", "test"),
        directions=directions,
        centre=np.array([[0.1, 0.9], [0.15, 0.8]]),
        slopes=np.full((count, dimensions), np.nan),
        curvatures=np.full((count, dimensions, dimensions), np.nan),
        cost=COST,
        provenance=known(name),
    )


def subject(name: str, scale: float = 1.0, group: str | None = None, pair: str | None = None) -> Subject:
    performance = {"train": Performance(0.1 * scale, 0.95, 1437), "test": Performance(0.2 * scale, 0.9, 360)}
    measured: dict[str, Any] = {
        "eigen": eigen(name, scale),
        "trace": trace(name, scale),
        "density": density(name, scale),
        "sharpness": sharpness(name, scale),
        "line": line(name, scale),
        "surface": plane(name, scale, wrong=scale > 2),
    }
    return Subject(
        name=name, group=group, pair=pair, performance=performance, provenance={"epoch": 5, **known(name)}, **measured
    )


def two(first: str = "sgd", second: str = "sam") -> Comparison:
    """Two checkpoints and the way between them."""
    way = line(first, 1.0, "checkpoint", towards=second)
    return Comparison(
        subjects=(subject(first, 2.5), subject(second, 0.7)),
        between=((first, second, way),),
        level="default",
        command=f"sharpscope compare {first}.pt {second}.pt --out report",
    )


def groups(runs: int = 3) -> Comparison:
    """Runs of two recipes, paired by seed."""
    found = [
        subject(f"{group}-{i}", scale * (1 + apart * i), group, str(i))
        for group, scale, apart in (("sgd", 1.2, 0.1), ("sam", 0.6, 0.12))
        for i in range(runs)
    ]
    return Comparison(subjects=tuple(found), level="default", command="sharpscope compare")
