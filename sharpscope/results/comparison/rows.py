"""The numbers of a comparison, a row each: what it is, and for each checkpoint its value, interval and origin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sharpscope.results.comparison.subject import Subject, group_subjects, pair_runs
from sharpscope.results.density_and_trace import TraceResult
from sharpscope.results.eigen import EigenResult
from sharpscope.results.origin import describe_examples, describe_origin, typed_value
from sharpscope.results.serialization import as_json
from sharpscope.results.sharpness import Measure, SharpnessResult
from sharpscope.results.statistics import (
    BINOMIAL,
    NO_INTERVAL,
    NUMERICAL,
    ONE_SUBSET,
    PROBED,
    PROBED_SAMPLED,
    SAMPLED,
    SUBSETS,
    Cell,
    Difference,
    OwnError,
    Spread,
    contrast,
    difference,
    spread,
    surely_positive,
    wilson,
)

Groups = Mapping[str, Sequence[Subject]]


@dataclass(frozen=True)
class Row:
    """One quantity over all checkpoints.

    Attributes:
        label: the quantity, with all settings that tell it from others.
        definition: what it is, in a sentence.
        cells: one for each subject, None where it was not measured.
        factor: whether numbers are compared by ratios, as quantities are that range over factors.
        spreads: of each group, by name.
        differences: by name, of each later group from the first; without groups of each later checkpoint.
        quantity: the label without m; and ``m``, where there is one.
    """

    label: str
    definition: str
    cells: tuple[Cell | None, ...]
    factor: bool
    spreads: dict[str, Spread]
    differences: dict[str, Difference]
    quantity: str = ""
    m: int | None = None

    def record(self) -> dict[str, Any]:
        """Return the row as plain JSON values; the key of ``cells`` is "readings"."""
        values = {field.name: as_json(getattr(self, field.name)) for field in fields(self)}
        return {"readings" if name == "cells" else name: value for name, value in values.items()}


@dataclass(frozen=True)
class _Quantity:
    label: str
    definition: str
    measure: Callable[[Subject], Cell | None]
    factor: bool = True
    quantity: str = ""
    m: int | None = None
    is_share: bool = False


def comparison_rows(subjects: Sequence[Subject]) -> list[Row]:
    """Every quantity that was measured of any checkpoint, means of groups, and how others differ from the first."""
    found, groups = [], group_subjects(subjects)
    for quantity in _quantities(subjects):
        cells = tuple(quantity.measure(subject) for subject in subjects)
        if any(cell is not None for cell in cells):
            found.append(_row(subjects, groups, quantity, cells))
    return found


def reference_and_others(subjects: Sequence[Subject]) -> tuple[str, list[str]]:
    """The first group or checkpoint, and those whose differences from it a table has room for."""
    groups = group_subjects(subjects)
    first, *others = list(groups) or [subject.name for subject in subjects]
    return first, others if groups or len(others) == 1 else []


def _row(subjects: Sequence[Subject], groups: Groups, quantity: _Quantity, cells: tuple[Cell | None, ...]) -> Row:
    measured = {s.name: r for s, r in zip(subjects, cells, strict=True) if r is not None}
    spreads, factor = _spreads(groups, quantity, measured)
    if quantity.label == "edge":  # it follows the learning rate at the end, which says nothing of the minimum
        differences: dict[str, Difference] = {}
    elif groups:
        differences = _differences(groups, measured, spreads, factor)
    else:
        found = {s.name: contrast(cells[0], r, factor) for s, r in zip(subjects[1:], cells[1:], strict=True)}
        differences = {name: one for name, one in found.items() if one is not None}
    return Row(
        quantity.label,
        quantity.definition,
        cells,
        factor,
        spreads,
        differences,
        quantity.quantity or quantity.label,
        quantity.m,
    )


def _spreads(groups: Groups, quantity: _Quantity, cells: Mapping[str, Cell]) -> tuple[dict[str, Spread], bool]:
    """The mean of each group all of whose runs have a number, and whether they are compared by ratios."""
    kept = {
        group: [cells[run.name] for run in runs]
        for group, runs in groups.items()
        if all(run.name in cells and math.isfinite(cells[run.name].value) for run in runs)
    }
    factor = quantity.factor and all(surely_positive(cell) for column in kept.values() for cell in column)
    found = {
        group: spread([cell.value for cell in column], log=factor, own=OwnError.of(column, log=factor))
        for group, column in kept.items()
    }
    if quantity.is_share:
        found = {group: one.within(0.0, 1.0) for group, one in found.items()}
    return found, factor


def _differences(
    groups: Groups, cells: Mapping[str, Cell], spreads: Mapping[str, Spread], factor: bool
) -> dict[str, Difference]:
    """Of each later group that has a mean from the first, over pairs where all runs have a partner."""
    first, *others = groups
    found: dict[str, Difference] = {}
    for group in others:
        if first in spreads and group in spreads:
            pairs = pair_runs(groups[first], groups[group])
            runs = zip(*pairs, strict=True) if pairs else (groups[name] for name in (first, group))
            columns = [[cells[run.name] for run in column] for column in runs]
            one, two = ([cell.value for cell in column] for column in columns)
            own = OwnError.of(columns[0], log=factor), OwnError.of(columns[1], log=factor)
            found[group] = difference(one, two, paired=bool(pairs), ratio=factor, own=own)
    return found


def _quantities(subjects: Sequence[Subject]) -> list[_Quantity]:
    found = [
        _Quantity(
            f"{split} {what}",
            _PERFORMANCE[what].format(split=split),
            _performance(split, what),
            what == "loss",
            is_share=what == "accuracy",
        )
        for what in ("loss", "accuracy")
        for split in ("train", "test")
    ]
    ks = {len(s.eigen.eigenvalues) for s in subjects if s.eigen is not None}
    found.append(_Quantity("lambda_max", "largest eigenvalue of the Hessian of the mean training loss", _lambda_max))
    for k in sorted(ks - {1}):
        found.append(
            _Quantity(
                f"lambda_max/lambda_{k}",
                f"largest eigenvalue over the {_ordinal(k)} largest: how far the sharpest direction stands out",
                _ratio(k),
            )
        )
    found.append(
        _Quantity("trace", "trace of the Hessian: the sum of its eigenvalues, by random probes (XTrace)", _trace)
    )
    measures = {m.label: m for s in reversed(subjects) if s.sharpness for m in s.sharpness.measures}
    order = dict.fromkeys(m.label for s in subjects if s.sharpness for m in s.sharpness.measures)
    for label in order:
        one = measures[label]
        without = replace(one, settings={key: value for key, value in one.settings.items() if key != "m"})
        found.append(_Quantity(label, one.definition, _measure(label), True, without.label, one.settings.get("m")))
    return found


def _ordinal(k: int) -> str:
    last = "th" if 10 < k % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(k % 10, "th")
    return f"{k}{last}"


_PERFORMANCE = {
    "loss": "mean loss on the {split} data, eval mode (nats for cross-entropy)",
    "accuracy": "share of right answers on the {split} data, eval mode",
}


def _performance(split: str, what: str) -> Callable[[Subject], Cell | None]:
    def of(subject: Subject) -> Cell | None:
        found = subject.performance.get(split)
        value = None if found is None else getattr(found, what)
        if found is None or value is None:
            return None
        noise = typed_value(subject.provenance, "label_noise", int | float) if split == "train" else None
        provenance = {**subject.provenance, "split": split, "label_noise": noise, "num_examples": found.examples}
        data = (
            describe_examples(provenance)
            if provenance.get("data")
            else f"{found.examples} examples of the {split} split"
        )
        if what == "accuracy":
            # Tokens of one text are not independent, so that many of them count as its examples.
            independent = found.examples if found.answers is None else min(found.examples, found.answers)
            return Cell(value, *wilson(value, independent), BINOMIAL, origin=data, data=data)
        return Cell(value, origin=data, data=data)

    return of


def _lambda_max(subject: Subject) -> Cell | None:
    result = subject.eigen
    if result is None:
        return None
    sampling, missed = result.sampling, result.missed_probability
    more = "" if missed is None else f"a larger one was missed with probability at most {float(missed[0]):.1g}"
    ends: tuple[float | None, float | None, str] = (float(result.lower[0]), float(result.upper[0]), NUMERICAL)
    if sampling is not None:
        known = sampling.get("lower") is not None
        ends = (None, None, f"{NO_INTERVAL}{sampling.get('reason')}")
        ends = (float(sampling["lower"][0]), float(sampling["upper"][0]), SAMPLED) if known else ends
    return Cell(result.lambda_max, *ends, bool(result.converged[0]), **_measured_on(result), more=more)


def _ratio(k: int) -> Callable[[Subject], Cell | None]:
    def of(subject: Subject) -> Cell | None:
        result = subject.eigen
        if result is None or len(result.eigenvalues) != k or result.ratio.value is None:
            return None
        ratio, sampled = result.ratio, (result.sampling or {}).get("ratio")
        ends: tuple[float | None, float | None, str] = (ratio.lower, ratio.upper, NUMERICAL)
        if sampled is not None:
            ends = (float(sampled["lower"]), float(sampled["upper"]), SAMPLED)
        elif result.sampling is not None:
            ends = (None, None, f"{NO_INTERVAL}{result.sampling.get('reason')}")
        return Cell(float(ratio.value or math.nan), *ends, bool(result.converged.all()), **_measured_on(result))

    return of


def _trace(subject: Subject) -> Cell | None:
    result = subject.trace
    if result is None:
        return None
    value, error = result.whole.value, result.whole.standard_error
    if result.provenance.get("population") and result.sampling_error is None:
        return Cell(value, interval=f"{NO_INTERVAL}too few micro-batches with loss terms", **_measured_on(result))
    kind = PROBED if result.sampling_error is None else PROBED_SAMPLED
    return Cell(value, value - error, value + error, kind, **_measured_on(result))


def _measure(label: str) -> Callable[[Subject], Cell | None]:
    def of(subject: Subject) -> Cell | None:
        result = subject.sharpness
        found: list[Measure] = [] if result is None else [m for m in result.measures if m.label == label]
        if result is None or not found:
            return None
        measure = found[0]
        prediction = ", ".join(f"{key} {value:.4g}" for key, value in measure.prediction.items())
        kind = ONE_SUBSET if measure.lower is None else SUBSETS if measure.standard_error is not None else NUMERICAL
        if measure.name == "edge":
            kind = SAMPLED if measure.settings.get("sampled") else NUMERICAL
        # The edge comes from eigenvalues that may be of more examples than the other measures.
        source = subject.eigen if measure.name == "edge" and subject.eigen is not None else result
        return Cell(
            measure.value,
            measure.lower,
            measure.upper,
            kind,
            measure.converged,
            **{**_measured_on(source), "price": f"{measure.gradients:.3g} gradients over these data"},
            more=f"a small perturbation predicts {prediction}" if prediction else "",
        )

    return of


def _measured_on(result: EigenResult | TraceResult | SharpnessResult) -> dict[str, Any]:
    """On what a number was measured, and what it took."""
    cost = result.cost
    price = f"{cost.passes} passes, {cost.hvps} products, {cost.gradients:.3g} gradients, {cost.seconds:.3g} s"
    return {"origin": describe_origin(result.provenance), "price": price, "data": describe_examples(result.provenance)}
