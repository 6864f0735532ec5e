"""A computation in float64 is one throughout, and a model that cannot be in it is measured in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dense import dense_hessian, top
from sharpscope import Objective, Problem, ProblemError, top_eigenvalues

COUNT = 15


class Rounding(nn.Module):
    """A norm and a softmax in float32 in each of the ways that code has, after numbers made without a dtype."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            h = self.body(x)
            h = h * (h.square().mean(1, keepdim=True) + 1e-3).rsqrt() + h.softmax(1)
            return self.head(torch.tanh(h))  # type: ignore[no-any-return]
        h = self.body(x.float() @ torch.eye(4) + torch.zeros(len(x), 4)).to(torch.float32)
        h = h * (h.square().mean(1, keepdim=True, dtype=torch.float32) + 1e-3).rsqrt() + h.softmax(1, torch.float32)
        return self.head(torch.tanh(h).type(torch.float32))  # type: ignore[no-any-return]


class Keeps(nn.Module):
    """Multiplies by a tensor that is neither parameter nor buffer, and so is not converted with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.mix = torch.eye(4) + 1

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x @ self.mix)
        return found


def data() -> Any:
    source = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 4, generator=source), torch.randint(0, 3, (COUNT,), generator=source)


@pytest.mark.parametrize(("operator", "tol"), [("hessian", 1e-9), ("finite-difference", 1e-4)])
def test_what_a_model_computes_in_float32_is_lifted_too(operator: str, tol: float) -> None:
    """The eigenvalues are those of the function without roundings, which are noise under a division by a short step."""
    torch.manual_seed(1)
    model, plain = Rounding(), Rounding(plain=True)
    plain.load_state_dict(model.state_dict())
    x, label = data()
    exact = top(dense_hessian(plain, lambda call: nn.functional.cross_entropy(call(x.double()), label)))
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(x, label))
    found = top_eigenvalues(problem, tol=tol, dtype=torch.float64, operator=operator)
    assert found.converged.all()
    assert found.eigenvalues == pytest.approx(exact.numpy(), rel=1e-7)


def test_a_model_that_keeps_float32_is_measured_in_float32() -> None:
    """Its audit does without the float64 copy; asked for float64, it is told so in one sentence."""
    torch.manual_seed(2)
    problem = Problem(model=Keeps(), loss=nn.CrossEntropyLoss(), data=data())
    x, label = data()
    x = x.double() @ (torch.eye(4).double() + 1)
    exact = top(
        dense_hessian(nn.Sequential(problem.model.body), lambda call: nn.functional.cross_entropy(call(x), label))
    )
    problem.model.float()
    assert top_eigenvalues(problem).eigenvalues == pytest.approx(exact.numpy(), rel=1e-3)
    with pytest.raises(ProblemError, match="cannot take the data"):
        top_eigenvalues(problem, dtype=torch.float64)


def test_float32_stays_where_it_is_asked_for() -> None:
    """A model in float32 rounds as its code says."""
    seen = []

    class Watched(Rounding):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.zeros(1).dtype)
            return super().forward(x)

    top_eigenvalues(Problem(model=Watched(), loss=nn.CrossEntropyLoss(), data=data()), k=1, dtype=torch.float32)
    assert {torch.float32, torch.float64} == set(seen)  # float64 is the audit's copy
    assert torch.zeros(1).dtype == torch.float32


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch 2.8 and later")
def test_groups_are_products_with_their_experts() -> None:
    """Rows by the matrix of their group, an empty one among them, and rows of no group at the end."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            found = torch._grouped_mm(x[0], self.experts, torch.tensor([3, 3, 7], dtype=torch.int32))
            assert found.shape == (8, 4)
            return found[None, :7]

    rows, model = torch.randn(1, 8, 4), Experts()
    problem = Problem(model=model, loss=nn.MSELoss(), data=(rows, torch.zeros(1, 7, 4)))
    loss, gradient = Objective(problem, dtype=torch.float64).loss_and_gradient()
    experts, x = model.experts.detach().double().requires_grad_(), rows[0].double()
    expected = torch.cat([x[:3] @ experts[0], x[3:7] @ experts[2]]).square().mean()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, torch.autograd.grad(expected, experts)[0].reshape(-1), rtol=1e-12)


class Draws(nn.Module):
    """Fixed random features, drawn anew in each forward pass in one of the ways that code has."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        source = torch.Generator().manual_seed(0)
        features = {
            "plain": lambda: torch.randn(4, 24, generator=source),
            "typed": lambda: torch.randn(4, 24, generator=source, dtype=torch.float32),
            "in place": lambda: torch.empty(4, 24).normal_(generator=source),
            "typed in place": lambda: torch.zeros(4, 24, dtype=torch.float32).uniform_(generator=source),
            "init": lambda: nn.init.xavier_normal_(torch.empty(4, 24), generator=source),
        }[self.way]()
        found: Tensor = self.head(torch.tanh(x @ features.to(x.dtype)))
        return found


@pytest.mark.parametrize("way", ["plain", "typed", "in place", "typed in place", "init"])
def test_random_numbers_are_those_of_float32(way: str) -> None:
    """A forward pass that draws fixed numbers is the same function in float64 as in float32."""
    torch.manual_seed(3)
    problem = Problem(model=Draws(way), loss=nn.CrossEntropyLoss(), data=data())
    single, double = (top_eigenvalues(problem, k=1, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert double.loss == pytest.approx(single.loss, rel=1e-5)
    assert double.lambda_max == pytest.approx(single.lambda_max, rel=1e-3)
