"""Hessian-vector products through a journal: a resumed run repeats no finished pass over the data."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import Point
from sharpscope.resume.journal import Entry, Journal

# The counters of the cost that are stored with a pass.
COUNTERS = ("passes", "hvps", "example_gradients", "seconds")


def journaled_hvp(objective: Objective, journal: Journal, progress: Progress) -> Callable[[Tensor], Tensor]:
    """``objective.products`` that reads finished passes from ``journal``, with their loss, gradient and cost.

    The micro-batch is settled first, and stored: the last bits depend on it.
    """
    settled = journal.once("micro-batch", lambda: _settled(objective))
    objective.micro_batch = settled["size"]

    def products(rows: Tensor) -> Tensor:
        before = journal.replayed
        entry = journal.once("pass", lambda: _pass(objective, rows, progress), given=[rows])
        if journal.replayed > before:
            _restore(objective, entry)
            progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)
        images: Tensor = entry["products"]
        return images

    return products


def _settled(objective: Objective) -> Entry:
    objective.settle_micro_batch()
    return {"size": objective.micro_batch}


def _pass(objective: Objective, rows: Tensor, progress: Progress) -> Entry:
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
