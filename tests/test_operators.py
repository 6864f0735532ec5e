"""Gauss-Newton, Fisher, empirical Fisher and difference products against dense matrices from torch.func."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from sharpscope import Objective, Problem
from sharpscope.batches import micro_batches
from sharpscope.draws import uniform
from sharpscope.operators import curvature

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1))
SOFT = torch.softmax(torch.randn(24, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1)
BITS = (SOFT > 0.3).double()
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
TOKENS = torch.randint(0, 3, (24, 2), generator=torch.Generator().manual_seed(3))
TOKENS[::5, 1] = -100


def net(outputs: int = 3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def tagger() -> nn.Module:
    return nn.Sequential(net(6), nn.Unflatten(1, (3, 2)))


def logarithmic() -> nn.Module:
    return nn.Sequential(net(), nn.LogSoftmax(1))


# name: model, loss, target; whether torch's reduction="none" gives a_i l_i for each term; and sum_i a_i.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor, float]] = {
    "cross_entropy": (net, nn.CrossEntropyLoss(), Y, 24),
    "class weights": (net, nn.CrossEntropyLoss(WEIGHT), Y, float(WEIGHT[Y].sum())),
    "smoothing, weights and ignore_index": (
        net,
        nn.CrossEntropyLoss(WEIGHT, ignore_index=0, label_smoothing=0.2),
        Y,
        float(WEIGHT[Y[Y != 0]].sum()),
    ),
    "class probabilities": (net, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), SOFT, 24),
    "tokens": (tagger, nn.CrossEntropyLoss(), TOKENS, float((TOKENS >= 0).sum())),
    "nll": (logarithmic, nn.NLLLoss(WEIGHT, ignore_index=2), Y, float(WEIGHT[Y[Y != 2]].sum())),
    "mse": (net, nn.MSELoss(), SOFT, 72),
    "bce": (net, nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT + 1), BITS, 72),
}


def summed(loss: nn.Module, reduction: str) -> nn.Module:
    other = copy.copy(loss)
    other.reduction = reduction
    return other


def product(problem: Problem, operator: str, seed: int = 0, **options: Any) -> Tensor:
    """The whole matrix, as products with the columns of the identity."""
    chosen = curvature(operator, torch.Generator().manual_seed(seed))
    objective = Objective(problem, curvature=chosen, **options)
    return objective.hvp(torch.eye(objective.num_params, dtype=objective.dtype))


def flat(model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The weights as one vector, and the output on all of X as a function of it."""
    names = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def output(w: Tensor) -> Tensor:
        pieces = torch.split(w, [size for _, _, size in names])
        return functional_call(model, {n: p.view(s) for (n, s, _), p in zip(names, pieces, strict=True)}, (X,))

    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), output


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


@functools.cache
def gauss_newton(name: str) -> Tensor:
    """J' H_L J / sum_i a_i by torch.func; of nll through the logits that log_softmax was given."""
    make, loss, target, weight = CASES[name]
    model = make()
    if name == "nll":
        loss = nn.CrossEntropyLoss(loss.weight, ignore_index=loss.ignore_index)
        model = model[0]
    w, output = flat(model)
    jacobian = jacrev(output)(w).flatten(0, -2)
    z = output(w).detach()
    middle = hessian(lambda z: summed(loss, "sum")(z, target))(z).reshape(z.numel(), z.numel())
    return jacobian.T @ middle @ jacobian / weight


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_matches_the_dense_one(name: str) -> None:
    """J' H_L J over unequal batches is torch.func's over all at once, whatever the loss's terms."""
    make, loss, target, _ = CASES[name]
    data = list(zip(X.split(7), target.split(7), strict=True))
    problem = Problem(model=make(), loss=loss, data=data)
    for micro_batch in ("loader", 5):
        assert close(product(problem, "ggn", micro_batch=micro_batch), gauss_newton(name))


@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher_matches_the_dense_one(name: str) -> None:
    """sum_i a_i g_i g_i' / sum_i a_i over single loss terms, from the Jacobian of all of them."""
    make, loss, target, weight = CASES[name]
    w, output = flat(make())
    rows = jacrev(lambda w: summed(loss, "none")(output(w), target).flatten())(w)
    if name in ("class probabilities", "tokens", "mse", "bce", "cross_entropy"):
        a = torch.ones(len(rows), dtype=torch.float64)
    else:
        a = WEIGHT[target]
    expected = sum(torch.outer(g, g) / a_i for g, a_i in zip(rows, a, strict=True) if bool(g.any())) / weight
    problem = Problem(model=make(), loss=loss, data=(X, target))
    assert close(product(problem, "empirical-fisher", micro_batch=5), expected)


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_that_of_drawn_targets(name: str) -> None:
    """Each term's gradient is that of torch's own loss at the drawn target, weighted as the loss weights its terms."""
    make, loss, target, weight = CASES[name]
    problem = Problem(model=make(), loss=loss, data=(X, target))
    objective = Objective(problem)
    likelihood = objective.terms.loss.likelihood
    assert likelihood is not None
    w, output = flat(make())
    z = output(w).detach()
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
    shape = z.shape if likelihood.dim is None else z[:, :1].shape
    drawn = likelihood.draw(z, uniform(seed, next(micro_batches([(X, target)], None)), shape))
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "mse": lambda z: F.mse_loss(z, drawn, reduction="none"),
        "bce": lambda z: F.binary_cross_entropy_with_logits(z, drawn, reduction="none"),
        "nll": lambda z: F.nll_loss(z, drawn[:, 0], reduction="none"),
    }
    term = plain.get(name, lambda z: F.cross_entropy(z, drawn[:, 0], reduction="none"))
    rows = jacrev(lambda w: term(output(w)).flatten())(w)
    mass = likelihood.mass(z, target).expand(shape).flatten()
    expected = torch.einsum("in,i,im->nm", rows, mass, rows) / weight
    for micro_batch in (24, 5):
        assert close(product(problem, "fisher", micro_batch=micro_batch), expected)


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_gauss_newton_on_average(name: str) -> None:
    """Over 400 draws its mean is the Gauss-Newton matrix, within five standard errors of its trace and corner."""
    make, loss, target, _ = CASES[name]
    problem = Problem(model=make(), loss=loss, data=(X, target))
    vector = torch.randn(Objective(problem).num_params, 1, generator=torch.Generator().manual_seed(5)).double()
    wanted = float(vector.T @ gauss_newton(name) @ vector)
    found = []
    for seed in range(400):
        objective = Objective(problem, curvature=curvature("fisher", torch.Generator().manual_seed(seed)))
        objective.terms.checked = True
        found.append(float(vector.T @ objective.hvp(vector)))
    sample = torch.tensor(found)
    assert abs(float(sample.mean()) - wanted) < 5 * float(sample.std()) / 20
    assert float(sample.std()) < wanted  # or the line above says nothing
