"""Sharpness measures, their definitions and table, before and after a rescaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from sharpscope.errors import DataError, nearest
from sharpscope.formatting import with_mark
from sharpscope.results.base import CheckpointResult, Cost
from sharpscope.results.origin import origin_notes, typed_value
from sharpscope.results.serialization import MaybeNaN, Shape
from sharpscope.results.table import Table, stacked

DEFINITIONS = {
    "m-sharpness": "mean over disjoint subsets b of m examples of max L_b(w+e) - L_b(w), ||D^-1 e||_p <= rho, as far "
    "as the ascent found it (Foret et al. 2021, section 4.1)",
    "worst-case": "max L(w+e) - L(w), ||D^-1 e||_p <= rho, as far as the ascent found it (Andriushchenko et al. 2023)",
    "average-case": "E L(w+e) - L(w), e ~ N(0, sigma^2 D^2) (Andriushchenko et al. 2023)",
    "pac-bayes": "1/sigma^2 for the largest standard deviation sigma of N(0, sigma^2 I) on the weights that costs at "
    "most 0.1 of accuracy in the mean (Jiang et al. 2020)",
    "lambda-max": "largest eigenvalue of D H D",
    "trace": "trace of D H D",
    "relative-flatness": "sum over rows s, s' of a weight matrix of <w_s, w_s'> tr(H_ss') (Petzka et al. 2021)",
    "keskar": "100 (max L - L) / (1 + L) over |e| <= box (|w| + 1), as far as the ascent found it (Keskar et al. 2017)",
    "edge": "lambda_max over SGD's edge of stability 2 (1 + momentum) / lr, at the lr in force when the checkpoint was "
    "written; above 1 a quadratic would diverge (Cohen et al. 2021)",
    "alignment": "|cosine| with the Hessian's top eigenvector (Long and Bartlett 2024)",
}

# Settings of the measure "edge": largest stable curvatures of SGD and of SAM, at the step size in force.
SGD_EDGE, SAM_EDGE = "SGD's edge", "SAM's edge"

# The settings in a measure's label, which distinguish measures of one name; none where the table has a note of them.
LABEL_SETTINGS = {
    "m-sharpness": ("m", "rho"),
    "worst-case": ("rho",),
    "average-case": ("sigma",),
    "relative-flatness": ("layer",),
    "keskar": ("box",),
    "alignment": ("rho", "of"),
}


@dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        name: a key of DEFINITIONS.
        value: the measure.
        standard_error: over subsets or draws; None where it is not sampled.
        lower, upper: the 95 % interval from that, or a bound from residuals; None where there is neither.
        settings: everything its value depends on beside the data: rho, p, m, adaptive, steps of the ascent, ...
        prediction: what it should be near where the perturbation is small, by the name of the rule.
        gradients: what it cost, in gradients over the data set.
        examples: that it saw.
    """

    derived: ClassVar[tuple[str, ...]] = ("definition",)

    name: str
    value: MaybeNaN
    standard_error: float | None = None
    lower: float | None = None
    upper: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    prediction: Mapping[str, MaybeNaN] = field(default_factory=dict)
    gradients: float = 0.0
    examples: int | None = None

    def __post_init__(self) -> None:
        if self.name not in DEFINITIONS:
            raise DataError(nearest("measure", self.name, DEFINITIONS))

    @property
    def definition(self) -> str:
        """What it is, and whose."""
        return DEFINITIONS[self.name]

    @property
    def converged(self) -> bool:
        """Whether the eigenvalue that it is made of, if any, is known to its tolerance, and no rounding hides it."""
        return bool(self.settings.get("converged", True) and self.settings.get("resolved", True))

    @property
    def label(self) -> str:
        """The name with what tells it from others of that name in one result."""
        return self.labelled(())

    def labelled(self, extra: Iterable[str]) -> str:
        """``label``, with these settings said too."""
        shown = LABEL_SETTINGS.get(self.name, ())
        parts = [f"{key}={exact_setting(self.settings[key])}" for key in shown if self.settings.get(key) is not None]
        adaptive = self.settings.get("adaptive")
        if adaptive:
            parts.append(f"adaptive ({adaptive})")
        parts += [f"{key} {exact_setting(self.settings[key])}" for key in extra if self.settings.get(key) is not None]
        return ", ".join([{"pac-bayes": "pac-bayes 1/sigma^2"}.get(self.name, self.name), *parts])

    def __str__(self) -> str:
        return with_mark(self.value, self.lower, self.upper, self.converged)


@dataclass(frozen=True)
class SharpnessResult(CheckpointResult):
    """Measures of the sharpness of a data set's mean loss at a model's weights.

    Attributes:
        measures: in the order they were asked for.
        loss: L(w), with the weight decay if it was asked for.
        gradient_norm: ``||grad L(w)||``.
        cost: what it took.
        provenance: as EigenResult's.
    """

    analysis = "sharpness"

    measures: tuple[Measure, ...]
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether every eigenvalue among the measures is known to its tolerance."""
        return all(m.converged for m in self.measures)

    def find(self, name: str, **settings: Any) -> Measure:
        """The one measure of that name whose settings are these.

        Raises: DataError when there is none, or more than one.
        """
        found = [
            m for m in self.measures if m.name == name and all(m.settings.get(k) == v for k, v in settings.items())
        ]
        if len(found) != 1:
            have = "; ".join(m.label for m in self.measures)
            raise DataError(f"There must be one measure {name} with {settings}, got {len(found)} of: {have}.")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, each measure with its definition; a number that is not finite is null."""
        values = super().to_dict()
        for entry, measure in zip(values["measures"], self.measures, strict=True):
            entry["definition"] = measure.definition
        return values

    @classmethod
    def _table(cls, results: Sequence[SharpnessResult], names: Sequence[str]) -> Table:
        """A row a measure, a column a result, and another for its predictions if it has any."""
        labels = _labels(results)
        every = list(dict.fromkeys(label for own in labels for label in own))
        columns = [["measure", *every, "loss", "|grad|", "gradients", "seconds"]]
        for name, r, own in zip(names, results, labels, strict=True):
            found = [r.measures[own.index(label)] if label in own else None for label in every]
            measured = ["-" if m is None else str(m) for m in found]
            cost = [f"{r.cost.gradients:.1f}", f"{r.cost.seconds:.1f}"]
            columns.append([name, *measured, f"{r.loss:.4g}", f"{r.gradient_norm:.2g}", *cost])
            if any(m.prediction for m in r.measures):
                predicted = [" to ".join(f"{x:.4g}" for x in m.prediction.values()) if m else "" for m in found]
                columns.append(["predicted", *predicted, "", "", "", ""])
        return Table(list(zip(*columns, strict=True)), [*cls._named_notes(results, names), *_legend(results, names)])

    def _notes(self) -> list[str]:
        notes = origin_notes(self.provenance)
        for m in self.measures:
            if m.name in ("edge", "pac-bayes"):
                settings = [f"{key} {format_setting(value)}" for key, value in m.settings.items() if key != "converged"]
                notes.append(f"{m.name}: {', '.join(settings)}.")
        lost = [m for m in self.measures if not m.settings.get("resolved", True)]
        notes += [_rounding_note(m, str(self.provenance.get("dtype", "?"))) for m in lost]
        left_out = typed_value(self.provenance, "left_out", Mapping) or {}
        notes += [f"{what} was left out. {why}" for what, why in left_out.items()]
        if any(m.settings.get("order") == "as loaded" for m in self.measures):
            notes.append("subsets are of neighbours in the loader's order, which must not be sorted by class.")
        return notes


def format_setting(value: Any) -> str:
    """A setting as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def exact_setting(value: Any) -> str:
    """A setting as text that no other value has, for labels."""
    short = format_setting(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


def _rounding_note(m: Measure, dtype: str) -> str:
    """Why a measure is marked, and what helps."""
    size = next((name for name in ("rho", "sigma", "box") if m.settings.get(name) is not None), "rho")
    lift = " or compute in float64 (--dtype float64)" if dtype == "float32" else ""
    what = "of the perturbation is lost in" if m.name == "alignment" else "is"
    return (
        f"{m.label} is too small for {dtype}: about {m.settings['rounding']:.1g} {what} rounding. Raise {size}{lift}."
    )


# Settings that are said once below the table, unless results differ in them.
_NOTE_SETTINGS = ("p", "ascent", "eta", "drop", "tol", "order")


# What scales the ball, see ``sharpscope.weights.norm_ball``.
_SCALINGS = {"None": "1", "elementwise": "|w| + eta", "filter": "the filter's norm + eta"}


def _labels(results: Sequence[SharpnessResult]) -> list[list[str]]:
    """What each measure is called, with every setting in which results differ, lest unlike ones share a row."""
    values: dict[tuple[str, str], set[str]] = {}
    for r in results:
        for m in r.measures:
            for key in _NOTE_SETTINGS:
                values.setdefault((m.name, key), set()).add(str(m.settings.get(key)))
    differing = {place for place, found in values.items() if len(found) > 1}
    return [
        [m.labelled(key for key in sorted(_NOTE_SETTINGS) if (m.name, key) in differing) for m in r.measures]
        for r in results
    ]


def _legend(results: Sequence[SharpnessResult], names: Sequence[str]) -> list[str]:
    """The definitions of all measures, each once, with their settings: of each result where these differ."""
    measures = [m for r in results for m in r.measures]
    definitions = {m.name: m.definition for m in measures}
    # By measure and its settings, the results that have them.
    holders: dict[str, dict[str, list[str]]] = {name: {} for name in definitions}
    for name, r in zip(names, results, strict=True):
        for m in r.measures:
            found = holders[m.name].setdefault(_described_settings(m), [])
            if name not in found:
                found.append(name)
    legend = []
    for measure, by_settings in holders.items():
        ((settings, _), *others) = by_settings.items()
        if others:
            differing = [f"{', '.join(found)}: {each or 'nothing set'}" for each, found in by_settings.items()]
            settings = f"settings differ: {'. '.join(differing)}"
        legend.append(f"{measure}: {definitions[measure]}{'; ' * bool(settings)}{settings}.")
    if not all(m.settings.get("converged", True) for m in measures):
        legend.append("? has not converged.")
    if not all(m.settings.get("resolved", True) for m in measures):
        legend.append("? is lost in rounding.")
    if "average-case" in definitions:
        legend.append(
            "The Hessian does not see the kinks of ReLU and max-pooling, which add a term of the same order to the "
            "average case: with them it may differ from what is predicted however small sigma is."
        )
    if any(m.standard_error is not None for m in measures):
        legend.append("± is a 95 % interval over subsets or draws, or a bound from residuals.")
    return legend


def _described_settings(m: Measure) -> str:
    """What a measure's definition leaves open, as text."""
    scaling = [f"D = {_SCALINGS.get(str(m.settings.get('adaptive')), 'unknown')}"] if "D" in m.definition else []
    settings = [
        f"{key} {exact_setting(value)}"
        for key, value in m.settings.items()
        if key in ("p", "ascent", "eta", "probes", "pairs of draws", "draws") and value not in (None, 0.0)
    ]
    rule = [f"predicted: {' to '.join(m.prediction)}"] if m.prediction else []
    return "; ".join([*scaling, *settings, *rule])


@dataclass(frozen=True)
class InvarianceResult(CheckpointResult):
    """What each measure says of one function in two sets of coordinates.

    Attributes:
        before, after: the same measures in the same order, with the same draws.
        factor: what the first layer of each pair was multiplied and the second divided by.
        layers: the pairs, by name.
        loss: L(w), the same on both sides.
        cost: of everything.
        provenance: as SharpnessResult's.
    """

    analysis = "invariance"
    derived = ("changes",)

    before: Annotated[tuple[Measure, ...], Shape("measures")]
    after: Annotated[tuple[Measure, ...], Shape("measures")]
    factor: float
    layers: tuple[tuple[str, str], ...]
    loss: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> tuple[float, ...]:
        """``|after - before| / |before|`` of each measure."""
        pairs = zip(self.before, self.after, strict=True)
        return tuple(abs(b.value - a.value) / abs(a.value) if a.value else float(b.value != 0) for a, b in pairs)

    @property
    def converged(self) -> bool:
        """Whether every eigenvalue among the measures is known to its tolerance."""
        return all(m.converged for m in (*self.before, *self.after))

    @classmethod
    def _table(cls, results: Sequence[InvarianceResult], names: Sequence[str]) -> Table:
        """A table a result under its name, and the notes of all at the end."""
        notes = cls._named_notes(results, names)
        if not all(r.converged for r in results):
            notes.append("? has not converged.")
        notes.append("Both sides in float64 with the same subsets, draws and probes; not intervals, but what moves.")
        *others, last = (Table(r._rows(), title=name) for name, r in zip(names, results, strict=True))
        return stacked([*others, replace(last, notes=notes)])

    def _rows(self) -> list[list[str]]:
        rows = [["measure", "before", "after", "relative change"]]
        for a, b, change in zip(self.before, self.after, self.changes, strict=True):
            unsure = "" if a.converged and b.converged else "?"
            rows.append([a.label, f"{a.value:.7g}", f"{b.value:.7g}", f"{change:.1e}{unsure}"])
        return rows

    def _notes(self) -> list[str]:
        pairs = ", ".join(f"{a or 'the model'} and {b}" for a, b in self.layers)
        return [
            *origin_notes(self.provenance),
            f"the function is the same, with a loss of {self.loss:.6g}; multiplied and divided by {self.factor:g}: "
            f"{pairs}. {self.cost.gradients:.1f} gradients, {self.cost.seconds:.1f} seconds.",
        ]
