"""The context of every analysis: seed, operator, objective, audit, journal, and the provenance of the result."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from sharpscope.atomic_io import locked
from sharpscope.fingerprint import key_of
from sharpscope.objective import Objective, Progress
from sharpscope.objective.audit import audit
from sharpscope.operators import curvature
from sharpscope.problem import Problem
from sharpscope.random_streams import stream, stream_from
from sharpscope.results import Cost
from sharpscope.resume import Journal, journaled_hvp
from sharpscope.version import __version__
from sharpscope.weights.norm_ball import norm_of


class Measurement:
    """One analysis of a problem, from its arguments to the fields that every result shares.

        m = Measurement(problem, generator, progress, "trace", operator=operator, dtype=dtype, device=device)
        ...                           # check arguments that depend on m.num_params
        with m:                       # measuring mode; the audit; the journal; the micro-batch
            images = m.products(rows)
        return Result(..., **m.outcome(), provenance=m.provenance(k=k))

    What guards a whole pass over the data is put together here: progress, and the journal. What guards the graph of one
    micro-batch is in ``sharpscope.objective.cost_and_out_of_memory``.

    Args:
        problem: model, loss and data.
        generator: source of all random numbers; by default one seeded with 0.
        progress: called as ``progress(stage, done, total)`` in examples.
        purpose: names the stream of random numbers.
        operator: the name of the curvature matrix.
        dtype, device, micro_batch: as for ``Objective``.
        audited: run the audit on entering.
        products: False for forward passes alone: no kernels for second derivatives, and no micro-batch for products.
        journal: a folder for finished passes, or None.
        settings: what decides the passes next to the problem and the objective; part of the journal's key.

    Attributes:
        objective: loss, gradient and products.
        generator: the stream of this purpose, from the generator given or the default.
        seed: that repeats the measurement; None where the generator was drawn from before.
        journal: of finished steps; stores nothing without a folder.
        status: appended to each stage that is reported.
    """

    def __init__(
        self,
        problem: Problem,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        purpose: str = "measurement",
        *,
        operator: str = "hessian",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        micro_batch: int | str | None = None,
        audited: bool = True,
        products: bool = True,
        journal: str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.problem = problem
        self.generator, self.seed = seeded(generator, purpose)
        self.objective = Objective(
            problem,
            dtype=dtype,
            device=device,
            micro_batch=micro_batch,
            curvature=curvature(operator, self.generator),
        )
        self.journal = Journal(None)
        self.status = ""
        self._progress, self._audited, self._products = progress, audited, products
        self._folder, self._settings = journal, dict(settings or {})
        self._pass: Callable[[Tensor], Tensor] = lambda rows: self.objective.products(rows, self.report)
        self._stack = ExitStack()

    @property
    def num_params(self) -> int:
        """The order n of the matrix."""
        return self.objective.num_params

    def __enter__(self) -> Measurement:
        with ExitStack() as stack:
            if self._folder is not None:
                stack.enter_context(locked(self._folder))
                # Before any forward pass: what a model leaves in its buffers must not change the key.
                key = key_of(self.objective, **self._settings, seed=self.generator.get_state())
                self.journal = Journal(self._folder, key)
            stack.enter_context(self.objective.measuring(products=self._products))
            if self._audited:
                # A generator of its own, so that the analysis draws the same numbers with and without it.
                audit(self.objective, stream(self.generator.initial_seed(), "audit"))
            if self._folder is not None:
                self._pass = journaled_hvp(self.objective, self.journal, self.report)
            elif self._products:
                self.objective.choose_micro_batch()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def products(self, rows: Tensor) -> Tensor:
        """The matrix times each row of ``rows`` (K, n), as (K, n); cost ``1 + 2K`` gradients, one pass."""
        return self._pass(rows)

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Tell the caller's ``progress`` of a stage, followed by ``status``."""
        if self._progress is not None:
            self._progress(f"{stage}{self.status}", done, total)

    def outcome(self) -> dict[str, Any]:
        """``loss``, ``gradient_norm`` and ``cost`` of a result, after at least one pass."""
        objective = self.objective
        assert objective.loss is not None
        assert objective.gradient is not None
        return {
            "loss": objective.loss,
            "gradient_norm": norm_of([objective.gradient]),
            "cost": Cost(objective.passes, objective.hvps, objective.gradients, objective.seconds),
        }

    def unconverged(self, what: str, tol: float) -> str:
        """A warning of ``what``, as "Eigenvalues [4, 5] have" or "lambda_max of fc has", with what helps here."""
        lift = ", or pass dtype=torch.float64" if self.objective.dtype == torch.float32 else ""
        passes = self.objective.passes
        return f"{what} not converged to tol={tol:g} in {passes} passes. Raise max_passes or tol{lift}."

    def provenance(self, **settings: Any) -> dict[str, Any]:
        """The provenance of a result, to be asked for after the measurement; ``settings`` of the analysis included."""
        return provenance(self.problem, self.objective, self.seed, **settings)


def seeded(generator: torch.Generator | None, purpose: str) -> tuple[torch.Generator, int | None]:
    """The stream of a purpose from ``generator``, and the seed that repeats the run; None where it has been drawn from.

    Without ``generator`` the seed is 0.
    """
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    seed = source.initial_seed()
    # A generator that has been drawn from does not start where its seed says, so the seed would not repeat the run.
    fresh = torch.equal(source.get_state(), torch.Generator().manual_seed(seed).get_state())
    return stream_from(source, purpose), seed if fresh else None


def provenance(problem: Problem, objective: Objective, seed: int | None, **settings: Any) -> dict[str, Any]:
    """What ``problem`` brings, what ``objective`` measured on and how, the analysis's ``settings``, and versions.

    To be asked for after the measurement, which settles the number of examples and the micro-batch.
    """
    given = dict(problem.provenance)
    return {
        "checkpoint": given.pop("checkpoint", None),
        "sha256": given.pop("sha256", None),
        **given,
        "num_params": objective.num_params,
        "params": problem.params if isinstance(problem.params, str) else list(problem.params),
        "num_examples": objective.num_examples,
        "loss_function": objective.loss_name,
        "weight_decay": problem.weight_decay,
        **settings,
        "dtype": str(objective.dtype).removeprefix("torch."),
        "tf32": False,  # off within Objective.measuring()
        "device": str(objective.device),
        "mode": problem.mode,
        "batchnorm": objective.batchnorm,
        "micro_batch": objective.micro_batch,
        "seed": seed,
        "versions": {
            "sharpscope": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
    }
