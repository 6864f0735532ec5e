"""lambda_max and trace of each diagonal block: the result that holds them, and the table that shows results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.formatting import with_mark
from sharpscope.results.base import CheckpointResult, Cost
from sharpscope.results.origin import describe_origin
from sharpscope.results.serialization import Array, Shape, annotations_of, as_json, metadata_of, parse_value
from sharpscope.results.statistics import Estimate
from sharpscope.results.table import Table, stacked

# A field of this shape is a key of each block's object in the JSON, of the same name or this one.
BLOCKS = Shape("L")
PerBlock = Annotated[Array, BLOCKS]
_RENAMED = {
    "names": "name",
    "sizes": "num_params",
    "residuals": "residual",
    "traces": "trace",
    "trace_errors": "trace_error",
}

# Standard errors that the whole trace must be away from zero before shares of it are told.
MIN_STANDARD_ERRORS = 4.0

BLOCK_DEFINITIONS = {
    "module": "A block is the parameters that one module holds itself, named as in model.named_modules()",
    "parameter": "A block is one parameter tensor",
}


@dataclass(frozen=True, eq=False)
class BlockResult(CheckpointResult):
    """lambda_max and trace of each diagonal block ``H_ll`` of the Hessian of a data set's mean loss; L blocks.

    Attributes:
        names: (L,) of the blocks, in the parameters' order; provenance ``by`` says whether of modules or parameters.
            A tied parameter belongs to the first of its names.
        sizes: (L,), each block's number of parameters.
        lambda_max: (L,), each block's largest algebraic eigenvalue, in units of the loss over squared weights.
        residuals: ``||H_ll v - lambda v||`` (L,), from true products.
        lower, upper: an interval (L,) for each lambda_max.
        converged: bool (L,), whether the interval is within the tolerance.
        traces, trace_errors: ``tr H_ll`` (L,) with standard errors, independent of each other.
        loss: L(w), with the weight decay if it was asked for.
        gradient_norm: ``||grad L(w)||``.
        cost: what it took; a product with a vector of one block counts as a whole one.
        provenance: as EigenResult's, with ``by``, ``operator``, ``probes``.
    """

    analysis = "blocks"
    derived = ("trace",)

    names: Annotated[tuple[str, ...], BLOCKS]
    sizes: Annotated[NDArray[np.int64], BLOCKS]
    lambda_max: PerBlock
    residuals: PerBlock
    lower: PerBlock
    upper: PerBlock
    converged: Annotated[NDArray[np.bool_], BLOCKS]
    traces: PerBlock
    trace_errors: PerBlock
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise DataError("A blocks result needs at least one block, got none. Measure it again.")

    @property
    def trace(self) -> Estimate:
        """``tr H``, the sum over the blocks."""
        return Estimate(float(self.traces.sum()), float(np.linalg.norm(self.trace_errors)))

    @property
    def shares(self) -> list[Estimate] | None:
        """``tr H_ll / tr H`` of each block, with standard errors to first order.

        None where ``tr H`` is not positive beyond doubt, and shares of it would mean nothing.
        """
        whole = self.trace
        if whole.value <= MIN_STANDARD_ERRORS * whole.standard_error:
            return None
        parts = self.traces / whole.value
        others = whole.standard_error**2 - self.trace_errors**2
        errors = np.sqrt((1 - parts) ** 2 * self.trace_errors**2 + parts**2 * np.maximum(others, 0)) / whole.value
        return [Estimate(float(part), float(error)) for part, error in zip(parts, errors, strict=True)]

    @classmethod
    def _block_keys(cls) -> dict[str, str]:
        """The fields with an entry a block, and each one's key in a block's object."""
        hints = annotations_of(cls)
        return {name: _RENAMED.get(name, name) for name in cls._json_fields() if BLOCKS in metadata_of(hints[name])}

    @classmethod
    def _json_keys(cls) -> tuple[str, ...]:
        return ("blocks", *(key for key in super()._json_keys() if key not in cls._block_keys()))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values: an object a block, with its share of the trace."""
        values, keys = super().to_dict(), self._block_keys()
        columns = {key: values.pop(name) for name, key in keys.items()}
        columns["share"] = [None] * len(self.names) if self.shares is None else as_json(self.shares)
        blocks = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return {**values, "blocks": blocks}

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        blocks = parse_value(tuple[Mapping[str, Any], ...], values["blocks"], "blocks")
        known = {name: key for name, key in cls._block_keys().items() if any(key in block for block in blocks)}
        return super()._parse({**values, **{name: [block[key] for block in blocks] for name, key in known.items()}})

    @classmethod
    def _table(cls, results: Sequence[BlockResult], names: Sequence[str]) -> Table:
        """A table a result, one row a block, each with its notes below."""
        return stacked(
            [
                Table(r._rows(), [*cls._named_notes([r], [name]), *r._legend()])
                for name, r in zip(names, results, strict=True)
            ]
        )

    def _rows(self) -> list[list[str]]:
        rows, shares = [["block", "parameters", "lambda_max", "trace", "share"]], self.shares
        for i, name in enumerate(self.names):
            top = with_mark(self.lambda_max[i], self.lower[i], self.upper[i], self.converged[i], " ?")
            trace = Estimate(float(self.traces[i]), float(self.trace_errors[i]))
            # 0.0 is added, lest a share of -1e-9 be shown as -0.0.
            share = "-" if shares is None else f"{round(100 * shares[i].value, 1) + 0.0:.1f} %"
            rows.append([name, f"{self.sizes[i]:,}", top, str(trace), share])
        return [*rows, ["all", f"{self.sizes.sum():,}", "", str(self.trace), ""]]

    def _notes(self) -> list[str]:
        return [
            describe_origin(self.provenance),
            f"loss {self.loss:.4g}, |grad| {self.gradient_norm:.2g}; {self.cost.gradients:.1f} gradients in "
            f"{self.cost.passes} passes, {self.cost.seconds:.1f} seconds.",
        ]

    def _legend(self) -> list[str]:
        p, notes = self.provenance, []
        if definition := BLOCK_DEFINITIONS.get(str(p.get("by"))):
            notes.append(f"{definition}; a tied parameter counts under the first of its names.")
        if p.get("operator", "hessian") != "hessian":
            approximate = p["operator"] == "finite-difference"
            about = "approximate, and their intervals leave its error out" if approximate else "not of the Hessian"
            notes.append(f"Blocks of the operator {p['operator']}, {about}.")
        notes.append("± of lambda_max is half an interval, of a trace one standard error over the random vectors.")
        if self.shares is None:
            notes.append("No shares, since the whole trace is not positive beyond doubt.")
        if not self.converged.all():
            missing = ", ".join(name for name, sure in zip(self.names, self.converged, strict=True) if not sure)
            notes.append(
                f"NOT CONVERGED to the tolerance {p.get('tol', '?')} (marked ?): {missing}. Allow more passes "
                "(--max-passes), a larger tolerance (--tol), or lift to float64 (--dtype float64)."
            )
        return notes
