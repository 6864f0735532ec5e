"""The monitor's numbers are the dense ones, and its result says what a reader must know."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sharpscope import MonitorRecord, MonitorResult, Problem, SharpnessMonitor
from sharpscope.errors import ArgumentError, DataError, ProblemError
from sharpscope.optim import SAM
from sharpscope.plot import sharpness_over_steps
from watched import TIGHT, N, X, Y, dense_lambda_max, net, pieces, problem, sgd, train


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
    """Where the weights move little, a later measurement takes 0.7 of the first's products, to the same tol."""
    ratios = []
    for seed in range(8):
        model = net()
        monitor = SharpnessMonitor(problem(model), every=5, examples=None, tol=0.01, seed=seed)
        optimizer = sgd(model, lr=0.01)
        monitor.measure()
        for _ in train(model, optimizer, 20):
            monitor.step()
        first, *later = monitor.result().records
        assert all(record.converged for record in (first, *later))
        assert max(record.products for record in later) <= first.products
        ratios += [record.products / first.products for record in later]
    assert np.mean(ratios) <= 0.7


def test_cost_is_what_was_done() -> None:
    """A gradient builds the graphs and each product takes two, whichever graphs are kept."""
    for kept in (1 << 30, 0):
        monitor = SharpnessMonitor(problem(net()), **TIGHT)
        monitor._max_cached = kept
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
    assert kept["num_examples"] == 32
    assert kept["split_examples"] == N
    with pytest.raises(DataError, match="column must be one of"):
        result.column("lambda_min")
    with pytest.raises(DataError, match="analysis 'monitor', got 'eigen'"):
        MonitorResult.from_dict({"analysis": "eigen"})
    with pytest.raises(DataError, match=r"keys of MonitorResult\.to_dict"):
        MonitorResult.from_dict({"analysis": "monitor"})


def test_the_table_says_what_a_reader_must_know() -> None:
    """Step, interval, known edges, loss, and that it is a sample; no column for an edge that means nothing."""
    shown = measured().summary()
    head = shown.splitlines()[0].split()
    assert head == ["step", "lambda_max", "2/eta", "momentum", "edge", "loss", "|grad|", "products"]
    assert "32 of 96 examples" in shown
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


def test_nothing_is_measured_at_the_perturbed_weights() -> None:
    """Between first_step and second_step the monitor records the reason, not lambda_max at w + e."""
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    monitor = SharpnessMonitor(problem(model), optimizer, every=1, examples=16)
    problem(model).loss(model(problem(model).data[0]), problem(model).data[1]).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.warns(RuntimeWarning, match=r"at w \+ e"):
        record = monitor.measure(1)
    assert record is not None
    assert math.isnan(record.lambda_max)
    assert "w + e" in record.reason


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
