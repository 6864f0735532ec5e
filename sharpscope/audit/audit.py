"""Is the loss one fixed function of the weights with a symmetric curvature? Asked before any work, on some examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharpscope.audit.agreement import require_additive, require_repeatable, require_same
from sharpscope.audit.twin import audit_in_float64, products_in_float64, reads
from sharpscope.errors import AuditError, ProblemError
from sharpscope.objective import Objective, microbatch
from sharpscope.objective.accumulate import Sums
from sharpscope.objective.data import MicroBatch, leaves, map_tensors, micro_batches

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
