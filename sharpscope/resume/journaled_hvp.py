"""Hessian-vector products through a journal: a resumed run repeats no finished pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import Point
from sharpscope.resume.journal import Entry, Journal

# The counters of the cost that are stored with a step.
COUNTERS = ("passes", "hvps", "example_gradients", "seconds")


def journaled_hvp(objective: Objective, journal: Journal, progress: Progress) -> Callable[[Tensor], Tensor]:
    """``objective.products`` that reads finished passes from ``journal``, with their loss, gradient and cost.

    The micro-batch is settled first, and stored: the last bits depend on it.
    """
    settled = journal.once("micro-batch", lambda: _settled(objective))
    objective.micro_batch = settled["size"]

    def products(rows: Tensor) -> Tensor:
        before = journal.replayed
        entry = once_charged(objective, journal, "pass", lambda: _pass(objective, rows, progress), given=[rows])
        if journal.replayed > before:
            _restore(objective, entry)
            progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)
        images: Tensor = entry["products"]
        return images

    return products


def once_charged(
    objective: Objective,
    journal: Journal,
    label: str,
    compute: Callable[[], Mapping[str, Any]],
    *,
    given: Sequence[Any] = (),
) -> Entry:
    """``journal.once``, where a stored step leaves the cost as it was after it was computed."""

    def charged() -> Entry:
        values = compute()
        return {**values, "cost": {name: getattr(objective.meter, name) for name in COUNTERS}}

    before = journal.replayed
    entry = journal.once(label, charged, given=given)
    if journal.replayed > before:
        objective.meter.recall(**entry["cost"])
    return entry


def _settled(objective: Objective) -> Entry:
    objective.settle_micro_batch()
    return {"size": objective.micro_batch}


def _pass(objective: Objective, rows: Tensor, progress: Progress) -> Entry:
    """One pass over the data: the products, and what it leaves in ``objective``."""
    products = objective.products(rows, progress)
    return {"products": products, **vars(objective.point), "micro_batch": objective.micro_batch}


def _restore(objective: Objective, entry: Entry) -> None:
    """Leave ``objective`` as the stored pass left it."""
    objective.point = Point(entry["loss"], entry["gradient"], entry["spread"], entry["examples"])
    objective.num_examples, objective.terms.checked = entry["examples"], True
    objective.micro_batch = entry["micro_batch"]
