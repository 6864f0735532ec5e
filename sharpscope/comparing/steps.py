"""Each analysis of a comparison: a function of a Problem that returns a result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sharpscope.comparing.levels import K, Level
from sharpscope.measurement import Measurement
from sharpscope.objective import Progress
from sharpscope.problem import Problem
from sharpscope.results import DensityResult, EigenResult, SharpnessResult, SliceResult, TraceResult
from sharpscope.results.comparison import Performance
from sharpscope.sampling.subsample import count_examples, random_subset
from sharpscope.sharpness import measure_sharpness
from sharpscope.slices import loss_slice, loss_surface, random_directions, towards
from sharpscope.slices.evaluation import Evaluation, default_micro_batch, running_norms
from sharpscope.spectrum import spectral_density, top_eigenvalues
from sharpscope.spectrum import trace as trace_of
from sharpscope.weights.parameters import select

M_VALUES = (1, 4, 16, 64, 256)
INTERPOLATION_RANGE = (-0.2, 1.2)

# Examples of a sample from which on a part of it guides the solver: of the cnn on 2,000 of Fashion-MNIST, to 1e-2, 63
# gradients in place of Lanczos's 88.
GUIDED_FROM = 2000

PathLike = str | os.PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the numbers, apart from checkpoint and data.

    Attributes:
        level: how much is paid for.
        test: data of the test split, or None.
        seed: of samples, starts, probes and directions, so that all checkpoints get the same.
        rho: the radius of m-sharpness.
        dtype, device: as for ``top_eigenvalues``.
    """

    level: Level
    test: Any = None
    seed: int = 0
    rho: float = 0.05
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    @property
    def generator(self) -> torch.Generator:
        """A new generator, the same for each step."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def dtype_and_device(self) -> dict[str, Any]:
        """Keyword arguments of the analyses."""
        return {"dtype": self.dtype, "device": self.device}


def eigen(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> EigenResult:
    """lambda_1 >= ... >= lambda_K of the training loss, with sampling intervals where it is not on all the data."""
    subset = sampled(problem, settings.level.eigen_examples, settings.seed)
    few = subset is problem or (settings.level.eigen_examples or 0) < GUIDED_FROM or problem.mode != "eval"
    return top_eigenvalues(
        subset,
        min(K, _num_params(problem)),
        settings.level.tol,
        "auto" if few else "guided",
        generator=settings.generator,
        progress=progress,
        certify=settings.level.certify,
        population=subset is not problem,
        journal=journal,
        **settings.dtype_and_device,
    )


def trace(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> TraceResult:
    """The trace of the Hessian of the training loss, with its error over examples where it is not on all of them."""
    subset, n = sampled(problem, settings.level.density_examples, settings.seed), _num_params(problem)
    probes, population = min(settings.level.trace_probes, n), subset is not problem
    return trace_of(subset, probes, settings.generator, progress, population=population, **settings.dtype_and_device)


def density(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> DensityResult:
    """The spectral density of the training loss."""
    subset, n = sampled(problem, settings.level.density_examples, settings.seed), _num_params(problem)
    return spectral_density(
        subset,
        min(settings.level.probes, n),
        settings.level.steps,
        settings.generator,
        progress,
        **settings.dtype_and_device,
    )


def sharpness(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> SharpnessResult:
    """m-sharpness against m."""
    subset = sampled(problem, settings.level.sharpness_examples, settings.seed)
    count = count_examples(subset.data)
    sizes = [m for m in M_VALUES if count is None or m <= count]
    return measure_sharpness(
        subset, ("m-sharpness",), settings.generator, progress, m=sizes, rho=settings.rho, **settings.dtype_and_device
    )


def line(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> SliceResult:
    """Loss and accuracy along random, filter-normalised lines, on train and test."""
    level = settings.level
    directions = [
        random_directions(problem, 1, torch.Generator().manual_seed(settings.seed + i))[0] for i in range(level.seeds)
    ]
    return loss_slice(
        sampled(problem, level.slice_examples, settings.seed),
        directions,
        level.line_points,
        progress=progress,
        also=_test_data(problem, settings),
        batchnorm=_batchnorm_statistics(problem),
        journal=journal,
        **settings.dtype_and_device,
    )


def surface(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> SliceResult:
    """The training loss over a random, filter-normalised plane, from -1 to 1 for all."""
    return loss_surface(
        sampled(problem, settings.level.surface_examples, settings.seed),
        random_directions(problem, 2, settings.generator),
        settings.level.surface_points,
        progress=progress,
        batchnorm=_batchnorm_statistics(problem),
        journal=journal,
        **settings.dtype_and_device,
    )


Step = Callable[[Problem, Settings, PathLike, Progress], Any]

# By the keys of ANALYSES: what the analysis is called while it is at work, and the function that makes it, which may
# keep a journal.
STEPS: dict[str, tuple[str, Step]] = {
    "eigen": ("lambda_max", eigen),
    "trace": ("trace", trace),
    "density": ("density", density),
    "sharpness": ("m-sharpness", sharpness),
    "line": ("lines", line),
    "surface": ("surface", surface),
}


def interpolation(name: str, other: Problem) -> Step:
    """The step that measures loss and accuracy on the straight line to ``other``, on train and test.

    Raises: ProblemError where the architectures differ.
    """

    def measure(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> SliceResult:
        return loss_slice(
            sampled(problem, settings.level.slice_examples, settings.seed),
            [towards(problem, other, name)],
            settings.level.between_points,
            INTERPOLATION_RANGE,
            progress,
            also=_test_data(problem, settings),
            batchnorm=_batchnorm_statistics(problem),
            marks={name: other},
            journal=journal,
            **settings.dtype_and_device,
        )

    return measure


def _test_data(problem: Problem, settings: Settings) -> dict[str, Any]:
    """As many test examples as training ones, where there are any."""
    if settings.test is None:
        return {}
    return {"test": sampled(replace(problem, data=settings.test), settings.level.slice_examples, settings.seed).data}


def _batchnorm_statistics(problem: Problem) -> str:
    """BatchNorm's statistics anew at each point: those of the centre are another network's away from it."""
    return "recalibrate" if problem.mode == "eval" and running_norms(problem.model) else "frozen"


def _num_params(problem: Problem) -> int:
    return sum(weight.numel() for weight in select(problem.model, problem.params).values())


def performance(
    problem: Problem, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Performance:
    """``L(w)`` and the share of right answers, None for a loss without labels; cost, a forward pass.

    The model and all random states are left bit for bit as they were.

    Raises: ProblemError, DataError, AuditError.
    """
    m = Measurement(problem, dtype=dtype, device=device, audited=False, products=False)
    with m:
        evaluation = Evaluation(m.objective, default_micro_batch(m.objective))
        loss, accuracy = evaluation()
    return Performance(loss, None if math.isnan(accuracy) else accuracy, evaluation.examples, evaluation.answers)


def sampled(problem: Problem, examples: int | None, seed: int) -> Problem:
    """``problem`` on ``examples`` of its examples, drawn without replacement, the same from the same seed.

    On all of them where there are no more, or where they cannot be counted.
    """
    count = count_examples(problem.data)
    if examples is None or count is None or examples >= count:
        return problem
    provenance = {"split_examples": count, **problem.provenance, "examples_seed": seed}
    return replace(problem, data=random_subset(problem.data, examples, seed), provenance=provenance)
