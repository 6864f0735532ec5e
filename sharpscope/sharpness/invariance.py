"""Which sharpness measures change when a network is rescaled without changing its function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, ProblemError
from sharpscope.objective import Objective, Progress
from sharpscope.objective.audit import depends_on
from sharpscope.objective.micro_batches import leaves
from sharpscope.precision import cast_model
from sharpscope.problem import Problem
from sharpscope.results import InvarianceResult, SharpnessResult
from sharpscope.results.base import total_cost
from sharpscope.sharpness.maximize import Ascent
from sharpscope.sharpness.measures import measure_sharpness

# Examples on which a rescaled network must give the same outputs, and the tolerance relative to the largest output.
EXAMPLES, TOLERANCE = 32, 1e-9


def rescaling_invariance(
    problem: Problem,
    factor: float = 4.0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    rho: float = 0.05,
    m: int = 64,
    ascent: Ascent | None = None,
    draws: int = 4,
    probes: int = 4,
    device: torch.device | str | None = None,
) -> InvarianceResult:
    """Sharpness measures before and after multiplying ``W_l, b_l`` and dividing ``W_{l+1}`` by ``factor``.

    ReLU is positively homogeneous, so rescaling two layers with a ReLU between them (and pooling or flattening) does
    not change the function of the network. This is checked on the outputs and the loss. Every second such pair is
    rescaled. The computation is in float64, with the same subsets, draws and probes before and after, so invariant
    measures agree to rounding.

    Args:
        problem: model, loss and data.
        factor: positive, not 1.
        generator, progress, device: as for ``measure_sharpness``.
        rho, m, ascent, draws, probes: as for ``measure_sharpness``.

    Cost: twice that of ``measure_sharpness`` for relative flatness, and for five other measures plain and adaptive.

    Raises: ArgumentError for an argument outside its domain; ProblemError if no pair of layers can be rescaled, or the
        loss depends on the weights other than through the outputs.
    Source: Dinh et al. 2017, section 3.

    >>> import sharpscope
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=(torch.randn(8, 3), torch.randn(8, 1)))
    >>> result = sharpscope.rescaling_invariance(problem, m=4, draws=2, probes=2)
    >>> moved = {measure.name for measure, change in zip(result.before, result.changes) if change > 1e-6}
    >>> "lambda-max" in moved, "relative-flatness" in moved
    (True, False)
    """
    if not 0 < factor < float("inf") or factor == 1.0:
        raise ArgumentError(f"factor must be positive, finite and not 1, got {factor!r}.")
    seed = 0 if generator is None else generator.initial_seed()
    if problem.weight_decay:
        raise ArgumentError("weight_decay must be 0, since c/2 ||w||^2 is not invariant under rescaling. Leave it out.")
    before = _float64_copy(problem)
    pairs = rescalable(before, factor)
    if not pairs:
        raise ProblemError("The model has no two layers with only a ReLU and pooling between. Nothing can be rescaled.")
    chosen = pairs[::2]
    after = rescaled(before, chosen, factor)
    for side in (before, after):
        _require_outputs_alone(problem, side)

    def measured(one: Problem, adaptive: str | None, names: Sequence[str]) -> SharpnessResult:
        return measure_sharpness(
            one,
            names,
            torch.Generator().manual_seed(seed),
            progress,
            m=(m,),
            rho=(rho,),
            adaptive=adaptive,
            ascent=ascent,
            draws=draws,
            probes=probes,
            dtype=torch.float64,
            device=device,
        )

    shared = ("lambda-max", "trace", "m-sharpness", "worst-case", "average-case")
    sides: list[tuple[SharpnessResult, SharpnessResult]] = []
    for adaptive, names in ((None, shared), ("elementwise", shared), (None, ("relative-flatness",))):
        sides.append((measured(before, adaptive, names), measured(after, adaptive, names)))
    one, two = sides[0]
    if abs(one.loss - two.loss) > TOLERANCE * abs(one.loss):
        raise ProblemError(
            f"Rescaling must not change the loss, but on all the data it is {one.loss:.9g} before and "
            f"{two.loss:.9g} after: the loss depends on the weights directly, or some outputs change."
        )
    return InvarianceResult(
        before=tuple(m for side, _ in sides for m in side.measures),
        after=tuple(m for _, side in sides for m in side.measures),
        factor=factor,
        layers=tuple(chosen),
        loss=one.loss,
        cost=total_cost(side.cost for pair in sides for side in pair),
        provenance={key: value for key, value in one.provenance.items() if key != "left_out"},
    )


def rescalable(problem: Problem, factor: float) -> list[tuple[str, str]]:
    """Pairs of consecutive layers, by name, whose rescaling by ``factor`` does not change the outputs.

    Each pair, in the order of registration, is tested numerically on the first EXAMPLES.
    """
    objective = Objective(problem, dtype=torch.float64)
    names = [
        name
        for name, module in problem.model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    found = []
    with objective.measuring():
        batch = objective.first_examples(EXAMPLES)
        expected = _flat(objective.terms.without_graph(lambda: objective.terms.forward(batch))[0])
        for pair in pairwise(names):
            one, two = (problem.model.get_submodule(name).get_parameter("weight") for name in pair)
            if one.data_ptr() == two.data_ptr():  # tied: multiplied, then divided again
                continue
            other = Objective(rescaled(problem, [pair], factor), dtype=torch.float64)
            with other.measuring():
                got = _flat(other.terms.without_graph(lambda: other.terms.forward(batch))[0])  # noqa: B023  called at once
            if float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
                found.append(pair)
    return found


@torch.no_grad()
def rescaled(problem: Problem, pairs: Sequence[tuple[str, str]], factor: float) -> Problem:
    """A copy of ``problem``: in each pair, multiply the first layer's weight and bias, divide the second's weight."""
    changed = _float64_copy(problem)
    for first, second in pairs:
        named = dict(changed.model.get_submodule(first).named_parameters(recurse=False))
        for name in ("weight", "bias"):
            if name in named:
                named[name].mul_(factor)
        changed.model.get_submodule(second).get_parameter("weight").div_(factor)
    return changed


def _float64_copy(problem: Problem) -> Problem:
    """A copy in float64, of model and loss together, since the loss may refer to the model."""
    device = next(iter(problem.model.parameters())).device
    model, loss = cast_model(problem.model, problem.loss, torch.float64, device, copied=True)
    return replace(problem, model=model, loss=loss)


def _require_outputs_alone(problem: Problem, side: Problem) -> None:
    """Raise ProblemError if the loss of a copy still depends on the weights of the original."""
    objective = Objective(side, dtype=torch.float64)
    originals = [p for p in problem.model.parameters() if p.requires_grad]
    with objective.measuring():
        if depends_on(objective, objective.first_examples(EXAMPLES), originals):
            raise ProblemError("The loss reads the model's own parameters, which a rescaled copy does not have.")


def _flat(output: Any) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in leaves(output) if isinstance(leaf, Tensor)])
