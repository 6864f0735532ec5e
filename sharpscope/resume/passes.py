"""A measurement's passes on disk, so that the same call after a kill repeats none that was finished."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import Point, Sums
from sharpscope.resume.fingerprint import fingerprint
from sharpscope.resume.journal import Entry, Journal
from sharpscope.version import __version__

# What of the bill is kept with a pass.
BILL = ("passes", "hvps", "example_gradients", "seconds")


def open_journal(path: str | os.PathLike[str] | None, objective: Objective, **settings: Any) -> Journal:
    """The journal at ``path`` of just this measurement; None keeps no journal. Cost: as ``key_of``."""
    return Journal(None) if path is None else Journal(path, key_of(objective, **settings))


def key_of(objective: Objective, **settings: Any) -> str:
    """The hash of just this measurement: weights, buffers, model, loss, data, ``settings``, versions.

    Model and loss count by their plain attributes, tensors and closures too; what neither those nor the audit's
    examples show (``resumable``), a journal cannot see. Cost: one walk over the data, without the model.
    """
    problem = objective.problem
    state = {**problem.model.state_dict(), **dict(problem.model.named_parameters())}
    return fingerprint(
        {name: value for name, value in state.items() if isinstance(value, Tensor)},
        [name for name, p in problem.model.named_parameters() if p.requires_grad],
        [_described(module) for module in problem.model.modules()],
        _described(problem.loss),
        problem.data,
        [problem.params, problem.mode, float(problem.weight_decay)],
        [objective.curvature.name, objective.dtype, objective.device, objective.micro_batch],
        settings,
        [__version__, torch.__version__, torch.get_num_threads()],
    )


def resumable(
    objective: Objective, journal: Journal, seen: Sums, progress: Progress | None
) -> Callable[[Tensor], Tensor]:
    """``objective.hvp`` that takes finished passes from the journal, with loss, gradient and cost as they were.

    ``seen`` is what the audit measured: loss, gradient and products of some examples, bit for bit, say that model and
    loss compute what they did. The micro-batch is settled first, and kept: the last bits depend on it.
    """
    journal.once("audit", dict, given=[seen.loss, seen.weight, seen.gradient, seen.products])
    settled = journal.once("micro-batch", lambda: _settled(objective))
    objective.micro_batch = settled["size"]

    def note() -> Entry:
        assert objective.point is not None
        point = {f.name: getattr(objective.point, f.name) for f in dataclasses.fields(Point)}
        return {
            **point,
            "micro_batch": objective.micro_batch,
            "bill": {name: getattr(objective.meter, name) for name in BILL},
        }

    def recall(entry: Entry) -> None:
        objective.point = Point(**{f.name: entry[f.name] for f in dataclasses.fields(Point)})
        objective.num_examples, objective.terms.checked = objective.point.examples, True
        objective.micro_batch = entry["micro_batch"]
        objective.meter.recall(**entry["bill"])
        if progress is not None:
            progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)

    return journal.matmat(lambda block: objective.hvp(block, progress), "pass", note=note, recall=recall)


def _described(thing: Any, depth: int = 3) -> Any:
    """What of a module, function or object can be hashed: type, plain attributes, tensors, code and closure."""
    if thing is None or isinstance(thing, bool | int | float | str | Tensor | torch.dtype | torch.device):
        return thing
    if depth and isinstance(thing, list | tuple):
        return [_described(entry, depth - 1) for entry in thing]
    if depth and isinstance(thing, Mapping):
        return {str(key): _described(value, depth - 1) for key, value in thing.items()}
    name = f"{type(thing).__module__}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if isinstance(thing, functools.partial):
        return [name, *(_described(part, depth) for part in (thing.func, thing.args, thing.keywords))]
    code = getattr(thing, "__code__", None)
    if depth and code is not None:
        cells = inspect.getclosurevars(thing).nonlocals if inspect.isfunction(thing) else {}
        return [
            name,
            code.co_code,
            repr(code.co_names),
            repr([c for c in code.co_consts if not inspect.iscode(c)]),
            *(_described(c, depth - 1) for c in (cells, thing.__defaults__)),
        ]
    tensors = thing.state_dict() if isinstance(thing, nn.Module) else {}
    attributes = {
        key: value
        for key, value in getattr(thing, "__dict__", {}).items()
        if not (key.startswith("_") or key == "training")
    }
    plain = {key: _described(value, depth - 1) for key, value in attributes.items()} if depth else {}
    return [name, {k: v for k, v in tensors.items() if isinstance(v, Tensor)}, plain]


def _settled(objective: Objective) -> Entry:
    objective.settle_micro_batch()
    return {"size": objective.micro_batch}
