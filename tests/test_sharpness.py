"""Every measure of sharpness equals its closed form where there is one, and leaves the model as it was."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sharpscope
from conftest import tiny_mlp
from dense import dense_hessian
from sharpscope import Ascent, Problem, TokenCrossEntropy, measure_sharpness, sharpness
from sharpscope.edge_of_stability import descent_edge, sam_edge
from sharpscope.errors import ArgumentError, DataError, ProblemError
from sharpscope.plot import m_sharpness_curves
from sharpscope.results import InvarianceResult, SharpnessResult
from sharpscope.sharpness import curvature_measures, worst_case

INF = math.inf
N, RHO = 24, 0.3
LONG = Ascent(80, adaptive=True, restarts=2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = drawn(N, 4) * torch.tensor([3.0, 1.0, 0.5, 0.2]), drawn(N, 1, seed=1)


def quadratic() -> Problem:
    """Linear regression, whose loss is exactly quadratic in its 5 weights."""
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.copy_(drawn(1, 4, seed=2))
        model.bias.fill_(-0.4)
    return Problem(model=model, loss=nn.MSELoss(), data=(X, Y))


class Closed:
    """Loss, gradient, Hessian and weights of ``quadratic`` on some rows, from the normal equations."""

    def __init__(self, rows: Sequence[int] | None = None) -> None:
        rows = list(range(N)) if rows is None else rows
        a = torch.cat([X, torch.ones(N, 1)], 1)[rows]
        self.w = torch.cat([drawn(1, 4, seed=2).flatten(), torch.tensor([-0.4], dtype=torch.float64)])
        rest = a @ self.w - Y[rows, 0]
        self.loss, self.g, self.h = float(rest.square().mean()), 2 * a.T @ rest / len(rows), 2 * a.T @ a / len(rows)

    def rise(self, e: Tensor) -> float:
        return float(self.g @ e + e @ self.h @ e / 2)

    def scales(self, scaling: str | None) -> Tensor:
        if scaling is None:
            return torch.ones(5, dtype=torch.float64)
        if scaling == "elementwise":
            return self.w.abs()
        return torch.cat([self.w[:4].norm().expand(4), self.w[4:].abs()])

    def highest(self, d: Tensor, p: float, rho: float) -> float:
        """The maximum over the ball: by the secular equation for p = 2, over all corners for p = inf."""
        g, h = d * self.g, d[:, None] * self.h * d
        if p == INF:
            corners = torch.tensor(list(itertools.product((-rho, rho), repeat=5)), dtype=torch.float64)
            return float((corners @ g + ((corners @ h) * corners).sum(1) / 2).max())
        values, vectors = torch.linalg.eigh(h)
        c = vectors.T @ g
        low, high = float(values[-1]), float(values[-1] + g.norm() / rho) + 1.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float((c / (middle - values)).norm()) > rho else (low, middle)
        e = vectors @ (c / (high - values))
        return float(g @ e + e @ h @ e / 2)


def sharp(problem: Problem, name: str, **options: Any) -> sharpscope.Measure:
    (found,) = measure_sharpness(problem, (name,), **options).measures
    return found


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("adaptive", [None, "elementwise", "filter"])
@pytest.mark.parametrize("steps", [1, 3])
def test_m_sharpness_is_the_mean_rise_over_disjoint_subsets(p: float, adaptive: str | None, steps: int) -> None:
    """For m = 5 of 24 examples: 4 random subsets, each with its own direction, and the interval of their mean."""
    found = sharp(
        quadratic(), "m-sharpness", m=(5,), rho=(RHO,), p=p, adaptive=adaptive, ascent=Ascent(steps), micro_batch=2
    )
    order = _order(quadratic())
    rises, first = [], []
    for start in range(0, 20, 5):
        closed = Closed(order[start : start + 5])
        d, at, best = closed.scales(adaptive), torch.zeros(5, dtype=torch.float64), -INF
        for _ in range(steps):
            g = d * (closed.g + closed.h @ at)
            at = at + RHO / steps * d * (g / g.norm() if p == 2 else g.sign())
            best = max(best, closed.rise(at))
        rises.append(best)
        first.append(RHO * float((d * closed.g).norm(p=2 if p == 2 else 1)))
    assert found.value == pytest.approx(np.mean(rises), rel=1e-9)
    assert found.standard_error == pytest.approx(np.std(rises, ddof=1) / 2, rel=1e-9)
    assert found.prediction["first order"] == pytest.approx(np.mean(first), rel=1e-9)
    assert found.upper is not None
    assert found.upper - found.value == pytest.approx(3.182446 * np.std(rises, ddof=1) / 2, rel=1e-6)
    assert (found.examples, found.settings["subsets"]) == (20, 4)


def _order(problem: Problem) -> list[int]:
    """The order in which the examples are taken, seen from outside: m = 1 and rho = 0 cost one forward an example."""
    seen: list[int] = []

    class Watching(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                seen.append(int((x == X).all(1).nonzero()))
            return self.inner(x)

    measure_sharpness(
        Problem(model=Watching(problem.model), loss=problem.loss, data=problem.data), m=(1,), rho=(0.0,), micro_batch=24
    )
    once = list(dict.fromkeys(seen[-2 * N :]))
    assert sorted(once) == list(range(N))
    assert once != list(range(N))
    return once


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("adaptive", [None, "elementwise", "filter"])
@pytest.mark.parametrize("rho", [0.01, 0.3, 2.0])
def test_worst_case_of_a_quadratic_is_its_maximum(p: float, adaptive: str | None, rho: float) -> None:
    """APGD finds the maximum over the ball, known from the secular equation or from all corners."""
    closed = Closed()
    d = closed.scales(adaptive)
    found = sharp(quadratic(), "worst-case", rho=(rho,), p=p, adaptive=adaptive, ascent=LONG)
    assert found.value == pytest.approx(closed.highest(d, p, rho), rel=1e-6)
    if p == 2:
        curved = rho**2 / 2 * float(torch.linalg.eigvalsh(d[:, None] * closed.h * d)[-1])
        assert found.prediction["small rho"] == pytest.approx(curved, rel=1e-3)
        assert curved <= found.value <= found.prediction["quadratic bound"] * (1 + 1e-3)


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("adaptive", [None, "elementwise"])
def test_apgd_never_reports_less_than_one_step(p: float, adaptive: str | None) -> None:
    """On networks with kinks, small and large radii: few steps of APGD find at least what a single step does."""
    options = {"rho": (0.01, 0.3, 3.0), "p": p, "adaptive": adaptive}
    for seed in range(3):
        problem = classifier(seed)
        once = measure_sharpness(problem, ("worst-case",), ascent=Ascent(1), **options).measures
        for steps in (1, 7):
            ascent = Ascent(steps, adaptive=True)
            for one, more in zip(
                once, measure_sharpness(problem, ("worst-case",), ascent=ascent, **options).measures, strict=True
            ):
                # To rounding: it goes there in other coordinates.
                assert more.value >= one.value * (1 - 1e-12)


def classifier(seed: int = 0, act: type[nn.Module] = nn.ReLU) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 3)).double()
    labels = torch.randint(3, (N,), generator=torch.Generator().manual_seed(seed))
    return Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, labels))


@pytest.fixture(scope="module")
def trained() -> Problem:
    """At a minimum to a gradient of 1e-9: a small tanh network with weight decay in its loss."""
    problem = classifier(0, nn.Tanh)
    decayed = Problem(model=problem.model, loss=problem.loss, data=problem.data, weight_decay=0.01)
    optimizer = torch.optim.LBFGS(
        problem.model.parameters(),
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = problem.loss(problem.model(X), problem.data[1])
        loss = loss + 0.005 * sum((p**2).sum() for p in problem.model.parameters())
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return decayed


@pytest.mark.parametrize("adaptive", [None, "elementwise"])
def test_worst_case_of_a_trained_net_meets_the_small_rho_prediction(trained: Problem, adaptive: str | None) -> None:
    """At a minimum and small rho the worst case is ``rho^2/2 lambda_max(DHD)`` within 2 %."""
    found = sharp(trained, "worst-case", rho=(1e-3,), adaptive=adaptive, ascent=LONG)
    h = dense_hessian(trained.model, lambda call: nn.functional.cross_entropy(call(X), trained.data[1]))
    w = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
    h = h + 0.01 * torch.eye(len(w), dtype=torch.float64)
    d = torch.ones_like(w) if adaptive is None else w.abs()
    expected = 1e-6 / 2 * float(torch.linalg.eigvalsh(d[:, None] * h * d)[-1])
    assert found.value == pytest.approx(expected, rel=0.02)
    assert found.prediction["small rho"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("adaptive", [None, "elementwise", "filter"])
def test_average_case_of_a_quadratic(adaptive: str | None) -> None:
    """Each pair of draws gives ``e'He/2`` exactly, and their mean is ``sigma^2/2 tr(DHD)`` within its error."""
    closed, sigma = Closed(), 0.2
    found = sharp(quadratic(), "average-case", sigma=sigma, draws=400, adaptive=adaptive)
    d = closed.scales(adaptive)
    expected = sigma**2 / 2 * float((d * d * closed.h.diagonal()).sum())
    assert found.value == pytest.approx(found.prediction["small sigma"], rel=1e-6)
    assert found.standard_error is not None
    assert abs(found.value - expected) < 4 * found.standard_error < 0.4 * expected


@pytest.mark.parametrize("adaptive", [None, "elementwise", "filter"])
def test_largest_eigenvalue_and_trace_of_the_scaled_hessian(adaptive: str | None) -> None:
    """``lambda_max(DHD)`` and ``tr(DHD)`` are those of the dense matrix."""
    closed = Closed()
    d = closed.scales(adaptive)
    scaled = d[:, None] * closed.h * d
    top = sharp(quadratic(), "lambda-max", adaptive=adaptive)
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]), rel=1e-6)
    trace = sharp(quadratic(), "trace", adaptive=adaptive, probes=5)
    assert trace.value == pytest.approx(float(scaled.trace()), rel=1e-6)


def test_relative_flatness_is_petzkas_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all sign vectors the mean of ``U'HU`` is ``sum <w_s, w_s'> tr(H_ss')`` of the dense Hessian."""
    model = tiny_mlp(2, 3, 2).double()
    data = (X[:, :2], drawn(N, 2, seed=4))
    signs = {n: [torch.tensor(s) for s in itertools.product((-1, 1), repeat=n)] for n in (2, 3)}
    pairs = {n: iter([v for a in rows for b in rows for v in (a, b)]) for n, rows in signs.items()}
    monkeypatch.setattr(curvature_measures, "_signs", lambda count, generator: next(pairs[count]))
    problem = Problem(model=model, loss=nn.MSELoss(), data=data)
    for name, probes in (("0.weight", 16), ("2.weight", 64)):
        one = Problem(model=model, loss=nn.MSELoss(), data=data, params=name)
        found = sharp(one, "relative-flatness", probes=probes)
        w = model.get_parameter(name).detach()
        h = dense_hessian(model, lambda call: nn.functional.mse_loss(call(data[0]), data[1]), name).detach()
        h = h.reshape(*w.shape, *w.shape)
        expected = sum(
            float(w[s] @ w[t]) * float(h[s, :, t, :].diagonal().sum())
            for s, t in itertools.product(range(len(w)), repeat=2)
        )
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.settings["layer"] == name
    assert problem.model is model


def test_keskar_is_the_largest_corner_of_his_box() -> None:
    """``100 (max L - L) / (1 + L)`` over ``|e| <= box (|w| + 1)``, by all corners."""
    closed, box = Closed(), 0.05
    found = sharp(quadratic(), "keskar", box=box)
    expected = 100 * closed.highest(closed.w.abs() + 1, INF, box) / (1 + closed.loss)
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_pac_bayes_sigma_is_the_largest_that_costs_a_tenth_of_accuracy() -> None:
    """With the same draws written out by hand, the mean drop is at most 0.1 at sigma and more a little above."""
    problem = classifier(3)
    with torch.no_grad():
        labels = problem.model(X).argmax(1)
    problem = Problem(model=problem.model, loss=problem.loss, data=(X, labels))
    found = sharp(problem, "pac-bayes", draws=6)
    sigma = found.settings["sigma"]
    assert found.value == pytest.approx(1 / sigma**2)
    assert found.settings["accuracy"] == 1.0

    drops = _drops(problem, 6, (sigma / 1.006, sigma * 1.006))
    assert drops[0] <= 0.1 < drops[1]


def _drops(problem: Problem, draws: int, sigmas: Sequence[float]) -> list[float]:
    """Mean drops of accuracy under the draws that pac-bayes makes, seen from outside by what the model is given."""
    seen: list[Tensor] = []
    flat = torch.cat([p.detach().flatten() for p in problem.model.parameters()])

    class Watching(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == N and not torch.is_grad_enabled():
                seen.append(torch.cat([p.detach().flatten() for p in self.inner.parameters()]) - flat)
            return self.inner(x)

    sharp(Problem(model=Watching(problem.model), loss=problem.loss, data=problem.data), "pac-bayes", draws=draws)
    moves = [e for e in seen if float(e.norm()) > 0][:draws]
    unit = [e / 1e-2 for e in moves]  # the first sigma that is looked at
    names = [name for name, _ in problem.model.named_parameters()]
    shapes = [p.shape for p in problem.model.parameters()]
    found = []
    for sigma in sigmas:
        wrong = []
        for e in unit:
            pieces = torch.split(flat + sigma * e, [math.prod(s) for s in shapes])
            given = {n: t.view(s) for n, t, s in zip(names, pieces, shapes, strict=True)}
            out = torch.func.functional_call(problem.model, given, (X,))
            wrong.append(float((out.argmax(1) != problem.data[1]).double().mean()))
        found.append(float(np.mean(wrong)))
    return found


def test_edges_of_stability() -> None:
    """2/eta and its momentum form; SAM's edge is below it, and tends to it as rho does to zero."""
    assert descent_edge(0.1) == pytest.approx(20)
    assert descent_edge(0.1, 0.9) == pytest.approx(38)
    g, rho, eta = 0.3, 0.05, 0.1
    edge = sam_edge(eta, rho, g)
    # Where gradient descent at w + rho g/||g|| on lambda w^2 / 2 turns over: eta lambda (1 + rho lambda / ||g||) = 2.
    assert eta * edge * (1 + rho * edge / g) == pytest.approx(2)
    assert sam_edge(eta, 1e-9, g) == pytest.approx(20, rel=1e-6)
    found = measure_sharpness(
        Problem(model=quadratic().model, loss=nn.MSELoss(), data=(X, Y), provenance={"recipe": {"momentum": 0.5}}),
        ("edge",),
        lr=0.2,
    ).find("edge")
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(Closed().h)[-1]) / 15, rel=1e-6)


def test_edge_without_a_learning_rate_says_so() -> None:
    """Nothing is guessed where the checkpoint does not say."""
    with pytest.raises(ArgumentError, match="Pass lr"):
        measure_sharpness(quadratic(), ("edge",))


def test_alignment_is_the_cosine_with_the_top_eigenvector() -> None:
    """Of the gradient and of that at ``w + rho g/||g||``, from the dense Hessian."""
    closed = Closed()
    v = torch.linalg.eigh(closed.h).eigenvectors[:, -1]
    there = closed.g + closed.h @ (RHO * closed.g / closed.g.norm())
    found = measure_sharpness(quadratic(), ("alignment",), rho=(RHO,))
    for which, g in (("gradient", closed.g), ("SAM's gradient", there)):
        assert found.find("alignment", of=which).value == pytest.approx(abs(float(g @ v / g.norm())), rel=1e-5)


def test_subsets_of_smaller_m_are_parts_of_those_of_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """One order of the examples serves every m; the same seed gives the same numbers whatever else is measured."""
    alone = measure_sharpness(quadratic(), ("m-sharpness",), m=(4,), rho=(RHO,)).measures[0]
    among = measure_sharpness(quadratic(), ("trace", "worst-case", "m-sharpness"), m=(2, 4), rho=(0.1, RHO))
    assert among.find("m-sharpness", m=4, rho=RHO).value == alone.value
    other = measure_sharpness(
        quadratic(), ("m-sharpness",), torch.Generator().manual_seed(5), m=(4,), rho=(RHO,)
    ).measures[0]
    assert other.value != alone.value


@pytest.mark.parametrize("micro_batch", [1, 7, 24])
def test_micro_batch_changes_nothing(micro_batch: int) -> None:
    """Neither m-sharpness nor the worst case depends on how many examples a graph has."""
    options: dict[str, Any] = {"m": (3, 24), "rho": (RHO,)}
    wanted, found = (
        measure_sharpness(quadratic(), ("m-sharpness", "worst-case"), micro_batch=size, **options)
        for size in (5, micro_batch)
    )
    for a, b in zip(wanted.measures, found.measures, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-11)


def test_weight_decay_is_part_of_the_loss_where_it_is_asked_for() -> None:
    """``c/2 ||w||^2`` adds to the worst case of a quadratic what it adds to gradient and Hessian."""
    base, closed = quadratic(), Closed()
    closed.g, closed.h = closed.g + 0.7 * closed.w, closed.h + 0.7 * torch.eye(5, dtype=torch.float64)
    problem = Problem(model=base.model, loss=base.loss, data=base.data, weight_decay=0.7)
    found = sharp(problem, "worst-case", rho=(RHO,), ascent=LONG)
    assert found.value == pytest.approx(closed.highest(torch.ones(5, dtype=torch.float64), 2, RHO), rel=1e-6)


def test_tokens_are_counted_in_each_subset() -> None:
    """Labels of -100 are no loss terms: a subset of them alone is left out, others are means over their own terms."""
    problem = classifier(1)
    labels = problem.data[1].clone()
    labels[::2] = -100
    masked = Problem(model=problem.model, loss=problem.loss, data=(X, labels))
    kept = Problem(model=problem.model, loss=problem.loss, data=(X[1::2], labels[1::2]))
    one, two = (sharp(p, "m-sharpness", m=(1,), rho=(RHO,)) for p in (masked, kept))
    assert one.value == pytest.approx(two.value, rel=1e-12)
    assert (one.examples, one.settings["subsets"]) == (12, 12)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_comes_back_to_the_bit(error: type[BaseException] | None, dtype: torch.dtype) -> None:
    """Weights, buffers, modes, gradients and random states, after all measures and after Ctrl-C in the midst of one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)
    labels = torch.randint(3, (N,))
    problem = Problem(
        model=model, loss=nn.CrossEntropyLoss(), data=(X.float(), labels), provenance={"recipe": {"lr": 0.1}}
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()

    def progress(stage: str, done: int, total: int | None) -> None:
        if error is not None and stage == "m = 4" and done > 8:
            raise error

    try:
        measure_sharpness(problem, ("all",), progress=progress, m=(4,), draws=2, probes=2, ascent=Ascent(2))
        assert error is None
    except KeyboardInterrupt:
        assert error is not None
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_cost_is_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step at two radii: a gradient and two forward passes an example, beside the audit's and the first pass's."""
    monkeypatch.setattr(worst_case, "MAX_VMAP_EXAMPLES", 0)
    costs = [
        measure_sharpness(quadratic(), ("m-sharpness",), m=(2,), rho=rho).cost.gradients for rho in ((0.1,), (0.1, 0.2))
    ]
    assert costs[1] - costs[0] == pytest.approx(0.4)
    found = sharp(quadratic(), "m-sharpness", m=(2,), rho=(0.1,))
    assert found.gradients == pytest.approx(1.4)


def test_loss_that_leaves_the_numbers_is_infinitely_sharp() -> None:
    """NaN on the way is no small rise: the worst case is infinity, and JSON says null."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :2] @ torch.sqrt(1.05 - self.w)[:, None]).square()

    problem = Problem(model=Fragile(), loss=nn.MSELoss(), data=(X, Y))
    found = measure_sharpness(problem, ("worst-case",), rho=(5.0,), p=INF)
    assert found.measures[0].value == INF
    assert found.to_dict()["measures"][0]["value"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ("flatness",)}, "flatness"),
        ({"m": (0,)}, "m must be one or more finite numbers of at least 1, got"),
        ({"m": (2.5,)}, "whole numbers of examples"),
        ({"m": ()}, "m must be one or more"),
        ({"m": (25,)}, r"m must be at most the number of examples \(24\), got 25"),
        ({"rho": (-1.0,)}, "rho must be one or more finite numbers of at least 0"),
        ({"rho": (INF,)}, "rho must be one or more finite numbers"),
        ({"rho": (1e300,)}, r"rho must be at most 1.3e\+154, whose square float64 holds"),
        ({"sigma": 1e20, "dtype": torch.float32}, r"sigma must be at most 1.8e\+19, whose square float32 holds"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"p": 1}, "p must be 2 or inf"),
        ({"measures": ("pac-bayes",)}, "An accuracy needs labels"),
    ],
)
def test_bad_argument_is_named(options: dict[str, Any], message: str) -> None:
    """Each argument outside its domain ends in an error that names it."""
    with pytest.raises(ArgumentError, match=message):
        measure_sharpness(quadratic(), **options)


def test_batch_statistics_have_no_subsets() -> None:
    """In train mode BatchNorm makes an example's loss depend on its batch: refused."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
    problem = Problem(model=model, loss=nn.MSELoss(), data=[(X, Y)], mode="train")
    with pytest.raises(ArgumentError, match="Measure in eval mode"):
        measure_sharpness(problem)


class Refilling:
    """Batches that are all in the same two tensors, as a careful loader gives them."""

    def __iter__(self) -> Any:
        x, y = torch.empty(6, 4, dtype=torch.float64), torch.empty(6, 1, dtype=torch.float64)
        for i in range(0, N, 6):
            x.copy_(X[i : i + 6])
            y.copy_(Y[i : i + 6])
            yield x, y


def test_loader_that_fills_the_same_tensors_again() -> None:
    """Subsets in a group, and walks over all, see each batch and not the last one."""
    base, measures = quadratic(), ("m-sharpness", "worst-case", "average-case")
    batches = [(X[i : i + 6], Y[i : i + 6]) for i in range(0, N, 6)]
    wanted, found = (
        measure_sharpness(Problem(model=base.model, loss=base.loss, data=data), measures, m=(3, 6), draws=2)
        for data in (batches, Refilling())
    )
    for a, b in zip(wanted.measures, found.measures, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-11)


def test_subsets_reach_over_batches_of_other_lengths() -> None:
    """Tokens padded to other lengths are in subsets of m all the same, each loss the mean over the subset's tokens."""
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    data = [(torch.randint(5, (size, n)), torch.randint(5, (size, n))) for size, n in ((3, 4), (3, 6), (1, 2), (4, 4))]
    problem = Problem(model=network, loss=TokenCrossEntropy(), data=data)
    found = measure_sharpness(problem, m=(4,), rho=0.1).measures[0]

    rises, sentences = [], [(x, y) for batch in data for x, y in zip(*batch, strict=True)]
    for start in (0, 4):
        tokens, labels = (torch.cat([pair[i] for pair in sentences[start : start + 4]]) for i in (0, 1))
        moved = copy.deepcopy(network)
        before = nn.functional.cross_entropy(moved(tokens), labels)
        grads = torch.autograd.grad(before, list(moved.parameters()))
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        with torch.no_grad():
            for p, g in zip(moved.parameters(), grads, strict=True):
                p += 0.1 * g / norm
            rises.append(float(nn.functional.cross_entropy(moved(tokens), labels) - before))
    assert found.value == pytest.approx(sum(rises) / 2, rel=1e-9)
    assert (found.examples, found.settings["subsets"]) == (8, 2)


def test_batches_that_cannot_be_cut_are_said() -> None:
    """Examples that do not lie along the first dimension give no subsets."""
    problem = Problem(
        model=nn.RNN(3, 5).double(),
        loss=lambda output, target: nn.functional.cross_entropy(output[1][0], target),
        data=[(torch.randn(7, 4, 3).double(), torch.randint(5, (4,)))],
    )
    with pytest.raises(DataError, match="can be cut by examples"):
        measure_sharpness(problem, m=(2,))


def test_unlike_settings_do_not_share_a_row() -> None:
    """Two results of other norms, steps or balls are rows of their own, and no one figure."""
    one, two = (measure_sharpness(quadratic(), m=(4,), ascent=Ascent(steps)) for steps in (1, 2))
    rows = [line.split("  ")[0] for line in str(sharpscope.side_by_side([one, two])).splitlines()]
    assert rows[1:3] == [f"m-sharpness, m=4, rho=0.05, ascent {how}" for how in ("1 step", "2 steps")]
    with pytest.raises(DataError, match="must share p, ascent and scaling"):
        m_sharpness_curves([one, two])


def test_radii_that_agree_in_four_digits_have_rows_and_curves_of_their_own() -> None:
    """Each rho, sigma, box and eta is a row with its own value, also across results, and a curve with its own name."""
    radii = (0.05, 0.0500001, 0.05000001)
    result = measure_sharpness(quadratic(), "m-sharpness, worst-case", m=(4,), rho=radii, ascent=1)
    rows = {line.split("  ")[0]: line for line in str(result).splitlines()}
    for name, m in (("m-sharpness", "m=4, "), ("worst-case", "")):
        for rho in radii:
            assert f" {result.find(name, rho=rho)!s} " in rows[f"{name}, {m}rho={rho}"]
    legend = m_sharpness_curves([result], against="m").get_legend_handles_labels()[1]
    assert [label.split(" = ")[-1] for label in legend] == [str(rho) for rho in radii]
    for setting, given in (("sigma", {"measures": "average-case", "draws": 2}), ("box", {"measures": "keskar"})):
        several = [measure_sharpness(quadratic(), **given, **{setting: value}) for value in radii]
        labels = [line.split("  ")[0] for line in str(sharpscope.side_by_side(several)).splitlines()][1:4]
        assert labels == [f"{given['measures']}, {setting}={value}" for value in radii]
    scaled = [measure_sharpness(quadratic(), m=(4,), adaptive=True, eta=value) for value in radii]
    labels = [line.split("  ")[0] for line in str(sharpscope.side_by_side(scaled)).splitlines()][1:4]
    assert [label.split("eta ")[-1] for label in labels] == [str(value) for value in radii]


def test_the_legend_names_the_settings_of_each_result_where_they_differ() -> None:
    """Draws, probes and steps of the ascent of every result are below the table; what is alike is there once."""
    for name, setting, shown in (
        ("average-case", "draws", "pairs of draws"),
        ("trace", "probes", "probes"),
        ("relative-flatness", "probes", "probes"),
        ("m-sharpness", "ascent", "ascent"),
    ):
        several = {
            f"run {count}": measure_sharpness(
                quadratic(), name, m=None if name != "m-sharpness" else 4, **{setting: count}
            )
            for count in (2, 3)
        }
        (note,) = [line for line in str(sharpscope.side_by_side(several)).splitlines() if line.startswith(f"{name}: ")]
        one, two = note.split("run 2: ")[1].split("run 3: ")
        assert f"{shown} 2" in one
        assert f"{shown} 3" in two
        alike = str(sharpscope.side_by_side({"a": several["run 2"], "b": several["run 2"]}))
        assert alike.count(f"{shown} 2") == 1
        assert "settings differ" not in alike


def test_edge_is_sgds() -> None:
    """Of another optimizer's checkpoint there is none, and of another SAM's radius no edge of SAM."""
    data = (X, Y)
    for recipe, error in (({"optimizer": "adamw", "lr": 0.1}, "SGD's, and the checkpoint was trained by adamw"),):
        problem = Problem(model=quadratic().model, loss=nn.MSELoss(), data=data, provenance={"recipe": recipe})
        with pytest.raises(ArgumentError, match=error):
            measure_sharpness(problem, "edge")
    for variant, wanted in (("sam", 0.1), ("asam", None)):
        recipe = {"optimizer": "sgd", "lr": 0.1, "rho": 0.1, "variant": variant}
        problem = Problem(model=quadratic().model, loss=nn.MSELoss(), data=data, provenance={"recipe": recipe})
        assert measure_sharpness(problem, "edge").find("edge").settings["rho"] == wanted


def test_single_values_may_stand_for_lists() -> None:
    """One m, one rho, a number of steps, adaptive=True and names with commas mean what they look like."""
    wanted = measure_sharpness(
        quadratic(), ("m-sharpness", "trace"), m=(4,), rho=(0.1,), adaptive="elementwise", ascent=Ascent(2)
    )
    found = measure_sharpness(quadratic(), "m-sharpness, trace", m=4, rho=0.1, adaptive=True, ascent=2)
    values = [m.value for m in wanted.measures]
    # Which subsets are taken side by side is a matter of timing, and so are the last bits.
    assert [m.value for m in found.measures] == pytest.approx(values, rel=1e-9)
    assert "APGD" in measure_sharpness(quadratic(), "worst-case", ascent="apgd").measures[0].settings["ascent"]


def test_all_leaves_out_what_the_problem_has_not() -> None:
    """A regression has no accuracy and this model no learning rate: said, and the other measures are there."""
    found = measure_sharpness(quadratic(), ("all",), m=(4,), draws=2, probes=2)
    assert set(found.provenance["left_out"]) == {"pac-bayes", "edge"}
    assert {m.name for m in found.measures} == set(sharpness.MEASURES) - {"pac-bayes", "edge"}
    assert "pac-bayes was left out. An accuracy needs labels" in found.summary()


def test_loader_keeps_its_order() -> None:
    """Batches that are no one tensor are cut as they come, and the table warns of sorted ones."""
    problem = quadratic()
    batches = [(X[i : i + 7], Y[i : i + 7]) for i in range(0, N, 7)]
    found = measure_sharpness(Problem(model=problem.model, loss=problem.loss, data=batches), m=(5,), rho=(RHO,))
    closed = [Closed(list(range(i, i + 5))) for i in range(0, 20, 5)]
    expected = np.mean([c.rise(RHO * c.g / c.g.norm()) for c in closed])
    assert found.measures[0].value == pytest.approx(expected, rel=1e-9)
    assert "neighbours in the loader's order" in found.summary()


def test_result_survives_a_file(tmp_path: Any) -> None:
    """What is saved is what is loaded, and the table shows every measure."""
    measures = ("m-sharpness", "worst-case", "trace")
    result = measure_sharpness(quadratic(), measures, m=(2, 4), rho=(0.1,), probes=2, p=INF)
    result.save(tmp_path / "r.json")
    again = SharpnessResult.load(tmp_path / "r.json")
    assert [m.value for m in again.measures] == [m.value for m in result.measures]
    assert again.summary() == result.summary()
    assert all(m.label in result.summary() for m in result.measures)
    assert "<table>" in result._repr_html_()
    assert again.find("worst-case", p="inf").value == result.find("worst-case", p="inf").value
    m_sharpness_curves([again])
    with pytest.raises(DataError, match="one measure m-sharpness"):
        result.find("m-sharpness")


# Side by side


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("adaptive", [None, "elementwise", "filter"])
@pytest.mark.parametrize("steps", [1, 3])
def test_subsets_side_by_side_are_those_one_after_another(
    p: float, adaptive: str | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CNN with weight decay, masked labels in some subsets: the same rises and first orders, whichever is faster."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()
    inputs, labels = drawn(50, 1, 6, 6, seed=3), torch.randint(3, (50,), generator=torch.Generator().manual_seed(0))
    labels[:20] = -100
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, labels), weight_decay=0.1)
    found = []
    for quick in (True, False):
        monkeypatch.setattr(worst_case, "MAX_VMAP_EXAMPLES", 128 if quick else 0)
        monkeypatch.setattr(worst_case.time, "perf_counter", itertools.count(0.0, 1.0).__next__)
        found.append(
            measure_sharpness(
                problem, m=(1, 2), rho=(0.05, 0.5), p=p, adaptive=adaptive, eta=0.01, ascent=Ascent(steps)
            )
        )
        monkeypatch.undo()
    for a, b in zip(*(r.measures for r in found), strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-10)
        assert a.prediction["first order"] == pytest.approx(b.prediction["first order"], rel=1e-10)
        assert {**a.settings, "side by side": not a.settings["side by side"]} == b.settings


def test_what_cannot_go_side_by_side_goes_one_after_another() -> None:
    """A model that asks for a number in its forward pass, which vmap cannot know, is measured all the same."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x)
            return out if float(out.detach().sum()) < 1e9 else 2 * out

    torch.manual_seed(0)
    asking = Asking()
    wanted = measure_sharpness(Problem(model=asking.linear, loss=nn.MSELoss(), data=(X, Y)), m=(2,))
    found = measure_sharpness(Problem(model=asking, loss=nn.MSELoss(), data=(X, Y)), m=(2,))
    assert found.measures[0].value == pytest.approx(wanted.measures[0].value, rel=1e-10)


class Scaled(nn.Module):
    """Takes a number beside its input, which is not the same in every batch; keeps its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()
        self.last = torch.zeros(1)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        self.last = self.linear(x).detach()
        return self.linear(x) * scale


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_subsets_side_by_side_have_their_own_numbers(kind: Any) -> None:
    """What has no row an example, and differs from batch to batch, is each subset's own."""
    inputs, labels = drawn(64, 3), torch.randint(2, (64,), generator=torch.Generator().manual_seed(0))
    model = Scaled()
    data = [
        {"x": inputs[i : i + 16], "scale": kind(2.0 ** (i // 16)), "y": labels[i : i + 16]} for i in range(0, 64, 16)
    ]
    found = sharp(Problem(model=model, loss=nn.CrossEntropyLoss(), data=data), "m-sharpness", m=(1,), rho=(0.1,))
    rises = []
    for i in range(64):
        at_w = nn.functional.cross_entropy(model(inputs[i : i + 1], 2.0 ** (i // 16)), labels[i : i + 1])
        g = torch.autograd.grad(at_w, list(model.parameters()))
        size = torch.cat([t.flatten() for t in g]).norm()
        moved = {n: p + 0.1 * t / size for (n, p), t in zip(model.named_parameters(), g, strict=True)}
        out = torch.func.functional_call(model, moved, (inputs[i : i + 1], 2.0 ** (i // 16)))
        rises.append(float((nn.functional.cross_entropy(out, labels[i : i + 1]) - at_w).detach()))
    assert found.value == pytest.approx(np.mean(rises), rel=1e-9)


def test_what_a_model_keeps_of_its_last_forward_pass_can_be_used() -> None:
    """After subsets went side by side an activation that the model stored is a plain tensor."""
    model = Scaled()
    data = [{"x": drawn(64, 3), "scale": 1.0, "y": torch.randint(2, (64,))}]
    measure_sharpness(Problem(model=model, loss=nn.CrossEntropyLoss(), data=data), m=(1,))
    copy.deepcopy(model)
    assert float(model.last.sum()) == float(model.last.clone().sum())


def test_batches_of_other_lengths_go_one_after_another() -> None:
    """Padded batches, first groups within one and later ones across two: a number, the mean of all examples."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(self.embedding(x).mean(1))
            return out

    data = [(torch.randint(10, (48, length)), torch.randint(2, (48,))) for length in (5, 7, 9)]
    model = Mean().double()
    found = sharp(Problem(model=model, loss=nn.CrossEntropyLoss(), data=data), "m-sharpness", m=(1,))
    parts = [sharp(Problem(model=model, loss=nn.CrossEntropyLoss(), data=[one]), "m-sharpness", m=(1,)) for one in data]
    assert found.value == pytest.approx(np.mean([part.value for part in parts]), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "given", "tiny", "enough"),
    [
        ("m-sharpness", {"m": (4,)}, {"rho": 1e-7}, {"rho": 0.05}),
        ("m-sharpness", {"m": (4,), "p": INF, "ascent": 3}, {"rho": 1e-9}, {"rho": 0.01}),
        ("m-sharpness", {"m": (4,), "adaptive": "filter"}, {"rho": 1e-8}, {"rho": 0.05}),
        ("m-sharpness", {"m": (N,)}, {"rho": 1e-7}, {"rho": 0.05}),
        ("worst-case", {}, {"rho": 1e-7}, {"rho": 0.05}),
        ("worst-case", {"adaptive": "elementwise", "ascent": 1}, {"rho": 1e-8}, {"rho": 0.05}),
        ("average-case", {"draws": 2}, {"sigma": 1e-5}, {"sigma": 0.1}),
        ("keskar", {}, {"box": 1e-9}, {"box": 1e-2}),
        ("alignment", {}, {"rho": 1e-8}, {"rho": 0.05}),
    ],
)
def test_what_float32_cannot_resolve_is_said(
    name: str, given: dict[str, Any], tiny: dict[str, float], enough: dict[str, float]
) -> None:
    """Too small a radius is marked with its rounding and a remedy, whose number then is float64's; others are not."""
    exact = classifier(0, nn.Tanh)
    rough = Problem(model=copy.deepcopy(exact.model).float(), loss=exact.loss, data=(X.float(), exact.data[1]))
    for extent, resolved in ((tiny, False), (enough, True)):
        found = measure_sharpness(rough, name, **given, **extent)
        one, true = found.measures[-1], measure_sharpness(exact, name, **given, **extent).measures[-1]
        assert found.converged == one.converged == resolved
        assert true.converged
        assert ("too small for float32" in str(found)) != resolved
        if resolved:
            assert one.value == pytest.approx(true.value, rel=0.1)
        else:
            assert f"Raise {next(iter(extent))} or compute in float64 (--dtype float64)" in str(found)
            lifted = measure_sharpness(rough, name, **given, **extent, dtype=torch.float64).measures[-1]
            assert lifted.converged
            assert lifted.value == pytest.approx(true.value, rel=1e-3)  # of weights rounded to float32
            if name != "alignment":
                assert abs(one.value - true.value) <= (200 if name == "keskar" else 2) * one.settings["rounding"]
        if one.lower is not None and one.upper is not None:
            assert one.lower <= true.value <= one.upper or resolved


def test_a_vanishing_gradient_is_no_rounding() -> None:
    """At a minimum one step along a zero gradient rises by exactly nothing, and so does a radius of 0."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    problem = Problem(model=model, loss=nn.MSELoss(), data=(X.float(), torch.zeros(N, 1)))
    found = measure_sharpness(problem, "m-sharpness, worst-case", m=4, rho=(0.0, 1e-7, 0.1), ascent=1)
    assert found.converged
    assert {m.value for m in found.measures} == {0.0}


def test_interval_of_tiny_perturbations_holds_the_truth_in_float32() -> None:
    """The rounding of the loss at w, which all draws share, is in the interval."""
    single = classifier(0, nn.Tanh)
    for sigma in (1e-5, 1e-4):
        true = sharp(single, "average-case", sigma=sigma, draws=16)
        rough = sharp(
            Problem(model=copy.deepcopy(single.model).float(), loss=single.loss, data=(X.float(), single.data[1])),
            "average-case",
            sigma=sigma,
            draws=16,
        )
        assert rough.lower is not None
        assert rough.upper is not None
        assert rough.lower <= true.value <= rough.upper


def test_radius_of_another_sam_is_no_plain_radius() -> None:
    """SAM's edge and gradient are stated of plain SAM alone."""
    for more, wanted in (
        ({}, 0.5),
        ({"m": 4}, None),
        ({"sam_args": {"adaptive": "elementwise"}}, None),
        ({"p": INF}, None),
    ):
        recipe = {"optimizer": "sgd", "lr": 0.1, "rho": 0.5, **more}
        base = quadratic()
        problem = Problem(model=base.model, loss=base.loss, data=base.data, provenance={"recipe": recipe})
        assert measure_sharpness(problem, "edge").find("edge").settings["rho"] == wanted


def test_accuracy_that_any_noise_destroys_has_no_sigma() -> None:
    """Where all outputs tie, the floor of the search is no measurement."""
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, torch.zeros(N, dtype=torch.long)))
    with pytest.raises(ArgumentError, match="Even noise of 1e-06 costs more"):
        measure_sharpness(problem, "pac-bayes")


def test_parameters_on_the_same_memory_are_refused() -> None:
    """Two parameters that share their numbers would each be moved: named, with how to tie them."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight.data = model[0].weight.data
    problem = Problem(model=model, loss=nn.MSELoss(), data=(X, X))
    with pytest.raises(ProblemError, match=r"0.weight and 2.weight are two parameters on the same memory"):
        measure_sharpness(problem, "worst-case")


def test_sign_of_a_zero_in_a_buffer_is_put_back() -> None:
    """Bit for bit means -0.0 too."""

    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1).double()
            self.register_buffer("zero", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.zero.mul_(-1)
            out: Tensor = self.linear(x)
            return out

    model = Turning()
    for steps in (1, 2):
        sharp(Problem(model=model, loss=nn.MSELoss(), data=(X, Y)), "worst-case", ascent=Ascent(steps))
        assert not bool(model.zero.signbit().any())


# Invariance


def test_rescaling_moves_the_plain_measures_and_not_the_adaptive_ones(tmp_path: Any) -> None:
    """lambda_max moves by more than a tenth; adaptive measures and relative flatness stand still to 1e-5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU()),
            *(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        )
    inputs = drawn(48, 1, 6, 6, seed=3).float()
    labels = torch.randint(3, (48,), generator=torch.Generator().manual_seed(0))
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, labels))
    found = sharpscope.rescaling_invariance(problem, 3.0, m=16)
    assert found.layers == (("0", "4"), ("6", "8"))
    moved = dict(zip([m.label for m in found.before], found.changes, strict=True))
    still = {k: v for k, v in moved.items() if "adaptive" in k or "relative" in k}
    assert len(still) == 5 + 4
    assert max(still.values()) < 1e-5
    assert moved["lambda-max"] > 0.1
    assert moved["m-sharpness, m=16, rho=0.05"] > 0.1
    assert "function is the same" in found.summary()
    found.save(tmp_path / "i.json")
    assert InvarianceResult.load(tmp_path / "i.json").summary() == found.summary()


class Penalised(nn.Module):
    """A loss that looks at the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(output, target)
        return loss + 0.1 * sum((p**2).sum() for p in self.model.parameters())


def test_what_is_not_the_functions_own_is_refused() -> None:
    """Weight decay, a penalty in the loss, and tied layers have no invariance to show."""
    base = classifier(0)
    decayed = Problem(model=base.model, loss=base.loss, data=base.data, weight_decay=0.1)
    with pytest.raises(ArgumentError, match="weight_decay must be 0"):
        sharpscope.rescaling_invariance(decayed)
    few = {"m": 12, "draws": 2, "probes": 2, "ascent": Ascent(1)}
    held = Problem(model=base.model, loss=Penalised(base.model), data=base.data)
    with pytest.raises(ProblemError, match="the loss depends on the weights"):
        sharpscope.rescaling_invariance(held, **few)
    loss = Penalised(base.model)
    caught = Problem(model=base.model, loss=lambda output, target: loss(output, target), data=base.data)
    with pytest.raises(ProblemError, match="reads the model's own parameters"):
        sharpscope.rescaling_invariance(caught, **few)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)).double()
    tied[2].weight = tied[0].weight
    with pytest.raises(ProblemError, match="Nothing can be rescaled"):
        sharpscope.rescaling_invariance(Problem(model=tied, loss=nn.CrossEntropyLoss(), data=base.data))


def test_what_passes_no_factor_is_not_rescaled() -> None:
    """tanh is no ReLU; BatchNorm between two layers takes the factor out again."""
    with pytest.raises(ProblemError, match="Nothing can be rescaled"):
        sharpscope.rescaling_invariance(classifier(0, nn.Tanh))
    with pytest.raises(ArgumentError, match="factor must be positive, finite and not 1, got 1"):
        sharpscope.rescaling_invariance(classifier(0), 1.0)
