"""Results: what was measured, how surely, at what cost, and where it came from. NumPy only."""

from __future__ import annotations

import contextlib
import html
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError, OutputError
from sharpscope.files import atomic

Array = NDArray[np.float64]

# What np.load raises for a file of another making.
_UNREADABLE = (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Cost:
    """What a measurement took.

    Attributes:
        passes: full walks over the data.
        hvps: Hessian-vector products over the whole data set.
        gradients: everything done, audit included, in units of one gradient (forward and backward) over the data set.
        seconds: wall-clock.
    """

    passes: int
    hvps: int
    gradients: float
    seconds: float


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
        ratio, cost = self.ratio, self.cost
        return {
            "analysis": "eigen",
            **dict(self.provenance),
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "eigenvalues": self.eigenvalues.tolist(),
            "residuals": self.residuals.tolist(),
            "lower": self.lower.tolist(),
            "upper": self.upper.tolist(),
            "converged": self.converged.tolist(),
            "lambda_max": self.lambda_max,
            "ratio": {
                "k": ratio.k,
                "value": ratio.value,
                "lower": ratio.lower,
                "upper": ratio.upper,
                "reason": ratio.reason,
            },
            "cost": {
                "passes": cost.passes,
                "hvps": cost.hvps,
                "gradients": cost.gradients,
                "seconds": cost.seconds,
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EigenResult:
        """The inverse of ``to_dict``.

        Raises: DataError when a key is missing or it is another analysis.
        """
        analysis = values.get("analysis") if isinstance(values, Mapping) else None
        if analysis != "eigen":
            raise DataError(f"An eigen result must be an object with analysis 'eigen', got {analysis!r}.")
        rest = dict(values)
        try:
            measured = {key: rest.pop(key) for key in ("eigenvalues", "residuals", "lower", "upper", "converged")}
            loss, gradient_norm, cost = rest.pop("loss"), rest.pop("gradient_norm"), Cost(**rest.pop("cost"))
        except (KeyError, TypeError) as error:
            raise DataError(f"An eigen result must have the keys of EigenResult.to_dict(), got: {error}.") from error
        for derived in ("analysis", "lambda_max", "ratio"):
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
        if Path(path).suffix == ".npz":
            raise OutputError(f"The result is JSON, and its vectors go beside it as .npz, got {path}. Name it .json.")
        if vectors:
            if self.eigenvectors is None:
                raise DataError("The result must hold eigenvectors to save them. Measure with vectors=True.")
            with atomic(Path(path).with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
                np.savez(file, eigenvectors=self.eigenvectors, eigenvalues=self.eigenvalues)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EigenResult:
        """Read what ``save`` wrote, with the eigenvectors where the ``.npz`` is there.

        Raises: DataError when ``path`` holds something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} must be a JSON file written by sharpscope; problem: {error}.") from error
        result = cls.from_dict(values)
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

    def _repr_html_(self) -> str:
        head, *rows = rows_of([self])
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in notes_of([self]))
        return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>{notes}"


def with_bound(value: float, lower: float, upper: float) -> str:
    """``value`` to the digits that its interval supports, with the half-width rounded up: "1.2345 ±0.0002"."""
    half = max(upper - value, value - lower)
    if not np.isfinite(half) or half <= 0:
        return f"{value:.6g}"
    last = int(np.floor(np.log10(half)))
    # Less a little, or the difference of two floats that stands for 0.01 would be rounded up to 0.02.
    half = float(np.ceil(half / 10.0**last * (1 - 1e-6)) * 10.0**last)
    first = int(np.floor(np.log10(abs(value)))) if value else last
    if -4 <= max(first, last) < 6:
        return f"{value:.{max(-last, 0)}f} ±{half:.{max(-last, 0)}f}"
    return f"{value:.{max(first - last, 0)}e} ±{half:.0e}"


def rows_of(results: Sequence[EigenResult]) -> list[list[str]]:
    """A heading and one row a result: checkpoint, lambda_1..lambda_k, ratio, loss, gradient norm, cost."""
    k = max(len(result.eigenvalues) for result in results)
    head = ["checkpoint", "lambda_max", *(f"lambda_{i}" for i in range(2, k + 1)), f"lambda_max/lambda_{k}"]
    rows = [[*head, "loss", "|grad|", "gradients", "passes", "seconds"]]
    for r in results:
        intervals = zip(r.eigenvalues, r.lower, r.upper, r.converged, strict=True)
        values = [with_bound(v, low, up) + ("" if sure else " ?") for v, low, up, sure in intervals]
        ratio, cost = r.ratio, r.cost
        shown = "-" if ratio.value is None else with_bound(ratio.value, ratio.lower or 0.0, ratio.upper or np.inf)
        rows.append(
            [
                Path(str(r.provenance.get("checkpoint") or "-")).name,
                *values,
                *[""] * (k - len(values)),
                shown,
                f"{r.loss:.4g}",
                f"{r.gradient_norm:.2g}",
                f"{cost.gradients:.1f}",
                str(cost.passes),
                f"{cost.seconds:.1f}",
            ]
        )
    return rows


def notes_of(results: Sequence[EigenResult]) -> list[str]:
    """What a reader of the table must know: the data, the mode, what has not converged, ratios that mean nothing."""
    notes = []
    for r in results:
        p = r.provenance
        name = Path(str(p.get("checkpoint") or "model")).name
        where = f"{p.get('num_examples', '?')} examples" + (f" of {p['data']} ({p['split']})" if p.get("data") else "")
        how = f"{p.get('num_params', '?')} parameters, {p.get('mode', '?')} mode, {p.get('dtype', '?')}"
        notes.append(f"{name}: {where}, {how}.")
        if r.ratio.value is None:
            notes.append(f"{name}: no ratio, since {r.ratio.reason}.")
        if not r.converged.all():
            which = ", ".join(f"lambda_{i + 1}" for i in np.flatnonzero(~r.converged))
            notes.append(f"{name}: NOT CONVERGED to the tolerance {p.get('tol', '?')} (marked ?): {which}.")
    return notes


def table(results: Sequence[EigenResult]) -> str:
    """Results row by row as aligned text, with the notes below."""
    return "\n".join([aligned(rows_of(results)), "", *notes_of(results)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
