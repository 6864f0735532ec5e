"""From a problem to the whole of its Hessian's spectrum, as far as random vectors show it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sharpscope.audit import audit
from sharpscope.errors import ArgumentError
from sharpscope.linalg.quadrature import lanczos_quadrature, require_probes
from sharpscope.linalg.trace import TraceEstimate, trace_and_frobenius, trace_from_images
from sharpscope.linalg.vectors import inner, norms
from sharpscope.objective import Objective, Progress
from sharpscope.objective.partwise import Partwise
from sharpscope.operators import curvature
from sharpscope.problem import Problem
from sharpscope.provenance import measured, provenance, seeded
from sharpscope.results import DensityResult, EigenResult, Estimate, TraceResult
from sharpscope.sampling import in_units, trace_error

# ||Hv - (v'Hv) v|| of an eigenvector that is taken out, in units of the largest eigenvalue taken out: what it is off
# by shows in the density at its square.
KNOWN_TO = 0.05


def spectral_density(
    problem: Problem,
    probes: int = 6,
    steps: int = 32,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    operator: str = "hessian",
    known: EigenResult | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | str | None = None,
) -> DensityResult:
    """``phi(t) = (1/n) sum_i delta(t - lambda_i)`` of the Hessian of L(w), by stochastic Lanczos quadrature.

    The audit runs first; then one Lanczos run for each of ``probes`` random vectors, all in the same passes over the
    data, and one more pass for trace and Frobenius norm by XTrace. The model and all random states are left bit for bit
    as they were.

    Args:
        problem: model, loss and data.
        probes: independent random vectors K; their scatter is the band and the standard errors.
        steps: of Lanczos; the curve's resolution is the spectrum's range over ``steps``.
        generator: source of the probes; by default one seeded with 0.
        progress: called as ``progress(stage, done, total)`` in examples; total is None until the first pass has ended.
        operator: "hessian", or another curvature matrix, as for ``top_eigenvalues``.
        known: d eigenpairs of the same problem, measured with vectors=True, to be taken out and put back exactly: the
            rest is then resolved on its own scale, at one more pass of 1 + 2d gradients.
        dtype: torch.float32 or torch.float64; by default the parameters' own, at least float32.
        device: where to compute; by default where the parameters are.
        micro_batch: examples a graph; "loader" keeps the loader's batches; by default chosen by measuring.

    Cost: ``(1 + 2 probes) (steps + 1)`` gradients in ``steps + 1`` passes; memory, ``probes * steps`` vectors.

    Raises: ArgumentError, ProblemError, DataError, AuditError.
    Source: Ghorbani, Krishnan and Xiao 2019, alg. 1 and 2; departures: full reorthogonalisation, the width follows from
    the steps, XTrace.

    >>> import sharpscope
    >>> import torch
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = 2 x x': 28, 0 and 0
    >>> data = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(1, 1)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> density = sharpscope.spectral_density(problem, probes=2)
    >>> round(float(density.nodes.max()), 3), round(density.mean.value, 3)
    (28.0, 9.333)
    """
    source, seed = seeded(generator)
    matrix = curvature(operator, source)
    objective = Objective(problem, dtype=dtype, device=device, micro_batch=micro_batch, curvature=matrix)
    n = objective.num_params
    require_probes(n, probes, steps)
    most = min(steps, n) + 1 + (known is not None)
    with objective.measuring():
        audit(objective, torch.Generator().manual_seed(source.initial_seed()))
        matmat = _products(objective, progress, most)
        pairs = None if known is None else _known(known, matmat, objective)
        quadrature = lanczos_quadrature(
            matmat, n, probes, steps, known=pairs, dtype=objective.dtype, device=objective.device, generator=source
        )
        sums = trace_from_images(matmat, quadrature.probes, quadrature.images, known=pairs, generator=source)
    num_known = 0 if pairs is None else len(pairs[0])
    return DensityResult(
        nodes=quadrature.nodes.numpy(),
        weights=quadrature.weights.numpy(),
        num_known=num_known,
        trace=Estimate(sums.trace, sums.trace_error),
        frobenius=_root(sums),
        **measured(objective),
        provenance=provenance(
            problem,
            objective,
            seed,
            probes=probes,
            steps=quadrature.nodes.shape[1] - num_known,
            method="slq",
            operator=matrix.name,
        ),
    )


def trace(
    problem: Problem,
    probes: int = 16,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    operator: str = "hessian",
    population: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | str | None = None,
) -> TraceResult:
    """``tr H`` and ``||H||_F`` of the Hessian of L(w), each with its standard error, by XTrace.

    The audit runs first.

    Args: as ``spectral_density``; ``population``: the data are a random sample of more, and the trace has a standard
    error over examples too, ``sharpscope.sampling.trace_error``. Cost: ``2 (1 + 2 probes)`` gradients in two passes.

    Raises: ArgumentError, ProblemError, DataError, AuditError.

    >>> import sharpscope
    >>> import torch
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = 2 x x': 28, 0 and 0
    >>> data = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(1, 1)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> result = sharpscope.trace(problem, probes=2)
    >>> round(result.trace.value, 3), round(result.frobenius.value, 3)
    (28.0, 28.0)
    """
    source, seed = seeded(generator)
    matrix = curvature(operator, source)
    objective = Objective(problem, dtype=dtype, device=device, micro_batch=micro_batch, curvature=matrix)
    n = objective.num_params
    require_probes(n, probes)
    with objective.measuring():
        audit(objective, torch.Generator().manual_seed(source.initial_seed()))
        products = _products(objective, progress, 2)
        parts: list[Partwise] = []

        def matmat(block: Tensor) -> Tensor:
            if not population or parts:
                return products(block)
            # The first block is of the probes.
            with in_units(objective, progress):
                images, found = objective.hvp_partwise(block, progress)
            parts.append(found)
            return images

        sums = trace_and_frobenius(
            matmat,
            n,
            probes,
            dtype=objective.dtype,
            device=objective.device,
            generator=source,
        )
    return TraceResult(
        trace=Estimate(sums.trace, sums.trace_error),
        frobenius=_root(sums),
        sampling_error=trace_error(parts[0], n) if parts else None,
        **measured(objective),
        provenance=provenance(
            problem,
            objective,
            seed,
            probes=probes,
            method="xtrace",
            operator=matrix.name,
            population=population,
        ),
    )


def _products(objective: Objective, progress: Progress | None, most: int) -> Callable[[Tensor], Tensor]:
    """The Hessian's products, with progress that says how many passes are still to come."""

    def stage(label: str, done: int, total: int | None) -> None:
        if progress is not None:
            progress(f"{label} of {most}", done, total)

    return lambda block: objective.hvp(block, stage)


def _known(known: EigenResult, matmat: Callable[[Tensor], Tensor], objective: Objective) -> tuple[Tensor, Tensor]:
    """The eigenpairs (d,), (n, d) that ``known`` holds, after a product that shows that they are this problem's."""
    if known.eigenvectors is None:
        raise ArgumentError("Known eigenvalues must come with vectors. Measure them with vectors=True (--vectors).")
    if known.eigenvectors.shape[0] != objective.num_params:
        raise ArgumentError(
            f"Known eigenvectors must be as long as there are parameters ({objective.num_params}), got "
            f"{known.eigenvectors.shape[0]}. Measure the same parameters."
        )
    vectors = torch.from_numpy(np.array(known.eigenvectors)).to(objective.device, objective.dtype)
    images = matmat(vectors)
    values = inner(vectors.T, images.T).diagonal()
    off, largest = float(norms((images - vectors * values.to(images)).T).max()), float(values.abs().max())
    if off > KNOWN_TO * largest:
        raise ArgumentError(
            f"Known eigenvectors must be those of this problem, but ||Hv - lambda v|| is {off:.2g} at a largest "
            f"eigenvalue of {largest:.2g}. Measure them at these weights, on these data."
        )
    return values, vectors


def _root(sums: TraceEstimate) -> Estimate:
    """``||H||_F`` from its square, with the standard error to first order."""
    value = math.sqrt(max(sums.squared, 0.0))
    return Estimate(value, sums.squared_error / (2 * value) if value else 0.0)
