"""Measures of sharpness and what each means."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sharpscope.errors import DataError
from sharpscope.results.cost import Cost
from sharpscope.results.record import (
    head,
    opened,
    plain,
    read,
    refuse_taken,
    write,
)
from sharpscope.results.table import Table, as_html, as_pretty, as_text
from sharpscope.tables import with_bound

_MEASURED = ("measures", "loss", "gradient_norm", "cost")

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

# Settings that tell measures of one name apart, in a table's first column.
_TELLING = ("m", "rho", "sigma", "box", "layer", "of")


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

    name: str
    value: float
    standard_error: float | None = None
    lower: float | None = None
    upper: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    prediction: Mapping[str, float] = field(default_factory=dict)
    gradients: float = 0.0
    examples: int | None = None

    @property
    def definition(self) -> str:
        """What it is, and whose."""
        return DEFINITIONS[self.name]

    @property
    def label(self) -> str:
        """The name with what tells it from others of that name in one result."""
        return self.labelled(())

    def labelled(self, also: Iterable[str]) -> str:
        """``label``, with these settings said too."""
        if self.name in ("pac-bayes", "edge"):
            told = []
        else:
            told = [f"{key}={short(self.settings[key])}" for key in _TELLING if self.settings.get(key) is not None]
        adaptive = self.settings.get("adaptive")
        if adaptive:
            told.append(f"adaptive ({adaptive})")
        told += [f"{key} {short(self.settings[key])}" for key in also if self.settings.get(key) is not None]
        return ", ".join([{"pac-bayes": "pac-bayes 1/sigma^2"}.get(self.name, self.name), *told])

    def __str__(self) -> str:
        sure = "" if self.settings.get("converged", True) else "?"
        if self.lower is None or self.upper is None:
            return f"{self.value:.4g}{sure}"
        return f"{with_bound(self.value, self.lower, self.upper)}{sure}"


@dataclass(frozen=True)
class SharpnessResult:
    """Measures of the sharpness of a data set's mean loss at a model's weights.

    Attributes:
        measures: in the order they were asked for.
        loss: L(w), with the weight decay if it was asked for.
        gradient_norm: ``||grad L(w)||``.
        cost: what it took.
        provenance: as EigenResult's.
    """

    measures: tuple[Measure, ...]
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, _MEASURED)

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
        """Everything as plain JSON values; a number that is not finite is null."""
        return {
            **head("sharpness", self.provenance),
            "measures": [{**plain(asdict(m)), "definition": m.definition} for m in self.measures],
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SharpnessResult:
        """The inverse of ``to_dict``; infinity comes back as NaN.

        Raises: DataError when a key is missing or it is another analysis.
        """
        rest = opened(values, "sharpness")
        try:
            kept = {key: rest.pop(key) for key in _MEASURED}
            kept["measures"] = tuple(measure_from(entry) for entry in kept["measures"])
            kept["cost"] = Cost(**kept["cost"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"A sharpness result must have the keys of to_dict(), got: {error}.") from error
        return cls(**kept, provenance=rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to ``path``, atomically.

        Raises: OutputError when it cannot be written.
        """
        write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharpnessResult:
        """Read what ``save`` wrote.

        Raises: DataError when ``path`` holds something else.
        """
        return cls.from_dict(read(path))

    def table(self) -> Table:
        """The result as rows and notes."""
        from sharpscope.results.sharpness_table import sharpness_table

        return sharpness_table([self])

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html


def measure_from(entry: Mapping[str, Any]) -> Measure:
    """A Measure from its record."""
    kept = {key: value for key, value in entry.items() if key != "definition"}
    kept["value"] = np.nan if kept["value"] is None else float(kept["value"])
    kept["prediction"] = {key: np.nan if v is None else v for key, v in kept["prediction"].items()}
    return Measure(**kept)


def short(value: Any) -> str:
    """A setting as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
