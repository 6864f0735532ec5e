"""Weights are moved as asked, put back to the bit, and the ball's steepest direction is the one of its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError
from sharpscope.weights.norm_ball import Ball
from sharpscope.weights.perturbation import Perturbation

INF = math.inf


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_weights_come_back_to_the_bit(dtype: torch.dtype, error: type[BaseException] | None) -> None:
    """However often they moved, however the block ends, the sign of zero too."""
    weights = [nn.Parameter(drawn(3, 4, dtype=dtype)), nn.Parameter(torch.tensor([0.0, -0.0], dtype=dtype))]
    before = [w.detach().clone() for w in weights]
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    e = [torch.ones_like(w, dtype=wide) for w in weights]
    try:
        with Perturbation(weights) as moved:
            for i in range(5):
                moved.move_to(e, 0.1 * i)
                moved.add(weights, e, 0.3)
            assert not torch.equal(weights[0].detach(), before[0])
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    for w, b in zip(weights, before, strict=True):
        assert torch.equal(w.detach(), b)
        assert torch.equal(w.detach().signbit(), b.signbit())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_where_the_copy_of_lists_fails(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one then, and an interrupt is passed on after the last."""

    def fail(*_: object) -> None:
        weights[0].detach().zero_()
        raise error

    weights = [nn.Parameter(drawn(3, 4)), nn.Parameter(drawn(5, seed=1))]
    before = [w.detach().clone() for w in weights]
    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    try:
        with Perturbation(weights) as moved:
            moved.add(weights, [torch.ones_like(w) for w in weights], 0.3)
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    else:
        assert error is RuntimeError
    assert all(torch.equal(w.detach(), b) for w, b in zip(weights, before, strict=True))


def test_moves_from_the_centre_do_not_drift() -> None:
    """A thousand moves to other places and back give the very bits of one."""
    weights = [nn.Parameter(drawn(50, dtype=torch.float32))]
    e = [drawn(50, seed=1, dtype=torch.float32)]
    with Perturbation(weights) as moved:
        moved.move_to(e, 0.1)
        once = weights[0].detach().clone()
        for i in range(1000):
            moved.move_to(e, 0.1 + i / 7)
        moved.move_to(e, 0.1)
        assert torch.equal(weights[0].detach(), once)


def test_achieved_norm_and_cosine_are_those_after_rounding() -> None:
    """In float64 all of what was wished for is there; of bfloat16 weights a part is lost, and said."""
    for dtype, lost in ((torch.float64, False), (torch.bfloat16, True)):
        start, e = drawn(2000, dtype=dtype), drawn(2000, seed=1, dtype=torch.float32)
        weights = [nn.Parameter(start.clone())]
        with Perturbation(weights) as moved:
            moved.move_to([e.to(torch.float64) if not lost else e], 1e-3)
            there = weights[0].detach().double() - start.double()
            norm, cosine = moved.achieved([e])
        assert norm == pytest.approx(float(there.norm()), rel=1e-12)
        assert cosine == pytest.approx(float(there @ e.double() / there.norm() / e.double().norm()), rel=1e-9)
        assert (cosine < 0.9) == lost


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("scaling", [None, "elementwise", "filter"])
@pytest.mark.parametrize("size", [1e-150, 1.0, 1e150])
def test_steepest_direction_lies_on_the_ball_and_beats_every_other(p: float, scaling: str | None, size: float) -> None:
    """``||D^-1 e||_p = rho``, ``g'e`` is rho times the dual norm, and of 200 random points none has more."""
    weights, rho = [drawn(3, 4), drawn(5, seed=1)], 0.3
    grads = [size * drawn(3, 4, seed=2), size * drawn(5, seed=3)]
    ball = Ball(p, scaling, 0.1 if scaling else 0.0)
    scales = ball.scales(weights)
    direction, factor = ball.steepest(grads, scales)
    e = torch.cat([d.flatten() for d in direction]) * rho * factor
    if scaling is None:
        d = torch.ones(17, dtype=torch.float64)
    elif scaling == "elementwise":
        d = torch.cat([w.abs().flatten() for w in weights]) + 0.1
    else:
        d = torch.cat([weights[0].norm(dim=1).repeat_interleave(4), weights[1].abs()]) + 0.1
    g = torch.cat([t.flatten() for t in grads])
    assert float((e / d).norm(p=p)) == pytest.approx(rho, rel=1e-12)
    gain = float(g / size @ e)
    assert gain == pytest.approx(rho * ball.dual_norm(grads, scales) / size, rel=1e-12)
    for seed in range(200):
        u = drawn(17, seed=10 + seed)
        assert float(g / size @ (d * u * rho / u.norm(p=p))) <= gain


def test_a_weight_of_zero_stays_where_its_ball_is_flat() -> None:
    """With D = |w| and w = 0 nothing is divided by zero: that weight does not move, the others do."""
    weights = [torch.tensor([0.0, 2.0], dtype=torch.float64)]
    for p, expected in ((2, [0.0, 2.0]), (INF, [0.0, 2.0])):
        ball = Ball(p, "elementwise")
        direction, factor = ball.steepest([torch.ones(2, dtype=torch.float64)], ball.scales(weights))
        assert (direction[0] * factor).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1,), "p must be 2 or inf, got 1"),
        ((2, "layer"), "must be one of elementwise, filter, got 'layer'"),
        ((2, "filter", -1.0), "eta must be a finite number >= 0, got -1.0"),
        ((2, "filter", INF), "eta must be a finite number >= 0, got inf"),
    ],
)
def test_bad_ball_is_named(arguments: tuple[object, ...], message: str) -> None:
    """Each argument outside its domain ends in an error that names it."""
    with pytest.raises(ArgumentError, match=message):
        Ball(*arguments)  # type: ignore[arg-type]


def test_infinity_may_be_a_word() -> None:
    """p="inf" is infinity, as the optimizers and the command line say it."""
    assert Ball("inf") == Ball(INF)  # type: ignore[arg-type]
    assert len({Ball(p, s) for p, s in itertools.product((2, INF), (None, "filter"))}) == 4
