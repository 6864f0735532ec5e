"""lambda_max and trace of each diagonal block of a problem's Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sharpscope.errors import ConvergenceWarning
from sharpscope.linalg.diagonal_blocks import diagonal_blocks
from sharpscope.linalg.quadrature import require_probes
from sharpscope.linalg.top_eigenpairs import require_arguments
from sharpscope.measurement import Measurement
from sharpscope.objective import Progress
from sharpscope.operators.blockwise import blockwise, parameter_blocks
from sharpscope.problem import Problem
from sharpscope.results import BlockResult
from sharpscope.weights.parameters import select


def block_spectra(
    problem: Problem,
    by: str = "module",
    tol: float = 1e-3,
    probes: int = 8,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    operator: str = "hessian",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | str | None = None,
    max_passes: int | None = None,
) -> BlockResult:
    """``lambda_max(H_ll)`` and ``tr H_ll`` of each diagonal block of the Hessian of L(w), and its share of ``tr H``.

    The audit runs first, once; then one Lanczos run and one XTrace for each block, all in the same passes over the
    data; what is finished drops out. The trace of a block of at most ``2 probes`` parameters is exact to rounding.
    ``lambda_max(H)`` is at least the largest ``lambda_max(H_ll)``, and may be far above.

    Args:
        problem: model, loss and data.
        by: "module", all parameters that one module holds itself, named as in ``model.named_modules()``; or
            "parameter", one tensor. A tied parameter belongs to the first of its names, and is counted there only.
        tol: relative tolerance of each lambda_max.
        probes: random vectors a block for its trace.
        generator: source of starts and probes; by default one seeded with 0.
        progress: called as ``progress(stage, done, total)`` in examples; total is None until the first pass has ended.
        operator: "hessian", "ggn", "fisher", "empirical-fisher" (per loss term) or "finite-difference".
        dtype: torch.float32 or torch.float64; by default the parameters' own, at least float32.
        device: where to compute; by default where the parameters are.
        micro_batch: examples a graph; "loader" keeps the loader's batches; by default chosen by measuring.
        max_passes: passes over the data after which the solver gives up.

    Cost: with L blocks ``1 + 2 L (probes + 2)`` gradients for each of two passes, then ``1 + 4 L'`` a pass, L' the
    blocks not yet done; 6 to 8 passes at tol 1e-3 on the bundled models. ``blockwise`` says by how much that overstates
    the work. Memory: about ``20 + 8 probes`` vectors of all parameters.

    Raises: ArgumentError, ProblemError, DataError, AuditError.

    >>> import sharpscope
    >>> import torch
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> problem = sharpscope.Problem(model=torch.nn.Linear(3, 1), loss=torch.nn.MSELoss(), data=data)
    >>> blocks = sharpscope.block_spectra(problem, by="parameter")  # 2/3 X'X and 2
    >>> dict(zip(blocks.names, blocks.lambda_max.round(2).tolist()))
    {'weight': 6.0, 'bias': 2.0}
    >>> blocks.traces.round(2)  # 2/3 (9 + 4 + 1) and 2
    array([9.33, 2.  ])
    """
    m = Measurement(
        problem,
        generator,
        progress,
        "blocks",
        operator=operator,
        dtype=dtype,
        device=device,
        micro_batch=micro_batch,
    )
    objective, matrix = m.objective, m.objective.curvature
    blocks = parameter_blocks(select(problem.model, problem.params), by)
    require_arguments(m.num_params, 1, tol, "lanczos", max_passes)
    require_probes(max(m.num_params, 2), probes if probes < 2 else 2)
    likes = [objective.empty_block()[:, one.entries] for one in blocks]

    def products(asked: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The products of each block that asks with its own vectors, as rows, in one pass."""
        counts = [len(asked[i]) if i in asked else 0 for i in range(len(blocks))]
        packed = torch.zeros(max(counts), m.num_params, dtype=objective.dtype, device=objective.device)
        for i, rows in asked.items():
            packed[: counts[i], blocks[i].entries] = rows
        m.status = f", {len(asked)} of {len(blocks)} blocks"
        objective.curvature = blockwise(matrix, blocks, counts)
        images = m.products(packed)
        # A product with a vector of one block counts as one, where the pass has counted rows.
        objective.cost_counter.hvps += sum(counts) - max(counts)
        return {i: images[: counts[i], blocks[i].entries].contiguous() for i in asked}

    with m:
        found = diagonal_blocks(products, likes, tol=tol, probes=probes, max_products=max_passes, generator=m.generator)
    missing = [one.name for one, its in zip(blocks, found, strict=True) if not its.converged]
    if missing:
        warnings.warn(m.unconverged(f"lambda_max of {', '.join(missing)} has", tol), ConvergenceWarning, stacklevel=2)
    return BlockResult(
        names=tuple(one.name for one in blocks),
        sizes=np.array([one.size for one in blocks]),
        lambda_max=np.array([its.lambda_max for its in found]),
        residuals=np.array([its.residual for its in found]),
        lower=np.array([its.lambda_max - its.bound for its in found]),
        upper=np.array([its.lambda_max + its.bound for its in found]),
        converged=np.array([its.converged for its in found]),
        traces=np.array([its.trace for its in found]),
        trace_errors=np.array([its.trace_error for its in found]),
        **m.outcome(),
        provenance=m.provenance(operator=operator, by=by, tol=tol, probes=probes),
    )
