"""Sharpness measures, their definitions and table, before and after a rescaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from sharpscope.errors import DataError, nearest
from sharpscope.formatting import with_bound
from sharpscope.results.base import Cost, Result
from sharpscope.results.serialization import MaybeNaN, Shape
from sharpscope.results.table import Table, checkpoint_names, origin_notes, stacked, typed_value

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
    def label(self) -> str:
        """The name with what tells it from others of that name in one result."""
        return self.labelled(())

    def labelled(self, extra: Iterable[str]) -> str:
        """``label``, with these settings said too."""
        shown = LABEL_SETTINGS.get(self.name, ())
        parts = [f"{key}={format_setting(self.settings[key])}" for key in shown if self.settings.get(key) is not None]
        adaptive = self.settings.get("adaptive")
        if adaptive:
            parts.append(f"adaptive ({adaptive})")
        parts += [f"{key} {format_setting(self.settings[key])}" for key in extra if self.settings.get(key) is not None]
        return ", ".join([{"pac-bayes": "pac-bayes 1/sigma^2"}.get(self.name, self.name), *parts])

    def __str__(self) -> str:
        sure = "" if self.settings.get("converged", True) else "?"
        if self.lower is None or self.upper is None:
            return f"{self.value:.4g}{sure}"
        return f"{with_bound(self.value, self.lower, self.upper)}{sure}"


@dataclass(frozen=True)
class SharpnessResult(Result):
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
        return all(m.settings.get("converged", True) for m in self.measures)

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

    def table(self) -> Table:
        """Return the result as a table with notes."""
        return sharpness_table([self])


def format_setting(value: Any) -> str:
    """A setting as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Settings that are said once below the table, unless results differ in them.
_NOTE_SETTINGS = ("p", "ascent", "eta", "drop", "tol", "order")


# What scales the ball, see ``sharpscope.weights.norm_ball``.
_SCALINGS = {"None": "1", "elementwise": "|w| + eta", "filter": "the filter's norm + eta"}


def sharpness_table(results: Sequence[SharpnessResult]) -> Table:
    """A row for each measure and a column for each result."""
    return Table(_rows(results), _notes(results))


def _labels(results: Sequence[SharpnessResult]) -> list[list[str]]:
    """What each measure is called, with every setting in which results differ, lest unlike ones share a row."""
    differing: dict[str, set[str]] = {}
    for key in _NOTE_SETTINGS:
        values_by_measure: dict[str, set[str]] = {}
        for r in results:
            for m in r.measures:
                values_by_measure.setdefault(m.name, set()).add(str(m.settings.get(key)))
        for name, values in values_by_measure.items():
            if len(values) > 1:
                differing.setdefault(name, set()).add(key)
    return [[m.labelled(sorted(differing.get(m.name, ()))) for m in r.measures] for r in results]


def _rows(results: Sequence[SharpnessResult]) -> list[list[str]]:
    names = checkpoint_names([r.provenance for r in results])
    labels_by_result = _labels(results)
    labels = list(dict.fromkeys(label for column in labels_by_result for label in column))
    predicted = [any(m.prediction for m in r.measures) for r in results]
    heading = ["measure"]
    for name, has in zip(names, predicted, strict=True):
        heading += [name, *(["predicted"] if has else [])]
    rows = [heading]
    for label in labels:
        row = [label]
        for r, column, has in zip(results, labels_by_result, predicted, strict=True):
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
    for r, name in zip(results, checkpoint_names([r.provenance for r in results]), strict=True):
        notes += origin_notes(name, r.provenance)
        for m in r.measures:
            if m.name in ("edge", "pac-bayes"):
                settings = [f"{key} {format_setting(value)}" for key, value in m.settings.items() if key != "converged"]
                notes.append(f"{name}: {m.name}: {', '.join(settings)}.")
        for left_out, why in (typed_value(r.provenance, "left_out", Mapping) or {}).items():
            notes.append(f"{name}: {left_out} was left out. {why}")
        if any(m.settings.get("order") == "as loaded" for m in r.measures):
            notes.append(f"{name}: subsets are of neighbours in the loader's order, which must not be sorted by class.")
    definitions: dict[str, str] = {}
    for r in results:
        for m in r.measures:
            settings_shown = [
                f"{key} {format_setting(value)}"
                for key, value in m.settings.items()
                if key in ("p", "ascent", "eta", "probes", "pairs of draws", "draws") and value not in (None, 0.0)
            ]
            rule = f"; predicted: {' to '.join(m.prediction)}" if m.prediction else ""
            shape = f"; D = {_SCALINGS.get(str(m.settings.get('adaptive')), 'unknown')}" if "D" in m.definition else ""
            definitions.setdefault(
                m.name, f"{m.name}: {m.definition}{shape}{''.join(f'; {h}' for h in settings_shown)}{rule}."
            )
    sampled = any(m.standard_error is not None for r in results for m in r.measures)
    if not all(r.converged for r in results):
        definitions["?"] = "? has not converged."
    if "average-case" in definitions:
        definitions["kinks"] = (
            "The Hessian does not see the kinks of ReLU and max-pooling, which add a term of the same order to the "
            "average case: with them it may differ from what is predicted however small sigma is."
        )
    closing = ["± is a 95 % interval over subsets or draws, or a bound from residuals."] if sampled else []
    return [*notes, *definitions.values(), *closing]


@dataclass(frozen=True)
class InvarianceResult(Result):
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
        return all(m.settings.get("converged", True) for m in (*self.before, *self.after))

    def table(self) -> Table:
        """Return the result as a table with notes."""
        return invariance_table([self])


def invariance_table(results: Sequence[InvarianceResult]) -> Table:
    """A table a result under its name, and the notes of all at the end."""
    names = checkpoint_names([r.provenance for r in results])
    *others, last = (Table(_invariance_rows(r), title=name) for name, r in zip(names, results, strict=True))
    return stacked([*others, replace(last, notes=_invariance_notes(results))])


def _invariance_rows(result: InvarianceResult) -> list[list[str]]:
    rows = [["measure", "before", "after", "relative change"]]
    for a, b, change in zip(result.before, result.after, result.changes, strict=True):
        unsure = "" if a.settings.get("converged", True) and b.settings.get("converged", True) else "?"
        rows.append([a.label, f"{a.value:.7g}", f"{b.value:.7g}", f"{change:.1e}{unsure}"])
    return rows


def _invariance_notes(results: Sequence[InvarianceResult]) -> list[str]:
    notes = []
    for r, name in zip(results, checkpoint_names([r.provenance for r in results]), strict=True):
        pairs = ", ".join(f"{a or 'the model'} and {b}" for a, b in r.layers)
        notes += origin_notes(name, r.provenance)
        notes.append(
            f"{name}: the function is the same, with a loss of {r.loss:.6g}; multiplied and divided by {r.factor:g}: "
            f"{pairs}. {r.cost.gradients:.1f} gradients, {r.cost.seconds:.1f} seconds."
        )
    if not all(r.converged for r in results):
        notes.append("? has not converged.")
    return [*notes, "Both sides in float64 with the same subsets, draws and probes; not intervals, but what moves."]
