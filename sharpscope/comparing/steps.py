"""Each part of a comparison: a function of a Problem that returns a result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sharpscope.comparing.levels import K, Level
from sharpscope.comparing.samples import sampled
from sharpscope.density import spectral_density
from sharpscope.density import trace as trace_of
from sharpscope.examples import count_examples
from sharpscope.objective import Progress
from sharpscope.params import select
from sharpscope.problem import Problem
from sharpscope.results import DensityResult, EigenResult, SharpnessResult, SliceResult, TraceResult
from sharpscope.sharpness import measure_sharpness
from sharpscope.sharpness.edge import edge_of
from sharpscope.slices import loss_slice, loss_surface, random_directions, towards
from sharpscope.slices.running_statistics import running_norms
from sharpscope.spectrum import top_eigenvalues

M = (1, 4, 16, 64, 256)
BETWEEN = (-0.2, 1.2)

# Examples of a sample from which on a part of it guides the solver: of the cnn on 2,000 of Fashion-MNIST, to 1e-2, 63
# gradients in place of Lanczos's 88.
GUIDED = 2000

Place = str | os.PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class How:
    """What decides the numbers beside checkpoint and data.

    Attributes:
        level: how much is paid for.
        seed: of samples, starts, probes and directions, so that all checkpoints get the same.
        rho: the radius of m-sharpness.
        dtype, device: as for ``top_eigenvalues``.
    """

    level: Level
    seed: int = 0
    rho: float = 0.05
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    @property
    def source(self) -> torch.Generator:
        """Random numbers, the same for each part."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def computation(self) -> dict[str, Any]:
        """As the analyses take it."""
        return {"dtype": self.dtype, "device": self.device}


def eigen(problem: Problem, how: How, journal: Place = None, progress: Progress | None = None) -> EigenResult:
    """lambda_1 >= ... >= lambda_K of the training loss, with sampling intervals where it is not on all the data."""
    drawn = sampled(problem, how.level.eigen_examples, how.seed)
    few = drawn is problem or (how.level.eigen_examples or 0) < GUIDED or problem.mode != "eval"
    return top_eigenvalues(
        drawn,
        min(K, _num_params(problem)),
        how.level.tol,
        "auto" if few else "guided",
        generator=how.source,
        progress=progress,
        certify=how.level.certify,
        population=drawn is not problem,
        journal=journal,
        **how.computation,
    )


def trace(problem: Problem, how: How, progress: Progress | None = None) -> TraceResult:
    """The trace of the Hessian of the training loss, with its error over examples where it is not on all of them."""
    drawn, n = sampled(problem, how.level.density_examples, how.seed), _num_params(problem)
    probes, population = min(how.level.trace_probes, n), drawn is not problem
    return trace_of(drawn, probes, how.source, progress, population=population, **how.computation)


def density(problem: Problem, how: How, progress: Progress | None = None) -> DensityResult:
    """The spectral density of the training loss."""
    drawn, n = sampled(problem, how.level.density_examples, how.seed), _num_params(problem)
    return spectral_density(drawn, min(how.level.probes, n), how.level.steps, how.source, progress, **how.computation)


def sharpness(
    problem: Problem, how: How, top: EigenResult | None = None, progress: Progress | None = None
) -> SharpnessResult:
    """m-sharpness against m, and ``top``'s lambda_max against the edge of stability where the recipe has one."""
    drawn = sampled(problem, how.level.sharpness_examples, how.seed)
    count = count_examples(drawn.data)
    sizes = [m for m in M if count is None or m <= count]
    found = measure_sharpness(drawn, ("m-sharpness",), how.source, progress, m=sizes, rho=how.rho, **how.computation)
    edge = None if top is None else edge_of(top)
    return found if edge is None else replace(found, measures=(*found.measures, edge))


def line(
    problem: Problem,
    test: Any,
    how: How,
    journal: Place = None,
    progress: Progress | None = None,
) -> SliceResult:
    """Loss and accuracy along random, filter-normalised lines, on train and test."""
    level = how.level
    directions = [
        random_directions(problem, 1, torch.Generator().manual_seed(how.seed + i))[0] for i in range(level.seeds)
    ]
    return loss_slice(
        sampled(problem, level.slice_examples, how.seed),
        directions,
        level.line_points,
        progress=progress,
        also=_beside(problem, test, how),
        batchnorm=_statistics(problem),
        journal=journal,
        **how.computation,
    )


def surface(problem: Problem, how: How, journal: Place = None, progress: Progress | None = None) -> SliceResult:
    """The training loss over a random, filter-normalised plane, from -1 to 1 for all."""
    return loss_surface(
        sampled(problem, how.level.surface_examples, how.seed),
        random_directions(problem, 2, how.source),
        how.level.surface_points,
        progress=progress,
        batchnorm=_statistics(problem),
        journal=journal,
        **how.computation,
    )


def between(
    problem: Problem,
    others: Mapping[str, Problem],
    test: Any,
    how: How,
    journal: Place = None,
    progress: Progress | None = None,
) -> SliceResult:
    """Loss and accuracy on the straight line to the one of ``others``, on train and test.

    Raises: ProblemError where the architectures differ.
    """
    ((name, other),) = others.items()
    return loss_slice(
        sampled(problem, how.level.slice_examples, how.seed),
        [towards(problem, other, name)],
        how.level.between_points,
        BETWEEN,
        progress,
        also=_beside(problem, test, how),
        batchnorm=_statistics(problem),
        marks=others,
        journal=journal,
        **how.computation,
    )


def _beside(problem: Problem, test: Any, how: How) -> dict[str, Any]:
    """As many test examples as training ones, where there are any."""
    return (
        {} if test is None else {"test": sampled(replace(problem, data=test), how.level.slice_examples, how.seed).data}
    )


def _statistics(problem: Problem) -> str:
    """BatchNorm's statistics anew at each point: those of the centre are another network's away from it."""
    return "recalibrate" if problem.mode == "eval" and running_norms(problem.model) else "frozen"


def _num_params(problem: Problem) -> int:
    return sum(weight.numel() for weight in select(problem.model, problem.params).values())
