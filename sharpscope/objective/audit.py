"""Check, before every analysis, that the loss is a fixed function of the weights with correct derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import AuditError, DataError, ProblemError
from sharpscope.objective import Objective, fastest_micro_batch
from sharpscope.objective.accumulate import Sums
from sharpscope.objective.micro_batches import MicroBatch, leaves, map_tensors, micro_batches
from sharpscope.precision import cast_model
from sharpscope.weights import parameters
from sharpscope.weights.norm_ball import norm_of
from sharpscope.weights.perturbation import Perturbation
from sharpscope.weights.restore import strided

# Examples on which loss and derivatives are checked in the precision of the computation, and in float64.
EXAMPLES, FLOAT64_EXAMPLES = 256, 32

# Models with more parameters than this are not copied in float64 (0.8 GB).
MAX_COPIED_PARAMS = 100_000_000

# Examples from which the effect of float32 on eigenvalues is estimated: with fewer the scatter is too large.
ROUNDING_EXAMPLES = 256

# Relative tolerance, in float64, for sums that agree in exact arithmetic.
TOLERANCE = 1e-9

# The step of finite differences relative to the weights. It is so short that a ReLU's kink rarely lies in it; where one
# does, the differences to the left and to the right disagree, and another direction is tried.
STEP = 1e-8
TRIES = 3

# Largest entries of loss, gradient and products between which no sum of squares leaves float64's range.
SMALLEST, LARGEST = 1e-150, 1e150

# A softmax resolves 1 - p to an absolute eps only: finite differences of a loss that changes by less are noise.
RESOLVED = 1e-8


def audit(objective: Objective, generator: torch.Generator | None = None) -> None:
    """Check on the first examples that loss and gradient repeat, that ``u'Hv = v'Hu``, and that batches add up.

    Products are with ``objective.curvature``. Checks that need more digits than the computation has run on a float64
    copy (``audit_in_float64``); where there is none, ``require_slope``. A loss that is not known to ``losses.py`` is
    summed over the whole data set in micro-batches of two sizes.

    Args:
        objective: the objective to check.
        generator: source of the random probe vectors. Default: torch's global one.

    Cost: about 8 gradients over 256 examples and 10 to 15 over 32, and 2 over the whole data set for a loss that is not
    known; all counted in ``objective.gradients``.

    Raises: AuditError naming the likely cause (dropout, a shuffled or augmented loader) and the remedy;
    ProblemError when the mean over a batch is not the mean over its parts; DataError.
    """
    with objective.measuring():
        first, again = objective.first_examples(EXAMPLES), objective.first_examples(EXAMPLES)
        if not _same_batch(first, again):
            raise AuditError(
                "Two walks over the data must give the same batches, but the first batch differs: the loader shuffles "
                "or augments. Pass shuffle=False and fix the augmentation."
            )
        probes = torch.randn(2, objective.num_params, generator=generator).to(objective.device, objective.dtype)
        one, two = (objective.accumulate([first], block) for block in (probes, probes[:0]))
        if not one.finite:
            objective.locate_nonfinite()
        _require_range(one)
        eps = torch.finfo(objective.dtype).eps
        first = objective.fit_to_memory(first)
        require_repeatable(objective, one, two, 1e3 * eps)
        # Finite differences lose about half of the digits that exact products have.
        _require_symmetric(objective, first, probes, one, 10 * eps**0.5 if objective.curvature.exact else 10 * eps**0.4)
        originals = [p for p in objective.problem.model.parameters() if p.requires_grad]
        if objective.terms.model is not objective.problem.model and depends_on(objective, first, originals):
            raise ProblemError(
                f"The loss reads the model's own parameters, which a copy in {objective.dtype} on {objective.device} "
                "does not have. Convert the model yourself, with model.to(...), and pass no dtype or device."
            )
        if not audit_in_float64(objective, first, generator, vanishes=not bool(one.gradient.any())):
            require_slope(objective, first, generator)
        if objective.micro_batch == "loader":
            if not objective.terms.loss.counts_terms:
                _require_no_sum(objective, first)
        elif not objective.terms.loss.counts_terms:
            _require_same_mean(objective)
        else:
            require_additive(objective, first, 1e4 * eps)


def _require_range(sums: Sums) -> None:
    """Raise DataError unless the squares of gradient and products can be summed in float64."""
    largest, products = (float(t.abs().max()) if t.numel() else 0.0 for t in (sums.gradient, sums.products))
    if max(largest, products) > LARGEST:
        raise DataError(
            f"Gradient and curvature must be at most {LARGEST:g}, so that their squares can be summed, but entries are "
            f"up to {max(largest, products):.2g}. Divide the loss by a constant."
        )
    if 0 < products < SMALLEST:
        raise DataError(
            f"The curvature must be at least {SMALLEST:g}, so that its squares can be summed, but its products have no "
            f"entry above {products:.2g}. Multiply the loss by a constant."
        )


def _require_symmetric(objective: Objective, first: MicroBatch, probes: Tensor, sums: Sums, tolerance: float) -> None:
    difference, size = _asymmetry(probes, sums.products)
    if difference > tolerance * size:
        exact = None if objective.dtype == torch.float64 else products_in_float64(objective, [first], probes)
        if exact is not None:
            exact_difference, exact_size = _asymmetry(probes, exact)
            if exact_difference <= tolerance * exact_size:
                raise AuditError(
                    f"The curvature must not be rounding, but u'Hv and v'Hu differ by {difference:.2g} at |u||Hv| = "
                    f"{size:.2g} in float32 and agree in float64: the loss is so near its least that float32 does not "
                    "resolve it. Pass dtype=torch.float64 (--dtype float64)."
                )
        remedy = (
            "operator='finite-difference' (--operator finite-difference)"
            if objective.curvature.exact
            else "dtype=torch.float64"
        )
        raise AuditError(
            f"The {objective.curvature.title} must be symmetric, but u'Hv and v'Hu differ by {difference:.2g} at "
            f"|u||Hv| = {size:.2g}: an operation has a wrong derivative. Look for custom autograd functions, detach "
            f"and weight_norm, or pass {remedy}."
        )


def _asymmetry(probes: Tensor, products: Tensor) -> tuple[float, float]:
    """``|u'Hv - v'Hu|``, and ``|u||Hv| + |v||Hu|``, which it is compared with."""
    (u, v), (hu, hv) = probes.cpu().double(), products.cpu().double()
    return abs(float(u @ hv - v @ hu)), float(u.norm() * hv.norm() + v.norm() * hu.norm())


def _require_no_sum(objective: Objective, first: MicroBatch) -> None:
    """Raise ProblemError for a loss that doubles when its batch is repeated; a mean does not change."""

    def twice(value: Any) -> Any:
        return map_tensors(value, lambda t: torch.cat([t, t]))

    output, target, _ = objective.terms.forward(first)
    try:
        once = objective.terms.loss_function(output, target).detach()
        again = objective.terms.loss_function(twice(output), twice(target)).detach()
    except (RuntimeError, ValueError, IndexError):
        return  # the loss takes no other batch size
    if float(once) and abs(float(again / once) - 2) < 1e-3:
        raise ProblemError("The loss must be a mean over the batch, but it is a sum. Divide it by its terms.")


def _require_same_mean(objective: Objective) -> None:
    """Compare the mean loss over the whole data set in micro-batches of two sizes that share few boundaries."""
    size = objective.micro_batch if isinstance(objective.micro_batch, int) else fastest_micro_batch.DEFAULT
    nothing = objective.empty_block()
    one, two = (
        objective.accumulate(micro_batches(objective.data, cut), nothing) for cut in (size, max(1, 2 * size // 5))
    )
    objective.cost_counter.passes += 2
    if one.finite and two.finite:
        require_same(one, two, "micro-batches", 1e3 * torch.finfo(objective.dtype).eps)


def _same_batch(first: MicroBatch, again: MicroBatch) -> bool:
    a, b = (
        [part for leaf in leaves(batch.batch) if isinstance(leaf, Tensor) for part in strided(leaf)]
        for batch in (first, again)
    )
    return len(a) == len(b) and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True)
    )


def float64_copy(objective: Objective) -> Objective | None:
    """The same objective in float64 on a copy of the model; None where that is impossible or too large."""
    if objective.num_params > MAX_COPIED_PARAMS or objective.device.type == "mps":  # MPS has no float64
        return None
    try:
        model, loss = cast_model(
            objective.terms.model, objective.terms.loss_function, torch.float64, objective.device, copied=True
        )
    except ProblemError:
        return None
    problem = dataclasses.replace(objective.problem, model=model, loss=loss)
    return Objective(problem, dtype=torch.float64, micro_batch=objective.micro_batch, curvature=objective.curvature)


def require_representable_loss(objective: Objective, batch: MicroBatch) -> None:
    """Raise DataError where the loss of ``batch``, which is 0 at these weights, is a smaller number in float64.

    Cost: a forward pass on a copy of the model, not counted.
    """
    copy = float64_copy(objective) if objective.dtype != torch.float64 else None
    if copy is None:
        return
    try:
        with copy.measuring(products=False):
            loss = float(copy.terms.without_graph(lambda: copy.terms.sums(batch))[0])
    except (ProblemError, RuntimeError, TypeError):  # for example, the model keeps float32 tensors in attributes
        return
    if 0 < abs(loss) < torch.finfo(objective.dtype).tiny:
        raise DataError(
            f"The loss must be a number that {objective.dtype} can hold, but {loss:.2g} becomes 0. Multiply the loss "
            "by a constant."
        )


def products_in_float64(objective: Objective, batches: Sequence[MicroBatch], block: Tensor) -> Tensor | None:
    """The products with ``block`` (K, n), summed over ``batches``, in float64; None where that is impossible."""
    copy = float64_copy(objective)
    if copy is None:
        return None
    with copy.measuring():
        try:
            if depends_on(copy, batches[0], [p for p in objective.terms.params if p.requires_grad]):
                return None
            products = copy.accumulate(batches, block.double()).products
        except (ProblemError, RuntimeError, TypeError):  # for example, the model keeps float32 tensors in attributes
            return None
    objective.add_cost(copy.cost_counter.example_gradients)
    return products


def float32_rounding(
    objective: Objective, vectors: Tensor, samples: Sequence[Sequence[MicroBatch]] | None = None
) -> float:
    """The error of eigenvalues from the model's float32 arithmetic: ``max |v'(H - H64)v|`` over unit vectors (n, k).

    H and H64 are the Hessians of the mean loss of a sample in float32 and in float64. The softmax of a well-fitted
    network resolves ``1 - p`` to an absolute 6e-8 only, and its curvature no better, however small that is; the
    relative rounding error of the products does not include it.

    Args:
        samples: examples that stand for all the data, then those of large errors, which count by their share of the
            data (``sharpscope.sampling.rounding_sample``). Default: the first ROUNDING_EXAMPLES.

    Returns: the error, in units of the eigenvalues; 0 where the model cannot run in float64.

    Cost: ``1 + 2k`` gradients of the examples, twice.
    """
    block, total, terms = vectors.T.to(objective.device, objective.dtype), 0.0, 0.0
    for batches in samples if samples is not None else [[objective.first_examples(ROUNDING_EXAMPLES)]]:
        exact = products_in_float64(objective, batches, block)
        if exact is None:
            return 0.0
        sums = objective.accumulate(batches, block)
        errors = (block.double() * (sums.products.double() - exact)).sum(1).abs()
        if not terms:  # loss terms of all the data, from those of the random examples
            count = sum(batch.size for batch in batches)
            terms = float(sums.weight)
            scale = max((objective.num_examples or count) / count, 1.0)
            total += float(errors.max()) / terms if terms else 0.0
            terms *= scale
        else:
            total += float(errors.max()) / terms
    return total


def audit_in_float64(
    objective: Objective, first: MicroBatch, generator: torch.Generator | None, vanishes: bool = False
) -> bool:
    """Check in float64 that sums repeat, that batches add up, and that gradient and products are true derivatives.

    Derivatives are compared with finite differences of the loss and of the gradient. This finds operations whose
    backward is correct but not differentiable, which torch does not always report. A model that cannot be copied or run
    in float64, or whose loss uses its parameters directly, is not checked.

    Args:
        vanishes: the gradient is zero in the precision of the computation. In float64 it must not be a number too small
            for that precision.

    Returns: whether the checks were possible.

    Cost: about 10 gradients over 32 examples.

    Raises: AuditError, ProblemError, DataError, naming what to look for.
    """
    copy = float64_copy(objective)
    if copy is None:
        return False
    batch = _few(objective, first)
    originals = [p for p in (*objective.terms.params, *objective.problem.model.parameters()) if p.requires_grad]
    with copy.measuring():
        try:
            if depends_on(copy, batch, originals):
                return False
        except (ProblemError, RuntimeError, TypeError):  # for example, the model keeps float32 tensors in attributes
            return False
        # Products with the Hessian are as additive as the gradient; finite differences have too few digits for this.
        block, curvature = copy.empty_block(), copy.curvature
        if curvature.exact and not curvature.uses_second_derivatives:
            block = torch.randn(1, copy.num_params, generator=generator, dtype=torch.float64).to(copy.device)
        one, two = (copy.accumulate([batch], block) for _ in range(2))
        require_repeatable(copy, one, two, TOLERANCE)
        largest = float(one.gradient.abs().max())
        if vanishes and 0 < largest < torch.finfo(objective.dtype).tiny:
            raise DataError(
                f"The loss must have a gradient that {objective.dtype} can hold, but its largest entry is "
                f"{largest:.2g}, which becomes 0. Multiply the loss by a constant."
            )
        if objective.micro_batch != "loader":
            require_additive(copy, batch, TOLERANCE, block)
        _require_derivatives(copy, batch, generator)
    objective.add_cost(copy.cost_counter.example_gradients)
    return True


def _few(objective: Objective, first: MicroBatch) -> MicroBatch:
    """The first FLOAT64_EXAMPLES examples of ``first``, or the whole where it may not be cut."""
    whole = objective.micro_batch == "loader" or not first.splittable
    return first if whole else first.slice(0, min(first.size, FLOAT64_EXAMPLES))


def depends_on(objective: Objective, batch: MicroBatch, others: Sequence[Tensor]) -> bool:
    """Whether the loss of ``batch`` depends on any of ``others``, tensors outside of the objective's model."""
    loss, _ = objective.terms.sums(batch)
    if not loss.requires_grad or not others:
        return False
    return any(g is not None for g in torch.autograd.grad(loss, list(others), allow_unused=True))


def require_slope(objective: Objective, first: MicroBatch, generator: torch.Generator | None = None) -> None:
    """The gradient must be the slope of the loss along random directions, in the precision of the computation.

    This takes no copy of the model, and finds gradients that are cut off, not small errors: it refuses where slope and
    loss differ by a tenth along two of TRIES directions in which the loss changes alike over two distances, so is at no
    kink. The weights are moved, and restored bit for bit.

    Cost: 15 gradients over 32 examples.

    Raises: ProblemError.
    """
    batch, params, nothing = _few(objective, first), objective.terms.params, objective.empty_block()
    size, eps = norm_of([p.detach() for p in params]) or 1.0, torch.finfo(objective.dtype).eps
    step = eps ** (1 / 3)
    padding = parameters.padding_rows(objective.terms.model, params, tied=True)
    with Perturbation(params) as moved:

        def direction() -> Tensor:
            u = torch.randn(objective.num_params, generator=generator).to(nothing)
            for i, row in padding:
                parameters.views(u, params)[i][row] = 0
            scaled: Tensor = u * (size / float(u.norm()))
            return scaled

        def sums(at: Tensor) -> Sums:
            moved.move_to(parameters.views(at, params))
            return objective.accumulate([batch], nothing)

        wrong = []
        for _ in range(TRIES):
            base, u = 0.01 * direction(), direction()
            here = sums(base)
            slope = float(here.gradient.double() @ u.double())
            far, near = (float(sums(base + h * u).loss - sums(base - h * u).loss) / (2 * h) for h in (step, step / 2))
            noise = 20 * eps / step * (abs(float(here.loss)) + float(here.spread) + abs(float(here.weight)))
            if abs(slope - near) > 0.1 * max(abs(slope), abs(near)) + noise and abs(far - near) <= 0.05 * abs(near):
                wrong.append((slope, near))
    if len(wrong) > 1:
        raise ProblemError(_wrong_gradient(*wrong[0]))


def _require_derivatives(objective: Objective, batch: MicroBatch, generator: torch.Generator | None) -> None:
    """Gradient and products must agree with finite differences of the loss and of the gradient."""
    weights = torch.cat([p.detach().reshape(-1) for p in objective.terms.params])
    second = objective.curvature.uses_second_derivatives
    padding = parameters.padding_rows(objective.terms.model, objective.terms.params, tied=True)

    def direction() -> Tensor:
        u = torch.randn(weights.shape, generator=generator, dtype=torch.float64).to(objective.device)
        for i, row in padding:
            parameters.views(u, objective.terms.params)[i][row] = 0
        scaled: Tensor = u * ((float(weights.norm()) or 1.0) / float(u.norm()))
        return scaled

    def sums(at: Tensor, block: Tensor) -> Sums:
        parameters.assign(objective.terms.params, at)
        return objective.accumulate([batch], block)

    for _ in range(TRIES):
        # Near w, not at it: where an input and a bias are both zero, w itself is at a ReLU's kink.
        base, u = weights + 0.01 * direction(), direction()
        here = sums(base, u[None] if second else u.new_empty(0, len(u)))
        before, after = (sums(base + sign * STEP * u, u.new_empty(0, len(u))) for sign in (-1, 1))
        rounding = 100 * torch.finfo(torch.float64).eps / STEP
        slope, rise = float(here.gradient @ u), float(after.loss - before.loss) / (2 * STEP)
        least = rounding * (abs(float(here.loss)) + float(here.spread))
        if float(here.spread) * float(u.norm()) <= RESOLVED * float(here.weight):
            # No gradient, or one of rounding. The loss may then change by rounding too, or jump, but have no slope.
            one, two = float(after.loss - here.loss) / STEP, float(here.loss - before.loss) / STEP
            if abs(rise) > 2 * (least + rounding * float(here.weight)) and abs(one - two) < 0.1 * abs(rise):
                raise ProblemError(_wrong_gradient(slope, rise))
            return
        left, right = (here.gradient - before.gradient) / STEP, (after.gradient - here.gradient) / STEP
        noise = rounding * float(here.spread)
        size = max(float(left.norm()), float(right.norm()))
        if float((left - right).norm()) > 1e-3 * size + noise:
            continue
        if abs(slope - rise) > 1e-2 * abs(rise) + least:
            raise ProblemError(_wrong_gradient(slope, rise))
        error = (
            float((here.products[0] - (left + right) / 2).norm())
            if objective.curvature.uses_second_derivatives
            else 0.0
        )
        if error > 1e-2 * size + noise:
            raise ProblemError(
                "Hessian products must be the derivative of the gradient, but are off its finite differences by "
                f"{error:.2g} of {size:.2g}: an operation has no true second derivative. Look for once_differentiable, "
                "detach and saved numbers in the backward of custom autograd functions, and scripted modules (measure "
                "the original), or pass operator='finite-difference' (--operator finite-difference)."
            )
        _require_tangent(objective, batch, base, u)
        return


def _wrong_gradient(slope: float, rise: float) -> str:
    return (
        f"The gradient must be the derivative of the loss, but along one direction it says {slope:.4g} where the loss "
        f"changes by {rise:.4g}. Look for detach, torch.no_grad and .data (a target from the same network must come "
        "from a copy of it), custom autograd functions, gradient scaling, rounding to 16 bits, and gradient "
        "checkpointing other than torch.utils.checkpoint, which hides weights: switch it off."
    )


def _require_tangent(objective: Objective, batch: MicroBatch, base: Tensor, u: Tensor) -> None:
    """J u must agree with the finite difference of the model's output along u, where the curvature is made of J."""
    if objective.curvature.tangent is None:
        return
    results = []
    for sign in (0, -1, 1):
        parameters.assign(objective.terms.params, base + sign * STEP * u)
        results.append(objective.curvature.tangent(objective.terms, batch, u))
    (_, tangent), (before, _), (after, _) = results
    slope = (after - before) / (2 * STEP)
    noise = 100 * torch.finfo(torch.float64).eps / STEP * float(after.norm())
    error, size = float((tangent - slope).norm()), float(slope.norm())
    if error > 1e-2 * size + noise:
        raise ProblemError(
            "Jacobian products must be the derivative of the model's output, but are off its finite differences by "
            f"{error:.2g} of {size:.2g}: a gradient is cut off where it is to be differentiated. Look for "
            "once_differentiable and detach in the backward of custom autograd functions, or pass "
            "operator='finite-difference' (--operator finite-difference)."
        )


def require_repeatable(objective: Objective, one: Sums, two: Sums, tolerance: float) -> None:
    """Two sums over the same examples must agree, or the loss is not a fixed function of the weights.

    Raises: AuditError naming the likely cause.
    """
    moved = float(torch.linalg.vector_norm(one.gradient - two.gradient))
    changed = abs(float(one.loss - two.loss)) > tolerance * max(abs(float(one.loss)), float(one.spread))
    if not changed and moved <= tolerance * float(one.spread):
        count = min(len(one.products), len(two.products))
        p, q = one.products[:count], two.products[:count]
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
    """Loss, gradient and products of a batch must be the sums over its halves, or micro-batching would change them.

    Raises: ProblemError.
    """
    if not whole.splittable or whole.size < 2:
        return
    block = objective.empty_block() if block is None else block
    half = whole.size // 2
    one = objective.accumulate([whole], block)
    two = objective.accumulate([whole.slice(0, half), whole.slice(half, whole.size)], block)
    require_same(one, two, "halves", tolerance)


def require_same(one: Sums, two: Sums, parts: str, tolerance: float) -> None:
    """Two sums over the same examples in different micro-batches must give the same mean loss, gradient and products.

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
            "its first dimension, pass micro_batch='loader'; if the model computes in 16 bits, use float32."
        )
    (p, q) = (s.products / s.weight for s in (one, two))
    if float((p - q).norm()) > tolerance * max(float(p.norm()), float(q.norm())):
        raise ProblemError(
            "The curvature of a batch must be the weighted mean over its parts, but products with it change when it is "
            "cut. If examples in a batch depend on each other, pass micro_batch='loader'."
        )
