"""Hessian-vector products through a journal: a resumed run repeats no finished pass over the data."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import Point
from sharpscope.resume.fingerprint import key_of
from sharpscope.resume.journal import Entry, Journal

# The counters of the cost that are stored with a pass.
COUNTERS = ("passes", "hvps", "example_gradients", "seconds")


def open_journal(path: str | os.PathLike[str] | None, objective: Objective, **settings: Any) -> Journal:
    """The journal at ``path`` for this measurement; None stores nothing. Cost: as ``key_of``."""
    return Journal(None) if path is None else Journal(path, key_of(objective, **settings))


def journaled_hvp(objective: Objective, journal: Journal, progress: Progress | None) -> Callable[[Tensor], Tensor]:
    """``objective.products`` that reads finished passes from ``journal``, with their loss, gradient and cost.

    The micro-batch is settled first, and stored: the
    last bits depend on it.
    """
    settled = journal.once("micro-batch", lambda: _settled(objective))
    objective.micro_batch = settled["size"]

    def products(rows: Tensor) -> Tensor:
        before = journal.replayed
        entry = journal.once("pass", lambda: _pass(objective, rows, progress), given=[rows])
        if journal.replayed > before:
            _restore(objective, entry)
            if progress is not None:
                progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)
        images: Tensor = entry["products"]
        return images

    return products


def _settled(objective: Objective) -> Entry:
    objective.settle_micro_batch()
    return {"size": objective.micro_batch}


def _pass(objective: Objective, rows: Tensor, progress: Progress | None) -> Entry:
    """One pass over the data: the products, and what it leaves in ``objective``."""
    products = objective.products(rows, progress)
    cost = {name: getattr(objective.meter, name) for name in COUNTERS}
    return {"products": products, **vars(objective.point), "micro_batch": objective.micro_batch, "cost": cost}


def _restore(objective: Objective, entry: Entry) -> None:
    """Leave ``objective`` as the stored pass left it."""
    objective.point = Point(entry["loss"], entry["gradient"], entry["spread"], entry["examples"])
    objective.num_examples, objective.terms.checked = entry["examples"], True
    objective.micro_batch = entry["micro_batch"]
    objective.meter.recall(**entry["cost"])
