"""The largest eigenvalues: ratios of them, the result that holds them, and the table that shows results."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.files import atomic
from sharpscope.results.cost import Cost
from sharpscope.results.record import head, names_of, opened, origin, read, refuse_taken, require_json_name, write
from sharpscope.tables import aligned, as_html, with_bound

Array = NDArray[np.float64]

_MEASURED = ("loss", "gradient_norm", "eigenvalues", "residuals", "lower", "upper", "converged", "cost")
_DERIVED = ("lambda_max", "ratio")

# What np.load raises for a file of another making.
_UNREADABLE = (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Ratio:
    """``lambda_max / lambda_k`` with an interval; value None and a reason where the ratio means nothing."""

    k: int
    value: float | None
    lower: float | None
    upper: float | None
    reason: str | None

    @classmethod
    def of(cls, values: Array, lower: Array, upper: Array) -> Ratio:
        """The ratio of the first to the last of descending eigenvalues with intervals."""
        k = len(values)
        if k < 2:
            return cls(k, None, None, None, "a ratio needs k of at least 2")
        if values[-1] <= 0:
            return cls(k, None, None, None, f"lambda_{k} is not positive")
        if lower[-1] <= 0:
            return cls(k, None, None, None, f"the interval of lambda_{k} reaches zero")
        low = lower[0] / upper[-1] if lower[0] > 0 else 0.0
        return cls(k, float(values[0] / values[-1]), float(low), float(upper[0] / lower[-1]), None)


@dataclass(frozen=True, eq=False)
class EigenResult:
    """The k largest algebraic eigenvalues of the Hessian of a data set's mean loss, with an interval on each.

    Attributes:
        eigenvalues: descending (k,), with multiplicity, in units of the loss over squared weights.
        residuals: ``||H v - lambda v||`` (k,), from products computed for them alone.
        lower, upper: an interval (k,) for each; for a pair that has not converged the place k is not sure.
        converged: bool (k,), whether the interval is within the tolerance.
        loss: L(w), with the weight decay if it was asked for.
        gradient_norm: ``||grad L(w)||``.
        cost: what it took.
        provenance: checkpoint, sha256, data, examples, parameters, mode, dtype, device, seed, versions and the like.
        eigenvectors: (n, k) in the parameters' flat order, or None.
    """

    eigenvalues: Array
    residuals: Array
    lower: Array
    upper: Array
    converged: NDArray[np.bool_]
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)
    eigenvectors: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, (*_MEASURED, *_DERIVED))

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def ratio(self) -> Ratio:
        """``lambda_max / lambda_k``, with an interval from both eigenvalues' intervals."""
        return Ratio.of(self.eigenvalues, self.lower, self.upper)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the eigenvectors, as plain JSON values."""
        return {
            **head("eigen", self.provenance),
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "eigenvalues": self.eigenvalues.tolist(),
            "residuals": self.residuals.tolist(),
            "lower": self.lower.tolist(),
            "upper": self.upper.tolist(),
            "converged": self.converged.tolist(),
            "lambda_max": self.lambda_max,
            "ratio": asdict(self.ratio),
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EigenResult:
        """The inverse of ``to_dict``.

        Raises: DataError when a key is missing or it is another analysis.
        """
        rest = opened(values, "eigen")
        try:
            measured = {key: rest.pop(key) for key in ("eigenvalues", "residuals", "lower", "upper", "converged")}
            loss, gradient_norm, cost = rest.pop("loss"), rest.pop("gradient_norm"), Cost(**rest.pop("cost"))
        except (KeyError, TypeError) as error:
            raise DataError(f"An eigen result must have the keys of EigenResult.to_dict(), got: {error}.") from error
        for derived in _DERIVED:
            rest.pop(derived, None)
        return cls(
            **{key: np.array(value, bool if key == "converged" else float) for key, value in measured.items()},
            loss=loss,
            gradient_norm=gradient_norm,
            cost=cost,
            provenance=rest,
        )

    def save(self, path: str | os.PathLike[str], *, vectors: bool = False) -> None:
        """Write JSON to ``path``, atomically, and with ``vectors`` the eigenvectors beside it as ``.npz``.

        Raises: OutputError when it cannot be written, DataError when there are no vectors to write.
        """
        require_json_name(path)
        if vectors:
            if self.eigenvectors is None:
                raise DataError("The result must hold eigenvectors to save them. Measure with vectors=True.")
            with atomic(Path(path).with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
                np.savez(file, eigenvectors=self.eigenvectors, eigenvalues=self.eigenvalues)
        write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EigenResult:
        """Read what ``save`` wrote, with the eigenvectors where the ``.npz`` is there.

        Raises: DataError when ``path`` holds something else.
        """
        result = cls.from_dict(read(path))
        beside = Path(path).with_suffix(".npz")
        if beside.is_file():
            # A file of another run, or of another making, that only shares the name is not this one's vectors.
            with contextlib.suppress(*_UNREADABLE), np.load(beside) as arrays:
                if np.array_equal(arrays["eigenvalues"], result.eigenvalues):
                    return replace(result, eigenvectors=arrays["eigenvectors"])
        return result

    def summary(self) -> str:
        """The result as a table of text."""
        return table([self])

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return as_html(rows_of([self]), notes_of([self]))


def rows_of(results: Sequence[EigenResult]) -> list[list[str]]:
    """A heading and one row a result: checkpoint, lambda_1..lambda_k, ratio (for k > 1), loss, gradient norm, cost."""
    ks = {len(result.eigenvalues) for result in results}
    k = max(ks)
    ratio_head = [f"lambda_max/lambda_{k if len(ks) == 1 else 'k'}"] if k > 1 else []
    columns = ["lambda_max", *(f"lambda_{i}" for i in range(2, k + 1)), *ratio_head]
    rows = [["checkpoint", *columns, "loss", "|grad|", "gradients", "passes", "seconds"]]
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        intervals = zip(r.eigenvalues, r.lower, r.upper, r.converged, strict=True)
        values = [with_bound(v, low, up) + ("" if sure else " ?") for v, low, up, sure in intervals]
        ratio, cost = r.ratio, r.cost
        shown = "-" if ratio.value is None else with_bound(ratio.value, ratio.lower or 0.0, ratio.upper or np.inf)
        if len(ks) > 1:
            shown += f" (k={ratio.k})"
        measured = [*values, *[""] * (k - len(values)), *([shown] if k > 1 else [])]
        paid = [f"{cost.gradients:.1f}", str(cost.passes), f"{cost.seconds:.1f}"]
        rows.append([name, *measured, f"{r.loss:.4g}", f"{r.gradient_norm:.2g}", *paid])
    return rows


def notes_of(results: Sequence[EigenResult]) -> list[str]:
    """What a reader of the table must know: the data, the mode, what has not converged, ratios that mean nothing."""
    notes = []
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        p = r.provenance
        notes.append(f"{name}: {origin(p)}")
        if r.ratio.value is None and r.ratio.k > 1:
            notes.append(f"{name}: no ratio, since {r.ratio.reason}.")
        if not r.converged.all():
            missing = np.flatnonzero(~r.converged)
            which = "all" if len(missing) == len(r.converged) > 5 else ", ".join(f"lambda_{i + 1}" for i in missing)
            notes.append(
                f"{name}: NOT CONVERGED to the tolerance {p.get('tol', '?')} (marked ?): {which}. {_remedy(r)}"
            )
    return notes


def _remedy(result: EigenResult) -> str:
    half = float((result.upper - result.lower).max()) / 2
    rounding = 64 * float(np.finfo(np.float32).eps) * float(np.abs(result.eigenvalues).max())
    if result.provenance.get("dtype") == "float32" and half <= rounding:
        return f"float32 rounding leaves ±{half:.0e}: lift the computation to float64 (--dtype float64)."
    return "Allow more passes (--max-passes), or a larger tolerance (--tol)."


def table(results: Sequence[EigenResult]) -> str:
    """Results row by row as aligned text, with the notes below."""
    return "\n".join([aligned(rows_of(results)), "", *notes_of(results)])
