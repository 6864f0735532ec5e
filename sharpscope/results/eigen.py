"""The largest eigenvalues: the result that holds them, and the ratio of the first to the last."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.results.cost import Cost
from sharpscope.results.eigen_table import eigen_table
from sharpscope.results.record import (
    CERTAIN,
    UNREADABLE,
    arrays_beside,
    head,
    opened,
    plain,
    read,
    refuse_taken,
    write,
)
from sharpscope.results.table import Table, as_html, as_pretty, as_text

Array = NDArray[np.float64]

_MEASURED = (
    *("loss", "gradient_norm", "eigenvalues", "residuals", "lower", "upper", "converged", "cost"),
    *("missed_probability", "sampling", "certificate"),
)
_DERIVED = ("lambda_max", "ratio")


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
    """The k largest algebraic eigenvalues of the Hessian of a data set's mean loss, or others, with intervals.

    Attributes:
        eigenvalues: (k,) with multiplicity, in units of the loss over squared weights; descending, but from the end
            inwards where ``which`` is "smallest", and by ``|lambda|`` where it is "magnitude".
        residuals: ``||H v - lambda v||`` (k,), from true products.
        lower, upper: an interval (k,) for each; for a pair that has not converged the place k is not sure.
        converged: bool (k,), whether the interval is within the tolerance.
        missed_probability: (k,), at most so probable is it that an eigenvalue beyond the i-th one was missed, as far as
            the solver's random vectors say, taking what was found as given; 1 where they say nothing.
        sampling: where the data stand for more than themselves: ``se``, ``lower``, ``upper`` (k,) of each eigenvalue of
            the population, ``examples`` and more; else None.
        certificate: where one was asked for: ``above``, a threshold, and ``probability`` of having missed an eigenvalue
            above it, with ``eps``, ``runs`` and ``steps``; else None.
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
    missed_probability: Array | None = None
    sampling: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, (*_MEASURED, *_DERIVED))

    @property
    def certified(self) -> bool:
        """Whether the certificate that was asked for holds; True where none was."""
        return self.certificate is None or bool(self.certificate["probability"] <= CERTAIN)

    @property
    def which(self) -> str:
        """Which eigenvalues these are: "largest", "smallest", "both" or "magnitude"."""
        return str(self.provenance.get("which", "largest"))

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue.

        Raises: DataError when it was not measured.
        """
        if self.which not in ("largest", "both"):
            raise DataError(f"lambda_max was not measured, with which={self.which!r}. Measure which='largest'.")
        return float(self.eigenvalues[0])

    @property
    def ratio(self) -> Ratio:
        """``lambda_max / lambda_k``, with an interval from both eigenvalues' intervals."""
        if self.which not in ("largest", "both"):
            return Ratio(len(self.eigenvalues), None, None, None, "these are not the largest eigenvalues")
        k = len(self.eigenvalues) // (2 if self.which == "both" else 1)
        return Ratio.of(self.eigenvalues[:k], self.lower[:k], self.upper[:k])

    @property
    def labels(self) -> list[str]:
        """What each eigenvalue is called: lambda_max, lambda_2, ...; lambda_min the smallest; (1), (2) by magnitude."""
        count = len(self.eigenvalues)
        up = ["lambda_max", *(f"lambda_{i}" for i in range(2, count + 1))]
        down = ["lambda_min", *(f"lambda_n-{i}" for i in range(1, count))]
        half = count // 2
        named = {"smallest": down, "both": up[:half] + down[:half][::-1]}
        return named.get(self.which, up if self.which == "largest" else [f"lambda_({i})" for i in range(1, count + 1)])

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
            "missed_probability": None if self.missed_probability is None else self.missed_probability.tolist(),
            "sampling": plain(self.sampling),
            "certificate": plain(self.certificate),
            "lambda_max": self.lambda_max if self.which in ("largest", "both") else None,
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
            measured = {key: np.array(rest.pop(key), float) for key in ("eigenvalues", "residuals", "lower", "upper")}
            converged, missed = np.array(rest.pop("converged"), bool), rest.pop("missed_probability", None)
            loss, gradient_norm, cost = rest.pop("loss"), rest.pop("gradient_norm"), Cost(**rest.pop("cost"))
            sampling, certificate = rest.pop("sampling", None), rest.pop("certificate", None)
        except (KeyError, TypeError) as error:
            raise DataError(f"An eigen result must have the keys of EigenResult.to_dict(), got: {error}.") from error
        for derived in _DERIVED:
            rest.pop(derived, None)
        return cls(
            **measured,
            converged=converged,
            loss=loss,
            gradient_norm=gradient_norm,
            cost=cost,
            provenance=rest,
            missed_probability=None if missed is None else np.array(missed, float),
            sampling=sampling,
            certificate=certificate,
        )

    def save(self, path: str | os.PathLike[str], *, vectors: bool = False) -> None:
        """Write JSON to ``path``, atomically, and with ``vectors`` the eigenvectors beside it as ``.npz``.

        Raises: OutputError when it cannot be written, DataError when there are no vectors to write.
        """
        arrays = None
        if vectors:
            if self.eigenvectors is None:
                raise DataError("The result must hold eigenvectors to save them. Measure with vectors=True.")
            arrays = {"eigenvectors": self.eigenvectors, "eigenvalues": self.eigenvalues}
        write(path, self.to_dict(), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EigenResult:
        """Read what ``save`` wrote, with the eigenvectors where the ``.npz`` is there.

        Raises: DataError when ``path`` holds something else.
        """
        result = cls.from_dict(read(path))
        beside = arrays_beside(path)
        if beside.is_file():
            # A file of another run, or of another making, that only shares the name is not this one's vectors.
            with contextlib.suppress(*UNREADABLE), np.load(beside) as arrays:
                if np.array_equal(arrays["eigenvalues"], result.eigenvalues):
                    return replace(result, eigenvectors=arrays["eigenvectors"])
        return result

    def table(self) -> Table:
        """The result as rows and notes."""
        return eigen_table([self])

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html
