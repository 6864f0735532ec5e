"""Measures from random perturbations of the weights: average-case sharpness and the PAC-Bayes sigma."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.precision import wide
from sharpscope.results import Measure
from sharpscope.results.statistics import Estimate
from sharpscope.sharpness.measure_context import MeasureContext, MeasureSpec, unresolved, with_interval
from sharpscope.sharpness.subset_loss import full_loss, require_classes
from sharpscope.weights.norm_ball import norm_of
from sharpscope.weights.perturbation import Perturbation

# PAC-Bayes: the mean drop of accuracy that sigma may cause (Jiang et al. 2020), and sigma's relative tolerance.
ACCURACY_DROP, SIGMA_TOL = 0.1, 1e-2

# Search range of sigma, in the units of the weights.
MIN_SIGMA, MAX_SIGMA = 1e-6, 1e4


def average_case(context: MeasureContext) -> Iterator[Measure]:
    """``E L(w + e) - L(w)`` for ``e ~ N(0, sigma^2 D^2)`` over all the data, from pairs of e and -e.

    In a pair the terms that are odd in e cancel, the gradient's first of all. For small sigma the result is
    ``sigma^2/2 tr(DHD)``, which is estimated from the same draws as the prediction. Networks with kinks (ReLU,
    max-pooling) have another term of that order, which the Hessian does not contain: the number of kinks that e
    crosses grows with its length.

    Cost: ``1 + 2 draws`` forward passes and ``1 + 2 draws`` gradients. Memory: 3 vectors a draw.
    """
    objective, s = context.objective, context.settings
    gradients_before = objective.gradients
    generator = context.generator("average-case")
    with objective.measuring(), Perturbation(objective.terms.params) as perturbation:
        loss = full_loss(objective)
        scales = s.ball.scales(perturbation.weights)
        base, rises, vectors = loss.value(), [], []
        for i in range(s.draws):
            e = _gaussian(perturbation.weights, scales, generator)
            losses = []
            for sign in (s.sigma, -s.sigma):
                perturbation.move_to(e, sign)
                losses.append(loss.value())
            rises.append((losses[0] + losses[1]) / 2 - base)
            vectors.append(torch.cat([t.flatten() for t in e]))
            if context.progress is not None:
                context.progress("random perturbations", i + 1, s.draws)
        lost, length = perturbation.lost(e, s.sigma), s.sigma * norm_of(e)
        perturbation.restore()
        rows = torch.stack(vectors)
        products = objective.products(rows, context.progress)
        quadratic_forms = s.sigma**2 / 2 * (rows.to(wide(rows.device)) * products.to(wide(rows.device))).sum(1)
    assert objective.gradient is not None
    rounding = context.loss_rounding + lost * length * norm_of([objective.gradient])
    yield Measure(
        "average-case",
        *with_interval(Estimate.of(np.array(rises)), s.draws, rounding),
        settings={
            "sigma": s.sigma,
            "adaptive": s.ball.scaling,
            "eta": s.ball.offset,
            "pairs of draws": s.draws,
            **unresolved(rounding, float(np.mean(np.abs(rises)))),
        },
        prediction={"small sigma": Estimate.of(quadratic_forms.cpu().double().numpy()).value},
        gradients=objective.gradients - gradients_before,
        examples=objective.num_examples,
    )


def pac_bayes(context: MeasureContext) -> Iterator[Measure]:
    """``1/sigma^2`` for the largest sigma whose mean drop of accuracy under ``N(0, sigma^2 I)`` is ACCURACY_DROP.

    All sigmas use the same draws, so the drop grows with sigma up to the scatter of the draws. The standard error of
    sigma is that of the drop divided by the slope of the drop.

    Cost: 12 to 20 forward passes a draw. Memory: one vector a draw.

    Raises: ArgumentError for a loss without classes, or when no sigma in the search range gives this drop.
    Source: Jiang et al. 2020, eq. 47 (their sigma is for a bound on the data's own accuracy; here it is a standard
    deviation).
    """
    objective, draws = context.objective, context.settings.draws
    gradients_before = objective.gradients
    generator = context.generator("pac-bayes")
    with objective.measuring(), Perturbation(objective.terms.params) as perturbation:
        loss = full_loss(objective)
        base = loss.accuracy()
        noise = [_gaussian(perturbation.weights, None, generator) for _ in range(draws)]
        evaluations = 0

        def drops(sigma: float) -> np.ndarray:
            nonlocal evaluations
            found = []
            for e in noise:
                perturbation.move_to(e, sigma)
                found.append(base - loss.accuracy())
            evaluations += 1
            if context.progress is not None:
                context.progress("accuracy under noise", evaluations, None)
            return np.array(found)

        low, high = _bracket(lambda sigma: float(drops(sigma).mean()))
        sigma = math.sqrt(low * high)
        at_sigma = drops(sigma)
        at_larger = drops(1.2 * sigma)
    slope = (float(at_larger.mean()) - float(at_sigma.mean())) / (0.2 * sigma)
    drop_error = float(at_sigma.std(ddof=1)) / math.sqrt(draws)
    sigma_error = drop_error / slope if slope > 0 else math.inf
    yield Measure(
        "pac-bayes",
        *with_interval(Estimate(1 / sigma**2, 2 * sigma_error / sigma**3), draws),
        settings={"sigma": sigma, "drop": ACCURACY_DROP, "draws": draws, "accuracy": base},
        gradients=objective.gradients - gradients_before,
        examples=objective.num_examples,
    )


MEASURES = (
    MeasureSpec("average-case", average_case),
    MeasureSpec("pac-bayes", pac_bayes, requires=lambda context: require_classes(context.objective)),
)


def _bracket(drop: Callable[[float], float]) -> tuple[float, float]:
    """Two sigmas within SIGMA_TOL; the drop is at most ACCURACY_DROP at the first and larger at the second."""
    low, high = MIN_SIGMA, 1e-2
    while drop(high) <= ACCURACY_DROP:
        low, high = high, high * 10
        if high > MAX_SIGMA:
            raise ArgumentError(f"No noise costs {ACCURACY_DROP} of the accuracy. Leave pac-bayes out.")
    while high > (1 + SIGMA_TOL) * low:
        # By factors of ten until a lower end is known, then by bisection of the logarithm.
        middle = math.sqrt(low * high) if low > MIN_SIGMA else max(MIN_SIGMA, high / 10)
        if drop(middle) <= ACCURACY_DROP:
            low = middle
        else:
            high = middle
    if low <= MIN_SIGMA:
        raise ArgumentError(
            f"Even noise of {MIN_SIGMA:g} costs more than {ACCURACY_DROP} of the accuracy. Leave pac-bayes out."
        )
    return low, high


def _gaussian(weights: list[Tensor], scales: list[Tensor] | None, generator: torch.Generator) -> list[Tensor]:
    """Draw ``e ~ N(0, D^2)``, on the CPU in float64, so that every device and precision gets the same draws."""
    noise = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for w in weights]
    return noise if scales is None else list(torch._foreach_mul(noise, scales))
