"""The sharpness beyond which training with a step leaves a quadratic's minimum."""

from __future__ import annotations

import math


def descent_edge(lr: float, momentum: float = 0.0, *, dampening: float = 0.0, nesterov: bool = False) -> float:
    """``2 (1 + beta) / eta``: the lambda_max beyond which SGD with momentum beta diverges on a quadratic.

    beta = 0 is plain gradient descent, ``2/eta``. A dampening d makes the steps, and so the edge, that of
    ``eta (1 - d)``; Nesterov's momentum divides it by ``1 + 2 beta``. Infinite where the rate is zero.

    Source: Cohen et al. 2021, section 2 and appendix B.

    >>> from sharpscope.edge_of_stability import descent_edge
    >>> descent_edge(lr=0.125), descent_edge(lr=0.125, momentum=0.5)
    (16.0, 24.0)
    """
    rate = lr * (1 - dampening) * (1 + 2 * momentum if nesterov else 1)
    return 2 * (1 + momentum) / rate if rate else math.inf


def sam_edge(
    lr: float,
    rho: float,
    gradient_norm: float,
    momentum: float = 0.0,
    *,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> float:
    """``(||g|| / (2 rho)) (sqrt(1 + 4 rho E / ||g||) - 1)``: the same for SAM, p = 2; E is ``descent_edge``.

    Along an eigenvector of lambda SAM descends ``lambda (1 + rho lambda / ||g||) w``, with which SGD is stable while
    that factor is at most E, ``2/eta`` without momentum; the edge is the positive root. It falls with the gradient,
    from E for rho far below ``||g|| / E`` to 0 at g = 0, where SAM leaps over the minimum.

    Source: Long and Bartlett 2024, there without momentum.

    >>> from sharpscope.edge_of_stability import sam_edge
    >>> sam_edge(lr=0.125, rho=0.5, gradient_norm=4.0)  # 4 (sqrt(1 + 8) - 1)
    8.0
    """
    edge = descent_edge(lr, momentum, dampening=dampening, nesterov=nesterov)
    if not lr or not rho:
        return edge
    if not gradient_norm:
        return 0.0
    # The conjugate form of the root: the difference above loses all digits where rho is small.
    return 2 * edge / (1 + math.sqrt(1 + 4 * rho * edge / gradient_norm))
