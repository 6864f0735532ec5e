"""The origin of a result in words, from its provenance: which checkpoint, examples, parameters, mode and precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def typed_value(provenance: Mapping[str, Any], key: str, kind: Any) -> Any:
    """Return the value under ``key``, None where it has another type: users may put anything into a provenance."""
    value = provenance.get(key)
    return value if isinstance(value, kind) else None


def checkpoint_names(provenances: Sequence[Mapping[str, Any]]) -> list[str]:
    """The checkpoints' file names, or whole paths where names come twice; models without a file are numbered."""
    paths = [str(provenance.get("checkpoint") or "model") for provenance in provenances]
    if paths.count("model") > 1:
        count = iter(range(1, len(paths) + 1))
        paths = [f"model {next(count)}" if path == "model" else path for path in paths]
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def describe_examples(provenance: Mapping[str, Any]) -> str:
    """How many examples of which data: "1000 examples of digits (train)"."""
    where = f"{provenance.get('num_examples', '?')} examples"
    if provenance.get("data") and provenance.get("split"):
        noise = typed_value(provenance, "label_noise", int | float)
        wrong = f", {100 * noise:.3g}% wrong labels" if noise else ""
        where += f" of {provenance['data']} ({provenance['split']}{wrong})"
    return where


def describe_departures(provenance: Mapping[str, Any]) -> list[str]:
    """What of the loss measured is not the default: weight decay, a choice of parameters, BatchNorm of the batch."""
    decay, params = typed_value(provenance, "weight_decay", int | float), provenance.get("params", "*")
    patterns = [params] if isinstance(params, str) else list(params) if isinstance(params, list | tuple) else ["*"]
    departures = [f"with weight decay {decay:g}"] if decay else []
    departures += [f"parameters matching {', '.join(map(str, patterns))}"] if patterns != ["*"] else []
    return departures + ["BatchNorm by batch statistics"] * (provenance.get("batchnorm") == "batch statistics")


def describe_origin(provenance: Mapping[str, Any]) -> str:
    """One sentence: which examples, parameters, mode, weight decay and precision, how the weights came about."""
    where = describe_examples(provenance)
    how = ", ".join(
        [
            f"{provenance.get('num_params', '?')} parameters",
            f"{provenance.get('mode', '?')} mode",
            *describe_departures(provenance),
        ]
    )
    return f"{where}, {how}, {provenance.get('dtype', '?')}{_training_suffix(provenance)}."


def origin_notes(provenance: Mapping[str, Any]) -> list[str]:
    """The origin, which weights of a file were loaded if not all, and the matrix if it is not the Hessian."""
    notes = [describe_origin(provenance)]
    key, prefix = provenance.get("weights_key"), provenance.get("weights_prefix")
    left = typed_value(provenance, "weights_left_out", list | tuple)
    parts = [f"weights under {key!r}"] if key else []
    parts += [f"the prefix {prefix!r} taken off their names"] if prefix else []
    if left:
        parts.append(f"left out: {', '.join(map(str, left[:3]))}{f' and {len(left) - 3} more' if left[3:] else ''}")
    notes += [f"{'; '.join(parts)}."] if parts else []
    operator = provenance.get("operator", "hessian")
    if operator != "hessian":
        what = "finite differences of the gradient, approximate" if operator == "finite-difference" else operator
        notes.append(f"eigenvalues not of the Hessian by double backprop, but of: {what}.")
    return notes


def _training_suffix(provenance: Mapping[str, Any]) -> str:
    """Describe how the weights were trained, as far as the checkpoint records it."""
    recipe, epoch = typed_value(provenance, "recipe", Mapping) or {}, provenance.get("epoch")
    text = ""
    if recipe.get("optimizer"):
        rho = typed_value(recipe, "rho", int | float)
        variant, m = str(recipe.get("variant", "sam")).upper(), recipe.get("m")
        text += f", {recipe['optimizer']}" if rho is None else f", {variant} around {recipe['optimizer']}, rho {rho:g}"
        text += "" if m is None else f", m {m}"
    return text + (f", epoch {epoch}" if epoch is not None else "")
