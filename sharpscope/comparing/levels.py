"""How much of each analysis a comparison pays for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from sharpscope.errors import ArgumentError, nearest

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
