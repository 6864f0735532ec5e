"""A watched training ends in the same bits as one that is not."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import processes
from sharpscope import MonitorRecord, SharpnessMonitor
from sharpscope.optim import SAM
from watched import (
    TIGHT,
    N,
    Squares,
    X,
    Y,
    adam,
    dense_lambda_max,
    draw_everywhere,
    everything,
    net,
    problem,
    seed_everything,
    sgd,
)


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
def test_a_measurement_that_fails_leaves_no_trace(variant: str, error: BaseException, place: str) -> None:
    """An error in the middle of a forward pass or of the products, or Ctrl-C there, changes no bit of the run."""
    expected, calls, armed = run(variant, None), [], []

    def fail() -> None:
        draw_everywhere()
        calls.append(place)
        raise error

    class Products(torch.autograd.Function):
        """The identity, whose derivative fails."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return fail()  # type: ignore[func-returns-value]

    class Gradient(torch.autograd.Function):
        """The identity, whose second derivative fails."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return Products.apply(gradient)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        if armed and place == "graph":
            fail()
        return nn.functional.cross_entropy(Gradient.apply(output) if armed else output, target)

    make, loop, optimizer_of = VARIANTS[variant]
    seed_everything()
    model = make()
    optimizer = optimizer_of(model)
    mode = "train" if place == "graph" else "eval"  # a graph then moves BatchNorm's statistics and draws masks
    monitor = SharpnessMonitor(problem(model, loss=broken, mode=mode), optimizer, every=1, examples=32)
    armed.append(True)

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
def test_two_processes_train_to_the_same_bits(tmp_path: Path) -> None:
    """Of two ranks under DDP the first measures, by the bare model, and neither run nor reducer knows of it."""
    processes.prepare()
    torch.multiprocessing.start_processes(rank_of_two, (str(tmp_path),), 2, start_method=processes.METHOD)
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
