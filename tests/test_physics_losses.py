"""Physics-informed losses, whose derivatives in the inputs are taken in the model or in the loss, end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from command import eigenvalues, printed, saved
from sharpscope import Problem

COUNT = 14


class Solution(nn.Module):
    """u(x), an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Any:
        x = x.requires_grad_()
        return self.layers(x), x


def second(u: Tensor, x: Tensor) -> Tensor:
    """u''(x), differentiable."""
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return found


class Residual(Solution):
    """u''(x), taken in the model."""

    def forward(self, x: Tensor) -> Any:
        return second(*super().forward(x))


def of_output(output: Any, target: Tensor) -> Tensor:
    """The mean of (u'' + f)^2, u'' taken in the loss."""
    return (second(*output) + target).square().mean()


def points() -> tuple[Tensor, Tensor]:
    x = torch.randn(COUNT, 1, generator=torch.Generator().manual_seed(60))
    return x, torch.sin(3 * x)


def in_forward() -> Problem:
    """The residual taken in the model's forward."""
    x, f = points()
    return Problem(model=Residual(), loss=nn.MSELoss(), data=(x, -f))


def in_loss() -> Problem:
    """The residual taken in the loss."""
    return Problem(model=Solution(), loss=of_output, data=points())


def residual(parameters: dict[str, Tensor], x: Tensor, f: Tensor) -> Tensor:
    """(u'' + f)^2 at one point, with the derivatives of tanh by hand."""
    w1, b1, w2, b2, w3 = (
        parameters[f"layers.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")
    )
    h = torch.tanh(w1[:, 0] * x + b1)
    h1, h2 = (1 - h**2) * w1[:, 0], -2 * h * (1 - h**2) * w1[:, 0] ** 2
    z1, z2 = w2 @ h1, w2 @ h2
    g = torch.tanh(w2 @ h + b2)
    return ((w3 @ ((1 - g**2) * z2 - 2 * g * (1 - g**2) * z1**2))[0] + f) ** 2


@pytest.mark.parametrize("problem", [in_forward, in_loss])
def test_physics_losses_are_measured(problem: Callable[[], Problem], tmp_path: Path) -> None:
    """Of a residual u'' + f: eigenvalues against the dense Hessian, and its mean in every command."""
    path = saved(tmp_path, problem)
    x, f = (t.double() for t in points())
    shapes = {name: p.shape for name, p in problem().model.named_parameters()}
    weights = torch.load(path)

    def mean(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes.values()])
        given = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.stack([residual(given, x[i, 0], f[i, 0]) for i in range(COUNT)]).mean()

    flat = torch.cat([weights[name].flatten() for name in shapes]).double()
    exact = torch.linalg.eigvalsh(torch.func.hessian(mean)(flat)).flip(0)[:5]
    assert eigenvalues(path, problem) == pytest.approx(exact.tolist(), rel=1e-6)
    options = {"slice": ("--points", "3", "--seeds", "1"), "sharpness": ("--m", "1,4"), "density": ("--steps", "5")}
    for command, given in options.items():
        found = printed(command, path, problem, "--dtype", "float64", *given)
        at = found["centre"][0][0] if command == "slice" else found["loss"]
        assert at == pytest.approx(float(mean(flat)), rel=1e-9)


@pytest.mark.parametrize("operator", ["ggn", "fisher", "empirical-fisher"])
def test_a_loss_that_differentiates_the_output_cannot_be_cut_from_it(operator: str, tmp_path: Path) -> None:
    """Operators that cut model from loss say in one sentence where to take the derivatives."""
    said = printed("eigen", saved(tmp_path, in_loss), in_loss, "--operator", operator, status=1)
    assert "Take them in the model's forward" in said
    assert len(said.splitlines()) == 1
