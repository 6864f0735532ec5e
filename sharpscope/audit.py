"""Is the loss one fixed, twice differentiable function of the weights? Asked before any work, on a few examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sharpscope.batches import MicroBatch, leaves
from sharpscope.derivatives import Sums
from sharpscope.errors import AuditError, ProblemError
from sharpscope.objective import Objective

EXAMPLES = 256


def audit(objective: Objective, generator: torch.Generator | None = None) -> None:
    """Check on the first examples that loss and gradient repeat, that batches add up, and that ``u'Hv = v'Hu``.

    Cost: about 8 gradients over 256 examples, counted in ``objective.gradients``.

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


def _split(whole: MicroBatch, half: int) -> Iterator[MicroBatch]:
    yield whole.part(0, half)
    yield whole.part(half, whole.size)


def _same(first: MicroBatch, again: MicroBatch) -> bool:
    tensors = ([leaf for leaf in leaves(part.batch) if isinstance(leaf, Tensor)] for part in (first, again))
    a, b = tensors
    return len(a) == len(b) and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True)
    )
