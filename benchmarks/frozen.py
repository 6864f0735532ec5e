"""Record what a fixed set of small runs gives, and compare two recordings: a check that a change of the code changes no
number.

    export OMP_NUM_THREADS=1
    PYTHONPATH=OLD python benchmarks/frozen.py record old.json      # OLD: a checkout of the code before the change
    PYTHONPATH=NEW python benchmarks/frozen.py record new.json
    python benchmarks/frozen.py compare old.json new.json           # exit status 1 and a list of differences

``record --only NAME`` takes the runs whose name begins with NAME; ``compare --allow PREFIX ...`` prints the differences
of such runs and does not count them. ``benchmarks/frozen/0.1.0.json.gz`` was recorded with 0.1.0; both commands read
and write ``.json`` and ``.json.gz``.

The set covers every analysis and every command, in float64 on one thread, with fixed seeds and micro-batches and a
clock that is replaced by a counter, so that no choice depends on the machine's speed. Two recordings of one code on one
machine are equal in every digit. The last digits depend on the CPU, on torch and on the BLAS, and iterations amplify
them: where a difference of 1e-12 matters, record the old code on the same machine instead of using the file.

Comparison: equal keys; equal integers and booleans; equal passes, products and gradients; floats and arrays to 1e-12 of
their largest entry; bounds, residuals and standard errors to 1e-12 of the largest eigenvalue or value of their result.
Text is compared only where it is one of a fixed list (method, operator, kind, ...) and in the interface: public names,
their arguments and defaults, options of the commands. Time, versions, paths and hashes are left out. Public classes may
gain members, and lose none.

The runs use public names alone, so that the file works with any later version. Two exceptions fix the choice of a
clock: every ``is_faster`` in a module of ``sharpscope`` (whether subsets of m-sharpness go through vmap) is replaced,
and so is ``time.perf_counter``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gzip
import importlib
import inspect
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
_ticks = itertools.count()
_clock = time.perf_counter
time.perf_counter = lambda: float(next(_ticks))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import sharpscope  # noqa: E402
from sharpscope import Problem  # noqa: E402

Run = Callable[[], Any]
RUNS: dict[str, Run] = {}

# Arrays of more numbers are recorded by some of their entries, their sum and their norm.
MOST, KEPT = 100, 25

TOLERANCE = 1e-12

# What differs between equal runs, or is prose.
IGNORED = {
    *("seconds", "versions", "version", "checkpoint", "path", "sha256", "digest", "command", "findings"),
    *("definition", "label", "order", "reason", "left_out", "memory_seconds"),
}

# Text that is one of a fixed list.
LISTED = {
    *("analysis", "method", "which", "operator", "mode", "dtype", "device", "split", "splits", "kind", "spacing"),
    *("normalisation", "one_dimensional", "statistics", "batchnorm", "by", "name", "status", "level", "group", "pair"),
    *("data", "model", "optimizer", "variant", "schedule", "adaptive", "loss_function", "layer", "layers", "files"),
    *("warnings", "params", "of", "error"),
}

# Bounds and errors, whose rounding is that of the largest value of their result.
OF_SCALE = {
    *("residual", "residuals", "lower", "upper", "standard_error", "se", "trace_error", "trace_errors"),
    *("sampling_error", "gradient_norm", "slopes", "error"),
}


def run(name: str) -> Callable[[Run], Run]:
    def keep(function: Run) -> Run:
        assert name not in RUNS, name
        RUNS[name] = function
        return function

    return keep


# Problems


def digits(split: str = "train", examples: int | None = None) -> tuple[Tensor, Tensor]:
    from sharpscope.zoo import load_data

    data = load_data("digits", split)
    return data.inputs[:examples].double(), data.targets[:examples]


def fitted(model: nn.Module, data: tuple[Tensor, Tensor], steps: int = 40, lr: float = 0.5) -> nn.Module:
    """After some steps of gradient descent by torch alone."""
    model.train()
    for _ in range(steps):
        model.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= lr * weight.grad
    model.zero_grad()
    return model.eval()


def mlp(seed: int = 0, examples: int | None = None, steps: int = 40, hidden: tuple[int, ...] = (8,)) -> Problem:
    from sharpscope.zoo import make_model

    model = make_model("mlp", seed=seed, hidden=hidden).double()
    data = digits()
    return Problem(model=fitted(model, data, steps), loss=nn.CrossEntropyLoss(), data=tuple(t[:examples] for t in data))


def blobs(count: int = 60, inputs: int = 4, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    centres = torch.randn(classes, inputs, generator=source, dtype=torch.float64)
    return centres[targets] + torch.randn(count, inputs, generator=source, dtype=torch.float64), targets


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def small(activation: type[nn.Module] = nn.Tanh, seed: int = 0, **changes: Any) -> Problem:
    """Three classes in four dimensions, 43 parameters."""
    data = blobs()
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)), seed)
    return Problem(**{"model": fitted(model, data, 30), "loss": nn.CrossEntropyLoss(), "data": data, **changes})


def normed(seed: int = 0, **changes: Any) -> Problem:
    """With BatchNorm."""
    data = blobs()
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), seed)
    return Problem(**{"model": fitted(model, data, 30), "loss": nn.CrossEntropyLoss(), "data": data, **changes})


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(ids)))
        return logits


def sequences(shift: bool) -> Problem:
    ids = torch.randint(6, (20, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:9, 5:] = -100
    return Problem(model=seeded(Tokens), loss=sharpscope.TokenCrossEntropy(shift=shift), data=(ids, labels))


def quartic(output: Tensor, target: Tensor) -> Tensor:
    return (output - nn.functional.one_hot(target, output.shape[1])).pow(4).sum(1).mean()


def steep(output: Tensor, target: Tensor) -> Tensor:
    """Overflows at coordinates that an axis may have."""
    return (output - nn.functional.one_hot(target, output.shape[1])).pow(8).sum(1).mean()


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu", "micro_batch": 64}


def top(problem: Problem, k: int = 3, tol: float = 1e-6, **options: Any) -> dict[str, Any]:
    result = sharpscope.top_eigenvalues(problem, k, tol, **{**EXACT, "generator": source(), **options})
    return {"result": result.to_dict(), "vectors": result.eigenvectors, "labels": result.labels}


# Eigenvalues

for _method in ("lanczos", "power", "auto"):
    run(f"eigen/method-{_method}")(lambda method=_method: top(mlp(examples=300), 2, 1e-4, method=method, vectors=True))
for _which in ("largest", "smallest", "both", "magnitude"):
    run(f"eigen/which-{_which}")(lambda which=_which: top(small(), which=which, vectors=True))
for _which in ("largest", "smallest", "magnitude"):
    run(f"eigen/power-{_which}")(
        lambda which=_which: top(small(), 2, 1e-2, which=which, method="power", max_passes=300)
    )
for _operator in ("hessian", "ggn", "fisher", "empirical-fisher", "finite-difference"):
    run(f"eigen/operator-{_operator}")(lambda operator=_operator: top(small(), 2, 1e-4, operator=operator))
    run(f"eigen/guided-{_operator}")(
        lambda operator=_operator: top(mlp(steps=80), 3, 1e-3, method="guided", operator=operator, micro_batch=256)
    )
    run(f"objective/{_operator}")(lambda operator=_operator: products(small(), operator))


@run("eigen/guided")
def _() -> Any:
    return top(mlp(steps=80), 5, 1e-3, method="guided", vectors=True, population=True, micro_batch=256)


@run("eigen/certify")
def _() -> Any:
    return {method: top(mlp(steps=60), 3, 1e-3, method=method, certify=0.2) for method in ("lanczos", "guided")}


@run("eigen/population")
def _() -> Any:
    return {which: top(mlp(examples=200), 3, 1e-4, which=which, population=True) for which in ("largest", "both")}


@run("eigen/weight-decay")
def _() -> Any:
    return top(small(weight_decay=0.1))


@run("eigen/params")
def _() -> Any:
    return top(small(params=["2.*"]), vectors=True)


@run("eigen/basis")
def _() -> Any:
    return top(mlp(examples=200), 3, 1e-5, max_basis=16, basis_device="cpu")


@run("eigen/not-converged")
def _() -> Any:
    return top(mlp(examples=200), 3, 1e-8, max_passes=3)


@run("eigen/generator")
def _() -> Any:
    return top(small(), generator=source(7))


@run("eigen/float32")
def _() -> Any:
    problem = small()
    problem.model.float()
    data = problem.data[0].float(), problem.data[1]
    return top(dataclasses.replace(problem, data=data), tol=1e-3, dtype=torch.float32)


@run("eigen/journal")
def _() -> Any:
    problem, found = mlp(examples=200), {}
    options: dict[str, Any] = {"method": "lanczos", "journal": "journal"}
    found["few"] = top(problem, 3, 1e-8, max_passes=3, **options)
    found["again"] = top(problem, 3, 1e-8, max_passes=3, **options)
    found["more"] = top(problem, 3, 1e-8, max_passes=6, **options)
    found["end"] = top(problem, 3, 1e-8, **options)
    found["without"] = top(problem, 3, 1e-8, method="lanczos")
    return found


@run("eigen/journal-guided")
def _() -> Any:
    problem, options = mlp(steps=60), {"method": "guided", "micro_batch": 256}
    first = top(problem, 3, 1e-5, max_passes=2, journal="journal", certify=0.2, **options)
    return first, top(problem, 3, 1e-5, journal="journal", certify=0.2, **options)


@run("eigen/losses")
def _() -> Any:
    data = blobs()
    one_hot = nn.functional.one_hot(data[1], 3).double()
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    some = torch.where(torch.arange(60) % 7 == 0, -100, data[1])
    found = {}
    for name, loss, target in (
        ("weighted", nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1), some),
        ("sum", nn.CrossEntropyLoss(reduction="sum"), data[1]),
        ("functional", nn.functional.cross_entropy, data[1]),
        ("mse", nn.MSELoss(), one_hot),
        ("bce", nn.BCEWithLogitsLoss(pos_weight=weights), one_hot),
        ("own", quartic, data[1]),
    ):
        for operator in ("hessian", "ggn") if name != "own" else ("hessian",):
            problem = small(loss=loss, data=(data[0], target))
            found[f"{name}-{operator}"] = top(problem, 2, 1e-5, operator=operator, micro_batch=16)
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)))
    found["nll"] = top(Problem(model=model, loss=nn.NLLLoss(), data=data), 2, 1e-5, micro_batch=16)
    return found


@run("eigen/tokens")
def _() -> Any:
    found = {f"shift-{shift}": top(sequences(shift), 2, 1e-5, micro_batch=6) for shift in (False, True)}
    return {**found, "ggn": top(sequences(True), 2, 1e-5, operator="ggn", micro_batch=6)}


@run("eigen/data")
def _() -> Any:
    inputs, targets = blobs()
    batches = [(inputs[:7], targets[:7]), (inputs[7:40], targets[7:40]), (inputs[40:], targets[40:])]
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=13)
    found = {}
    for name, data in (("batches", batches), ("dataset", TensorDataset(inputs, targets)), ("loader", loader)):
        found[name] = top(small(data=data), 2, 1e-5, micro_batch=16)
    found["kept"] = top(small(data=loader), 2, 1e-5, micro_batch="loader")
    return found


@run("eigen/batchnorm")
def _() -> Any:
    inputs, targets = blobs()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=20)
    found = {"eval": top(normed(), 2, 1e-5)}
    for operator in ("hessian", "ggn"):
        kept = normed(data=loader, mode="train")
        found[f"train-{operator}"] = top(kept, 2, 1e-5, operator=operator, micro_batch="loader")
    found["train-chosen"] = top(normed(data=loader, mode="train"), 2, 1e-5, micro_batch=None)
    return found


@run("eigen/cnn")
def _() -> Any:
    from sharpscope.zoo import make_model

    data = digits(examples=64)
    model = make_model("cnn", seed=0, channels=(4, 4)).double()
    problem = Problem(model=fitted(model, data, 3, 0.1), loss=nn.CrossEntropyLoss(), data=data)
    found = {op: top(problem, 2, 1e-3, operator=op, micro_batch=32) for op in ("hessian", "ggn", "empirical-fisher")}
    return {**found, "audited": top(problem, 1, 1e-2, micro_batch=None)}


# The objective


def products(problem: Problem, operator: str = "hessian", **options: Any) -> dict[str, Any]:
    from sharpscope.operators import curvature

    objective = sharpscope.Objective(
        problem, **{**EXACT, "micro_batch": 16, **options}, curvature=curvature(operator, source())
    )
    block = torch.randn(objective.num_params, 3, generator=source(), dtype=torch.float64)
    loss, gradient = objective.loss_and_gradient()
    whole = objective.hvp(block)
    again, parts = objective.hvp_per_batch(block)
    return {
        "loss": loss,
        "gradient": gradient,
        "product": whole,
        "again": again,
        "parts": {name: getattr(parts, name) for name in ("weights", "forms", "squares", "sizes")},
        "attributes": {
            name: getattr(objective, name)
            for name in ("num_params", "num_examples", "passes", "hvps", "gradients", "micro_batch", "batchnorm")
        },
    }


@run("objective/problems")
def _() -> Any:
    loader = DataLoader(TensorDataset(*blobs()), batch_size=20)
    return {
        "decay": products(small(weight_decay=0.3)),
        "tokens": products(sequences(True), micro_batch=6),
        "own": products(small(loss=quartic)),
        "batchnorm": products(normed()),
        "train": products(normed(data=loader, mode="train"), micro_batch="loader"),
        "mlp": products(mlp(examples=130), micro_batch=None),
        "float32": products(small(), dtype=torch.float32),
    }


# Blocks, density, trace

for _by in ("module", "parameter"):

    @run(f"blocks/{_by}")
    def _(by: str = _by) -> Any:
        options = {**EXACT, "generator": source()}
        found = {
            op: sharpscope.block_spectra(small(), by, 1e-5, 4, operator=op, **options) for op in ("hessian", "ggn")
        }
        found["mlp"] = sharpscope.block_spectra(mlp(examples=100), by, 1e-3, 4, **options)
        found["few"] = sharpscope.block_spectra(mlp(examples=100), by, 1e-8, 2, max_passes=3, **options)
        return {name: result.to_dict() for name, result in found.items()}


@run("density")
def _() -> Any:
    problem = mlp(examples=200)
    known = sharpscope.top_eigenvalues(problem, 3, 1e-4, vectors=True, generator=source(), **EXACT)
    found = {
        "plain": sharpscope.spectral_density(problem, 3, 12, source(), **EXACT),
        "known": sharpscope.spectral_density(problem, 3, 12, source(), known=known, **EXACT),
        "ggn": sharpscope.spectral_density(problem, 3, 8, source(), operator="ggn", **EXACT),
        "small": sharpscope.spectral_density(small(weight_decay=0.1), 4, 50, source(), **EXACT),
    }
    return {name: {**result.to_dict(), "moment": vars(result.moment(3))} for name, result in found.items()}


@run("trace")
def _() -> Any:
    problem = mlp(examples=200)
    found = {op: sharpscope.trace(problem, 6, source(), operator=op, **EXACT) for op in ("hessian", "ggn", "fisher")}
    found["population"] = sharpscope.trace(problem, 6, source(), population=True, **EXACT)
    found["decay"] = sharpscope.trace(small(weight_decay=0.1), 8, source(), **EXACT)
    return {name: result.to_dict() for name, result in found.items()}


# Sharpness


@contextlib.contextmanager
def side_by_side(value: bool) -> Iterator[None]:
    """Fix the choice of a clock, whether the subsets of m-sharpness go through vmap, to ``value``."""
    importlib.import_module("sharpscope.sharpness")
    changed = [
        (module, key, vars(module)[key])
        for name, module in list(sys.modules.items())
        for key in ("is_faster", "faster")  # now, and in 0.1.0
        if name.startswith("sharpscope.") and inspect.isfunction(vars(module).get(key))
    ]
    if not changed:
        raise RuntimeError("No module of sharpscope has a function `is_faster`. Give its new name in side_by_side().")
    try:
        for module, key, _ in changed:
            setattr(module, key, lambda *args, **kwargs: value)
        yield
    finally:
        for module, key, function in changed:
            setattr(module, key, function)


FEW: dict[str, Any] = {**EXACT, "draws": 3, "probes": 3, "rho": (0.02, 0.1)}


def sharp(problem: Problem, measures: Any, **options: Any) -> dict[str, Any]:
    result = sharpscope.measure_sharpness(problem, measures, source(), **{**FEW, **options})
    found: dict[str, Any] = result.to_dict()
    return found


def recipe(problem: Problem) -> Problem:
    said = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "rho": 0.05, "variant": "sam", "seed": 1}
    return dataclasses.replace(problem, provenance={"recipe": said})


for _together in (False, True):

    @run(f"sharpness/all-{'together' if _together else 'alone'}")
    def _(together: bool = _together) -> Any:
        with side_by_side(together):
            return sharp(recipe(mlp(examples=64)), ("all",), m=(4, 16))

    @run(f"sharpness/m-{'together' if _together else 'alone'}")
    def _(together: bool = _together) -> Any:
        found, problem = {}, mlp(examples=64)
        with side_by_side(together):
            for p, adaptive in itertools.product((2, float("inf")), (None, "elementwise", "filter")):
                options = {"m": (4, 16), "adaptive": adaptive, "p": p, "eta": 0.01 if adaptive else 0.0}
                found[f"p={p} {adaptive}"] = sharp(problem, "m-sharpness", **options)
            found["steps"] = sharp(problem, "m-sharpness", m=8, ascent=3)
            found["apgd"] = sharp(small(), "m-sharpness", m=20, ascent="apgd")
            found["default m"] = sharp(small(nn.ReLU), "m-sharpness")
        return found


@run("sharpness/adaptive")
def _() -> Any:
    names = "worst-case, average-case, lambda-max, trace"
    found = {}
    with side_by_side(False):
        for adaptive in (None, "elementwise", "filter"):
            found[str(adaptive)] = sharp(small(nn.ReLU), names, adaptive=adaptive, eta=0.01 if adaptive else 0.0)
        for ascent in (2, sharpscope.Ascent(4, adaptive=True, restarts=2)):
            found[str(ascent)] = sharp(small(nn.ReLU), "worst-case", ascent=ascent)
        found["inf"] = sharp(small(nn.ReLU), "worst-case", p=float("inf"))
        found["tokens"] = sharp(sequences(True), ("all",), m=5, micro_batch=6)
        found["edge"] = sharp(small(), "edge, alignment", lr=0.1)
        found["batchnorm"] = sharp(normed(), ("all",), m=20)
    return found


@run("sharpness/invariance")
def _() -> Any:
    with side_by_side(False):
        found = {"mlp": sharpscope.rescaling_invariance(mlp(examples=40, hidden=(5, 5)), 3.0, source(), m=10)}
        problem, ascent = small(nn.ReLU), sharpscope.Ascent(2)
        found["small"] = sharpscope.rescaling_invariance(problem, 2.0, source(), m=20, ascent=ascent, draws=2, probes=2)
    return {name: result.to_dict() for name, result in found.items()}


@run("sharpness/invariance-together")
def _() -> Any:
    with side_by_side(True):
        return sharpscope.rescaling_invariance(small(nn.ReLU), 2.0, source(), m=20, draws=2, probes=2).to_dict()


# Slices

SLICED: dict[str, Any] = {"dtype": torch.float64, "device": "cpu", "micro_batch": 32}


def cut(result: Any) -> dict[str, Any]:
    lines = range(len(result.directions))
    return {
        "result": result.to_dict(grid=True),
        "prediction": [result.prediction(line) for line in lines],
        "barrier": [result.barrier(line=line) for line in lines],
    }


def line(problem: Problem, *args: Any, **options: Any) -> dict[str, Any]:
    return cut(sharpscope.loss_slice(problem, *args, **{**SLICED, **options}))


def surface(problem: Problem, *args: Any, **options: Any) -> dict[str, Any]:
    return cut(sharpscope.loss_surface(problem, *args, **{**SLICED, **options}))


@run("slice/random")
def _() -> Any:
    from sharpscope.slices import random_directions

    problem, found = small(), {}
    for normalisation, flat in (("filter", "fixed"), ("layer", "scaled"), ("model", "fixed"), ("none", "scaled")):
        made = random_directions(problem, 2, source(), normalisation=normalisation, one_dimensional=flat)
        vectors = [direction.vector for direction in made]
        found[f"{normalisation} {flat}"] = {"vectors": vectors, "line": line(problem, made, 5)}
    found["default"] = line(problem, points=7, also={"test": blobs(30, seed=1)})
    found["log"] = line(problem, points=6, spacing="log")
    found["coordinates"] = line(problem, coordinates=(-0.3, 0.1, 0.7))
    found["refine"] = line(problem, points=5, refine=3)
    found["diverged"] = line(small(nn.ReLU, loss=steep), points=5, span=(-1e30, 1e30))
    found["tokens"] = line(sequences(True), points=5, micro_batch=6)
    found["decay"] = line(small(weight_decay=0.1), points=5)
    return found


@run("slice/curvature")
def _() -> Any:
    from sharpscope.slices import eigenvector_directions, gradient_directions

    problem = small()
    known = sharpscope.top_eigenvalues(problem, 3, 1e-6, vectors=True, generator=source(), **EXACT)
    along, gradient = eigenvector_directions(known), gradient_directions(problem, 0.05, **SLICED)
    return {
        "eigenvectors": line(problem, along, 5),
        "gradient": line(problem, gradient, 5, curvature=True),
        "gradient vectors": [direction.vector for direction in gradient],
        "surface": surface(problem, along, 5, (-0.5, 0.5)),
        "surface gradient": surface(problem, gradient, 5, curvature=True),
        "off": line(problem, along, 5, curvature=False),
    }


@run("slice/surface")
def _() -> Any:
    problem = small()
    return {
        "random": surface(problem, points=5, also={"test": blobs(30, seed=1)}),
        "uneven": surface(problem, points=(3, 4), span=((-1.0, 0.5), (-0.2, 0.4)), spacing="log"),
        "refine": surface(problem, points=5, refine=2),
        "coordinates": surface(problem, coordinates=((-0.5, 0.0, 0.2), (0.0, 1.0))),
        "diverged": surface(small(nn.ReLU, loss=steep), points=3, span=(-1e30, 1e30)),
    }


@run("slice/checkpoints")
def _() -> Any:
    from sharpscope.slices import orthonormalised, plane_through, span_of, towards, trajectory_plane

    problem, others = small(), {"one": small(seed=1), "two": small(seed=2)}
    plane = plane_through(problem, others)
    path = [small(seed=seed) for seed in (3, 4, 5)]
    along = trajectory_plane(problem, path)
    return {
        "towards": line(problem, towards(problem, others["one"], "one"), 9, marks=others),
        "plane": surface(problem, plane, 5, span_of(problem, plane, list(others.values())), marks=others),
        "trajectory": surface(problem, along, 4, trajectory={str(i): step for i, step in enumerate(path)}),
        "vectors": [direction.vector for direction in (*plane, *along, *orthonormalised(plane))],
    }


@run("slice/batchnorm")
def _() -> Any:
    from sharpscope.slices import random_directions, towards

    problem, other, found = normed(), normed(seed=1), {}
    ways = {"random": random_directions(problem), "towards": [towards(problem, other)]}
    for (kind, way), batchnorm in itertools.product(ways.items(), ("frozen", "interpolate", "recalibrate")):
        try:
            found[f"{kind} {batchnorm}"] = line(
                problem, way, 5, batchnorm=batchnorm, marks={"other": other}, also={"test": blobs(30, seed=1)}
            )
        except sharpscope.SharpscopeError as error:
            found[f"{kind} {batchnorm}"] = {"error": type(error).__name__}
    loader = DataLoader(TensorDataset(*blobs()), batch_size=20)
    found["train"] = line(normed(data=loader, mode="train"), points=5, micro_batch=None)
    found["surface"] = surface(problem, points=3, batchnorm="recalibrate")
    return found


@run("slice/journal")
def _() -> Any:
    problem = small()
    first = line(problem, points=5, journal="journal")
    again = line(problem, points=5, journal="journal")
    finer = line(problem, points=9, journal="journal", refine=2)
    shards = [surface(problem, points=3, journal="shards", shard=(i, 2)) for i in (1, 2)]
    return {"first": first, "again": again, "finer": finer, "shards": shards}


@run("slice/preview")
def _() -> Any:
    seen: list[Any] = []
    line(small(), points=5, preview=lambda result: seen.append(cut(result())))
    return seen


@run("slice/directions-file")
def _() -> Any:
    from sharpscope.slices import random_directions, read_directions, write_directions

    made = random_directions(small(), 2, source())
    write_directions("directions.npz", made, {"seed": 0})
    read = read_directions("directions.npz", {"seed": 0})
    assert read is not None
    return [[direction.vector, dict(direction.settings)] for direction in read]


# The monitor and the optimizers


def optimizers(weights: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    from sharpscope import optim

    sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    for name, more in (
        ("plain", {}),
        ("inf", {"p": "inf"}),
        ("elementwise", {"adaptive": "elementwise", "eta": 0.01, "rho": 0.5}),
        ("filter", {"adaptive": "filter"}),
        ("steps", {"ascent_steps": 3}),
        ("unnormalised", {"normalize": False}),
        ("m", {"m": 8}),
    ):
        yield f"SAM {name}", optim.SAM(weights(), torch.optim.SGD, **{**sgd, **more})
    yield "SAM adam", optim.SAM(weights(), torch.optim.AdamW, lr=0.01)
    for cls in (optim.ASAM, optim.GSAM, optim.LookSAM, optim.FriendlySAM):
        yield cls.__name__, cls(weights(), torch.optim.SGD, **sgd)
        yield f"{cls.__name__} m", cls(weights(), torch.optim.SGD, m=8, **sgd)


def closing(model: nn.Module, optimizer: Any) -> Callable[..., Tensor]:
    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    return closure


@run("optim")
def _() -> Any:
    model, data, found = small(nn.ReLU).model.train(), blobs(), {}
    start = copy.deepcopy(model.state_dict())
    for name, optimizer in optimizers(model.parameters):
        model.load_state_dict(start)
        closure, losses = closing(model, optimizer), []
        for step in range(8):
            batch = tuple(t[step * 7 : step * 7 + 20] for t in data)
            losses.append(float(optimizer.step(closure, *batch).detach()))
        weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        found[name] = {"weights": weights, "losses": losses, "taken": optimizer.num_gradients}
        found[name]["skipped"] = optimizer.skipped_steps
    return found


@run("optim/two-calls")
def _() -> Any:
    from sharpscope.optim import SAM, frozen_buffers

    model, (inputs, targets) = normed().model.train(), blobs()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for _ in range(4):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        with frozen_buffers():
            nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)
    return dict(model.state_dict())


@run("monitor/sgd")
def _() -> Any:
    problem, found = small(nn.ReLU), {}
    for name, options in {"plain": {}, "sample": {"examples": 20, "tol": 1e-3}, "decay": {"seed": 3}}.items():
        own = dataclasses.replace(
            problem, model=copy.deepcopy(problem.model), weight_decay=0.1 if name == "decay" else 0.0
        )
        optimizer = torch.optim.SGD(own.model.parameters(), lr=0.1, momentum=0.9)
        logged: list[Any] = []
        monitor = sharpscope.SharpnessMonitor(
            own, optimizer, **{"every": 3, "examples": None, "dtype": torch.float64, "log": logged.append, **options}
        )
        closure = closing(own.model, optimizer)
        for _ in range(12):
            optimizer.step(lambda closure=closure: closure(*blobs()))
            monitor.step()
        found[name] = {"result": monitor.result().to_dict(), "logged": logged, "sample": monitor.sample}
        found[name]["weights"] = [weight.detach() for weight in own.model.parameters()]
    return found


@run("monitor/sam")
def _() -> Any:
    from sharpscope.optim import SAM

    problem = small(nn.ReLU)
    optimizer = SAM(problem.model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    monitor = sharpscope.SharpnessMonitor(problem, optimizer, every=2, examples=30, dtype=torch.float64)
    closure = closing(problem.model, optimizer)
    for _ in range(8):
        optimizer.step(closure, *blobs())
        monitor.step()
    monitor.measure(100)
    return monitor.result().to_dict()


@run("monitor/failing")
def _() -> Any:
    problem = small()
    monitor = sharpscope.SharpnessMonitor(problem, every=1, dtype=torch.float64)
    with torch.no_grad():
        next(problem.model.parameters())[0, 0] = float("nan")
    monitor.step()
    return monitor.result().to_dict()


@run("edges")
def _() -> Any:
    edges = sharpscope.edges
    return {
        "descent": [edges.descent_edge(0.1), edges.descent_edge(0.1, 0.9), edges.descent_edge(0.1, 0.9, nesterov=True)],
        "dampening": edges.descent_edge(0.1, 0.9, dampening=0.5),
    }


# Comparisons


def level(**changes: Any) -> Any:
    from sharpscope.comparing import Level

    counts = dict.fromkeys(
        ("performance_examples", "density_examples", "sharpness_examples", "slice_examples", "surface_examples"), 60
    )
    given: dict[str, Any] = {
        "name": "small",
        "eigen_examples": None,
        "tol": 1e-5,
        "certify": None,
        "probes": 3,
        "steps": 6,
        "trace_probes": 4,
        "seeds": 2,
        "line_points": 5,
        "between_points": 8,
        "surface_points": 3,
        **counts,
    }
    return Level(**{**given, **changes})


def compared(checkpoints: Any, **options: Any) -> dict[str, Any]:
    with side_by_side(False):
        found = sharpscope.compare(checkpoints, **{"level": level(), "dtype": torch.float64, "seed": 1, **options})
    said: dict[str, Any] = found.to_dict()
    return said


def run_of(seed: int, steps: int, activation: type[nn.Module] = nn.ReLU) -> Problem:
    problem = small(activation, seed)
    fitted(problem.model, problem.data, steps)
    return Problem(
        model=problem.model, loss=problem.loss, data=problem.data, provenance={"recipe": {"seed": seed, "lr": 0.05}}
    )


@run("compare/checkpoints")
def _() -> Any:
    return compared({"one": run_of(0, 0), "two": lambda: run_of(1, 40)}, test=blobs(30, seed=1))


@run("compare/groups")
def _() -> Any:
    groups = {"sgd": [run_of(s, 0) for s in range(3)], "sam": {f"sam {s}": run_of(s, 60) for s in range(3)}}
    return compared(groups, test=blobs(30, seed=1), level=level(surface_points=3, seeds=1))


@run("compare/sample")
def _() -> Any:
    return compared({"one": run_of(0, 0), "two": run_of(1, 40)}, level=level(eigen_examples=40, certify=0.2))


@run("compare/folder")
def _() -> Any:
    checkpoints = {"one": normed(), "two": normed(seed=1)}
    return [compared(checkpoints, folder="parts"), compared(checkpoints, folder="parts")]


@run("side-by-side")
def _() -> Any:
    one, two = (sharpscope.top_eigenvalues(small(seed=s), 2, 1e-4, generator=source(), **EXACT) for s in (0, 1))
    return [len(row) for row in sharpscope.side_by_side({"one": one, "two": two}).rows]


# Linear algebra


def matrix(n: int = 40, seed: int = 0) -> Tensor:
    generator = source(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor([20.0, 11.0, 11.0, 7.0, -9.0, -3.0]), torch.linspace(-1, 2, n - 6)]).double()
    return basis @ torch.diag(values) @ basis.T


for _method in ("lanczos", "power", "guided", "auto"):

    @run(f"linalg/top-{_method}")
    def _(method: str = _method) -> Any:
        from sharpscope.linalg import top_eigenpairs

        given, found = matrix(), {}
        noise = matrix(seed=1)
        guides = [lambda v: (given + 0.01 * noise) @ v] if method == "guided" else ()
        for which, k in itertools.product(("largest", "smallest", "both", "magnitude"), (1, 3)):
            if method == "guided" and which != "largest":
                continue
            for basis in (None, 20):
                options: dict[str, Any] = {"tol": 1e-6, "which": which, "method": method, "max_basis": basis}
                pairs = top_eigenpairs(
                    lambda v: given @ v, 40, k, guides=guides, generator=source(), max_products=60, **options
                )
                found[f"{which} {k} {basis}"] = {
                    key: getattr(pairs, key)
                    for key in ("eigenvalues", "eigenvectors", "residuals", "lower", "upper", "converged", "method")
                } | {"products": pairs.num_products, "matvecs": pairs.num_matvecs}
        return found


@run("linalg/quadrature")
def _() -> Any:
    from sharpscope.linalg import lanczos_quadrature, trace_and_frobenius

    given = matrix()
    values, vectors = torch.linalg.eigh(given)
    known = values[-2:], vectors[:, -2:]
    found: dict[str, Any] = {}
    for name, options in {"plain": {}, "known": {"known": known}, "all": {"steps": 60}}.items():
        result = lanczos_quadrature(lambda v: given @ v, 40, **{"probes": 3, "steps": 9, **options}, generator=source())
        found[name] = {key: getattr(result, key) for key in ("nodes", "weights", "probes", "images")}
        found[name] |= {"products": result.num_products, "matvecs": result.num_matvecs}
    for probes in (4, 12):
        estimate = trace_and_frobenius(lambda v: given @ v, 40, probes, generator=source())
        found[f"trace {probes}"] = dataclasses.asdict(estimate)
    return found


# The commands


def command(*argv: object, status: Sequence[int] = (0,)) -> dict[str, Any]:
    """Exit status, what ``--json`` printed, and the files written since, their JSON with them."""
    from sharpscope.cli import main

    before, out, err = {path: path.stat().st_mtime_ns for path in _files()}, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        came = main([str(word) for word in argv])
    if came not in status:
        raise RuntimeError(f"{' '.join(map(str, argv))} ended with {came}: {err.getvalue()}")
    written = sorted(path for path in _files() if before.get(path) != path.stat().st_mtime_ns)
    found: dict[str, Any] = {"status": came, "files": [str(path) for path in written]}
    with contextlib.suppress(ValueError):
        found["printed"] = json.loads(out.getvalue())
    found["json"] = {str(path): json.loads(path.read_text()) for path in written if path.suffix == ".json"}
    found["arrays"] = {str(path): dict(np.load(path)) for path in written if path.suffix == ".npz"}
    return found


def _files() -> list[Path]:
    """All but unfinished and intermediate results, whose layout is internal."""
    found = [path for path in Path().rglob("*") if path.is_file()]
    return [path for path in found if not any(p == "parts" or p.endswith(".partial") for p in path.parts)]


def trained() -> None:
    """Two checkpoints in the working folder, by the command."""
    for name, *more in (("sgd.pt",), ("sam.pt", "--optimizer", "sam", "--rho", "0.1")):
        small_mlp = ("--model", "mlp", "--model-args", "hidden=5,5", "--epochs", 2, "--batch-size", 128, "--seed", 1)
        command("train", "--out", name, *small_mlp, "--device", "cpu", *more)


WHOLE = ("--device", "cpu", "--dtype", "float64", "--micro-batch", 64, "--examples", 120, "--json")


@run("command/train")
def _() -> Any:
    arguments = ("--model", "mlp", "--model-args", "hidden=5,5", "--batch-size", 128, "--device", "cpu")
    first = command(
        *("train", "--out", "a.pt", *arguments, "--epochs", 2, "--save-epochs", "0,1", "--label-noise", 0.1),
        *("--monitor", 6, "--monitor-examples", 16),
    )
    found: dict[str, Any] = {"first": first}
    for name in ("sam", "asam", "gsam", "looksam", "friendlysam", "adamw"):
        more = () if name == "adamw" else ("--m", 64)
        found[name] = command("train", "--out", f"{name}.pt", *arguments, "--epochs", 1, "--optimizer", name, *more)
    for path in sorted(Path().glob("*.pt")):
        kept = torch.load(path, weights_only=True)
        found[path.name] = {key: kept[key] for key in ("state_dict", "metrics") if key in kept}
    return found


@run("command/eigen")
def _() -> Any:
    trained()
    return {
        "both": command("eigen", "sgd.pt", "sam.pt", "--k", 2, *WHOLE),
        "written": command("eigen", "sgd.pt", "--k", 2, "--vectors", "--out", "r.json", *WHOLE),
        "which": command("eigen", "sgd.pt", "--k", 2, "--which", "both", *WHOLE),
        "ggn": command("eigen", "sgd.pt", "--k", 2, "--operator", "ggn", *WHOLE),
        "few": command("eigen", "sgd.pt", "--tol", 1e-8, "--max-passes", 3, "--out", "f.json", *WHOLE, status=(3,)),
        "more": command("eigen", "sgd.pt", "--tol", 1e-8, "--out", "f.json", *WHOLE),
        "layers": command("eigen", "sgd.pt", "--per-layer", "--probes", 3, *WHOLE),
        "tensors": command("eigen", "sgd.pt", "--per-parameter", "--probes", 3, *WHOLE),
        "certified": command("eigen", "sgd.pt", "--k", 2, "--certify", 0.3, *WHOLE),
        "test": command("eigen", "sgd.pt", "--k", 2, "--split", "test", "--params", "*.weight", *WHOLE),
    }


@run("command/density")
def _() -> Any:
    trained()
    command("eigen", "sgd.pt", "--k", 2, "--vectors", "--out", "r.json", *WHOLE)
    few = ("--probes", 3, "--steps", 8)
    return {
        "both": command("density", "sgd.pt", "sam.pt", *few, "--figure", "density.png", *WHOLE),
        "known": command("density", "sgd.pt", *few, "--eigen", "r.json", "--out", "d.json", *WHOLE),
    }


@run("command/sharpness")
def _() -> Any:
    trained()
    few = ("--m", "4,20", "--rho", "0.02,0.1", "--draws", 2, "--probes", 2)
    with side_by_side(False):
        return {
            "m": command("sharpness", "sgd.pt", "sam.pt", *few, "--out", "out", "--figure", "m.png", *WHOLE),
            "all": command("sharpness", "sam.pt", "--measures", "all", *few, *WHOLE),
            "inf": command("sharpness", "sgd.pt", *few, "--p", "inf", "--adaptive", "--ascent", 2, *WHOLE),
            "invariance": command(
                *("invariance", "sgd.pt", "--examples", 40, "--m", 10, "--device", "cpu", "--json"),
                *("--out", "invariance.json"),
            ),
        }


@run("command/slice")
def _() -> Any:
    trained()
    return {
        "random": command("slice", "sgd.pt", "--seeds", 2, "--points", 5, "--split", "both", *WHOLE),
        "to": command("slice", "sgd.pt", "--to", "sam.pt", "--points", 7, "--out", "to.json", *WHOLE),
        "eigenvectors": command("slice", "sgd.pt", "--eigenvectors", "1,2", "--points", 5, *WHOLE),
        "gradient": command("slice", "sgd.pt", "--directions", "gradient", "--points", 5, "--quadratic", *WHOLE),
        "drawn": command("slice", "sgd.pt", "--points", 5, "--out", "s.json", "--figure", "s.png", *WHOLE),
        "again": command("plot", "s.json", "--out", "again.svg"),
        "table": command("plot", "s.json", "--out", "again.csv"),
    }


@run("command/surface")
def _() -> Any:
    trained()
    found = {
        "both": command("surface", "sgd.pt", "sam.pt", "--points", 3, "--out", "out", "--figure", "s.png", *WHOLE),
        "refined": command("surface", "sgd.pt", "--points", "3x4", "--range", -1, 0.5, "--refine", 1, *WHOLE),
        "eigen": command("surface", "sgd.pt", "--directions", "eigenvectors", "--points", 3, *WHOLE),
        "shards": [
            command("surface", "sgd.pt", "--points", 3, "--shard", f"{i}/2", "--out", "p.json", *WHOLE, status=(0, 3))
            for i in (1, 2)
        ],
    }
    surfaces = ("out/sgd.json", "out/sam.json")
    found["figure"] = command("plot", *surfaces, "--out", "again.pdf", "--width", 3.3)
    found["solid"] = command("plot", *surfaces, "--out", "solid.png", "--kind", "3d", "--quantity", "accuracy")
    found["vtk"] = command("plot", surfaces[0], "--out", "again.vtk")
    found["vtk text"] = [float(word) for word in Path("again.vtk").read_text().split() if _is_number(word)]
    return found


@run("command/compare")
def _() -> Any:
    trained()
    few = ("--examples", 60, "--quick", "--dtype", "float64", "--device", "cpu", "--json")
    with side_by_side(False):
        found = {"both": command("compare", "sgd.pt", "sam.pt", *few, "--out", "both")}
    return {name: {key: one[key] for key in ("status", "printed", "files")} for name, one in found.items()}


@run("command/groups")
def _() -> Any:
    small_mlp = ("--model", "mlp", "--model-args", "hidden=5,5", "--batch-size", 128, "--epochs", 1, "--device", "cpu")
    for seed, name in itertools.product((1, 2), ("sgd", "sam")):
        command("train", "--out", f"{name}-{seed}.pt", "--optimizer", name, "--seed", seed, *small_mlp)
    few = ("--examples", 24, "--quick", "--dtype", "float64", "--device", "cpu", "--json")
    with side_by_side(False):
        found = command("compare", "--sgd", "sgd-*.pt", "--sam", "sam-*.pt", *few, "--out", "groups")
    return {key: found[key] for key in ("status", "printed", "files")}


@run("command/problem")
def _() -> Any:
    trained()
    weights = torch.load("sgd.pt", weights_only=True)["state_dict"]
    torch.save(weights, "plain.pt")
    Path("own.py").write_text(
        "import torch\nfrom torch import nn\nfrom sharpscope import Problem\nfrom sharpscope.zoo import load_data\n"
        "def problem():\n    data = load_data('digits')\n"
        "    layers = [nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 10)]\n"
        "    model = nn.Sequential(*layers)\n"
        "    state = torch.load('plain.pt', weights_only=True)\n"
        "    model.load_state_dict(dict(zip(model.state_dict(), state.values())))\n"
        "    torch.save(model.state_dict(), 'renamed.pt')\n"
        "    return Problem(model=model, loss=nn.CrossEntropyLoss(), data=(data.inputs, data.targets))\n"
    )
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("own", "own.py")
    assert spec is not None
    assert spec.loader is not None
    own = module_from_spec(spec)
    spec.loader.exec_module(own)
    own.problem()
    return {
        "problem": command("eigen", "renamed.pt", "--problem", "own.py", "--k", 2, *WHOLE),
        "named": command(
            *("eigen", "plain.pt", "--model", "mlp", "--model-args", "hidden=5,5", "--data", "digits", "--k", 2, *WHOLE)
        ),
        "inspect": [command("inspect", path, "--json") for path in ("sgd.pt", "plain.pt")],
        "init": command("init", "renamed.pt", "--out", "mine.py"),
        "load": top(sharpscope.load("sgd.pt", examples=50, seed=2, weight_decay=0.01), 2, 1e-5),
    }


# The interface


@run("interface/names")
def _() -> Any:
    found: dict[str, Any] = {"sharpscope": _described(sharpscope, sharpscope.__all__)}
    for name in ("comparing", "linalg", "operators", "optim", "plot", "results", "sharpness", "slices"):
        module = importlib.import_module(f"sharpscope.{name}")
        found[name] = _described(module, module.__all__)
    found["edges"] = _described(sharpscope.edges, ("descent_edge", "sam_edge"))
    return found


def _described(module: Any, names: Sequence[str]) -> dict[str, Any]:
    """The public names of a module, with the arguments of functions and the members of classes."""
    found: dict[str, Any] = {}
    for name in sorted(name for name in names if not name.startswith("_")):
        one = getattr(module, name)
        found[name] = {"arguments": _arguments(one)}
        if inspect.isclass(one):
            found[name]["members"] = sorted(member for member in dir(one) if not member.startswith("_"))
    return found


def _arguments(one: Any) -> Any:
    try:
        parameters = inspect.signature(one).parameters.values()
    except (TypeError, ValueError):
        return None
    return {p.name: [str(p.kind), "required" if p.default is p.empty else _default(p.default)] for p in parameters}


def _default(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, bool | int | float | str | tuple) else type(value).__name__


@run("interface/options")
def _() -> Any:
    from sharpscope.cli import parser

    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    found: dict[str, Any] = {}
    for name, one in commands.choices.items():
        found[name] = {
            " ".join(action.option_strings) or action.dest: {
                "default": _default(action.default),
                "choices": None if action.choices is None else list(map(str, action.choices)),
                "nargs": str(action.nargs),
                "required": action.required,
                "constant": _default(action.const),
            }
            for action in one._actions
        }
    return found


@run("interface/help")
def _() -> Any:
    from sharpscope.cli import main

    found = {}
    for words in (["demo", "--help"], ["--help"], ["--version"], ["eigen"]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                main(words)
            except SystemExit as ending:
                found[" ".join(words)] = ending.code
    return found


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


# Recording


def plain(value: Any) -> Any:
    """``value`` as JSON, long arrays by some of their entries, their sum and their norm."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, list | tuple):
        numbers = _numbers(value)
        if numbers is None:
            return [plain(entry) for entry in value]
        value = numbers
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        if value.size <= MOST or value.dtype.kind not in "fiu":
            return plain_list(value)
        flat = value.ravel()
        finite = np.where(np.isfinite(flat), flat, 0).astype(np.float64)
        step = len(flat) // KEPT
        return {
            "array of": list(value.shape),
            "entries": plain_list(flat[::step]),
            "sum": float(finite.sum()),
            "norm": float(np.linalg.norm(finite)),
            "finite": int(np.isfinite(flat).sum()),
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def plain_list(value: Any) -> Any:
    if value.dtype.kind in "US" or value.dtype == object:
        return [str(entry) for entry in value.ravel()]
    return value.tolist()


def _numbers(value: Sequence[Any]) -> Any:
    """A long list of numbers, nested or not, as an array; None for any other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            array = np.array(value)
    except (ValueError, TypeError, Warning):
        return None
    return array if array.dtype.kind in "fiu" and array.size > MOST else None


def record(only: str) -> dict[str, Any]:
    """What each run gives, made in a folder of its own; a run that fails is recorded as its error."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    home = Path.cwd()
    for name, function in RUNS.items():
        if not name.startswith(only):
            continue
        started = _clock()
        torch.manual_seed(0)
        np.random.seed(0)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            os.chdir(folder)
            try:
                found[name] = {"value": plain(function())}
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
            finally:
                os.chdir(home)
        ours = [w.category.__name__ for w in warned if issubclass(w.category, sharpscope.ConvergenceWarning)]
        found[name]["warnings"] = ours
        failed = found[name].get("failed", "")
        print(f"{name:40s} {_clock() - started:6.1f} s {failed}", file=sys.stderr, flush=True)
    return found


# Comparing


class Differences:
    """A walk through two recordings."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def walk(self, where: str, one: Any, two: Any, key: str = "", scale: float = 0.0) -> None:
        if key in IGNORED and not self.exact:
            return
        if isinstance(one, dict) and isinstance(two, dict):
            own = max(scale, _scale(one))
            for name in one.keys() | two.keys():
                if name not in one or name not in two:
                    self.add(f"{where}/{name}", f"only in the {'first' if name in one else 'second'}")
                else:
                    self.walk(f"{where}/{name}", one[name], two[name], name, own)
        elif isinstance(one, list) and isinstance(two, list):
            self.lists(where, one, two, key, scale)
        elif isinstance(one, str) and isinstance(two, str):
            if one != two and (self.exact or key in LISTED):
                self.add(where, f"{one!r} and {two!r}")
        elif isinstance(one, str) or isinstance(two, str):
            self.add(where, f"{one!r} and {two!r}")
        else:
            self.numbers(where, [one], [two], key, scale)

    def lists(self, where: str, one: list[Any], two: list[Any], key: str, scale: float) -> None:
        if key == "members":
            lost = set(one) - set(two)
            if lost:
                self.add(where, f"lost {', '.join(sorted(lost))}")
            return
        if len(one) != len(two):
            self.add(where, f"{len(one)} and {len(two)} entries")
            return
        flat = list(_flat(one)), list(_flat(two))
        if all(entry is None or isinstance(entry, bool | int | float) for entry in (*flat[0], *flat[1])):
            if len(flat[0]) != len(flat[1]):
                self.add(where, "other shapes")
            else:
                self.numbers(where, *flat, key, scale)
            return
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            self.walk(f"{where}/{i}", a, b, key, scale)

    def numbers(self, where: str, one: list[Any], two: list[Any], key: str, scale: float) -> None:
        whole = all(isinstance(entry, bool | int) for entry in (*one, *two))
        if whole or any(isinstance(entry, bool) for entry in (*one, *two)):
            if one != two:
                self.add(where, f"{_short(one)} and {_short(two)}")
            return
        a, b = (np.array([math.nan if e is None else e for e in given], float) for given in (one, two))
        # Equal covers infinity.
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if same.all():
            return
        finite = np.abs(a[np.isfinite(a)])
        largest = max(finite.max(initial=0.0), scale if key in OF_SCALE else 0.0)
        with np.errstate(invalid="ignore"):
            off = np.where(same, 0.0, np.abs(a - b))
        if not (off <= TOLERANCE * largest).all():
            place = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
            ratio = off[place] / largest if largest else math.inf
            self.add(
                where, f"{float(a[place])!r} and {float(b[place])!r} at {place}, off by {ratio:.1e} of the largest"
            )


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def _short(values: list[Any]) -> str:
    return str(values[0] if len(values) == 1 else values)[:100]


def _scale(entries: Mapping[str, Any]) -> float:
    """The largest value of a result, of which the rounding of its bounds is a share."""
    found = [0.0]
    for key in ("eigenvalues", "lambda_max", "value", "nodes", "trace"):
        if key in entries and not isinstance(entries[key], dict):
            found += [abs(e) for e in _flat(entries[key]) if isinstance(e, int | float) and math.isfinite(e)]
    return max(found)


def compare(one: Mapping[str, Any], two: Mapping[str, Any], allowed: Sequence[str]) -> int:
    """Print what differs; the number of runs that differ and are not allowed to."""
    bad = 0
    for name in sorted(one.keys() | two.keys()):
        walk = Differences(exact=name.startswith("interface"))
        if name not in one or name not in two:
            walk.add(name, f"only in the {'first' if name in one else 'second'}")
        else:
            walk.walk(name, one[name], two[name])
        if not walk.found:
            continue
        declared = any(name.startswith(prefix) for prefix in allowed)
        bad += not declared
        print(f"{name} differs{' (allowed)' if declared else ''}:")
        for difference in sorted(walk.found)[:30]:
            print(f"  {difference}")
        if len(walk.found) > 30:
            print(f"  ... {len(walk.found) - 30} more")
    print(f"{len(one.keys() & two.keys())} runs compared, {bad} differ.")
    return bad


def read(path: Path) -> Any:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def write(path: Path, values: Any) -> None:
    text = json.dumps(values, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    uses = parser.add_subparsers(dest="use", required=True)
    recording = uses.add_parser("record", help="run all and write what they gave")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", default="", metavar="NAME", help="runs whose name begins so")
    comparing = uses.add_parser("compare", help="compare two recordings")
    comparing.add_argument("one", type=Path)
    comparing.add_argument("two", type=Path)
    comparing.add_argument("--only", default="", metavar="NAME", help="runs whose name begins so")
    comparing.add_argument("--allow", nargs="+", default=(), metavar="PREFIX", help="runs that may differ")
    args = parser.parse_args()
    if args.use == "record":
        print(f"sharpscope of {Path(sharpscope.__file__).parent}", file=sys.stderr)
        found = record(args.only)
        write(args.out, found)
        return int(any("failed" in one for one in found.values()))
    one, two = (
        {name: entry for name, entry in read(path).items() if name.startswith(args.only)}
        for path in (args.one, args.two)
    )
    return int(compare(one, two, args.allow) > 0)


if __name__ == "__main__":
    sys.exit(main())
