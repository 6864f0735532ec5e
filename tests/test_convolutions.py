"""Our convolutions are torch's to the bit, and their second derivative is the true one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from dense import dense_hessian
from sharpscope import Objective, Problem
from sharpscope.weights import kernels
from sharpscope.weights.kernels import faster_kernels

FORMS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": (F.conv1d, (2, 3, 7), (4, 3, 3), {"stride": 2, "padding": 1}),
    "2d": (F.conv2d, (2, 3, 5, 6), (4, 3, 3, 2), {"padding": (1, 0)}),
    "dilated": (F.conv2d, (2, 2, 6, 6), (2, 2, 2, 2), {"dilation": (2, 1), "stride": (1, 2)}),
    "grouped": (F.conv2d, (2, 4, 4, 4), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (F.conv2d, (2, 3, 4, 4), (3, 1, 3, 3), {"groups": 3}),
    "3d": (F.conv3d, (2, 2, 3, 3, 3), (2, 2, 2, 2, 2), {}),
    "same": (F.conv2d, (2, 2, 4, 4), (2, 2, 3, 3), {"padding": "same"}),
    "one channel 1d": (F.conv1d, (2, 1, 9), (4, 1, 3), {"stride": 2, "dilation": 2, "padding": 1}),
    "one channel 2d": (F.conv2d, (2, 1, 5, 6), (4, 1, 3, 2), {"padding": (1, 0), "stride": (1, 2)}),
    "one channel 3d": (F.conv3d, (2, 1, 3, 4, 3), (2, 1, 2, 2, 2), {"padding": (0, 1, 1)}),
    "large kernel": (F.conv2d, (2, 1, 6, 6), (2, 1, 5, 5), {}),
    "single": (F.conv2d, (2, 4, 4), (2, 2, 3, 3), {}),
}
HOLDER = nn.Conv2d(1, 1, 1)


def tensors(name: str) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    _, x, w, _ = FORMS[name]
    return [torch.randn(s, generator=source, dtype=torch.float64).requires_grad_() for s in (x, w, w[:1])]


@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_are_torchs_bits(name: str) -> None:
    """Output and the gradients in input, weight and bias are equal, not close."""
    function, _, _, options = FORMS[name]
    given = tensors(name)
    found = []
    for model in (HOLDER, nn.Linear(1, 1)):  # with a convolution in the model, and left alone
        with faster_kernels(model):
            out = function(*given, **options)
        found.append([out, *torch.autograd.grad(out.sin().sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,), (0,), (2,), (1, 2)])
@pytest.mark.parametrize("name", FORMS)
def test_second_derivatives_are_differences_of_the_first(name: str, wanted: tuple[int, ...]) -> None:
    """gradcheck and gradgradcheck pass, whichever of input, weight and bias are differentiated."""
    function, _, _, options = FORMS[name]
    given = tensors(name)

    def call(*chosen: Tensor) -> Tensor:
        full = [t.detach() for t in given]
        for i, t in zip(wanted, chosen, strict=True):
            full[i] = t
        with faster_kernels(HOLDER):
            return function(*full, **options).tanh()

    assert gradcheck(call, [given[i] for i in wanted])
    assert gradgradcheck(call, [given[i] for i in wanted])


@pytest.mark.parametrize("name", FORMS)
def test_one_channel_data_are_taken_in_patches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parts of a product that are left then are matrix products, and equal torch's own to rounding."""
    function, _, _, options = FORMS[name]
    x, w, b = tensors(name)
    calls: list[str] = []
    for part in ("_forward_of_patches", "_backward_of_patches"):
        original = getattr(kernels, part)
        monkeypatch.setattr(
            kernels, part, lambda *args, part=part, original=original: (calls.append(part), original(*args))[1]
        )
    found = []
    for model in (HOLDER, nn.Linear(1, 1)):
        with faster_kernels(model):
            out = function(x.detach(), w, b, **options)
        grads = torch.autograd.grad(out.sin().sum(), (w, b), create_graph=True)
        found.append(torch.autograd.grad(grads, (w, b), [torch.ones_like(g) for g in grads]))
    for ours, torchs in zip(*found, strict=True):
        assert float((ours - torchs).norm()) < 1e-13 * float(torchs.norm())
    assert calls == (["_forward_of_patches", "_backward_of_patches"] if name.startswith("one channel") else [])


class Checkpointed(nn.Module):
    """Two convolutions, one recomputed in the backward."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(1, 2, 3, stride=2), nn.Conv2d(2, 3, 2, bias=False)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.again:
            return checkpoint(lambda h: self.second(h).tanh(), hidden, use_reentrant=False).flatten(2).sum(2)
        return self.second(hidden).tanh().flatten(2).sum(2)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("frozen", ["", "first", "second"])
def test_the_hessian_of_a_convolutional_network_is_the_dense_one(frozen: str, again: bool) -> None:
    """Frozen layers, a recomputed one and a float64 copy change nothing."""
    x = torch.randn(6, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(6) % 3
    plain, model = Checkpointed(False).double(), Checkpointed(again).double()
    for net in (plain, model):
        for name, p in net.named_parameters():
            p.requires_grad_(not frozen or not name.startswith(frozen))
    wanted = dense_hessian(plain, lambda call: F.cross_entropy(call(x), y))
    objective = Objective(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(x, y)), micro_batch=4)
    found = objective.hvp(torch.eye(objective.num_params, dtype=torch.float64))
    assert float((found - wanted).abs().max()) < 1e-12


def test_a_model_that_transforms_itself_is_left_to_torch() -> None:
    """torch.func inside a forward, which knows no functions of ours, still works."""

    class Sensitive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda x: self.conv(x).tanh().sum())(x).flatten(1)[:, :3]

    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    problem = Problem(model=Sensitive(), loss=nn.CrossEntropyLoss(), data=(x, torch.arange(4) % 3))
    assert Objective(problem).loss_and_gradient()[1].isfinite().all()


def test_complex_convolutions_are_left_to_torch() -> None:
    """Its own way with them is differentiated as before."""
    x, w = (torch.randn(s, dtype=torch.complex128, requires_grad=True) for s in ((2, 1, 4, 4), (2, 1, 3, 3)))
    with faster_kernels(HOLDER):
        out = F.conv2d(x, w)
    assert "_Convolution" not in str(out.grad_fn)
    assert torch.equal(out, F.conv2d(x, w))
