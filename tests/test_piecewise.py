"""ReLU and max-pooling are torch's to the bit, twice, and their second derivative is the true one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from sharpscope.weights.kernels import faster_kernels

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": Tensor.relu,
    "nn.ReLU": nn.ReLU(),
    "inplace": lambda x: nn.ReLU(inplace=True)(x.clone()),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, [2, 3], stride=[1, 2]),
    "nn.MaxPool2d": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "dilated": nn.MaxPool2d((2, 1), dilation=(2, 1)),
    "with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "single": lambda x: F.max_pool2d(x[0], 2),
}
OURS = {
    "F.relu",
    "torch.relu",
    "Tensor.relu",
    "nn.ReLU",
    *("F.max_pool2d", "torch.max_pool2d", "nn.MaxPool2d", "dilated"),
}
HOLDER = nn.ReLU()


def given() -> Tensor:
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0, 0, :2] = 0.0  # at the kink
    return x.requires_grad_()


@pytest.mark.parametrize("name", FORMS)
def test_values_gradients_and_products_are_torchs_bits(name: str) -> None:
    """Output, gradient and second derivative along a vector are equal, at the kink and with NaN too."""
    found = []
    for model in (HOLDER, nn.Linear(1, 1)):  # with such a layer in the model, and left alone
        x = given()
        with torch.no_grad():
            x[1, 2, 5, 6] = float("nan")
        with faster_kernels(model):
            out = FORMS[name](x)
        assert ("_Relu" in str(out.grad_fn) or "_MaxPool" in str(out.grad_fn)) == (model is HOLDER and name in OURS)
        (gradient,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        (product,) = torch.autograd.grad(gradient, x, torch.linspace(-1, 1, x.numel()).view(x.shape).double())
        found.append((out, gradient, product))
    for ours, torchs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), torchs.nan_to_num(7.0))


@pytest.mark.parametrize("name", FORMS)
def test_second_derivatives_are_differences_of_the_first(name: str) -> None:
    """gradcheck and gradgradcheck pass away from the kinks."""
    x = torch.randperm(2 * 36, generator=torch.Generator().manual_seed(0)).double().sub(35.5).div(20)

    def call(x: Tensor) -> Tensor:
        with faster_kernels(HOLDER):
            return FORMS[name](x.tanh()).sin()

    leaf = x.view(1, 2, 6, 6).requires_grad_()
    assert gradcheck(call, [leaf])
    assert gradgradcheck(call, [leaf])


@pytest.mark.parametrize("name", sorted(OURS))
def test_no_zeros_are_made_of_the_vanishing_derivative(name: str) -> None:
    """A product writes no tensor of zeros of the activations' size, but those that pooling scatters into."""
    x = given()
    with faster_kernels(HOLDER):
        out = FORMS[name](x)
    (gradient,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    with torch.profiler.profile(acc_events=True) as profile:
        torch.autograd.grad(gradient, x, torch.ones_like(gradient))
    zeros = [event for event in profile.events() if event.name in ("aten::zeros", "aten::zeros_like")]
    assert not zeros
