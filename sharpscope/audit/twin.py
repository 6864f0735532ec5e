"""What an audit asks of a copy of the model in float64, where the answers have digits to spare."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sharpscope import params
from sharpscope.audit.agreement import require_additive, require_repeatable
from sharpscope.errors import ProblemError
from sharpscope.objective import Objective
from sharpscope.objective.accumulate import Sums
from sharpscope.objective.data import MicroBatch
from sharpscope.precision import placed

# How many examples the copy sees, and the largest it may be (0.8 GB).
EXAMPLES = 32
LARGEST = 100_000_000

# How many show what float32 does to eigenvalues: of fewer its scatter would be taken for a shift of all.
ROUNDING_EXAMPLES = 256

# Sums that agree in exact arithmetic agree to this in float64, relative to the sizes that were added.
TOLERANCE = 1e-9

# The step of its differences relative to the weights. It is so short that a ReLU's kink rarely lies in it; where one
# does, the differences to the left and to the right disagree, and another direction is drawn.
STEP = 1e-8
TRIES = 3

# A softmax has 1 - p to an absolute eps, so that differences of a loss that changes by less a term are its rounding.
RESOLVED = 1e-8


def twin_of(objective: Objective) -> Objective | None:
    """The same objective in float64, on a copy of the model; None where there cannot be one, or it would be large."""
    if objective.num_params > LARGEST or objective.device.type == "mps":  # MPS has no float64
        return None
    try:
        model, loss = placed(
            objective.terms.model, objective.terms.loss_function, torch.float64, objective.device, copied=True
        )
    except ProblemError:
        return None
    problem = dataclasses.replace(objective.problem, model=model, loss=loss)
    return Objective(problem, dtype=torch.float64, micro_batch=objective.micro_batch, curvature=objective.curvature)


def products_in_float64(objective: Objective, part: MicroBatch, block: Tensor) -> Tensor | None:
    """What ``accumulate`` gives of the products with ``block`` (K, n), in float64; None where that cannot be had."""
    twin = twin_of(objective)
    if twin is None:
        return None
    with twin.measuring():
        try:
            if reads(twin, part, [p for p in objective.terms.params if p.requires_grad]):
                return None
            found = twin.accumulate([part], block.double()).products
        except (ProblemError, RuntimeError, TypeError):  # a model that keeps float32 tensors of its own, say
            return None
    objective.charge(twin.meter.example_gradients)
    return found


def rounding_of(objective: Objective, vectors: Tensor) -> float:
    """``max |v'(H - H64)v|`` over unit vectors (n, k), H of the mean loss of some examples: what float32 does to it.

    A well-fitted network's softmax has ``1 - p`` to an absolute 6e-8 only, and its curvature no better, however small
    that is; the rounding of products, which is relative, says nothing of it. The first ROUNDING_EXAMPLES stand for all.

    Cost: ``1 + 2k`` gradients of ROUNDING_EXAMPLES examples, twice. 0 where the model cannot run in float64.
    """
    part = objective.first_examples(ROUNDING_EXAMPLES)
    block = vectors.T.to(objective.device, objective.dtype)
    exact = products_in_float64(objective, part, block)
    if exact is None:
        return 0.0
    sums = objective.accumulate([part], block)
    apart = (block.double() * (sums.products.double() - exact)).sum(1) / sums.weight.double()
    return float(apart.abs().max())


def audit_in_float64(objective: Objective, first: MicroBatch, generator: torch.Generator | None) -> None:
    """Check that sums repeat and batches add up, and that gradient and Hessian products are true derivatives.

    Derivatives are held against differences, of the loss and of the gradient. That finds an operation whose backward is
    right but cannot be differentiated: torch does not always say so. Passes over a model that cannot be copied or run
    in float64, or whose loss reads it.

    Cost: about 10 gradients over 32 examples.

    Raises: AuditError, ProblemError, naming what to look for.
    """
    twin = twin_of(objective)
    if twin is None:
        return
    whole = objective.micro_batch == "loader" or not first.splittable
    few = first if whole else first.part(0, min(first.size, EXAMPLES))
    originals = [p for p in (*objective.terms.params, *objective.problem.model.parameters()) if p.requires_grad]
    with twin.measuring():
        try:
            if reads(twin, few, originals):
                return
        except (ProblemError, RuntimeError, TypeError):  # a model that keeps float32 tensors of its own, say
            return
        # Products with a true Hessian are as additive as the gradient, and differences have not so many digits.
        block, curvature = twin.no_vectors(), twin.curvature
        if curvature.exact and not curvature.twice:
            block = torch.randn(1, twin.num_params, generator=generator, dtype=torch.float64).to(twin.device)
        require_repeatable(twin, twin.accumulate([few], block), twin.accumulate([few], block), TOLERANCE)
        if objective.micro_batch != "loader":
            require_additive(twin, few, TOLERANCE, block)
        _require_derivatives(twin, few, generator)
    objective.charge(twin.meter.example_gradients)


def reads(objective: Objective, part: MicroBatch, others: Sequence[Tensor]) -> bool:
    """Whether the loss of ``part`` depends on tensors that are not of the objective's model."""
    value, _ = objective.terms.sums(part)
    if not value.requires_grad or not others:
        return False
    return any(g is not None for g in torch.autograd.grad(value, list(others), allow_unused=True))


def _require_derivatives(twin: Objective, few: MicroBatch, generator: torch.Generator | None) -> None:
    weights = torch.cat([p.detach().reshape(-1) for p in twin.terms.params])
    held = params.held_rows(twin.terms.model, twin.terms.params, tied=True)

    def direction() -> Tensor:
        u = torch.randn(weights.shape, generator=generator, dtype=torch.float64).to(twin.device)
        for i, row in held:
            params.views(u, twin.terms.params)[i][row] = 0
        scaled: Tensor = u * ((float(weights.norm()) or 1.0) / float(u.norm()))
        return scaled

    def sums(at: Tensor, block: Tensor) -> Sums:
        params.assign(twin.terms.params, at)
        return twin.accumulate([few], block)

    for _ in range(TRIES):
        # Near w, not at it: where an input and a bias are both zero, w itself lies on a ReLU's kink.
        base, u = weights + 0.01 * direction(), direction()
        here = sums(base, u[None] if twin.curvature.twice else u.new_empty(0, len(u)))
        before, after = (sums(base + sign * STEP * u, u.new_empty(0, len(u))) for sign in (-1, 1))
        if float(here.spread) * float(u.norm()) <= RESOLVED * float(here.weight):
            return
        left, right = (here.gradient - before.gradient) / STEP, (after.gradient - here.gradient) / STEP
        rounding = 100 * torch.finfo(torch.float64).eps / STEP
        noise = rounding * float(here.spread)
        size = max(float(left.norm()), float(right.norm()))
        if float((left - right).norm()) > 1e-3 * size + noise:
            continue
        slope, rise = float(here.gradient @ u), float(after.loss - before.loss) / (2 * STEP)
        if abs(slope - rise) > 1e-2 * abs(rise) + rounding * (abs(float(here.loss)) + float(here.spread)):
            raise ProblemError(
                f"The gradient must be the derivative of the loss, but along one direction it says {slope:.4g} where "
                f"the loss changes by {rise:.4g}. Look for custom autograd functions and gradient scaling."
            )
        apart = float((here.products[0] - (left + right) / 2).norm()) if twin.curvature.twice else 0.0
        if apart > 1e-2 * size + noise:
            raise ProblemError(
                "Hessian products must be the derivative of the gradient, but are off its finite differences by "
                f"{apart:.2g} of {size:.2g}: an operation has no true second derivative. Look for once_differentiable, "
                "detach and saved numbers in the backward of custom autograd functions, or pass "
                "operator='finite-difference' (--operator finite-difference)."
            )
        _require_tangent(twin, few, base, u)
        return


def _require_tangent(twin: Objective, few: MicroBatch, base: Tensor, u: Tensor) -> None:
    """J u must be the derivative of the model's output along u, where the curvature is made of J."""
    if twin.curvature.tangent is None:
        return
    ends = []
    for sign in (0, -1, 1):
        params.assign(twin.terms.params, base + sign * STEP * u)
        ends.append(twin.curvature.tangent(twin.terms, few, u))
    (_, tangent), (before, _), (after, _) = ends
    slope = (after - before) / (2 * STEP)
    noise = 100 * torch.finfo(torch.float64).eps / STEP * float(after.norm())
    apart, size = float((tangent - slope).norm()), float(slope.norm())
    if apart > 1e-2 * size + noise:
        raise ProblemError(
            "Jacobian products must be the derivative of the model's output, but are off its finite differences by "
            f"{apart:.2g} of {size:.2g}: a gradient is cut off where it is to be differentiated. Look for "
            "once_differentiable and detach in the backward of custom autograd functions, or pass "
            "operator='finite-difference' (--operator finite-difference)."
        )
