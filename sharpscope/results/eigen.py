"""The largest eigenvalues: the result that holds them, the ratio of the first to the last, and their table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.formatting import with_mark
from sharpscope.results.base import Cost, RowResult
from sharpscope.results.origin import origin_notes
from sharpscope.results.serialization import (
    IN_NPZ,
    Array,
    MaybeNaNs,
    Schema,
    Shape,
    arrays_path,
    read_arrays,
    write_json,
)

# Above this probability of a miss there is no certificate.
MAX_MISS_PROBABILITY = 0.01

PerEigenvalue = Annotated[Array, Shape("k")]


class RatioSampling(TypedDict):
    """The sampling error of the ratio, in the JSON."""

    se: float
    lower: float
    upper: float
    bias: float


class Sampling(TypedDict):
    """The sampling errors of k eigenvalues, in the JSON; null where they are not known."""

    se: tuple[float, ...] | None
    lower: tuple[float, ...] | None
    upper: tuple[float, ...] | None
    bias: tuple[float, ...] | None
    ratio: RatioSampling | None
    confidence: float
    examples: int
    parts: int
    reason: str | None


class Certificate(TypedDict):
    """What the runs of a certificate support, in the JSON."""

    eps: float
    above: float
    probability: float
    runs: int
    steps: int
    kuczynski_wozniakowski: float


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
class EigenResult(RowResult):
    """The k largest algebraic eigenvalues of the Hessian of a data set's mean loss, or others, with intervals.

    Attributes:
        eigenvalues: (k,) with multiplicity, in units of the loss over squared weights; descending, but from the end
            inwards where ``which`` is "smallest", and by ``|lambda|`` where it is "magnitude".
        residuals: ``||H v - lambda v||`` (k,), from true products.
        lower, upper: an interval (k,) for each, from residuals, gaps and rounding (``sharpscope.linalg.ritz``), in
            float32 widened by the model's own rounding; for a pair that has not converged the place k is not sure.
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

    analysis = "eigen"
    derived = ("lambda_max", "ratio")

    eigenvalues: PerEigenvalue
    residuals: PerEigenvalue
    lower: PerEigenvalue
    upper: PerEigenvalue
    converged: Annotated[NDArray[np.bool_], Shape("k")]
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)
    eigenvectors: Annotated[NDArray[Any], Shape("n k"), IN_NPZ] | None = None
    missed_probability: Annotated[MaybeNaNs, Shape("k")] | None = None
    sampling: Annotated[Mapping[str, Any], Schema(Sampling)] | None = None
    certificate: Annotated[Mapping[str, Any], Schema(Certificate)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.eigenvalues) == 0:
            raise DataError("An eigen result needs at least one eigenvalue, got none. Measure it again.")
        sampling, k = self.sampling or {}, len(self.eigenvalues)
        known = {name: sampling[name] for name in ("se", "lower", "upper", "bias") if sampling.get(name) is not None}
        counts = {name: len(values) for name, values in known.items()}
        if set(counts.values()) - {k} or ("lower" in known) != ("upper" in known):
            raise DataError(
                f"An eigen result needs {k} numbers in each array of 'sampling', or none in all, got {counts}. Measure "
                "it again."
            )

    @property
    def certified(self) -> bool:
        """Whether the certificate that was asked for holds; True where none was."""
        return self.certificate is None or bool(self.certificate["probability"] <= MAX_MISS_PROBABILITY)

    @property
    def which(self) -> str:
        """Which eigenvalues these are: "largest", "smallest", "both" or "magnitude"."""
        return str(self.provenance.get("which", "largest"))

    @property
    def _has_largest(self) -> bool:
        return self.which in ("largest", "both")

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue.

        Raises: DataError when it was not measured.
        """
        if not self._has_largest:
            raise DataError(f"lambda_max was not measured, with which={self.which!r}. Measure which='largest'.")
        return float(self.eigenvalues[0])

    @property
    def ratio(self) -> Ratio:
        """``lambda_max / lambda_k``, with an interval from both eigenvalues' intervals."""
        if not self._has_largest:
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

    def _derived_values(self) -> dict[str, Any]:
        return {"lambda_max": self.lambda_max if self._has_largest else None, "ratio": self.ratio}

    def save(self, path: str | os.PathLike[str], *, vectors: bool = False) -> None:
        """Write JSON to ``path``, atomically, and with ``vectors`` the eigenvectors beside it as ``.npz``.

        Raises: OutputError when it cannot be written, DataError when there are no vectors to write.
        """
        arrays = None
        if vectors:
            if self.eigenvectors is None:
                raise DataError("The result must hold eigenvectors to save them. Measure with vectors=True.")
            arrays = {"eigenvectors": self.eigenvectors, "eigenvalues": self.eigenvalues}
        write_json(path, self.to_dict(), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EigenResult:
        """Read what ``save`` wrote, with the eigenvectors where the ``.npz`` is there.

        Raises: DataError when ``path`` holds something else, or is damaged.
        """
        result = super().load(path)
        arrays_file = arrays_path(path)
        if arrays_file.is_file():
            # A file of another run, or of another making, that only shares the name is not this one's vectors.
            with contextlib.suppress(DataError):
                arrays = read_arrays(arrays_file, ["eigenvalues", "eigenvectors"])
                if np.array_equal(arrays["eigenvalues"], result.eigenvalues):
                    return replace(result, eigenvectors=arrays["eigenvectors"])
        return result

    @classmethod
    def _columns(cls, results: Sequence[EigenResult]) -> dict[str, Sequence[str]]:
        """lambda_max to lambda_k, and where k > 1 their ratio."""
        ends = {r.which for r in results}
        if len(ends) > 1:
            raise DataError(
                "Eigenvalues side by side must be of the same end of the spectrum, got "
                f"{', '.join(sorted(ends))}. Show each by itself."
            )
        labels = max((r.labels for r in results), key=len)
        cells = [dict(zip(r.labels, r._eigenvalue_cells(), strict=True)) for r in results]
        columns: dict[str, Sequence[str]] = {label: [found.get(label, "") for found in cells] for label in labels}
        ks = {r.ratio.k for r in results}
        if max(ks) > 1 and results[0]._has_largest:
            if len(ks) == 1:
                columns[f"lambda_max/lambda_{ks.pop()}"] = [r._ratio_cell() for r in results]
            else:
                columns["lambda_max/lambda_k"] = [f"{r._ratio_cell()} (k={r.ratio.k})" for r in results]
        return columns

    def _eigenvalue_cells(self) -> list[str]:
        cells = zip(self.eigenvalues, self.lower, self.upper, self.converged, strict=True)
        return [with_mark(value, lower, upper, sure, " ?") for value, lower, upper, sure in cells]

    def _ratio_cell(self) -> str:
        ratio = self.ratio
        if ratio.value is None:
            return "-"
        sure = bool(self.converged[0] and self.converged[ratio.k - 1])
        return with_mark(ratio.value, ratio.lower, ratio.upper, sure, " ?")

    def _notes(self) -> list[str]:
        # Of a sample what it leaves open is more than the bounds in the table, and comes first.
        notes = [_sampling_note(self), *origin_notes(self.provenance), _missed_note(self), _certificate_note(self)]
        if self.ratio.value is None and self.ratio.k > 1 and self._has_largest:
            notes.append(f"no ratio, since {self.ratio.reason}.")
        if not self.converged.all():
            missing = np.flatnonzero(~self.converged)
            all_of_many = len(missing) == len(self.converged) > 5
            notes.append(
                f"NOT CONVERGED to the tolerance {self.provenance.get('tol', '?')} (marked ?): "
                f"{'all' if all_of_many else ', '.join(self.labels[i] for i in missing)}. Their intervals may be about "
                f"other eigenvalues. {_convergence_advice(self)}"
            )
        return [note for note in notes if note]


def _missed_note(result: EigenResult) -> str:
    """How sure it is that nothing larger was missed, as far as the run's random vectors say."""
    if result.which not in ("largest", "smallest"):
        return "no probability is stated of eigenvalues that were missed; that goes with --which largest or smallest."
    if result.missed_probability is None:
        return ""
    first, last = float(result.missed_probability[0]), float(result.missed_probability[-1])
    side = "above" if result.which == "largest" else "below"
    if first >= 0.995:
        unknown = "nothing is known of eigenvalues that were missed"
        return f"{unknown}; power iteration may skip some." if result.provenance.get("method") == "power" else ""
    text = f"an eigenvalue {side} {result.labels[0]} was missed with probability at most {_percent(first)}"
    if len(result.labels) > 1:
        text += f", {side} {result.labels[-1]} " + ("not excluded" if last >= 0.995 else f"at most {_percent(last)}")
    can_certify = last > MAX_MISS_PROBABILITY and result.which == "largest" and not result.certificate
    return text + ("; --certify pays for less." if can_certify else ".")


def _certificate_note(result: EigenResult) -> str:
    """What --certify paid for."""
    proof = result.certificate
    if not proof:
        return ""
    if proof["probability"] > MAX_MISS_PROBABILITY:
        return f"NO CERTIFICATE: after {proof['runs']} runs one above {proof['above']:.4g} is not excluded."
    where = f"above {proof['above']:.4g} (lambda_{result.ratio.k} + {proof['eps']:g} lambda_max)"
    missed = _percent(proof["probability"])
    return f"certificate, {proof['steps']} steps: one {where} was missed with probability at most {missed}."


def _sampling_note(result: EigenResult) -> str:
    """The intervals over the data."""
    if not result.sampling:
        return ""
    s = result.sampling
    if not result.converged.all():
        return "no intervals for all the data of which these are a sample: not all eigenvalues have converged."
    if s["lower"] is None:
        return f"no intervals for all the data of which these are a sample: {s['reason']}."
    pairs = zip(result.labels, s["lower"], s["upper"], strict=True)
    intervals = [f"{label} {low:.3g} to {high:.3g}" for label, low, high in pairs]
    if s.get("ratio"):
        intervals.append(f"lambda_max/lambda_{result.ratio.k} {s['ratio']['lower']:.3g} to {s['ratio']['upper']:.3g}")
    level = f"{100 * s['confidence']:.3g} %"
    return f"for all the data of which these are {s['examples']} examples, {level} intervals: {', '.join(intervals)}."


def _percent(probability: float) -> str:
    return f"{100 * max(probability, 1e-6):.2g} %"


def _convergence_advice(result: EigenResult) -> str:
    half = float((result.upper - result.lower).max()) / 2
    rounding = 64 * float(np.finfo(np.float32).eps) * float(np.abs(result.eigenvalues).max())
    if result.provenance.get("dtype") == "float32" and half <= rounding:
        return f"float32 rounding leaves ±{half:.0e}: lift the computation to float64 (--dtype float64)."
    return "Allow more passes (--max-passes), or a larger tolerance (--tol)."
