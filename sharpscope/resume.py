"""A measurement's passes on disk, so that the same call after a kill repeats none that was finished."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpscope.fingerprint import fingerprint
from sharpscope.journal import Entry, Journal
from sharpscope.objective import Objective, Progress
from sharpscope.point import Point
from sharpscope.sums import Sums
from sharpscope.version import __version__


def open_journal(path: str | os.PathLike[str] | None, objective: Objective, **settings: Any) -> Journal:
    """The journal at ``path`` of just this measurement: weights, buffers, model, data, ``settings``, versions.

    What a model and a loss compute does not show in their names; ``resumable`` sees to that. None keeps no journal.
    Cost: one walk over the data, without the model.
    """
    if path is None:
        return Journal(None)
    problem = objective.problem
    state = {**problem.model.state_dict(), **dict(problem.model.named_parameters())}
    key = fingerprint(
        {name: value for name, value in state.items() if isinstance(value, Tensor)},
        [name for name, p in problem.model.named_parameters() if p.requires_grad],
        repr(problem.model),
        problem.data,
        [problem.params, problem.mode, float(problem.weight_decay)],
        [objective.curvature.name, objective.dtype, objective.device, objective.micro_batch],
        settings,
        [__version__, torch.__version__, torch.get_num_threads()],
    )
    return Journal(path, key)


def resumable(
    objective: Objective, journal: Journal, seen: Sums, progress: Progress | None
) -> Callable[[Tensor], Tensor]:
    """``objective.hvp`` that takes finished passes from the journal, with loss, gradient and cost as they were.

    ``seen`` is what the audit measured: loss, gradient and products of some examples, bit for bit, say that model and
    loss compute what they did. The micro-batch is settled first, and kept: the last bits depend on it.
    """
    journal.once("audit", dict, given=[seen.loss, seen.weight, seen.gradient, seen.products])
    objective.micro_batch = journal.once("micro-batch", lambda: {"size": _settled(objective)})["size"]

    def note() -> Entry:
        assert objective.point is not None
        point = {f.name: getattr(objective.point, f.name) for f in dataclasses.fields(Point)}
        return {
            **point,
            "micro_batch": objective.micro_batch,
            "passes": objective.meter.passes,
            "hvps": objective.meter.hvps,
            "example_gradients": objective.meter.example_gradients,
        }

    def recall(entry: Entry) -> None:
        objective.point = Point(**{f.name: entry[f.name] for f in dataclasses.fields(Point)})
        objective.num_examples, objective.terms.checked = objective.point.examples, True
        objective.micro_batch = entry["micro_batch"]
        meter = objective.meter
        meter.passes, meter.hvps = entry["passes"], entry["hvps"]
        meter.example_gradients = entry["example_gradients"]

    return journal.matmat(lambda block: objective.hvp(block, progress), "pass", note=note, recall=recall)


def _settled(objective: Objective) -> int | str | None:
    objective.settle_micro_batch()
    return objective.micro_batch
