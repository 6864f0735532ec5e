"""Is the loss one fixed, twice differentiable function of the weights? Asked before any work, on a few examples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sharpscope import params
from sharpscope.batches import MicroBatch, leaves
from sharpscope.derivatives import Sums
from sharpscope.errors import AuditError, ProblemError
from sharpscope.objective import Objective

EXAMPLES = 256

# The float64 twin: how many examples it sees, the largest it may be, and the step of its differences relative to the
# weights. The step is so short that a ReLU's kink rarely lies in it; where one does, the differences to the left and
# to the right disagree, and another direction is drawn.
TWIN_EXAMPLES = 32
LARGEST_TWIN = 100_000_000
STEP = 1e-8
TRIES = 3


def audit(objective: Objective, generator: torch.Generator | None = None) -> None:
    """Check on the first examples that loss and gradient repeat, that batches add up, and that H is their derivative.

    The last is asked twice: ``u'Hv = v'Hu``, and ``Hu`` against differences of gradients in float64 on a copy of the
    model, which finds an operation whose backward is right but cannot be differentiated (torch does not always say).

    Cost: about 10 gradients over 256 examples and 5 over 32, counted in ``objective.gradients``.

    Raises: AuditError naming the likely cause (dropout, a shuffled or augmented loader) and the remedy;
    ProblemError when the mean over a batch is not the mean over its parts; DataError.
    """
    if objective.micro_batch is None and objective.batchnorm == "batch statistics":
        # The loss of an example depends on its neighbours, so only the loader's own batches define L.
        objective.micro_batch = "loader"
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
            objective.blame()
        eps = torch.finfo(objective.dtype).eps
        _require_repeatable(objective, one, two, 1e3 * eps)
        _require_symmetric(probes, one, 10 * eps**0.5)
        if objective.micro_batch != "loader" and first.size > 1:
            _require_additive(objective, first, one, 0.01)
        _require_derivative_of_gradient(objective, first, generator)


def _require_repeatable(objective: Objective, one: Sums, two: Sums, tolerance: float) -> None:
    moved = float(torch.linalg.vector_norm(one.gradient - two.gradient))
    changed = abs(float(one.loss - two.loss)) > 1e-3 * abs(float(one.loss)) + tolerance
    if not changed and moved <= tolerance * float(one.spread):
        return
    dropout = nn.modules.dropout._DropoutNd
    dropping = [name for name, m in objective.model.named_modules() if isinstance(m, dropout) and m.training]
    cause = (
        f"dropout is on in {dropping[0]} ({len(dropping)} in all). Measure in mode 'eval'"
        if dropping
        else "the model draws random numbers, such as F.dropout without training=self.training. Turn that off"
    )
    raise AuditError(
        f"The same batch must give the same loss twice, but it gave {float(one.loss):.6g} and {float(two.loss):.6g} in "
        f"sum and the gradient moved by {moved:.2g}: {cause}."
    )


def _require_symmetric(probes: Tensor, sums: Sums, tolerance: float) -> None:
    u, v = probes.double().cpu() if probes.device.type != "mps" else probes.cpu().double()
    hu, hv = sums.products.cpu().double()
    apart = abs(float(u @ hv - v @ hu))
    size = float(u.norm() * hv.norm() + v.norm() * hu.norm())
    if apart > tolerance * size:
        raise AuditError(
            f"The Hessian must be symmetric, but u'Hv and v'Hu differ by {apart:.2g} (|u||Hv| = {size:.2g}): an "
            "operation has a wrong second derivative. Look for custom autograd functions, detach and no_grad."
        )


def _require_additive(objective: Objective, whole: MicroBatch, sums: Sums, tolerance: float) -> None:
    half = whole.size // 2
    parts = objective.accumulate(_split(whole, half), torch.empty_like(sums.products[:0]))
    if not float(sums.weight) or not float(parts.weight):
        return
    mean, parts_mean = float(sums.loss / sums.weight), float(parts.loss / parts.weight)
    gradient, parts_gradient = sums.gradient / sums.weight, parts.gradient / parts.weight
    moved = float(torch.linalg.vector_norm(gradient - parts_gradient))
    floor = 100 * torch.finfo(objective.dtype).eps
    if abs(mean - parts_mean) > tolerance * abs(mean) + floor or moved > tolerance * float(sums.spread / sums.weight):
        raise ProblemError(
            f"The mean loss of a batch must be the weighted mean over its parts, but it is {mean:.6g} for {whole.size} "
            f"examples and {parts_mean:.6g} for the halves. If the loss is a sum, or a mean over tokens, give it "
            "a terms(batch) method and return the mean; if examples in a batch depend on each other, pass "
            "micro_batch='loader'."
        )


def _require_derivative_of_gradient(objective: Objective, first: MicroBatch, generator: torch.Generator | None) -> None:
    if objective.num_params > LARGEST_TWIN or objective.device.type == "mps":  # MPS has no float64
        return
    try:
        model = copy.deepcopy(objective.model).double()
    except RuntimeError:
        return  # a model that cannot be copied; the other checks stand
    problem = dataclasses.replace(objective.problem, model=model)
    twin = Objective(problem, dtype=torch.float64, micro_batch=objective.micro_batch)
    few = first if objective.micro_batch == "loader" else first.part(0, min(first.size, TWIN_EXAMPLES))
    weights = torch.cat([p.detach().reshape(-1) for p in twin.params])

    def direction() -> Tensor:
        u = torch.randn(weights.shape, generator=generator, dtype=torch.float64).to(twin.device)
        scaled: Tensor = u * ((float(weights.norm()) or 1.0) / float(u.norm()))
        return scaled

    def gradient(at: Tensor, block: Tensor) -> Sums:
        params.assign(twin.params, at)
        return twin.accumulate([few], block)

    with twin.measuring():
        for _ in range(TRIES):
            # Near w, not at it: where an input and a bias are both zero, w itself lies on a ReLU's kink.
            base, u = weights + 0.01 * direction(), direction()
            here = gradient(base, u[None])
            before, after = (
                gradient(base - STEP * u, u.new_empty(0, len(u))),
                gradient(base + STEP * u, u.new_empty(0, len(u))),
            )
            objective.charge(5 * few.size)
            left, right = (here.gradient - before.gradient) / STEP, (after.gradient - here.gradient) / STEP
            noise = 100 * torch.finfo(torch.float64).eps / STEP * float(here.spread)
            size = max(float(left.norm()), float(right.norm()))
            smooth = float((left - right).norm()) <= 1e-3 * size + noise
            apart = float((here.products[0] - (left + right) / 2).norm())
            if smooth and apart > 1e-2 * size + noise:
                raise ProblemError(
                    "Hessian products must be the derivative of the gradient, but are off its finite differences by "
                    f"{apart:.2g} of {size:.2g}: an operation has no true second derivative. Look for "
                    "once_differentiable, detach and saved numbers in the backward of custom autograd functions."
                )
            if smooth:
                return


def _split(whole: MicroBatch, half: int) -> Iterator[MicroBatch]:
    yield whole.part(0, half)
    yield whole.part(half, whole.size)


def _same(first: MicroBatch, again: MicroBatch) -> bool:
    tensors = ([leaf for leaf in leaves(part.batch) if isinstance(leaf, Tensor)] for part in (first, again))
    a, b = tensors
    return len(a) == len(b) and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True)
    )
