"""The monitor's numbers are the dense ones, and the training does not know of it."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dense import dense_hessian, top
from sharpscope import MonitorRecord, MonitorResult, Problem, SharpnessMonitor
from sharpscope.edges import descent_edge, sam_edge
from sharpscope.errors import ArgumentError, DataError, ProblemError
from sharpscope.linalg.tracking import HANDED_ON, tracked
from sharpscope.monitor import monitor as module
from sharpscope.monitor.optimizer import edges_of
from sharpscope.monitor.sample import drawn
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM
from sharpscope.plot import sharpness_over_steps

N = 96
TIGHT: dict[str, Any] = {"examples": None, "tol": 1e-4, "max_products": 60}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 5, generator=generator), torch.randint(0, 3, (N,), generator=generator)


X, Y = data()


def net(dropout: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(6), nn.Dropout(0.3)] if dropout else []
        return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def problem(model: nn.Module, **options: Any) -> Problem:
    return Problem(**{"model": model, "loss": nn.CrossEntropyLoss(), "data": (X, Y), **options})


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.3, "momentum": 0.5, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Full-batch steps; yields their number."""
    for i in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        yield i + 1


def dense_lambda_max(model: nn.Module, inputs: Tensor = X, targets: Tensor = Y) -> float:
    twin = copy.deepcopy(model)
    loss = nn.CrossEntropyLoss()
    return float(top(dense_hessian(twin, lambda call: loss(call(inputs.double()), targets)), 1)[0])


# The number.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_record_of_a_run_holds_the_dense_eigenvalue(dtype: torch.dtype) -> None:
    """Converged, at each tenth of 200 steps, the float64 lambda_max lies in the interval, which is as narrow as tol."""
    model = net().to(dtype)
    monitor = SharpnessMonitor(problem(model, data=(X.to(dtype), Y)), every=10, **TIGHT)
    optimizer, records = sgd(model), []
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.to(dtype)), Y).backward()
        optimizer.step()
        record = monitor.step()
        if record is not None:
            records.append(record)
            assert record.converged
            assert record.lower <= dense_lambda_max(model) <= record.upper
            assert record.upper - record.lower <= 1.1e-4 * record.lambda_max
    assert [record.step for record in records] == list(range(10, 201, 10))
    assert monitor.result().records == tuple(records)


def test_loss_and_gradient_norm_are_those_of_the_sample() -> None:
    """They equal autograd's on the whole data, with weight decay where the problem has it."""
    model = net().double()
    for decay in (0.0, 0.5):
        monitor = SharpnessMonitor(problem(model, data=(X.double(), Y), weight_decay=decay), **TIGHT)
        record = monitor.measure()
        assert record is not None
        flat = torch.cat([p.flatten() for p in model.parameters()])
        loss = nn.functional.cross_entropy(model(X.double()), Y) + decay / 2 * flat.square().sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert record.loss == pytest.approx(loss.item(), rel=1e-12)
        assert record.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)
        assert record.lower - decay <= dense_lambda_max(model) <= record.upper - decay


def test_a_warm_start_takes_fewer_products() -> None:
    """Where the weights move little, each later measurement takes fewer products than the first, to the same tol."""
    model = net()
    monitor = SharpnessMonitor(problem(model), every=5, examples=None, tol=0.01)
    optimizer = sgd(model, lr=0.01)
    monitor.measure()
    for _ in train(model, optimizer, 40):
        monitor.step()
    first, *later = monitor.result().records
    assert all(record.converged for record in (first, *later))
    assert max(record.products for record in later) < first.products
    assert np.mean([record.products for record in later]) <= 0.7 * first.products


def test_cost_is_what_was_done() -> None:
    """A gradient builds the graphs and each product takes two, whichever graphs are kept."""
    for kept in (1 << 30, 0):
        monitor = SharpnessMonitor(problem(net()), **TIGHT)
        monitor._most_kept = kept
        record = monitor.measure()
        assert record is not None
        rebuilt = 0 if kept else record.products
        assert record.gradients == pytest.approx(1 + 2 * record.products + rebuilt)


class Planted(nn.Module):
    """The loss ``sum_i a_i(t) w_i^2 / 2`` for a clock t that is data, so that any eigenvalue overtakes any other."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n))
        self.register_buffer("diagonal", torch.linspace(0, 0.5, n))

    def forward(self, x: Tensor) -> Tensor:
        return (self.diagonal * self.w.square()).sum() / 2 + 0 * x.sum()


def test_an_eigenvalue_that_overtakes_is_found() -> None:
    """Of 400 dimensions with eigenvectors that do not turn, the second passes the first and is the one that is told."""
    model = Planted(400)
    of_output = Problem(model=model, loss=lambda output, target: output, data=(torch.ones(2, 1), torch.ones(2)))
    monitor = SharpnessMonitor(of_output, tol=0.02)
    for t in range(11):
        model.diagonal[7], model.diagonal[300] = 2.0, 1.0 + 0.2 * t
        record = monitor.measure(t)
        assert record is not None
        assert record.converged
        assert record.lower <= float(model.diagonal.max()) <= record.upper
        assert record.lambda_max == pytest.approx(float(model.diagonal.max()), rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_tracking_is_exact_once_the_space_is_exhausted(seed: int) -> None:
    """A multiple eigenvalue, a negative spectrum, a zero and a single dimension each end in their exact lambda_max."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    for spectrum in ([3, 3, 3, 1, 0, -9], [-1, -2, -3, -4, -5, -6], [0] * 6, [1, -1, 0, 0, 0, 0]):
        values = torch.tensor(spectrum, dtype=torch.float64)
        h = q @ torch.diag(values) @ q.T
        found = tracked(
            lambda rows, h=h: rows @ h,
            torch.empty(0, 6, dtype=torch.float64),
            None,
            tol=1e-9,
            max_products=50,
            generator=generator,
        )
        assert found.converged
        assert found.value == pytest.approx(max(spectrum), abs=1e-12)
        assert found.lower <= max(spectrum) + 1e-13
        assert found.upper >= max(spectrum) - 1e-13
        gram = found.vectors @ found.vectors.T
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64))
        assert len(found.vectors) <= HANDED_ON
    alone = tracked(
        lambda rows: 2 * rows, torch.empty(0, 1), None, tol=0.1, max_products=9, generator=torch.Generator()
    )
    assert (alone.value, alone.products) == (pytest.approx(2), 1)


def test_tracking_outlives_its_restarts() -> None:
    """An eigenvalue that takes more products than there are vectors kept is found to the tolerance."""
    values = torch.linspace(0, 1, 3000, dtype=torch.float64)
    values[-1] = 1.002
    like = torch.empty(0, 3000, dtype=torch.float64)
    found = tracked(
        lambda rows: rows * values, like, None, tol=1e-5, max_products=500, generator=torch.Generator().manual_seed(0)
    )
    assert found.converged
    assert found.products > 48
    assert found.value == pytest.approx(1.002, rel=1e-5)


def test_what_has_not_converged_is_said() -> None:
    """Two products leave a record with a wide interval and no claim, and the table marks it."""
    model = net()
    monitor = SharpnessMonitor(problem(model), examples=None, tol=1e-6, max_products=2)
    assert monitor.measure(0) is not None
    for _ in train(model, sgd(model), 3):
        pass
    late = monitor.measure(3)
    assert late is not None
    assert not late.converged
    assert late.products == 2
    assert late.upper - late.lower > 1e-6 * late.lambda_max
    shown = monitor.result().summary()
    assert " ?" in shown
    assert "1 NOT CONVERGED to the tolerance 1e-06" in shown


# The edges.


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}])
@pytest.mark.parametrize(("lr", "rho", "norm"), [(0.1, 0.05, 0.3), (0.5, 0.5, 2.0), (0.01, 1.0, 0.01)])
def test_sam_leaves_a_quadratic_above_its_edge_alone(
    lr: float, rho: float, norm: float, options: dict[str, Any]
) -> None:
    """SAM's own steps along an eigenvector shrink just below the edge and grow just above, at a held gradient norm."""
    for factor, stable in ((0.99, True), (1.01, False)):
        sharpness = factor * sam_edge(lr, rho, norm, **options)
        # A linear slope of nearly the whole norm holds ||g||, and a small w along the eigenvector feels it.
        w = torch.tensor([1e-6 * norm / sharpness, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = SAM([w], torch.optim.SGD, rho=rho, lr=lr, **options)

        def closure(w: Tensor = w, sharpness: float = sharpness, optimizer: SAM = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = sharpness * w[0] ** 2 / 2 + norm * w[1]
            loss.backward()
            return loss

        before = abs(float(w.detach()[0]))
        for _ in range(600 if options else 50):
            optimizer.step(closure)
        assert (abs(float(w.detach()[0])) < before) == stable


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}]
)
def test_sgd_leaves_a_quadratic_above_its_edge_alone(options: dict[str, Any]) -> None:
    """torch's SGD shrinks just below ``descent_edge`` and grows just above, with any momentum that it has."""
    for factor, stable in ((0.99, True), (1.01, False)):
        w = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1, **options)
        sharpness = factor * descent_edge(0.1, **options)
        for _ in range(4000):
            w.grad = sharpness * w.detach()
            optimizer.step()
        assert (abs(float(w.detach())) < 1) == stable


def test_edges_are_those_of_the_lowest_group() -> None:
    """The largest rate counts of several groups, a tensor too, and SAM's edge where the derivation is SAM's."""
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups: list[dict[str, Any]] = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": torch.tensor(0.4)}]
    plain = edges_of(torch.optim.SGD(groups, momentum=0.9), 1.0)
    assert plain.learning_rate == pytest.approx(0.4)
    assert plain.two_over_eta == pytest.approx(5)
    assert plain.momentum_edge == pytest.approx(9.5)
    assert math.isnan(plain.sam_edge)
    aware = edges_of(SAM([{"params": [a], "lr": 0.1, "rho": 9.0}, {"params": [b], "lr": 0.4}], torch.optim.SGD), 2.0)
    assert aware.sam_edge == pytest.approx(min(sam_edge(0.1, 9.0, 2.0), sam_edge(0.4, 0.05, 2.0)))
    assert math.isnan(aware.momentum_edge)
    for kind in (ASAM, GSAM, LookSAM, FriendlySAM):
        assert math.isnan(edges_of(kind([a], torch.optim.SGD, lr=0.1), 1.0).sam_edge)
    assert math.isnan(edges_of(SAM([a], torch.optim.SGD, p=math.inf, lr=0.1), 1.0).sam_edge)
    assert math.isnan(edges_of(SAM([a], torch.optim.Adam, lr=0.1), 1.0).sam_edge)
    assert math.isnan(edges_of(torch.optim.Adam([a]), 1.0).momentum_edge)
    assert math.isnan(edges_of(None, 1.0).two_over_eta)


# The sample.


class Squares(Dataset[Any]):
    """Examples made one by one, which counts and draws random numbers as an augmentation does."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.read.append(i)
        draw_everywhere()
        return X[i], Y[i]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(N)])


def pieces() -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + 10], Y[i : i + 10]) for i in range(0, N, 10)]


SOURCES: dict[str, Callable[[], Any]] = {
    "tuple": lambda: (X, Y),
    "dict": lambda: {"input": X, "target": Y},
    "list": pieces,
    "dataset": Squares,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=7),
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True, generator=torch.Generator()),
    "stream": lambda: DataLoader(Stream(), batch_size=7),
}


def rows_of(batches: list[Any]) -> list[tuple[float, ...]]:
    inputs = [batch["input"] if isinstance(batch, dict) else batch[0] for batch in batches]
    return [tuple(row) for row in torch.cat(inputs).tolist()]


@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_is_drawn_without_replacement(source: str) -> None:
    """Of any kind of data: as many examples as asked for, all different, each from the data, by the seed."""
    there = {tuple(row): i for i, row in enumerate(X.tolist())}
    found = drawn(SOURCES[source](), 20, torch.Generator().manual_seed(1))
    places = [there[row] for row in rows_of(found.batches)]
    assert len(set(places)) == 20
    assert places == sorted(places)
    assert (found.examples, found.drawn_from) == (20, N)
    again = drawn(SOURCES[source](), 20, torch.Generator().manual_seed(1))
    assert rows_of(again.batches) == rows_of(found.batches)
    other = drawn(SOURCES[source](), 20, torch.Generator().manual_seed(2))
    assert rows_of(other.batches) != rows_of(found.batches)
    whole = drawn(SOURCES[source](), None, torch.Generator())
    assert sorted(there[row] for row in rows_of(whole.batches)) == list(range(N))
    assert drawn(SOURCES[source](), 10**6, torch.Generator()).examples == N


@pytest.mark.parametrize("source", ["list", "dataset"])
def test_every_example_is_as_likely(source: str) -> None:
    """Over 300 seeds each of 96 examples is drawn as often as chance allows (six standard errors)."""
    counts = dict.fromkeys((tuple(row) for row in X.tolist()), 0)
    for seed in range(300):
        for row in rows_of(drawn(SOURCES[source](), 24, torch.Generator().manual_seed(seed)).batches):
            counts[row] += 1
    assert all(abs(count - 75) < 6 * math.sqrt(300 * 0.25 * 0.75) for count in counts.values())


def test_only_those_drawn_are_read_and_once() -> None:
    """Of a Dataset, by itself or in a shuffling loader, nothing is read but the sample, and in training nothing."""
    for make in (lambda d: d, lambda d: DataLoader(d, batch_size=4, shuffle=True)):
        dataset, model = Squares(), net()
        monitor = SharpnessMonitor(problem(model, data=make(dataset)), every=1, examples=12)
        assert len(dataset.read) == len(set(dataset.read)) == 12
        for _ in train(model, sgd(model), 3):
            monitor.step()
        assert len(dataset.read) == 12


def test_batches_of_unequal_shape_are_drawn_whole() -> None:
    """Where a batch cannot be cut, whole batches are taken until there are enough examples."""
    ragged = [{"input": torch.ones(2, 3 + i), "lengths": torch.ones(5), "target": torch.ones(2)} for i in range(6)]
    found = drawn(ragged, 5, torch.Generator().manual_seed(0))
    assert len(found.batches) == 3
    assert found.examples == 6


def test_a_sample_is_a_copy() -> None:
    """What the user does to his tensors later does not reach it."""
    mine = X.clone()
    found = drawn((mine, Y), None, torch.Generator())
    mine.zero_()
    assert torch.equal(found.batches[0][0], X)


# The training does not know of it.


def everything(model: nn.Module, optimizer: Any, *others: Any) -> dict[str, Any]:
    """All that a run is: tensors as bytes, so that NaN and -0 count."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"grad.{k}": p.grad for k, p in model.named_parameters()}
    for i, slots in enumerate(optimizer.state_dict()["state"].values()):
        state |= {f"optimizer.{i}.{k}": v for k, v in slots.items()}
    random_states = {"torch": torch.get_rng_state(), "numpy": str(np.random.get_state()), "python": random.getstate()}
    modes = {f"mode.{k}": m.training for k, m in model.named_modules()}
    found: dict[str, Any] = {**state, **random_states, **modes}
    for i, other in enumerate(others):
        found[f"other.{i}"] = str(other.state_dict())
    return {
        k: v.contiguous().view(torch.uint8).tolist() if isinstance(v, Tensor) and v.dim() else v
        for k, v in found.items()
    }


def seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def draw_everywhere() -> None:
    torch.rand(1)
    np.random.rand()
    random.random()


def plain_loop(model: nn.Module, step: Callable[[], object], optimizer: Any) -> list[Any]:
    for _ in range(6):
        chosen = torch.randint(N, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.to(next(model.parameters()))[chosen]).float(), Y[chosen]).backward()
        optimizer.step()
        step()
    return []


def accumulating(model: nn.Module, step: Callable[[], object], optimizer: Any) -> list[Any]:
    for i in range(12):
        chosen = torch.randint(N, (16,))
        nn.functional.cross_entropy(model(X[chosen]), Y[chosen]).backward()
        if i % 2:
            optimizer.step()
        step()  # with gradients in .grad
        if i % 4 == 3:
            optimizer.zero_grad(set_to_none=False)
    return []


def mixed(model: nn.Module, step: Callable[[], object], optimizer: Any) -> list[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(6):
            chosen = torch.randint(N, (16,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X[chosen]), Y[chosen])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step()
    return [scaler]


def sharpness_aware(model: nn.Module, step: Callable[[], object], optimizer: Any) -> list[Any]:
    for _ in range(6):
        chosen = torch.randint(N, (16,))

        def closure(chosen: Tensor = chosen) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X[chosen]), Y[chosen])
            loss.backward()
            return loss

        optimizer.step(closure)
        step()
    return []


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def lower(model: nn.Module) -> nn.Module:
    return model.bfloat16()


def partly_eval(model: nn.Module) -> nn.Module:
    model[1].eval()  # type: ignore[index]
    return model


VARIANTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list[Any]], Callable[[nn.Module], Any]]] = {
    "plain": (net, plain_loop, sgd),
    "dropout and BatchNorm": (lambda: net(True), plain_loop, adam),
    "BatchNorm frozen": (lambda: partly_eval(net(True)), plain_loop, sgd),
    "bfloat16": (lambda: lower(net()), plain_loop, sgd),
    "bfloat16 with BatchNorm": (lambda: lower(net(True)), plain_loop, sgd),
    "gradients in .grad": (lambda: net(True), accumulating, sgd),
    "autocast and GradScaler": (lambda: net(True), mixed, adam),
    "SAM": (lambda: net(True), sharpness_aware, lambda m: SAM(m.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)),
}
PROBLEMS = {"eval": {}, "train mode": {"mode": "train"}, "an augmented loader": {"data": "loader"}}


def run(variant: str, monitored: dict[str, Any] | None, seen: list[Any] | None = None, **log: Any) -> dict[str, Any]:
    make, loop, optimizer_of = VARIANTS[variant]
    seed_everything()
    model = make()
    optimizer = optimizer_of(model)
    monitor = None
    if monitored is not None:
        given = dict(monitored)
        if given.get("data") == "loader":
            given["data"] = DataLoader(Squares(), batch_size=8, shuffle=True)
        monitor = SharpnessMonitor(problem(model, **given), optimizer, every=1, examples=32, **log)
    others = loop(model, (lambda: None) if monitor is None else monitor.step, optimizer)
    if seen is not None and monitor is not None:
        seen += monitor.result().records
    return everything(model, optimizer, *others)


@pytest.mark.parametrize("of", PROBLEMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_bit_identical(variant: str, of: str) -> None:
    """Weights, buffers, gradients, optimizer, scaler, modes and random states are those of a run without a monitor."""
    seen: list[MonitorRecord] = []
    assert run(variant, PROBLEMS[of], seen) == run(variant, None)
    assert len(seen) >= 6
    assert all(math.isfinite(record.lambda_max) for record in seen)


class Boom(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("place", ["graph", "product"])
@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), Boom()])
@pytest.mark.parametrize("variant", ["dropout and BatchNorm", "bfloat16 with BatchNorm", "autocast and GradScaler"])
def test_a_measurement_that_fails_leaves_no_trace(
    variant: str, error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle of a forward pass or of the products, or Ctrl-C there, changes no bit of the run."""
    expected = run(variant, None)
    whole, calls = module.SharpnessMonitor._measured, []

    def broken(self: SharpnessMonitor, step: int) -> MonitorRecord:
        def fail(*args: Any) -> Any:
            draw_everywhere()
            calls.append(step)
            raise error

        if place == "product":
            monkeypatch.setattr(module, "tracked", lambda *args, **options: fail())
            return whole(self, step)
        objective = self._objective()
        with objective.measuring():
            objective.terms.model.train()
            objective.terms.model(X[:8].to(objective.dtype))  # moves BatchNorm's statistics, draws masks
            return fail()  # type: ignore[no-any-return]

    monkeypatch.setattr(module.SharpnessMonitor, "_measured", broken)
    make, loop, optimizer_of = VARIANTS[variant]
    seed_everything()
    model = make()
    optimizer = optimizer_of(model)
    monitor = SharpnessMonitor(problem(model), optimizer, every=1, examples=32)

    def step() -> None:
        with contextlib.suppress(Boom):
            monitor.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        others = loop(model, step, optimizer)
    assert len(calls) >= 6
    assert everything(model, optimizer, *others) == expected


def test_a_diverged_run_goes_on_and_is_told_once() -> None:
    """Weights that are not finite make records of NaN with the reason, and one warning; the training goes on."""
    model = net()
    monitor = SharpnessMonitor(problem(model), sgd(model), every=1)
    assert monitor.step() is not None
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match=r"step 2.*training goes on.*0\.weight holds NaN") as caught:
        monitor.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last = monitor.step()
    assert last is not None
    assert math.isnan(last.lambda_max)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
        model[2].bias.copy_(torch.tensor([3e38, -3e38, 0.0]))  # finite, but not the loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last = monitor.step()
    assert last is not None
    assert "must be finite" in str(last.reason)
    assert "3 without a number, first at step 2" in monitor.result().summary()
    with torch.no_grad():
        model.load_state_dict(net().state_dict())
    back = monitor.step()
    assert back is not None
    assert back.lower <= dense_lambda_max(model, *monitor.sample[0]) <= back.upper


class Forward(nn.Module):
    """A module with a forward pass of its own, which torch.compile does not pass over as it does nn.Sequential's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 1.0  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", ["compile", "Module.compile", "inside"])
def test_compiled_graphs_are_passed_by(wrap: str) -> None:
    """What torch.compile made, which has no second derivative, is not run: the numbers are the bare module's."""
    model, calls = net(), []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    wrapped: Any = model
    if wrap == "compile":
        wrapped = torch.compile(model, backend=backend)
    elif wrap == "Module.compile":
        wrapped = Forward(model)
        wrapped.compile(backend=backend)
    else:
        model[0] = torch.compile(model[0], backend=backend)
    record = SharpnessMonitor(problem(wrapped, params="_orig_mod.*" if wrap == "compile" else "*"), **TIGHT).measure()
    expected = SharpnessMonitor(problem(net()), **TIGHT).measure()
    assert record is not None
    assert expected is not None
    assert record.lambda_max == pytest.approx(expected.lambda_max, rel=1e-5)
    assert not calls
    wrapped(X)
    assert calls


def rank_of_two(rank: int, folder: str) -> None:
    """One of two processes that train a DistributedDataParallel model, without a monitor and with."""
    torch.set_num_threads(1)
    meeting, limit = f"file://{folder}/meet", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2, timeout=limit)
    found = []
    for watched in (False, True):
        torch.manual_seed(rank)
        model = net(True)
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(parallel)
        # A pattern may have the wrapper's prefix.
        monitor = SharpnessMonitor(problem(parallel, params="module.*"), optimizer, every=2, **TIGHT)
        for _ in range(4):
            chosen = torch.randint(N, (16,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(X[chosen]), Y[chosen]).backward()
            optimizer.step()
            if watched:
                monitor.step()
        found.append((everything(parallel, optimizer), len(monitor.result().records)))
    torch.save([found, dense_lambda_max(model), list(monitor.result().column("lambda_max"))], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.xdist_group("ranks")
def test_two_processes_train_to_the_same_bits(tmp_path: Path) -> None:
    """Of two ranks under DDP the first measures, by the bare model, and neither run nor reducer knows of it."""
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), 2)
    for rank, records in ((0, 2), (1, 0)):
        ((bare, none), (watched, count)), dense, values = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert watched == bare
        assert (none, count) == (0, records)
        if rank == 0:
            assert values[-1] == pytest.approx(dense, rel=1e-4)


def test_other_ranks_do_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose rank is not 0 counts its steps and measures nothing."""
    monitor = SharpnessMonitor(problem(net()), every=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert monitor.step() is None
    assert monitor.result().records == ()


def test_frozen_parameters_start_anew() -> None:
    """Where parameters are frozen on the way, the number is that of those that are left."""
    model = net()
    monitor = SharpnessMonitor(problem(model), **TIGHT)
    monitor.measure()
    model[0].requires_grad_(False)
    record = monitor.measure()
    assert record is not None
    assert record.converged
    # A linear layer's block of the Hessian, by the oracle that skips frozen parameters.
    assert record.lower <= dense_lambda_max(model) <= record.upper


# Where the numbers go.


class Scalars:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.seen.append((tag, value, step))


class Metrics:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen += [(tag, value, step) for tag, value in metrics.items()]


class Wandb:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def log(self, values: dict[str, float]) -> None:
        step = int(values.pop("sharpness/step"))
        self.seen += [(tag, value, step) for tag, value in values.items()]


class Function(Wandb):
    log = None  # type: ignore[assignment]

    def __call__(self, values: dict[str, float]) -> None:
        Wandb.log(self, values)


@pytest.mark.parametrize("kind", [Scalars, Metrics, Wandb, Function])
def test_each_kind_of_logger_is_given_the_record(kind: Callable[[], Any]) -> None:
    """Tags, values and step are the record's; what is NaN is left out."""
    model, log = net(), kind()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.25)
    monitor = SharpnessMonitor(problem(model), optimizer, log=log)
    record = monitor.measure(70)
    assert record is not None
    assert {step for _, _, step in log.seen} == {70}
    values = {tag: value for tag, value, _ in log.seen}
    assert values["sharpness/lambda_max"] == record.lambda_max
    assert values["sharpness/two_over_eta"] == 8
    assert values["sharpness/sam_edge"] == record.sam_edge
    assert "sharpness/momentum_edge" not in values


def test_a_logger_that_fails_is_told_once_and_random_numbers_it_drew_are_put_back() -> None:
    """The record is kept, the run goes on, and its random state too."""

    def log(values: dict[str, float]) -> None:
        torch.rand(1)
        raise OSError("disk full")

    monitor = SharpnessMonitor(problem(net()), every=1, log=log)
    state = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match="log= of the sharpness monitor failed.*disk full"):
        monitor.step()
    monitor.step()
    assert torch.equal(state, torch.get_rng_state())
    assert len(monitor.result().records) == 2


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"every": 1.5}, "every must be"),
        ({"examples": 0}, "examples must be"),
        ({"tol": 0}, "tol must be a number between 0 and 1"),
        ({"max_products": 1}, "max_products must be"),
        ({"seed": -1}, "seed must be"),
        ({"log": 3}, "log must have add_scalar.*got int"),
        ({"optimizer": "sgd"}, "optimizer must be a torch.optim.Optimizer or None, got str"),
        ({"dtype": torch.float16}, "dtype must be"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Each is an ArgumentError at construction."""
    with pytest.raises(ArgumentError, match=message):
        SharpnessMonitor(problem(net()), **options)


def test_what_can_never_be_measured_is_refused() -> None:
    """A model that cannot take the data, a loss without it, data that are none: at construction, not at step 100."""
    with pytest.raises(ProblemError, match="A Problem"):
        SharpnessMonitor(net())  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="model cannot take the data"):
        SharpnessMonitor(problem(net(), data=(X[:, :3], Y)))
    with pytest.raises(DataError, match="at least one example"):
        SharpnessMonitor(problem(net(), data=[]))
    with pytest.raises(DataError, match="walked once"):
        SharpnessMonitor(problem(net(), data=iter(pieces())))


# The result.


def measured(model: nn.Module | None = None) -> MonitorResult:
    model = net() if model is None else model
    monitor = SharpnessMonitor(problem(model), sgd(model), every=2)
    monitor.measure()
    for _ in train(model, sgd(model), 6):
        monitor.step()
    return monitor.result()


def same(one: MonitorResult, two: MonitorResult) -> bool:
    return str(one.records) == str(two.records) and one.to_dict() == two.to_dict()


def test_a_result_reads_back(tmp_path: Path) -> None:
    """JSON on disk and back is the same records and provenance, NaN too."""
    result = measured()
    result.save(tmp_path / "run.json")
    assert same(MonitorResult.load(tmp_path / "run.json"), result)
    assert result.steps.tolist() == [0, 2, 4, 6]
    assert result.lambda_max.tolist() == [r.lambda_max for r in result.records]
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["records"][1]["sam_edge"] is None
    assert kept["num_examples"] == 64
    assert kept["split_examples"] == N
    with pytest.raises(DataError, match="column must be one of"):
        result.column("lambda_min")
    with pytest.raises(DataError, match="analysis 'monitor', got 'eigen'"):
        MonitorResult.from_dict({"analysis": "eigen"})
    with pytest.raises(DataError, match="keys of to_dict"):
        MonitorResult.from_dict({"analysis": "monitor"})


def test_the_table_says_what_a_reader_must_know() -> None:
    """Step, interval, known edges, loss, and that it is a sample; no column for an edge that means nothing."""
    shown = measured().summary()
    head = shown.splitlines()[0].split()
    assert head == ["step", "lambda_max", "2/eta", "momentum", "edge", "loss", "|grad|", "products"]
    assert "64 of 96 examples" in shown
    assert measured()._repr_html_().startswith("<table>")
    many = MonitorResult(tuple(MonitorRecord(step=i, lambda_max=1.0, converged=True) for i in range(100)))
    lines = many.summary().splitlines()
    assert (lines[1].split()[0], lines[20].split()[0], lines[21]) == ("0", "99", "")
    assert "20 of 100 records" in many.summary()
    assert "step" in SharpnessMonitor(problem(net())).result().summary()


def test_the_figure_shows_the_interval_and_the_edges() -> None:
    """Bars reach from lower to upper, edges are lines over the steps, and what is NaN leaves a gap."""
    import matplotlib.pyplot as plt

    result = measured()
    axes = sharpness_over_steps(result)
    labels = axes.get_legend_handles_labels()[1]
    assert set(labels) == {r"$\lambda_{\max}$", "2/eta", "momentum edge"}
    bars = axes.containers[0].lines[2][0].get_segments()
    for bar, record in zip(bars, result.records, strict=True):
        assert (bar[0][1], bar[1][1]) == pytest.approx((record.lower, record.upper))
    line = next(line for line in axes.lines if line.get_label() == "2/eta")
    assert line.get_ydata().tolist() == result.column("two_over_eta").tolist()
    both = sharpness_over_steps({"SGD": result, "again": result})
    assert "SGD" in both.get_legend_handles_labels()[1]
    with pytest.raises(DataError, match="at least one"):
        sharpness_over_steps(MonitorResult(()))
    plt.close("all")


def test_a_run_goes_on_where_it_was() -> None:
    """``resume`` keeps the records up to its step, and the count goes on from there."""
    result = measured()
    monitor = SharpnessMonitor(problem(net()), every=2)
    monitor.resume(result, 4)
    assert [monitor.step() is not None for _ in range(4)] == [False, True, False, True]
    assert monitor.result().steps.tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(ArgumentError, match="num_examples is 16 and was"):
        SharpnessMonitor(problem(net()), examples=16).resume(result, 4)


# Trainers.


def lightning_run(monitored: bool, callback_of: Any, folder: Path) -> tuple[dict[str, Any], list[int]]:
    pl = pytest.importorskip("lightning.pytorch")

    class Lit(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return adam(self)

    seed_everything()
    lit = Lit()
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    monitor = SharpnessMonitor(problem(lit, data=loader), every=2)
    trainer = pl.Trainer(
        max_epochs=2,
        accumulate_grad_batches=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback_of(monitor)] if monitored else [],
    )
    trainer.fit(lit, loader)
    found = everything(lit, trainer.optimizers[0])
    found.pop("python")  # what Lightning draws for file names is its own
    return found, monitor.result().steps.tolist()


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_to_the_same_bits(tmp_path: Path) -> None:
    """The callback measures at every second optimizer step, not batch, and the run is the one without it."""
    watched, steps = lightning_run(True, SharpnessMonitor.lightning, tmp_path)
    bare, none = lightning_run(False, None, tmp_path)
    assert watched == bare
    assert (steps, none) == ([2, 4, 6, 8], [])


@pytest.mark.filterwarnings("ignore")
def test_huggingface_trains_to_the_same_bits(tmp_path: Path) -> None:
    """The callback measures by the Trainer's global step with its own optimizer, and the run is the one without it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(True)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.net(x)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    def trained(monitored: bool) -> tuple[dict[str, Any], MonitorResult]:
        seed_everything()
        model = Head()
        monitor = SharpnessMonitor(problem(model, data={"x": X, "labels": Y}), every=2)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        callbacks = [monitor.huggingface()] if monitored else []
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        return everything(model, trainer.optimizer), monitor.result()

    (watched, result), (bare, _) = trained(True), trained(False)
    assert watched == bare
    assert result.steps.tolist() == [2, 4, 6]
    # A linear schedule from 0.1 to 0 in 6 steps, as it stands for the step to come.
    assert result.column("learning_rate").tolist() == pytest.approx([0.1 * (1 - i / 6) for i in (2, 4, 6)])


def test_missing_trainers_are_named() -> None:
    """Without the other library the sentence says which to install."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['lightning', 'lightning.pytorch', 'pytorch_lightning', "
        "'transformers']))\n"
        "import torch, sharpscope\n"
        "m = sharpscope.SharpnessMonitor(sharpscope.Problem(model=torch.nn.Linear(2, 1), loss=torch.nn.MSELoss(), "
        "data=(torch.ones(4, 2), torch.ones(4, 1))))\n"
        "for make in (m.lightning, m.huggingface):\n"
        "    try:\n        make()\n    except sharpscope.ArgumentError as error:\n        print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "lightning.pytorch or pytorch_lightning must be installed" in shown
    assert "pip install transformers" in shown


def test_warnings_that_are_errors_do_not_end_the_training() -> None:
    """A failed measurement under -W error leaves its record and raises nothing."""
    model = net()
    monitor = SharpnessMonitor(problem(model), every=1)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = monitor.step()
    assert record is not None
    assert math.isnan(record.lambda_max)


def test_a_problem_can_be_copied() -> None:
    """A deep copy of a Problem is one, for instance beside a model that is copied."""
    copied = copy.deepcopy(problem(net()))
    assert isinstance(copied, Problem)
