"""What float32 does to the curvature of a network that fits its data too well is in the bounds, or is said."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dense import dense_hessian, top
from sharpscope import AuditError, Objective, Problem, top_eigenvalues
from sharpscope.objective.audit import float32_rounding

LOSS = nn.CrossEntropyLoss()
ROWS = torch.Generator().manual_seed(0)
X, Y = torch.randn(200, 8, generator=ROWS), torch.arange(200) % 3


LOSSES = (1e-2, 1e-3, 1e-4, 4e-5)


def fitted(seed: int, loss: float) -> nn.Module:
    """A network trained until its mean loss is so small."""
    return copy.deepcopy(trajectory(seed)[loss])


@functools.cache
def trajectory(seed: int) -> dict[float, nn.Module]:
    """One training, as it was when its mean loss first fell below each of LOSSES."""
    found: dict[float, nn.Module] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(5000):
        optimizer.zero_grad()
        value = LOSS(model(X), Y)
        value.backward()
        found |= {loss: copy.deepcopy(model) for loss in LOSSES if value < loss and loss not in found}
        if len(found) == len(LOSSES):
            break
        optimizer.step()
    return found


def problem(model: nn.Module, inputs: Tensor = X, labels: Tensor = Y) -> Problem:
    return Problem(model=model, loss=LOSS, data=(inputs, labels))


@pytest.mark.filterwarnings("ignore::sharpscope.ConvergenceWarning")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_in_float32_hold_the_float64_eigenvalues(seed: int, loss: float) -> None:
    """However small the loss is, and without being longer than 1 % of lambda_max while it is 1e-4 or more."""
    model = fitted(seed, loss)
    truth = top(dense_hessian(copy.deepcopy(model), lambda call: LOSS(call(X.double()), Y)), 5).numpy()
    result = top_eigenvalues(problem(model), tol=1e-2)
    assert (result.lower <= truth).all()
    assert (truth <= result.upper).all()
    assert loss < 1e-4 or result.upper[0] - result.lower[0] < 0.01 * truth[0]


def test_the_rounding_is_that_of_the_models_own_numbers() -> None:
    """It is ``|v'(H - H64)v|`` of the dense Hessians, and nothing in float64."""
    model = fitted(0, 1e-4)
    vectors = torch.linalg.qr(torch.randn(len(torch.nn.utils.parameters_to_vector(model.parameters())), 3))[0]
    single = Objective(problem(model))
    with single.measuring():
        found = float32_rounding(single, vectors)
        forms = (vectors * single.hvp(vectors)).double().sum(0).numpy()
    exact = dense_hessian(copy.deepcopy(model), lambda call: LOSS(call(X.double()), Y)).numpy()
    v = vectors.double().numpy()
    expected = np.abs(forms - np.einsum("ik,ij,jk->k", v, exact, v)).max()
    assert found == pytest.approx(expected, rel=0.2)
    double = Objective(problem(model), dtype=torch.float64)
    with double.measuring():
        assert float32_rounding(double, vectors) < 1e-15


def test_a_loss_of_zero_is_not_blamed_on_a_derivative() -> None:
    """Where float32 has nothing but rounding left, the sentence says so and names float64, which measures it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([25.0, 0.0, 0.0]))
    of_one_class = problem(model, labels=torch.zeros(200, dtype=torch.long))
    with pytest.raises(AuditError, match=r"float32 does not resolve it\. Pass dtype=torch\.float64"):
        top_eigenvalues(of_one_class)
    result = top_eigenvalues(of_one_class, k=1, dtype=torch.float64)
    assert 0 < result.lambda_max < 1e-6
