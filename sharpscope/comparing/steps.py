"""The analyses of a comparison, one step each, and how much of each is paid for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from sharpscope.errors import ArgumentError, nearest
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

K = 5
CHANGED = ", changed"


@dataclass(frozen=True, kw_only=True)
class Level:
    """Examples, points and probes of every part; None examples are all there are.

    ``dataclasses.replace(sharpscope.comparing.LEVELS["quick"], seeds=1)`` is "quick, changed".

    Attributes:
        name: by which a comparison says what was paid for; that of one of LEVELS only where it is just that.
        performance_examples: for loss and accuracy, of each split.
        eigen_examples, tol, certify: of the K largest eigenvalues, see ``top_eigenvalues``.
        density_examples, probes, steps: of the spectral density.
        trace_probes: of the trace, on as many examples.
        sharpness_examples: for m-sharpness.
        slice_examples: of each split, for lines and for the way between minima.
        seeds, line_points: random lines, and points of each.
        between_points: from -0.2 to 1.2, so that both ends are on the grid where 0.2 is a multiple of their distance.
        surface_examples, surface_points: of the training data, and of each axis.
    """

    name: str
    performance_examples: int | None
    eigen_examples: int | None
    tol: float
    certify: float | None
    density_examples: int
    probes: int
    steps: int
    trace_probes: int
    sharpness_examples: int
    slice_examples: int
    seeds: int
    line_points: int
    between_points: int
    surface_examples: int
    surface_points: int

    def __post_init__(self) -> None:
        known = self.name.removesuffix(CHANGED)
        if known in LEVELS:
            own = {**vars(self), "name": ""} == {**vars(LEVELS[known]), "name": ""}
            object.__setattr__(self, "name", known if own else known + CHANGED)

    def within(self, examples: int | None) -> Level:
        """The same on at most so many examples; all where that is None.

        Raises: ArgumentError unless it is positive.
        """
        if examples is None:
            return self
        if examples < 1:
            raise ArgumentError(f"examples must be at least 1, got {examples}.")
        counts = [field.name for field in fields(self) if field.name.endswith("_examples")]
        fewer: dict[str, Any] = {name: min(examples, getattr(self, name) or examples) for name in counts}
        return replace(self, **fewer)


LEVELS: dict[str, Level] = {}  # each is held to what the name already stands for

# Measured on one core of a machine with three times as much to do as it has cores, on the cnn of 52,138 parameters and
# Fashion-MNIST: 13,000 examples a second, whether for a gradient, a product or a forward pass at a point. In seconds of
# that core for each checkpoint:
LEVELS |= {
    # 36 in all. Eigenvalues 9: their sampling error is some 10 to 20 %, beside which a numerical one of 1e-2 does not
    # show. Density 8, trace 6, lines 4, surface 4, m-sharpness 3, loss and accuracy 2.
    "quick": Level(
        name="quick",
        performance_examples=10_000,
        eigen_examples=2000,
        tol=1e-2,
        certify=None,
        density_examples=1000,
        probes=5,
        steps=8,
        trace_probes=16,
        sharpness_examples=1024,
        slice_examples=1000,
        seeds=3,
        line_points=9,
        between_points=15,
        surface_examples=1000,
        surface_points=7,
    ),
    # 200 in all, two thirds of them for the eigenvalues of all 60,000 images, a fifth for the density.
    "default": Level(
        name="default",
        performance_examples=None,
        eigen_examples=None,
        tol=1e-3,
        certify=None,
        density_examples=2000,
        probes=7,
        steps=16,
        trace_probes=24,
        sharpness_examples=4096,
        slice_examples=2000,
        seeds=3,
        line_points=15,
        between_points=29,
        surface_examples=1000,
        surface_points=15,
    ),
    # 1,500 by count, not measured: eigenvalues with their certificate 400, density 450, surface 300, lines 250.
    "thorough": Level(
        name="thorough",
        performance_examples=None,
        eigen_examples=None,
        tol=1e-4,
        certify=0.1,
        density_examples=8000,
        probes=8,
        steps=40,
        trace_probes=48,
        sharpness_examples=16_384,
        slice_examples=10_000,
        seeds=5,
        line_points=31,
        between_points=57,
        surface_examples=4000,
        surface_points=31,
    ),
}


def resolve_level(level: str | Level) -> Level:
    """The level of that name, or the one given.

    Raises: ArgumentError when there is none.
    """
    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise ArgumentError(nearest("level", level, LEVELS))
    return LEVELS[level]


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
    return trace_of(
        subset,
        probes,
        settings.generator,
        progress,
        population=population,
        journal=journal,
        **settings.dtype_and_device,
    )


def density(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> DensityResult:
    """The spectral density of the training loss."""
    subset, n = sampled(problem, settings.level.density_examples, settings.seed), _num_params(problem)
    return spectral_density(
        subset,
        min(settings.level.probes, n),
        settings.level.steps,
        settings.generator,
        progress,
        journal=journal,
        **settings.dtype_and_device,
    )


def sharpness(problem: Problem, settings: Settings, journal: PathLike, progress: Progress) -> SharpnessResult:
    """m-sharpness against m."""
    subset = sampled(problem, settings.level.sharpness_examples, settings.seed)
    count = count_examples(subset.data)
    sizes = [m for m in M_VALUES if count is None or m <= count]
    return measure_sharpness(
        subset,
        ("m-sharpness",),
        settings.generator,
        progress,
        m=sizes,
        rho=settings.rho,
        journal=journal,
        **settings.dtype_and_device,
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
