"""Check, before any measurement, that the loss is a fixed function of the weights with a symmetric curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import AuditError, ProblemError
from sharpscope.objective import Objective, microbatch
from sharpscope.objective.accumulate import Sums
from sharpscope.objective.data import MicroBatch, leaves, map_tensors, micro_batches
from sharpscope.precision import placed
from sharpscope.weights import parameters

EXAMPLES = 256


def audit(objective: Objective, generator: torch.Generator | None = None) -> None:
    """Check on the first examples that loss and gradient repeat, that ``u'Hv = v'Hu``, and that batches add up.

    Products are those with ``objective.curvature``. What needs more digits than the computation may have is asked of a
    float64 copy (``audit_in_float64``). A loss whose terms are its author's to count is cut in two ways over the whole
    data set.

    Cost: about 8 gradients over 256 examples and 10 over 32, and 2 whole ones for a loss that is not known here; all
    counted in ``objective.gradients``.

    Raises: AuditError naming the likely cause (dropout, a shuffled or augmented loader) and the remedy;
    ProblemError when the mean over a batch is not the mean over its parts; DataError.
    """
    with objective.measuring():
        first, again = objective.first_examples(EXAMPLES), objective.first_examples(EXAMPLES)
        if not _same(first, again):
            raise AuditError(
                "Two walks over the data must give the same batches, but the first batch differs: the loader shuffles "
                "or augments. Pass shuffle=False and fix the augmentation."
            )
        probes = torch.randn(2, objective.num_params, generator=generator).to(objective.device, objective.dtype)
        one, two = (objective.accumulate([first], block) for block in (probes, probes[:0]))
        if not one.finite:
            objective.locate_nonfinite()
        eps = torch.finfo(objective.dtype).eps
        first = objective.fitting(first)
        require_repeatable(objective, one, two, 1e3 * eps)
        # What differences leave of the digits is about the square root of what products have.
        _require_symmetric(objective, first, probes, one, 10 * eps**0.5 if objective.curvature.exact else 10 * eps**0.4)
        originals = [p for p in objective.problem.model.parameters() if p.requires_grad]
        if objective.terms.model is not objective.problem.model and reads(objective, first, originals):
            raise ProblemError(
                f"The loss reads the model's own parameters, which a copy in {objective.dtype} on {objective.device} "
                "does not have. Convert the model yourself, with model.to(...), and pass no dtype or device."
            )
        audit_in_float64(objective, first, generator)
        if objective.micro_batch == "loader":
            if not objective.terms.loss.counted:
                _require_no_sum(objective, first)
        elif not objective.terms.loss.counted:
            _require_same_mean(objective)
        else:
            require_additive(objective, first, 1e4 * eps)


def _require_symmetric(objective: Objective, first: MicroBatch, probes: Tensor, sums: Sums, tolerance: float) -> None:
    apart, size = _asymmetry(probes, sums.products)
    if apart > tolerance * size:
        exact = None if objective.dtype == torch.float64 else products_in_float64(objective, first, probes)
        if exact is not None:
            also, whole = _asymmetry(probes, exact)
            if also <= tolerance * whole:
                raise AuditError(
                    f"The curvature must not be rounding, but u'Hv and v'Hu differ by {apart:.2g} at |u||Hv| = "
                    f"{size:.2g} in float32 and agree in float64: the loss is so near its least that float32 does not "
                    "resolve it. Pass dtype=torch.float64 (--dtype float64)."
                )
        remedy = (
            "operator='finite-difference' (--operator finite-difference)"
            if objective.curvature.exact
            else "dtype=torch.float64"
        )
        raise AuditError(
            f"The {objective.curvature.title} must be symmetric, but u'Hv and v'Hu differ by {apart:.2g} at |u||Hv| = "
            f"{size:.2g}: an operation has a wrong derivative. Look for custom autograd functions, detach and "
            f"weight_norm, or pass {remedy}."
        )


def _asymmetry(probes: Tensor, products: Tensor) -> tuple[float, float]:
    """``|u'Hv - v'Hu|``, and the size that it is small beside."""
    (u, v), (hu, hv) = probes.cpu().double(), products.cpu().double()
    return abs(float(u @ hv - v @ hu)), float(u.norm() * hv.norm() + v.norm() * hu.norm())


def _require_no_sum(objective: Objective, first: MicroBatch) -> None:
    """Refuse a loss that doubles when its batch is taken twice; a mean stays, and batches need not add up here."""

    def twice(value: Any) -> Any:
        return map_tensors(value, lambda t: torch.cat([t, t]))

    output, target, _ = objective.terms.forward(first)
    try:
        once = objective.terms.loss_function(output, target).detach()
        again = objective.terms.loss_function(twice(output), twice(target)).detach()
    except (RuntimeError, ValueError, IndexError):
        return  # a loss that takes no other batch size
    if float(once) and abs(float(again / once) - 2) < 1e-3:
        raise ProblemError("The loss must be a mean over the batch, but it is a sum. Divide it by its terms.")


def _require_same_mean(objective: Objective) -> None:
    """The mean over the whole data set, cut into micro-batches of two sizes that share few boundaries."""
    size = objective.micro_batch if isinstance(objective.micro_batch, int) else microbatch.DEFAULT
    nothing = objective.no_vectors()
    one, two = (
        objective.accumulate(micro_batches(objective.data, cut), nothing) for cut in (size, max(1, 2 * size // 5))
    )
    objective.meter.passes += 2
    if one.finite and two.finite:
        require_same(one, two, "micro-batches", 1e3 * torch.finfo(objective.dtype).eps)


def _same(first: MicroBatch, again: MicroBatch) -> bool:
    a, b = ([leaf for leaf in leaves(part.batch) if isinstance(leaf, Tensor)] for part in (first, again))
    return len(a) == len(b) and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True)
    )


# How many examples the copy sees, and the largest it may be (0.8 GB).
FLOAT64_EXAMPLES = 32
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
    few = first if whole else first.part(0, min(first.size, FLOAT64_EXAMPLES))
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
    held = parameters.held_rows(twin.terms.model, twin.terms.params, tied=True)

    def direction() -> Tensor:
        u = torch.randn(weights.shape, generator=generator, dtype=torch.float64).to(twin.device)
        for i, row in held:
            parameters.views(u, twin.terms.params)[i][row] = 0
        scaled: Tensor = u * ((float(weights.norm()) or 1.0) / float(u.norm()))
        return scaled

    def sums(at: Tensor, block: Tensor) -> Sums:
        parameters.assign(twin.terms.params, at)
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
        parameters.assign(twin.terms.params, base + sign * STEP * u)
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


def require_repeatable(objective: Objective, one: Sums, two: Sums, tolerance: float) -> None:
    """Two sums over the same examples must agree, or the loss is no fixed function of the weights.

    Raises: AuditError naming the likely cause.
    """
    moved = float(torch.linalg.vector_norm(one.gradient - two.gradient))
    changed = abs(float(one.loss - two.loss)) > tolerance * max(abs(float(one.loss)), float(one.spread))
    if not changed and moved <= tolerance * float(one.spread):
        both = min(len(one.products), len(two.products))
        p, q = one.products[:both], two.products[:both]
        if float((p - q).norm()) > tolerance * float(p.norm()):
            raise AuditError(
                f"Products with the {objective.curvature.title} must repeat, but two with the same vector differ while "
                "the losses agree. Turn on torch.use_deterministic_algorithms."
            )
        return
    dropout = nn.modules.dropout._DropoutNd
    dropping = [name for name, m in objective.terms.model.named_modules() if isinstance(m, dropout) and m.training]
    cause = (
        f"dropout is on in {dropping[0]} ({len(dropping)} in all). Measure in mode 'eval', or set its p to 0"
        if dropping
        else "the model draws random numbers, as F.dropout without training=self.training does, or changes its "
        "own buffers. Turn that off"
    )
    raise AuditError(
        f"The same batch must give the same loss twice, but it gave {float(one.loss):.6g} and {float(two.loss):.6g} in "
        f"sum and the gradient moved by {moved:.2g}: {cause}."
    )


def require_additive(
    objective: Objective, whole: MicroBatch, tolerance: float, block: torch.Tensor | None = None
) -> None:
    """Loss, gradient and products of a batch must be the sums over its halves, or micro-batches would change them.

    Raises: ProblemError.
    """
    if not whole.splittable or whole.size < 2:
        return
    block = objective.no_vectors() if block is None else block
    half = whole.size // 2
    one = objective.accumulate([whole], block)
    two = objective.accumulate([whole.part(0, half), whole.part(half, whole.size)], block)
    require_same(one, two, "halves", tolerance)


def require_same(one: Sums, two: Sums, parts: str, tolerance: float) -> None:
    """Two sums over the same examples, cut differently, must give one mean loss, gradient and curvature.

    Raises: ProblemError.
    """
    if not float(one.weight) or not float(two.weight):
        return
    (a, g), (b, h) = ((float(s.loss / s.weight), s.gradient / s.weight) for s in (one, two))
    spread = max(float(s.spread / s.weight) for s in (one, two))
    if abs(a - b) > tolerance * max(abs(a), 1e-3) or float((g - h).norm()) > tolerance * spread:
        raise ProblemError(
            f"The mean loss of a batch must be the weighted mean over its parts, but over the same examples it is "
            f"{a:.9g} and, cut into other {parts}, {b:.9g}. If the loss is a sum, or a mean over tokens, give it a "
            "terms(batch) method and return the mean; if examples in a batch depend on each other, or do not lie along "
            "its first dimension, pass micro_batch='loader'."
        )
    (p, q) = (s.products / s.weight for s in (one, two))
    if float((p - q).norm()) > tolerance * max(float(p.norm()), float(q.norm())):
        raise ProblemError(
            "The curvature of a batch must be the weighted mean over its parts, but products with it change when it is "
            "cut. If examples in a batch depend on each other, pass micro_batch='loader'."
        )
