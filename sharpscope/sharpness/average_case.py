"""How the loss and the accuracy change under random perturbations of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.objective import Objective, Progress
from sharpscope.precision import wide
from sharpscope.results.statistics import Estimate
from sharpscope.sharpness.losses import whole
from sharpscope.weights.norm_ball import Ball
from sharpscope.weights.perturbation import Perturbation

# The accuracy that PAC-Bayes sigma may cost (Jiang et al. 2020), and how closely its sigma is found.
DROP, CLOSE = 0.1, 1e-2

# Sigmas that are looked between, in the units of the weights.
LEAST, MOST = 1e-6, 1e4


@dataclass(frozen=True)
class Average:
    """``E L(w + e) - L(w)`` and, for the same draws, ``E e'He / 2``, each with its standard error."""

    rise: Estimate
    second_order: Estimate


def average_rise(
    objective: Objective,
    ball: Ball,
    sigma: float,
    draws: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Average:
    """``E L(w + e) - L(w)`` for ``e ~ N(0, sigma^2 D^2)`` over all the data, from pairs of e and -e.

    A pair takes out what is odd in e, the gradient first of all. At small sigma it is ``sigma^2/2 tr(DHD)``, of which
    the second number is an estimate from the same draws; a network with kinks (ReLU, max-pooling) has another
    term of that order, since e crosses as many of them as it is long, and the Hessian sees none.

    Cost: ``1 + 2 draws`` forward passes and ``1 + 2 draws`` gradients. Memory: 3 vectors a draw.
    """
    with objective.measuring(), Perturbation(objective.terms.params) as moved:
        loss = whole(objective)
        scales = ball.scales(moved.weights)
        base, rises, vectors = loss.value(), [], []
        for i in range(draws):
            e = noise(moved.weights, scales, generator)
            ends = []
            for sign in (sigma, -sigma):
                moved.move_to(e, sign)
                ends.append(loss.value())
            rises.append((ends[0] + ends[1]) / 2 - base)
            vectors.append(torch.cat([t.flatten() for t in e]))
            if progress is not None:
                progress("random perturbations", i + 1, draws)
        moved.restore()
        rows = torch.stack(vectors)
        images = objective.products(rows, progress)
        forms = sigma**2 / 2 * (rows.to(wide(rows.device)) * images.to(wide(rows.device))).sum(1)
    return Average(Estimate.of(np.array(rises)), Estimate.of(forms.cpu().double().numpy()))


@dataclass(frozen=True)
class PacBayes:
    """The largest sigma whose mean drop of accuracy is at most DROP, its standard error, and the accuracy at w."""

    sigma: Estimate
    accuracy: float


def pac_bayes_sigma(
    objective: Objective, draws: int, generator: torch.Generator, progress: Progress | None = None
) -> PacBayes:
    """The largest sigma whose mean drop of accuracy under ``N(0, sigma^2 I)`` is at most DROP, to CLOSE of itself.

    The same draws serve every sigma, so that the drop goes up with it but for their own scatter; its standard error is
    that of the drop there over the drop's slope.

    Cost: 12 to 20 forward passes a draw. Memory: one vector a draw.

    Raises: ArgumentError for a loss without classes, or where no noise costs so much accuracy.
    Source: Jiang et al. 2020, eq. 47 (their sigma is for a bound on the data's own accuracy; sigma is a standard
    deviation).
    """
    with objective.measuring(), Perturbation(objective.terms.params) as moved:
        loss = whole(objective)
        base = loss.accuracy()
        draw = [noise(moved.weights, None, generator) for _ in range(draws)]
        seen = 0

        def drops(sigma: float) -> np.ndarray:
            nonlocal seen
            found = []
            for e in draw:
                moved.move_to(e, sigma)
                found.append(base - loss.accuracy())
            seen += 1
            if progress is not None:
                progress("accuracy under noise", seen, None)
            return np.array(found)

        low, high = _bracket(lambda sigma: float(drops(sigma).mean()))
        at = math.sqrt(low * high)
        here = drops(at)
        wider = drops(1.2 * at)
    slope = (float(wider.mean()) - float(here.mean())) / (0.2 * at)
    error = float(here.std(ddof=1)) / math.sqrt(draws)
    return PacBayes(Estimate(at, error / slope if slope > 0 else math.inf), base)


def _bracket(drop: Callable[[float], float]) -> tuple[float, float]:
    """Two sigmas within CLOSE of each other, the drop at most DROP at the first and more at the second."""
    low, high = LEAST, 1e-2
    while drop(high) <= DROP:
        low, high = high, high * 10
        if high > MOST:
            raise ArgumentError(f"No noise costs {DROP} of the accuracy. Leave pac-bayes out.")
    while high > (1 + CLOSE) * low:
        # Decades first, where nothing below is known yet.
        middle = math.sqrt(low * high) if low > LEAST else max(LEAST, high / 10)
        if drop(middle) <= DROP:
            low = middle
        else:
            high = middle
    if low <= LEAST:
        raise ArgumentError(f"Even noise of {LEAST:g} costs more than {DROP} of the accuracy. Leave pac-bayes out.")
    return low, high


def noise(weights: list[Tensor], scales: list[Tensor] | None, generator: torch.Generator) -> list[Tensor]:
    """``e ~ N(0, D^2)``, drawn on the CPU in float64, so that every device and precision sees the same."""
    drawn = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for w in weights]
    return drawn if scales is None else list(torch._foreach_mul(drawn, scales))
