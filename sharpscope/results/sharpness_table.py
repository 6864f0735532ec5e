"""Results of several checkpoints side by side, a row a measure."""

from __future__ import annotations

from collections.abc import Sequence

from sharpscope.results.record import names_of, origin_notes
from sharpscope.results.sharpness import SharpnessResult, short
from sharpscope.results.table import Table

# Settings that are said once below the table, unless results differ in them.
_COMPARED = ("p", "ascent", "eta", "drop", "tol", "order")


# What scales the ball, see ``sharpscope.ball``.
_D = {None: "1", "elementwise": "|w| + eta", "filter": "the filter's norm + eta"}


def sharpness_table(results: Sequence[SharpnessResult]) -> Table:
    """A row for each measure and a column for each result."""
    return Table(_rows(results), _notes(results))


def _labels(results: Sequence[SharpnessResult]) -> list[list[str]]:
    """What each measure is called, with every setting in which results differ, lest unlike ones share a row."""
    differing: dict[str, set[str]] = {}
    for key in _COMPARED:
        said: dict[str, set[str]] = {}
        for r in results:
            for m in r.measures:
                said.setdefault(m.name, set()).add(str(m.settings.get(key)))
        for name, values in said.items():
            if len(values) > 1:
                differing.setdefault(name, set()).add(key)
    return [[m.labelled(sorted(differing.get(m.name, ()))) for m in r.measures] for r in results]


def _rows(results: Sequence[SharpnessResult]) -> list[list[str]]:
    names = names_of([r.provenance for r in results])
    called = _labels(results)
    labels = list(dict.fromkeys(label for column in called for label in column))
    predicted = [any(m.prediction for m in r.measures) for r in results]
    heading = ["measure"]
    for name, has in zip(names, predicted, strict=True):
        heading += [name, *(["predicted"] if has else [])]
    rows = [heading]
    for label in labels:
        row = [label]
        for r, column, has in zip(results, called, predicted, strict=True):
            one = r.measures[column.index(label)] if label in column else None
            row.append("-" if one is None else str(one))
            if has:
                row.append("" if one is None else " to ".join(f"{value:.4g}" for value in one.prediction.values()))
        rows.append(row)
    for label, cells in (
        ("loss", [f"{r.loss:.4g}" for r in results]),
        ("|grad|", [f"{r.gradient_norm:.2g}" for r in results]),
        ("gradients", [f"{r.cost.gradients:.1f}" for r in results]),
        ("seconds", [f"{r.cost.seconds:.1f}" for r in results]),
    ):
        row = [label]
        for cell, has in zip(cells, predicted, strict=True):
            row += [cell, *([""] if has else [])]
        rows.append(row)
    return rows


def _notes(results: Sequence[SharpnessResult]) -> list[str]:
    notes = []
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        notes += origin_notes(name, r.provenance)
        for m in r.measures:
            if m.name in ("edge", "pac-bayes"):
                said = [f"{key} {short(value)}" for key, value in m.settings.items() if key != "converged"]
                notes.append(f"{name}: {m.name}: {', '.join(said)}.")
        for left_out, why in (r.provenance.get("left_out") or {}).items():
            notes.append(f"{name}: {left_out} was left out. {why}")
        if any(m.settings.get("order") == "as loaded" for m in r.measures):
            notes.append(f"{name}: subsets are of neighbours in the loader's order, which must not be sorted by class.")
    seen: dict[str, str] = {}
    for r in results:
        for m in r.measures:
            how = [
                f"{key} {short(value)}"
                for key, value in m.settings.items()
                if key in ("p", "ascent", "eta", "probes", "pairs of draws", "draws") and value not in (None, 0.0)
            ]
            rule = f"; predicted: {' to '.join(m.prediction)}" if m.prediction else ""
            shape = f"; D = {_D[m.settings.get('adaptive')]}" if "D" in m.definition else ""
            seen.setdefault(m.name, f"{m.name}: {m.definition}{shape}{''.join(f'; {h}' for h in how)}{rule}.")
    sampled = any(m.standard_error is not None for r in results for m in r.measures)
    if not all(r.converged for r in results):
        seen["?"] = "? has not converged."
    if "average-case" in seen:
        seen["kinks"] = (
            "The Hessian does not see the kinks of ReLU and max-pooling, which add a term of the same order to the "
            "average case: with them it may differ from what is predicted however small sigma is."
        )
    closing = ["± is a 95 % interval over subsets or draws, or a bound from residuals."] if sampled else []
    return [*notes, *seen.values(), *closing]
