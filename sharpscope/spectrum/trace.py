"""Trace and Frobenius norm of a problem's Hessian, each with its standard error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sharpscope.linalg.quadrature import require_probes
from sharpscope.linalg.trace import TraceEstimate, trace_and_frobenius_rows
from sharpscope.measurement import Measurement
from sharpscope.objective import Progress
from sharpscope.objective.accumulate import PerBatch
from sharpscope.problem import Problem
from sharpscope.results import Estimate, TraceResult
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
    m = Measurement(
        problem, generator, progress, operator=operator, dtype=dtype, device=device, micro_batch=micro_batch
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
        **m.outcome(),
        provenance=m.provenance(probes=probes, method="xtrace", operator=operator, population=population),
    )


def frobenius_norm(sums: TraceEstimate) -> Estimate:
    """``||H||_F`` from its square, with the standard error to first order."""
    value = math.sqrt(max(sums.squared, 0.0))
    return Estimate(value, sums.squared_error / (2 * value) if value else 0.0)
