"""What a result says of what was measured, at what cost, and where it came from, whatever the analysis."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import scipy
import torch

from sharpscope.objective import Objective
from sharpscope.problem import Problem
from sharpscope.results import Cost
from sharpscope.version import __version__


def seeded(generator: torch.Generator | None) -> tuple[torch.Generator, int | None]:
    """``generator``, or one seeded with 0, and the seed that repeats the run; None where it has been drawn from."""
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    seed = source.initial_seed()
    # A generator that has been drawn from does not start where its seed says, so the seed would not repeat the run.
    fresh = torch.equal(source.get_state(), torch.Generator().manual_seed(seed).get_state())
    return source, seed if fresh else None


def measured(objective: Objective) -> dict[str, Any]:
    """``loss``, ``gradient_norm`` and ``cost`` after at least one full pass, as every result has them."""
    assert objective.loss is not None
    assert objective.gradient is not None
    return {
        "loss": objective.loss,
        "gradient_norm": float(torch.linalg.vector_norm(objective.gradient)),
        "cost": Cost(objective.passes, objective.hvps, objective.gradients, objective.seconds),
    }


def provenance(problem: Problem, objective: Objective, seed: int | None, **settings: Any) -> dict[str, Any]:
    """What ``problem`` brings, what ``objective`` measured on and how, the analysis's ``settings``, and versions.

    To be asked after the measurement, which settles the number of examples and the micro-batch.
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
        "device": str(objective.device),
        "mode": problem.mode,
        "batchnorm": objective.batchnorm,
        "micro_batch": objective.micro_batch,
        "lanes": objective.lanes,
        "seed": seed,
        "versions": {
            "sharpscope": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
    }
