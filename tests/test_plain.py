"""Functions in plain operations are torch's, and their second derivatives are true ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from sharpscope import Problem, top_eigenvalues
from sharpscope.weights.kernels import embedding_bag, weight_norm

IDS = torch.tensor([1, 0, 4, 2, 2, 0, 3, 5])
FORMS: list[dict[str, Any]] = [
    {"input": IDS.view(2, 4)},
    {"input": IDS.view(2, 4), "mode": "sum", "padding_idx": -6},
    {"input": IDS.view(4, 2), "padding_idx": 0},
    {"input": IDS, "offsets": torch.tensor([0, 3, 3, 7])},
    {"input": IDS, "offsets": torch.tensor([0, 2, 8]), "include_last_offset": True},
    {
        "input": IDS,
        "offsets": torch.tensor([0, 5]),
        "mode": "sum",
        "per_sample_weights": torch.linspace(-1, 1, 8).double(),
    },
]


@pytest.mark.parametrize("form", FORMS)
def test_bags_are_torchs_own(form: dict[str, Any]) -> None:
    """Sums and means, with padding, empty bags, weights and either form of offsets; differentiable twice."""
    weight = torch.randn(6, 3).double().requires_grad_()

    def bag(w: Tensor) -> Tensor:
        found = embedding_bag(**form, weight=w)
        assert found is not None
        return found

    wanted = F.embedding_bag(**form, weight=weight)
    assert torch.allclose(bag(weight), wanted, rtol=1e-12)
    slope = torch.randn_like(wanted)
    one, two = (torch.autograd.grad(out, weight, slope)[0] for out in (bag(weight), wanted))
    assert torch.allclose(one, two, rtol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weight_norm_is_torchs_own(dim: int) -> None:
    """Over any dimension, with a second derivative that differences confirm."""
    v = torch.randn(4, 3, 2).double().requires_grad_()
    g = torch.rand([size if i == dim else 1 for i, size in enumerate(v.shape)]).double().requires_grad_()
    assert torch.allclose(weight_norm(v, g, dim), torch._weight_norm(v, g, dim), rtol=1e-12)

    def bent(v: Tensor, g: Tensor) -> Tensor:
        return weight_norm(v, g, dim).sin()

    assert gradcheck(bent, (v, g))
    assert gradgradcheck(bent, (v, g))


def test_the_old_form_of_weight_norm_is_measured() -> None:
    """A layer of torch.nn.utils.weight_norm, which is a hook, has the eigenvalues of its successor."""
    torch.manual_seed(0)
    data = torch.randn(9, 4).double(), torch.randint(0, 3, (9,))
    layers = [nn.Linear(4, 5).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(layers[0])
    new = nn.utils.parametrizations.weight_norm(layers[1])
    head = nn.Linear(5, 3).double()
    one, two = (
        top_eigenvalues(
            Problem(model=nn.Sequential(layer, nn.Tanh(), head), loss=nn.CrossEntropyLoss(), data=data), tol=1e-8
        )
        for layer in (old, new)
    )
    assert one.eigenvalues == pytest.approx(two.eigenvalues, rel=1e-8)


@pytest.mark.parametrize("kind", ["embedding", "bag"])
def test_rows_are_shortened_without_being_written(kind: str) -> None:
    """With max_norm the function is torch's, and the weights are what they were, bit for bit."""
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 6, (9, 4)), torch.randint(0, 3, (9,))
    layer = nn.Embedding(6, 5, max_norm=1.0) if kind == "embedding" else nn.EmbeddingBag(6, 5, max_norm=1.0, mode="sum")
    flat = nn.Flatten() if kind == "embedding" else nn.Identity()
    model = nn.Sequential(layer, flat, nn.Tanh(), nn.Linear(20 if kind == "embedding" else 5, 3))
    before = layer.weight.detach().clone()
    assert float(before.norm(dim=1).max()) > 1
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(ids, labels))
    found = top_eigenvalues(problem, k=1)
    assert torch.equal(layer.weight, before)
    wanted = F.cross_entropy(model(ids), labels)  # which does write
    assert found.loss == pytest.approx(wanted.item(), rel=1e-5)
    assert not torch.equal(layer.weight, before)
