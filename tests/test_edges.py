"""The edges of stability are those that the optimizers' own steps show."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharpscope import MonitorRecord, SharpnessMonitor
from sharpscope.edge_of_stability import descent_edge, sam_edge
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM
from watched import net, problem


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}])
@pytest.mark.parametrize(("lr", "rho", "norm"), [(0.1, 0.05, 0.3), (0.5, 0.5, 2.0), (0.01, 1.0, 0.01)])
def test_sam_leaves_a_quadratic_above_its_edge_alone(
    lr: float, rho: float, norm: float, options: dict[str, Any]
) -> None:
    """SAM's own steps along an eigenvector shrink just below the edge and grow just above, at a held gradient norm."""
    for factor, stable in ((0.99, True), (1.01, False)):
        sharpness = factor * sam_edge(lr, rho, norm, **options)
        # A linear slope of nearly the whole norm holds ||g||, and a small w along the eigenvector feels it.
        w = torch.tensor([1e-6 * norm / sharpness, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = SAM([w], torch.optim.SGD, rho=rho, lr=lr, **options)

        def closure(w: Tensor = w, sharpness: float = sharpness, optimizer: SAM = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = sharpness * w[0] ** 2 / 2 + norm * w[1]
            loss.backward()
            return loss

        before = abs(float(w.detach()[0]))
        for _ in range(300 if options else 50):
            optimizer.step(closure)
        assert (abs(float(w.detach()[0])) < before) == stable


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}]
)
def test_sgd_leaves_a_quadratic_above_its_edge_alone(options: dict[str, Any]) -> None:
    """torch's SGD shrinks just below ``descent_edge`` and grows just above, with any momentum that it has."""
    for factor, stable in ((0.99, True), (1.01, False)):
        w = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1, **options)
        sharpness = factor * descent_edge(0.1, **options)
        for _ in range(1500):
            w.grad = sharpness * w.detach()
            optimizer.step()
        assert (abs(float(w.detach())) < 1) == stable


def recorded(optimizer: Any) -> MonitorRecord:
    record = SharpnessMonitor(problem(net()), optimizer, examples=8).measure()
    assert record is not None
    return record


def test_edges_are_those_of_the_lowest_group() -> None:
    """The largest rate counts of several groups, a tensor too, and SAM's edge where the derivation is SAM's."""
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups: list[dict[str, Any]] = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": torch.tensor(0.4)}]
    plain = recorded(torch.optim.SGD(groups, momentum=0.9))
    assert plain.learning_rate == pytest.approx(0.4)
    assert plain.two_over_eta == pytest.approx(5)
    assert plain.momentum_edge == pytest.approx(9.5)
    assert math.isnan(plain.sam_edge)
    aware = recorded(SAM([{"params": [a], "lr": 0.1, "rho": 9.0}, {"params": [b], "lr": 0.4}], torch.optim.SGD))
    edges = [sam_edge(lr, rho, aware.gradient_norm) for lr, rho in ((0.1, 9.0), (0.4, 0.05))]
    assert aware.sam_edge == pytest.approx(min(edges))
    assert math.isnan(aware.momentum_edge)
    for kind in (ASAM, GSAM, LookSAM, FriendlySAM):
        assert math.isnan(recorded(kind([a], torch.optim.SGD, lr=0.1)).sam_edge)
    assert math.isnan(recorded(SAM([a], torch.optim.SGD, p=math.inf, lr=0.1)).sam_edge)
    assert math.isnan(recorded(SAM([a], torch.optim.Adam, lr=0.1)).sam_edge)
    assert math.isnan(recorded(torch.optim.Adam([a])).momentum_edge)
    assert math.isnan(recorded(None).two_over_eta)
