"""Pieces of a micro-batch side by side give the sums that the whole gives, and leave the threads as they were."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharpscope import Objective, Problem, ProblemError
from sharpscope.objective import lanes, sizes
from sharpscope.operators import NAMES, curvature

X = torch.randn(140, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (140,), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolution, ReLU and pooling, and which threads it ran in."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.last = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.double()
        self.ran: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.ran.add(threading.get_ident())
        hidden = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1)
        return self.last(hidden.tanh())


def objective(count: int, operator: str = "hessian", size: int = 70, data: object = (X, Y)) -> Objective:
    problem = Problem(model=Net(), loss=nn.CrossEntropyLoss(), data=data)
    made = Objective(problem, micro_batch=size, curvature=curvature(operator, torch.Generator().manual_seed(0)))
    made.lanes = count
    return made


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Four threads, so that lanes get more and less than one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("operator", [name for name in NAMES if name != "finite-difference"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_lanes_add_up_to_the_whole(operator: str, count: int) -> None:
    """Loss, gradient, products and cost are those of whole micro-batches, whichever the matrix."""
    plain, laned = objective(1, operator), objective(count, operator)
    block = torch.randn(plain.num_params, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted, found = plain.hvp(block), laned.hvp(block)
    assert float((wanted - found).norm() / wanted.norm()) < 1e-13
    assert laned.loss == pytest.approx(plain.loss, rel=1e-14)
    assert laned.gradients == plain.gradients
    assert torch.equal(laned.hvp(block), found)


def test_what_partwise_says_does_not_depend_on_lanes() -> None:
    """A micro-batch is one part, however many lanes made it."""
    block = torch.randn(objective(1).num_params, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (_, one), (_, two) = (objective(count).hvp_partwise(block) for count in (1, 2))
    assert one.sizes == two.sizes == (70, 70)
    assert float((one.forms - two.forms).abs().max()) < 1e-13


def test_the_model_runs_in_one_thread_and_products_in_several() -> None:
    """The user's forward may keep what it likes; only graphs that are there are differentiated side by side."""
    seen: set[int] = set()
    made = objective(4)
    graph = made.curvature.graph

    def watched(terms, part, keep):  # type: ignore[no-untyped-def]
        built = graph(terms, part, keep)

        def products(block: Tensor, last: bool = False) -> Tensor:
            seen.add(threading.get_ident())
            assert torch.get_num_threads() == 1
            return built.products(block, last)

        return dataclasses.replace(built, products=products)

    made.curvature = dataclasses.replace(made.curvature, graph=watched)
    made.hvp(torch.ones(made.num_params, 1, dtype=torch.float64))
    assert len(seen) > 1
    assert made.terms.model.ran == {threading.get_ident()}
    assert torch.get_num_threads() == 4


def test_few_examples_are_one_graph() -> None:
    """No piece has fewer than LEAST examples."""
    built: list[int] = []
    made = objective(8, size=2 * lanes.LEAST + 3)
    graph = made.curvature.graph

    def counted(terms, part, keep):  # type: ignore[no-untyped-def]
        built.append(part.size)
        return graph(terms, part, keep)

    made.curvature = dataclasses.replace(made.curvature, graph=counted)
    made.hvp(torch.ones(made.num_params, 1, dtype=torch.float64))
    assert sum(built) == len(Y)
    assert min(built) >= lanes.LEAST
    assert max(built) <= lanes.LEAST + 2


class Fails(torch.autograd.Function):
    """The identity, whose backward has no derivative for more than ``most`` examples, and says ``error``."""

    error: Exception = MemoryError()
    most = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: int = 0) -> Tensor:
        ctx.order = order
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.order and len(gradient) > Fails.most:
            raise Fails.error
        return Fails.apply(gradient, ctx.order + 1), None


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Objective:
    """Two lanes, in which nothing goes well."""
    monkeypatch.setattr(Net, "forward", lambda self, x: self.last(Fails.apply(self.conv(x)).flatten(1)[:, :8].tanh()))
    return objective(2)


def test_an_error_in_a_lane_is_the_callers_and_threads_come_back(
    failing: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, as without lanes."""
    monkeypatch.setattr(Fails, "error", RuntimeError("the derivative for 'self' is not implemented."))
    with pytest.raises(ProblemError, match="second derivative"):
        failing.hvp(torch.ones(failing.num_params, 2, dtype=torch.float64))
    assert torch.get_num_threads() == 4


def test_lanes_that_do_not_fit_into_memory_are_halved(failing: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of 70 in lanes of 35, of which 20 fit, become some of 35 in lanes of 17 and 18."""
    block = torch.randn(failing.num_params, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    monkeypatch.setattr(Fails, "most", 70)
    wanted = failing.hvp(block)
    monkeypatch.setattr(Fails, "most", 20)
    found = failing.hvp(block)
    assert failing.micro_batch == 35
    assert float((wanted - found).norm() / wanted.norm()) < 1e-13


def test_lanes_are_chosen_where_they_are_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least time in two rounds wins, by 5 % where it is not the first choice; one round does where it is clear."""
    now = [0.0]
    monkeypatch.setattr(sizes.time, "perf_counter", lambda: now[0])

    def chosen(*rounds: tuple[float, float]) -> tuple[int, int]:
        left = [seconds for one in rounds for seconds in one]

        def run(choice: tuple[int, int]) -> None:
            now[0] += left.pop(0)

        return sizes.clearly_fastest(run, [(256, 1), (256, 2)])

    assert chosen((1.0, 1.1), (1.0, 0.96)) == (256, 1)
    assert chosen((1.0, 1.1), (1.0, 0.94)) == (256, 2)
    assert chosen((1.0, 1.3)) == (256, 1)
    assert chosen((1.0, 0.8)) == (256, 2)


def test_trials_of_lanes_are_within_their_price() -> None:
    """More threads and more data are worth more trials, few data none."""
    for threads, price, wanted in (
        (1, 1e9, [(256, 1)]),
        (4, 1e9, [(256, 1), (512, 2), (512, 4)]),
        (2, 8_000, [(256, 1), (512, 2)]),
        (2, 4_000, [(256, 1), (256, 2)]),
        (2, 3_000, [(256, 1)]),
    ):
        choices = sizes.with_lanes(256, 512, threads, price)
        assert choices == wanted
        cost = sizes.ROUNDS * len(choices) * max(size for size, _ in choices) * (1 + 2 * sizes.VECTORS)
        assert len(choices) == 1 or cost <= price


def test_finite_differences_have_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """They write the weights that all lanes would read."""
    monkeypatch.setattr(sizes, "clearly_fastest", lambda run, choices: choices[-1])
    monkeypatch.setattr(sizes, "PRICE", 100.0)
    data = (X.repeat(30, 1, 1, 1), Y.repeat(30))
    for operator, wanted in (("hessian", 4), ("finite-difference", 1)):
        made = objective(1, operator, data=data)
        made.micro_batch = None
        made.settle_micro_batch()
        assert made.lanes == wanted


def test_weights_that_move_and_batches_that_are_kept_are_never_cut() -> None:
    """Lanes that somebody sets by hand change neither a finite difference nor a loader's batches."""
    block = torch.randn(objective(1).num_params, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, two = (objective(count, "finite-difference") for count in (1, 2))
    before = [p.clone() for p in two.terms.params]
    assert torch.equal(one.hvp(block), two.hvp(block))
    assert all(torch.equal(p, q) for p, q in zip(two.terms.params, before, strict=True))
    kept = objective(2)
    kept.micro_batch = "loader"
    built: list[int] = []
    graph = kept.curvature.graph
    kept.curvature = dataclasses.replace(
        kept.curvature, graph=lambda terms, part, keep: (built.append(part.size), graph(terms, part, keep))[1]
    )
    kept.hvp(block)
    assert built == [140]
