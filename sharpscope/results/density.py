"""The spectral density: quadratures, one a random vector, and what follows from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.results.cost import Cost
from sharpscope.results.curve import Curve, shares_below, smoothed
from sharpscope.results.estimate import Estimate
from sharpscope.results.record import (
    POINT_AND_PRICE,
    head,
    names_of,
    opened,
    origin_notes,
    point_and_price,
    read,
    refuse_taken,
    write,
)
from sharpscope.results.table import Table, as_html, as_pretty, as_text
from sharpscope.tables import narrower

Array = NDArray[np.float64]

_ARRAYS = ("nodes", "weights")
_ESTIMATES = ("trace", "frobenius")
_PLAIN = ("num_known", "loss", "gradient_norm")
_MEASURED = (*_ARRAYS, *_ESTIMATES, *_PLAIN, "cost")
_SHARES = ("mean", "second_moment", "negative_mass", "near_zero_mass")
_DERIVED = (*_SHARES, "curve")

# An eigenvalue counts as negative from so many widths below zero on, by a step softened to so many widths, lest one
# node's side decide. Of an eigenvalue at zero 3e-5 then counts as negative.
SURELY, SOFTNESS = 2.0, 0.5


@dataclass(frozen=True, eq=False)
class DensityResult:
    """The spectral density ``phi(t) = (1/n) sum_i delta(t - lambda_i)`` of the Hessian of a data set's mean loss.

    Attributes:
        nodes: (K, d + s), in each row the d eigenvalues that were known, then the nodes of one probe's quadrature.
        weights: (K, d + s), not negative, each row's sum 1: ``phi(t) ~ sum_j weights_j delta(t - nodes_j)``.
        num_known: d.
        trace: ``tr H`` with its standard error, by XTrace from the same probes and one more pass.
        frobenius: ``||H||_F``, likewise.
        loss: L(w), with the weight decay if it was asked for.
        gradient_norm: ``||grad L(w)||``.
        cost: what it took.
        provenance: as EigenResult's, with ``probes`` and ``steps``; ``num_params`` is n.
    """

    nodes: Array
    weights: Array
    num_known: int
    trace: Estimate
    frobenius: Estimate
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, (*_MEASURED, *_DERIVED))
        if self.nodes.ndim != 2 or self.nodes.shape != self.weights.shape or len(self.nodes) < 2:
            shapes = f"{self.nodes.shape} and {self.weights.shape}"
            raise DataError(f"Nodes and weights must be of one shape (K, s) with K at least 2, got {shapes}.")
        if not isinstance(self.provenance.get("num_params"), int):
            raise DataError("The provenance must hold num_params, the number of eigenvalues.")

    @property
    def n(self) -> int:
        """The number of eigenvalues, which is that of the parameters."""
        return int(self.provenance["num_params"])

    @property
    def mean(self) -> Estimate:
        """The mean eigenvalue, ``tr H / n``."""
        return Estimate(self.trace.value / self.n, self.trace.standard_error / self.n)

    @property
    def second_moment(self) -> Estimate:
        """The mean squared eigenvalue, ``||H||_F^2 / n``."""
        value, error = self.frobenius.value, self.frobenius.standard_error
        return Estimate(value**2 / self.n, 2 * value * error / self.n)

    def moment(self, power: int) -> Estimate:
        """The mean ``power``-th power of an eigenvalue, from the quadratures alone (exact in them up to 2s - 1)."""
        return Estimate.of((self.weights * self.nodes**power).sum(1))

    @property
    def negative_mass(self) -> Estimate:
        """The share of eigenvalues below ``-2 width``, where their sign is sure.

        Which node falls on which side of zero itself would be chance: where many eigenvalues are next to zero, as those
        of networks are, one node stands for all of them. (Seen on a CNN with a quarter of its eigenvalues below zero
        and half of them zero: the nodes below zero weigh 0.68 +- 0.04.) What is nearer is ``near_zero_mass``.
        """
        return Estimate.of(self._below(-SURELY * self.width))

    @property
    def near_zero_mass(self) -> Estimate:
        """The share of eigenvalues within ``2 width`` of zero, whose sign these steps do not resolve."""
        return Estimate.of(self._below(SURELY * self.width) - self._below(-SURELY * self.width))

    def _below(self, at: float) -> Array:
        return shares_below(self.nodes, self.weights, at, SOFTNESS * self.width)

    @property
    def width(self) -> float:
        """The Gaussian's standard deviation in ``curve``: the nodes' range over the steps, without known eigenvalues.

        The narrowest that s steps resolve for any spectrum: a polynomial of degree 2s, which they are exact for, then
        follows a Gaussian to exp(-8) of its height (its Chebyshev series). Eigenvalues that were taken out do not widen
        it.
        """
        free = self.nodes[:, self.num_known :]
        spread = float(free.max() - free.min())
        # Of a single point, a multiple of the identity, a thousandth of its size, and of nothing at all something.
        return max(spread, 1e-3 * float(np.abs(free).max()), 1e-100) / int(free.shape[1])

    def curve(self, grid: Array | None = None, width: float | None = None, confidence: float = 0.95) -> Curve:
        """The density smoothed by a Gaussian, with a band for its mean over all probes (Student's t).

        A weight of one eigenvalue is chi-squared, not normal: where the curve is one outlier's, a band of 95 % from 6
        probes covers about 80 % (seen on two networks; 88 % on average over the grid). Known outliers are exact.

        Args:
            grid: where, ascending; by default all of the spectrum in steps of a tenth of the width.
            width: the Gaussian's standard deviation; by default ``width``. With a narrower one single nodes show, and
                they are not eigenvalues.
            confidence: of the band, at each point for itself.

        Raises: DataError when the width is not positive or the confidence not between 0 and 1.
        """
        chosen = self.width if width is None else float(width)
        if not chosen > 0 or not 0 < confidence < 1:
            raise DataError(f"width must be positive and confidence between 0 and 1, got {width} and {confidence}.")
        return smoothed(self.nodes, self.weights, chosen, confidence, grid)

    def to_dict(self) -> dict[str, Any]:
        """Everything, and what follows from it, as plain JSON values."""
        curve = {
            key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(self.curve()).items()
        }
        return {
            **head("density", self.provenance),
            **{key: getattr(self, key) for key in _PLAIN},
            **{key: asdict(getattr(self, key)) for key in (*_ESTIMATES, *_SHARES)},
            "curve": curve,
            **{key: getattr(self, key).tolist() for key in _ARRAYS},
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DensityResult:
        """The inverse of ``to_dict``.

        Raises: DataError when a key is missing or it is another analysis.
        """
        rest = {key: value for key, value in opened(values, "density").items() if key not in _DERIVED}
        try:
            measured = {key: rest.pop(key) for key in _MEASURED}
            measured |= {key: np.array(measured[key], float) for key in _ARRAYS}
            measured |= {key: Estimate(**measured[key]) for key in _ESTIMATES} | {"cost": Cost(**measured["cost"])}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"A density result must have the keys of DensityResult.to_dict(), got: {error}.") from error
        return cls(**measured, provenance=rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to ``path``, atomically.

        Raises: OutputError when it cannot be written.
        """
        write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DensityResult:
        """Read what ``save`` wrote.

        Raises: DataError when ``path`` holds something else.
        """
        return cls.from_dict(read(path))

    def table(self) -> Table:
        """The result as rows and notes."""
        return density_table([self])

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html


def density_table(results: Sequence[DensityResult]) -> Table:
    """A row a result, or a column where that is narrower."""
    return Table(narrower(_rows(results)), _notes(results))


def _rows(results: Sequence[DensityResult]) -> list[list[str]]:
    estimates = ["trace", "||H||_F", "mean eigenvalue", "negative mass"]
    rows = [["checkpoint", *estimates, *POINT_AND_PRICE]]
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        shown = [str(r.trace), str(r.frobenius), str(r.mean), str(r.negative_mass)]
        rows.append([name, *shown, *point_and_price(r.loss, r.gradient_norm, r.cost)])
    return rows


def _notes(results: Sequence[DensityResult]) -> list[str]:
    notes = []
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        known = r.num_known
        steps = r.nodes.shape[1] - known
        without = f", {known} eigenvalues taken out before" if known else ""
        notes += origin_notes(name, r.provenance)
        notes.append(
            f"{name}: {len(r.nodes)} random vectors, {steps} Lanczos steps each{without}; density smoothed to a width "
            f"of {r.width:.2g}. Negative is what is below {-SURELY * r.width:.2g}; of the share {r.near_zero_mass} "
            "nearer to zero the sign is not resolved."
        )
    return [*notes, "± is one standard error, over the random vectors."]
