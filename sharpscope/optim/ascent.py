"""The perturbation of SAM: norms of gradients, and ``w + e`` written into the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError

LOW_PRECISION = (torch.float16, torch.bfloat16)

# Below this norm, rho / norm may pass float32's largest number (3.4e38).
_TINY = 1e-30


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of ``params``, all of which have one.

    Raises:
        ArgumentError: a gradient is sparse.
    """
    grads = [p.grad for p in params if p.grad is not None]
    sparse = next((g for g in grads if g.layout != torch.strided), None)
    if sparse is not None:
        raise ArgumentError(
            f"SAM needs dense gradients, got one of shape {tuple(sparse.shape)} with layout {sparse.layout}. "
            "Build the embedding with sparse=False."
        )
    return grads


def norm_on_device(grads: Sequence[Tensor]) -> Tensor:
    """``||g||_2`` over all tensors as a tensor of one element, accumulated in float64; waits for no device.

    Float64 because the squares of gradients below 1e-23 underflow in float32, and those below 1e-4 in
    float16. MPS has no float64: float32 there.
    """
    if not grads:
        return torch.zeros(1, dtype=torch.float64)
    dtype = torch.float32 if any(g.device.type == "mps" for g in grads) else torch.float64
    norms = torch._foreach_norm(list(grads), 2, dtype)
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total.reshape(1)


def settled_norm(norm: float, grads: Sequence[Tensor]) -> float:
    """``norm``, or a second opinion where it says 0 or not finite: the squares may have left the range.

    Costs nothing but in that rare case, when it waits for the device a second time.
    """
    if 0.0 < norm < math.inf or not grads:
        return norm
    largest = max(float(g.abs().max()) if g.numel() else 0.0 for g in grads)
    if not 0.0 < largest < math.inf or any(bool(g.isnan().any()) for g in grads):
        return norm
    if any(g.device.type == "mps" for g in grads):
        grads = [g.cpu() for g in grads]
    return largest * float(norm_on_device([g.double() / largest for g in grads]))


def ascent_direction(grads: Sequence[Tensor], norm: float, p: float) -> tuple[list[Tensor], float]:
    """``d`` and ``c`` with ``e = rho c d``: ``c d = g / ||g||_2`` for p = 2, ``sign(g)`` for p = inf.

    Foret et al. 2021, Eq. 2. No epsilon in the denominator: ``||c d||_2 = 1`` however small the gradient.
    """
    wide = [g.float() if g.dtype in LOW_PRECISION else g for g in grads]
    if p == math.inf:
        return list(torch._foreach_sign(wide)), 1.0
    if norm >= _TINY:
        return wide, 1.0 / norm
    # A power of two: exact, and 2**126 is a float32.
    boost = 2.0 ** min(126, -math.frexp(norm)[1])
    return list(torch._foreach_mul(wide, boost)), 1.0 / (norm * boost)


def perturb(weights: Sequence[Tensor], direction: Sequence[Tensor], scale: float) -> Tensor | None:
    """Add ``scale * direction`` to the weights in place; the sum is formed in float32 or better.

    Returns ``(<a, e>, <a, a>, <e, e>)`` over the float16 and bfloat16 weights, where ``e`` is the perturbation
    wished for and ``a`` the one that is left after rounding, or None where there are no such weights.
    """
    low = [w.dtype in LOW_PRECISION for w in weights]
    exact = [w for w, is_low in zip(weights, low, strict=True) if not is_low]
    if exact:
        torch._foreach_add_(exact, [d for d, is_low in zip(direction, low, strict=True) if not is_low], alpha=scale)
    rounded = [w for w, is_low in zip(weights, low, strict=True) if is_low]
    if not rounded:
        return None
    before = [w.float() for w in rounded]
    wished = torch._foreach_mul([d for d, is_low in zip(direction, low, strict=True) if is_low], scale)
    torch._foreach_copy_(rounded, list(torch._foreach_add(before, wished)))
    achieved = torch._foreach_sub([w.float() for w in rounded], before)
    device = rounded[0].device
    sums = [
        torch.stack([(a * e).sum(), (a * a).sum(), (e * e).sum()]).to(device)
        for a, e in zip(achieved, wished, strict=True)
    ]
    return torch.stack(sums).sum(0)


def cosine(dot: float, achieved: float, wished: float) -> float:
    """``<a, e> / (||a|| ||e||)`` from the sums of ``perturb``; 0 where nothing was left of ``e``, 1 for ``e = 0``."""
    if wished == 0.0:
        return 1.0
    return dot / math.sqrt(achieved) / math.sqrt(wished) if achieved > 0.0 else 0.0
