"""The numbers of a comparison, a row each: what it is, and for each checkpoint its value, interval and origin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sharpscope.results.comparison import Comparison, Subject
from sharpscope.results.eigen import EigenResult
from sharpscope.results.groups import Difference, Spread, difference, spread
from sharpscope.results.record import examples_of, origin
from sharpscope.results.sharpness import Measure, SharpnessResult
from sharpscope.results.trace import TraceResult
from sharpscope.tables import with_bound

NUMERICAL = "bound on the numerical error"
SAMPLED = "95 % over examples, for all the data"
PROBED = "one standard error over random probes"
PROBED_SAMPLED = "one standard error over random probes and examples, for all the data"
SUBSETS = "95 % over subsets"
BINOMIAL = "95 % over examples (Wilson 1927)"
EXACT = "exact on these examples"


@dataclass(frozen=True)
class Reading:
    """One number of one checkpoint.

    Attributes:
        value: the number.
        lower, upper: its interval, or None.
        interval: what the interval is, a phrase.
        converged: False where the interval does not meet the tolerance.
        origin: data, examples, precision; and ``price``: what it took.
        more: further things to know of it.
        data: the examples alone, alike for all that were measured on the same.
    """

    value: float
    lower: float | None = None
    upper: float | None = None
    interval: str = EXACT
    converged: bool = True
    origin: str = ""
    price: str = ""
    more: str = ""
    data: str = ""

    def __str__(self) -> str:
        mark = "" if self.converged else "?"
        if self.lower is None or self.upper is None:
            return f"{self.value:.4g}{mark}"
        return f"{with_bound(self.value, self.lower, self.upper)}{mark}"


@dataclass(frozen=True)
class Row:
    """One quantity over all checkpoints.

    Attributes:
        label: the quantity's name.
        definition: what it is, in a sentence.
        readings: one for each subject, None where it was not measured.
        factor: whether groups are compared by ratios, as quantities are that range over factors.
        spreads: of each group, by name.
        differences: of each later group from the first, by name.
    """

    label: str
    definition: str
    readings: tuple[Reading | None, ...]
    factor: bool
    spreads: dict[str, Spread]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class _Quantity:
    label: str
    definition: str
    of: Callable[[Subject], Reading | None]
    factor: bool = True


def rows_of(comparison: Comparison) -> list[Row]:
    """Every quantity that was measured of any checkpoint, with groups' means and differences where there are groups."""
    found = []
    for quantity in _quantities(comparison.subjects):
        readings = tuple(quantity.of(subject) for subject in comparison.subjects)
        if any(reading is not None for reading in readings):
            found.append(_row(comparison, quantity, readings))
    return found


def _row(comparison: Comparison, quantity: _Quantity, readings: tuple[Reading | None, ...]) -> Row:
    values = {s.name: r.value for s, r in zip(comparison.subjects, readings, strict=True) if r is not None}
    whole = {group: [s.name for s in members] for group, members in comparison.groups.items()}
    kept = {
        group: [values[name] for name in names]
        for group, names in whole.items()
        if all(name in values and math.isfinite(values[name]) for name in names)
    }
    factor = quantity.factor and all(value > 0 for column in kept.values() for value in column)
    spreads = {group: spread(column, log=factor) for group, column in kept.items()}
    differences: dict[str, Difference] = {}
    first = next(iter(whole), None)
    for group in kept:
        if first is not None and group != first and first in kept:
            pairs = comparison.paired(first, group)
            if pairs is None:
                differences[group] = difference(kept[first], kept[group], ratio=factor)
            else:
                one, two = ([values[pair[i].name] for pair in pairs] for i in (0, 1))
                differences[group] = difference(one, two, paired=True, ratio=factor)
    return Row(quantity.label, quantity.definition, readings, factor, spreads, differences)


def _quantities(subjects: Sequence[Subject]) -> list[_Quantity]:
    found = [
        _Quantity(f"{split} {what}", _PERFORMANCE[what].format(split=split), _performance(split, what), what == "loss")
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
    labels = dict.fromkeys(m.label for s in subjects if s.sharpness is not None for m in s.sharpness.measures)
    for label in labels:
        definition = next(
            m.definition for s in subjects if s.sharpness for m in s.sharpness.measures if m.label == label
        )
        found.append(_Quantity(label, definition, _measure(label)))
    return found


def _ordinal(k: int) -> str:
    last = "th" if 10 < k % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(k % 10, "th")
    return f"{k}{last}"


_PERFORMANCE = {
    "loss": "mean loss on the {split} data, eval mode (nats for cross-entropy)",
    "accuracy": "share of right answers on the {split} data, eval mode",
}


def _performance(split: str, what: str) -> Callable[[Subject], Reading | None]:
    def of(subject: Subject) -> Reading | None:
        found = subject.performance.get(split)
        value = None if found is None else getattr(found, what)
        if found is None or value is None:
            return None
        noise = subject.provenance.get("label_noise") if split == "train" else None
        said = {**subject.provenance, "split": split, "label_noise": noise, "num_examples": found.examples}
        where = examples_of(said) if said.get("data") else f"{found.examples} examples of the {split} split"
        if what == "accuracy":
            return Reading(value, *wilson(value, found.examples), BINOMIAL, origin=where, data=where)
        return Reading(value, origin=where, data=where)

    return of


def wilson(share: float, examples: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``examples`` independent ones (Wilson 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples**2))
    # A share of 1 lies at the interval's end, which rounding must not pull under it.
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def _lambda_max(subject: Subject) -> Reading | None:
    result = subject.eigen
    if result is None:
        return None
    sampling, missed = result.sampling, result.missed_probability
    more = "" if missed is None else f"a larger one was missed with probability at most {float(missed[0]):.1g}"
    ends = (float(result.lower[0]), float(result.upper[0]), NUMERICAL)
    if sampling is not None and sampling.get("lower") is not None:
        ends = (float(sampling["lower"][0]), float(sampling["upper"][0]), SAMPLED)
    return Reading(result.lambda_max, *ends, bool(result.converged[0]), **_source(result), more=more)


def _ratio(k: int) -> Callable[[Subject], Reading | None]:
    def of(subject: Subject) -> Reading | None:
        result = subject.eigen
        if result is None or len(result.eigenvalues) != k or result.ratio.value is None:
            return None
        ratio, sampled = result.ratio, (result.sampling or {}).get("ratio")
        ends: tuple[float | None, float | None, str] = (ratio.lower, ratio.upper, NUMERICAL)
        if sampled is not None:
            ends = (float(sampled["lower"]), float(sampled["upper"]), SAMPLED)
        elif result.sampling is not None:
            ends = (None, None, f"none: {result.sampling.get('reason')}")
        return Reading(float(ratio.value or math.nan), *ends, bool(result.converged.all()), **_source(result))

    return of


def _trace(subject: Subject) -> Reading | None:
    result = subject.trace
    if result is None:
        return None
    value, error = result.whole.value, result.whole.standard_error
    kind = PROBED if result.sampling_error is None else PROBED_SAMPLED
    return Reading(value, value - error, value + error, kind, **_source(result))


def _measure(label: str) -> Callable[[Subject], Reading | None]:
    def of(subject: Subject) -> Reading | None:
        result = subject.sharpness
        found: list[Measure] = [] if result is None else [m for m in result.measures if m.label == label]
        if result is None or not found:
            return None
        one = found[0]
        told = ", ".join(f"{key} {value:.4g}" for key, value in one.prediction.items())
        what = EXACT if one.lower is None else SUBSETS if one.standard_error is not None else NUMERICAL
        if one.name == "edge":
            what = SAMPLED if one.settings.get("sampled") else NUMERICAL
        # The edge comes from eigenvalues that may be of more examples than the other measures.
        told_by = subject.eigen if one.name == "edge" and subject.eigen is not None else result
        return Reading(
            one.value,
            one.lower,
            one.upper,
            what,
            bool(one.settings.get("converged", True)),
            **{**_source(told_by), "price": f"{one.gradients:.3g} gradients over these data"},
            more=f"a small perturbation predicts {told}" if told else "",
        )

    return of


def _source(result: EigenResult | TraceResult | SharpnessResult) -> dict[str, Any]:
    """On what a number was measured, and what it took."""
    cost = result.cost
    price = f"{cost.passes} passes, {cost.hvps} products, {cost.gradients:.3g} gradients, {cost.seconds:.3g} s"
    return {"origin": origin(result.provenance), "price": price, "data": examples_of(result.provenance)}
