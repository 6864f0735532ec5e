"""Variants of SAM: ASAM, GSAM, LookSAM and Friendly SAM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sharpscope.errors import ArgumentError, require_count
from sharpscope.optim.ascent import GradientSum
from sharpscope.optim.sam import SAM, _Progress
from sharpscope.weights.norm_ball import inner_of, norm_of, widened


class ASAM(SAM):
    """Adaptive SAM: ``e = rho T^2 g / ||T g||_2`` with ``T = |w| + eta``, a ball that scales with the weights.

    ``adaptive="filter"`` uses the norm of each filter in place of ``|w|``. T applies to all tensors; the paper's code
    has T = 1 for biases and norms. Args and cost: as SAM.

    Source: Kwon et al. 2021, Eq. 4 to 6 and Algorithm 1; rho = 0.5 and eta = 0.01 are their values for CIFAR-10.

    >>> import torch
    >>> from sharpscope.optim import ASAM
    >>> w = torch.nn.Parameter(torch.tensor(2.0))
    >>> optimizer = ASAM([w], torch.optim.SGD, rho=0.5, eta=0.0, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     (w**2 / 2).backward()
    >>> optimizer.step(closure)  # e = 0.5 |w|, so w is scaled: 2 - 0.1 (2 + 1)
    >>> w.data
    tensor(1.7000)
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.5,
        *,
        adaptive: str = "elementwise",
        eta: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, adaptive=adaptive, eta=eta, **options)


class GSAM(SAM):
    """Surrogate-gap SAM: the base step takes ``g_e - alpha g_perp``, ``g_perp = g - <g, g_e> / ||g_e||^2 g_e``.

    ``g = grad L(w)`` and ``g_e = grad L(w + e)``. Subtracting the component of g orthogonal to ``g_e`` decreases the
    surrogate gap ``L(w + e) - L(w)``. In the paper, rho follows the learning rate: update each group's ``rho`` with
    its ``lr``.

    Args: as SAM, and ``alpha`` >= 0; ``base_options={"alpha": ...}`` is that of RMSprop or ASGD.
    Cost: 2 gradients per step, and one more copy of the gradient.

    Source: Zhuang et al. 2022, Algorithm 1.

    >>> import torch
    >>> from sharpscope.optim import GSAM
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    >>> optimizer = GSAM([w], torch.optim.SGD, rho=1.0, alpha=1.0, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     (w[0] * w[1]).backward()
    >>> optimizer.step(closure)  # g = (0, 1), g_e = (1, 1), g_perp = (-1/2, 1/2)
    >>> w.data  # (1, 0) - 0.1 (3/2, 1/2)
    tensor([ 0.8500, -0.0500])
    """

    _uses_gradient_at_w = True
    _copied_attributes = (*SAM._copied_attributes, "alpha")

    def __init__(
        self, params: ParamsT, base_optimizer: type[Optimizer], rho: float = 0.05, *, alpha: float = 0.4, **options: Any
    ) -> None:
        self.alpha = _number("alpha", alpha)
        super().__init__(params, base_optimizer, rho, **options)

    def _combine(self, at_w: GradientSum | None) -> None:
        assert at_w is not None
        params = [p for p in self._params() if p.grad is not None and p in at_w.sums]
        new, old = [widened(p.grad) for p in params if p.grad is not None], [at_w.sums[p] for p in params]
        # By the same sum as the numerator: for equal gradients it is exactly 1.
        coefficient = inner_of(old, new) / max(inner_of(new, new), torch.finfo(torch.float64).tiny)
        for p, g, e in zip(params, old, new, strict=True):
            assert p.grad is not None
            p.grad.sub_((g - coefficient * e).to(p.grad.dtype), alpha=self.alpha)


class LookSAM(SAM):
    """LookSAM: SAM's gradient every k-th step, ``g + alpha ||g|| / ||g_v|| g_v`` in the steps between.

    ``g_v = g_e - <g_e, g> / ||g||^2 g`` is the component of ``g_e = grad L(w + e)`` orthogonal to ``g = grad L(w)``; it
    changes slowly and is reused from the last step that computed both. Needs ``step(closure)``.

    Args: as SAM, and ``k`` >= 1 and ``alpha`` >= 0; ``base_options={"alpha": ...}`` is that of RMSprop or ASGD.
    Cost: ``1 + 1/k`` gradients per step, and one more copy of the gradient.

    Source: Liu et al. 2022, Algorithm 1.

    >>> import torch
    >>> from sharpscope.optim import LookSAM
    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = LookSAM([w], torch.optim.SGD, rho=0.5, k=5, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     (w**2 / 2).backward()
    >>> for _ in range(10):
    ...     optimizer.step(closure)
    >>> optimizer.num_gradients  # two of the ten steps take both gradients
    12.0
    """

    _uses_gradient_at_w, _supports_two_calls = True, False
    _memory_name = "looksam_g_v"
    _copied_attributes = (*SAM._copied_attributes, "k", "alpha")

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        k: int = 5,
        alpha: float = 0.7,
        **options: Any,
    ) -> None:
        require_count("k", k)
        self.k, self.alpha = k, _number("alpha", alpha)
        super().__init__(params, base_optimizer, rho, **options)

    def _perturbs(self) -> bool:
        return self._steps() % self.k == 0

    def _combine(self, at_w: GradientSum | None) -> None:
        params = [p for p in self._params() if p.grad is not None]
        now = [widened(p.grad) for p in params if p.grad is not None]
        memory, steps = self._memory(), self._steps() + 1
        if at_w is not None:
            old = [at_w.sums.get(p, torch.zeros_like(e)) for p, e in zip(params, now, strict=True)]
            coefficient = inner_of(now, old) / max(inner_of(old, old), torch.finfo(torch.float64).tiny)
            self._set_memory({p: e - coefficient * g for p, e, g in zip(params, now, old, strict=True)}, steps)
            return
        self._set_steps(steps)
        orthogonal = [memory.get(p, torch.zeros_like(g)) for p, g in zip(params, now, strict=True)]
        # Computed before .grad is changed, since `now` may share its memory.
        orthogonal_norm, norm = norm_of(orthogonal), norm_of(now)
        if orthogonal_norm > 0:
            for p, v in zip(params, orthogonal, strict=True):
                assert p.grad is not None
                p.grad.add_(v.to(p.grad.dtype), alpha=self.alpha * norm / orthogonal_norm)


class FriendlySAM(SAM):
    """Friendly SAM: ``e = rho d / ||d||_2`` with ``d = g - sigma m``, ``m <- lmbda m + (1 - lmbda) g``.

    The running mean m estimates the full gradient; subtracting it leaves the noise of the batch in the perturbation.
    With several chunks, m is updated after each of them. With ``ddp``, each process has its own m, so each must save
    its own ``state_dict``. A skipped step does not change m, nor does any step for a parameter without a gradient at
    ``w + e``.

    Args: as SAM, and ``sigma`` >= 0 and ``lmbda`` in [0, 1].
    Cost: 2 gradients per step, and one more copy of the gradient.

    Source: Li et al. 2024, Eq. 9 and 10, in the order of their code: m is subtracted before its update, which for
        sigma = 1 changes only the length of d. In the first step, without m, d = g.

    >>> import torch
    >>> from sharpscope.optim import FriendlySAM
    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = FriendlySAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     (w**2 / 2).backward()
    >>> optimizer.step(closure)  # as SAM: 1 - 0.1 (1 + 0.5)
    >>> optimizer.step(closure)  # g is below its mean: 0.85 - 0.1 (0.85 - 0.5)
    >>> w.data
    tensor(0.8150)
    """

    _copied_attributes = (*SAM._copied_attributes, "sigma", "lmbda")
    _memory_name = "friendlysam_mean"
    # Running mean after this step; becomes the state when the step is taken.
    _next_mean: _Progress[dict[Tensor, Tensor] | None] = _Progress(None)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        **options: Any,
    ) -> None:
        if options.get("ascent_steps", 1) != 1:
            raise ArgumentError("FriendlySAM needs ascent_steps=1, since its running mean is of gradients at w.")
        if not 0 <= lmbda <= 1:
            raise ArgumentError(f"lmbda must be from 0 to 1, got {lmbda!r}.")
        self.sigma, self.lmbda = _number("sigma", sigma), float(lmbda)
        super().__init__(params, base_optimizer, rho, **options)

    def _start_step(self) -> None:
        self._next_mean = None

    def _ascent_direction(self, weights: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        if not math.isfinite(norm_of(grads)):
            return grads  # the step is skipped
        means = self._memory() if self._next_mean is None else self._next_mean
        after, directions = dict(means), []
        for p, g in zip(weights, grads, strict=True):
            now, mean = widened(g), means.get(p)
            after[p] = now.clone() if mean is None else torch.lerp(mean, now, 1 - self.lmbda)
            directions.append(now if mean is None else now - self.sigma * mean)
        self._next_mean = after
        return directions

    def _combine(self, at_w: GradientSum | None) -> None:
        if self._next_mean is not None:
            # Where the base takes no step, it has no state either.
            stepped = {p: mean for p, mean in self._next_mean.items() if p.grad is not None}
            self._set_memory({**self._memory(), **stepped}, self._steps() + 1)
            self._next_mean = None


def _number(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ArgumentError(f"{name} must be a finite number >= 0, got {value!r}.")
    return float(value)
