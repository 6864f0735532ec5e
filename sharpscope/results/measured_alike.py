"""Whether results are of one loss, and of one matrix, by their provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sharpscope.results.eigen import EigenResult

# Keys of a provenance.
WEIGHTS = ("sha256", "num_params")
DATA = ("data", "split", "label_noise", "num_examples", "examples_seed")
LOSS = ("loss_function", "weight_decay", "params", "mode")

# What they are called in a message.
WORDS = {
    "sha256": "checkpoint",
    "label_noise": "share of wrong labels",
    "examples_seed": "subset of the data",
    "loss_function": "loss",
    "weight_decay": "weight decay",
    "params": "choice of parameters",
}

# Relative difference of two values of one loss: float32 gives about 1e-6 in another order of sums, 1e-5 beside float64.
TOLERANCE = 1e-4


def differing(
    provenances: Sequence[Mapping[str, Any]], keys: Sequence[str], *, unknown: bool = True
) -> dict[str, list[Any]]:
    """The values of each of ``keys`` in which not all provenances agree.

    Args:
        provenances: of results, or as much of one as ``keys`` needs.
        keys: to compare.
        unknown: whether a key that only some have counts as a difference.
    """
    found = {key: [_value(provenance, key) for provenance in provenances] for key in keys}
    if not unknown:
        found = {key: [value for value in values if value is not None] for key, values in found.items()}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _value(provenance: Mapping[str, Any], key: str) -> Any:
    value = provenance.get(key)
    if key in ("weight_decay", "label_noise"):
        return value or 0.0
    if key == "operator":
        return value or "hessian"
    if key == "params":
        return ["*"] if value is None else [value] if isinstance(value, str) else list(value)
    return value


def describe(differ: Mapping[str, Sequence[Any]]) -> str:
    """What differs, in words: "the weight decay differs (0.0 against 0.5)"."""
    names = [WORDS.get(key, key) for key in differ]
    values = " against ".join(dict.fromkeys(map(_shown, next(iter(differ.values())))))
    came = f" ({values})" if len(values) < 100 and "sha256" not in list(differ)[:1] else ""
    return f"the {', '.join(names)} {'differ' if names[1:] else 'differs'}{came}"


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return ", ".join(value)
    return "unknown" if value is None else str(value)


def another_matrix(known: EigenResult, provenance: Mapping[str, Any], loss: float | None = None) -> str | None:
    """Why ``known`` is not of the matrix of a measurement: what differs, in words; None if nothing does.

    Args:
        known: eigenvalues.
        provenance: of the measurement. A key that only one of them has is not compared.
        loss: L(w) of the measurement, which shows other weights or data; None: not compared.
    """
    differ = differing([known.provenance, provenance], (*WEIGHTS, *DATA, *LOSS, "operator"), unknown=False)
    if differ:
        return describe(differ)
    if loss is not None and not math.isclose(known.loss, loss, rel_tol=TOLERANCE, abs_tol=1e-6):
        return f"the loss at the weights differs ({known.loss:.6g} against {loss:.6g})"
    return None
