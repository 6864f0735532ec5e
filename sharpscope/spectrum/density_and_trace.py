"""Spectral density, trace and Frobenius norm of a problem's Hessian, each with its error."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.quadrature import Quadrature, lanczos_quadrature_rows, require_probes
from sharpscope.linalg.ritz import residual_vectors
from sharpscope.linalg.trace_and_frobenius import TraceEstimate, trace_and_frobenius_rows, trace_from_images
from sharpscope.linalg.vectors_as_rows import inner, norms, project_out, rounding_error
from sharpscope.measurement import Measurement
from sharpscope.objective import Progress
from sharpscope.objective.accumulate import PerBatch
from sharpscope.problem import Problem
from sharpscope.results import DensityResult, EigenResult, Estimate, TraceResult
from sharpscope.results.measured_alike import another_matrix
from sharpscope.sampling.sampling_error import sampling_units, trace_error


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
    journal: str | os.PathLike[str] | None = None,
) -> TraceResult:
    """``tr H`` and ``||H||_F`` of the Hessian of L(w), each with its standard error, by XTrace.

    The audit runs first.

    Args: as ``spectral_density``; ``population``: the data are a random sample of more, and the trace has a standard
    error over examples too, ``sharpscope.sampling.trace_error``. Cost: ``2 (1 + 2 probes)`` gradients in two passes.
    With at most ``2 probes`` parameters both are exact, and the result says so (``exact``).

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
    computation: dict[str, Any] = {"dtype": dtype, "device": device, "micro_batch": micro_batch}
    settings = {"probes": probes, "population": population}
    m = Measurement(
        problem, generator, progress, "trace", operator=operator, journal=journal, settings=settings, **computation
    )
    require_probes(m.num_params, probes)
    m.status = " of 2"
    per_batch: list[PerBatch] = []

    def products(rows: Tensor) -> Tensor:
        """The products; those with the probes, which come first, batch by batch where the population is asked for."""
        if not population or per_batch:
            return m.products(rows)
        with sampling_units(m.objective, m.report):
            images, found = m.objective.products_per_batch(rows, m.report)
        per_batch.append(found)
        return images

    with m:
        sums = trace_and_frobenius_rows(products, m.objective.empty_block(), probes, generator=m.generator)
    return TraceResult(
        trace=Estimate(sums.trace, sums.trace_error),
        frobenius=frobenius_norm(sums),
        sampling_error=trace_error(per_batch[0], m.num_params) if per_batch else None,
        exact=sums.exact,
        **m.outcome(),
        provenance=m.provenance(probes=probes, method="xtrace", operator=operator, population=population),
    )


def frobenius_norm(sums: TraceEstimate) -> Estimate:
    """``||H||_F`` from its square, with the standard error to first order."""
    value = math.sqrt(max(sums.squared, 0.0))
    return Estimate(value, sums.squared_error / (2 * value) if value else 0.0)


# Largest residual ||Hv - (v'Hv) v|| of a deflated eigenvector, relative to the largest deflated eigenvalue. Its effect
# on the density is of second order.
MAX_KNOWN_RESIDUAL = 0.05

# Largest such effect, ||Hv - (v'Hv) v||^2 / |v'Hv|, relative to the largest eigenvalue that is left.
MAX_KNOWN_EFFECT = 0.1


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
    journal: str | os.PathLike[str] | None = None,
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
        known: d eigenpairs of the same problem and operator, measured with vectors=True, to be taken out and put back
            exactly: the rest is then resolved on its own scale, at one more pass of 1 + 2d gradients. Refused if their
            provenance, the loss at the weights or the residuals show another matrix, or where their errors show in the
            rest.
        dtype: torch.float32 or torch.float64; by default the parameters' own, at least float32.
        device: where to compute; by default where the parameters are.
        micro_batch: examples a graph; "loader" keeps the loader's batches; by default chosen by measuring.
        journal: folder for finished passes; the same call after a kill resumes from them, to the same bits. Delete it
            when the result is safe.

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
    computation: dict[str, Any] = {"dtype": dtype, "device": device, "micro_batch": micro_batch}
    settings = {"probes": probes, "steps": steps}
    m = Measurement(
        problem, generator, progress, "density", operator=operator, journal=journal, settings=settings, **computation
    )
    n, like = m.num_params, m.objective.empty_block()
    require_probes(n, probes, steps)
    _require_vectors(known, n)
    if known is not None:
        _require_same_matrix(known, m.provenance(operator=operator))
    m.status = f" of {min(steps, n) + 1 + (known is not None)}"
    with m:
        pairs, effect = (None, 0.0) if known is None else _known_pairs(known, m, operator)
        quadrature = lanczos_quadrature_rows(m.products, like, probes, steps, known=pairs, generator=m.generator)
        _require_small_effect(effect, quadrature, pairs)
        sums = trace_from_images(m.products, quadrature.probes, quadrature.images, known=pairs, generator=m.generator)
    num_known = 0 if pairs is None else len(pairs[0])
    steps_taken = quadrature.nodes.shape[1] - num_known
    return DensityResult(
        nodes=quadrature.nodes.numpy(),
        weights=quadrature.weights.numpy(),
        num_known=num_known,
        trace=Estimate(sums.trace, sums.trace_error),
        frobenius=frobenius_norm(sums),
        exact=sums.exact,
        **m.outcome(),
        provenance=m.provenance(probes=probes, steps=steps_taken, method="slq", operator=operator),
    )


def _known_pairs(known: EigenResult, m: Measurement, operator: str) -> tuple[tuple[Tensor, Tensor], float]:
    """Eigenvalues (d,) and eigenvectors as rows (d, n) of ``known``, checked by a product with each.

    Also their effect on what is left: taking v out adds up to ``||(I - P) H v||^2 / |v'Hv|`` to another eigenvalue.
    """
    assert known.eigenvectors is not None
    vectors = torch.from_numpy(np.array(known.eigenvectors.T)).to(m.objective.empty_block())
    images = m.products(vectors)
    _require_same_matrix(known, m.provenance(operator=operator), m.objective.loss)
    values = inner(vectors, images).diagonal()
    lengths = norms(residual_vectors(values, vectors, images))
    residual, largest = float(lengths.max()), float(values.abs().max())
    if residual > MAX_KNOWN_RESIDUAL * largest:
        raise ArgumentError(
            f"Known eigenvectors must be those of this problem, but ||Hv - lambda v|| is {residual:.2g} at a largest "
            f"eigenvalue of {largest:.2g}. Measure them at these weights, on these data."
        )
    outside = norms(project_out(images, vectors)[0])
    effect = outside * (outside / values.abs().clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
    return (values, vectors), float(effect.max())


def _require_small_effect(effect: float, quadrature: Quadrature, known: tuple[Tensor, Tensor] | None) -> None:
    """Raise ArgumentError where the error of the known eigenvectors shows in the density of the rest."""
    if known is None:
        return
    left = float(quadrature.nodes[:, len(known[0]) :].abs().max())
    noise = rounding_error(float(known[0].abs().max()), known[1].dtype)
    if effect > MAX_KNOWN_EFFECT * left + noise:
        raise ArgumentError(
            f"Known eigenvectors must be accurate enough for what they leave, but they move eigenvalues of the rest, "
            f"which are up to {left:.2g}, by up to {effect:.2g}. Measure them with a smaller tol (--tol)."
        )


def _require_same_matrix(known: EigenResult, provenance: Mapping[str, Any], loss: float | None = None) -> None:
    """Raise ArgumentError where the eigenpairs are of another matrix, as far as provenance and loss show."""
    differ = another_matrix(known, provenance, loss)
    if differ is not None:
        raise ArgumentError(f"Known eigenpairs must be of this problem, but {differ}. Measure both alike.")


def _require_vectors(known: EigenResult | None, n: int) -> None:
    """Raise ArgumentError where known eigenvalues lack vectors of length n."""
    if known is None:
        return
    if known.eigenvectors is None:
        raise ArgumentError("Known eigenvalues must come with vectors. Measure them with vectors=True (--vectors).")
    if known.eigenvectors.shape[0] != n:
        raise ArgumentError(
            f"Known eigenvectors must be as long as there are parameters ({n}), got {known.eigenvectors.shape[0]}. "
            "Measure the same parameters."
        )
