"""A result's record, whatever the analysis: its JSON on disk, and what its provenance says to a reader."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError, OutputError
from sharpscope.files import atomic
from sharpscope.results.cost import Cost

# The layout of the saved JSON; a reader refuses a later one.
FORMAT = 1

# Above this probability of a miss there is no certificate.
CERTAIN = 0.01

# What np.load raises for a file of another making.
UNREADABLE = (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile)

# The columns that close every table of results.
POINT_AND_PRICE = ("loss", "|grad|", "gradients", "passes", "seconds")


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: a number that is not finite becomes null, what is no plain value its name."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def refuse_taken(provenance: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise DataError when ``provenance``, which stands beside them in the record, uses one of a result's ``keys``."""
    taken = sorted({"format", "analysis", *keys} & set(provenance))
    if taken:
        raise DataError(f"Provenance must not use the result's own keys, got {', '.join(taken)}. Rename them.")


def head(analysis: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that open every record: format, analysis, and the provenance as plain values."""
    return {"format": FORMAT, "analysis": analysis, **{str(key): plain(value) for key, value in provenance.items()}}


def opened(values: Any, analysis: str) -> dict[str, Any]:
    """A copy of a record without its format and analysis.

    Raises: DataError when it is no object, of another analysis, or of a later format.
    """
    said = values.get("analysis") if isinstance(values, Mapping) else None
    if said != analysis:
        article = "An" if analysis[0] in "aeiou" else "A"
        raise DataError(f"{article} {analysis} result must be an object with analysis {analysis!r}, got {said!r}.")
    if values.get("format", FORMAT) != FORMAT:
        raise DataError(f"The result has format {values['format']!r}, and this sharpscope reads {FORMAT}.")
    return {key: value for key, value in values.items() if key not in ("format", "analysis")}


def require_json_name(path: str | os.PathLike[str]) -> None:
    """Raise OutputError where ``path`` is named for the arrays beside the record, not for the record."""
    if Path(path).suffix == ".npz":
        raise OutputError(f"The result is JSON, and its vectors go beside it as .npz, got {path}. Name it .json.")


def arrays_beside(path: str | os.PathLike[str]) -> Path:
    """Where the arrays of the record ``path`` are: ``sgd.json`` has ``sgd.npz``, ``run.1`` has ``run.1.npz``."""
    place = Path(path)
    return place.with_name(f"{place.name.removesuffix('.json')}.npz")


def write(
    path: str | os.PathLike[str], values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write ``arrays``, where there are any, beside ``path`` and then a record to it as JSON, each atomically.

    Raises: OutputError when it cannot be written, or ``path`` is named for the arrays.
    """
    require_json_name(path)
    if arrays is not None:
        # As keywords, mypy would take them for savez's own.
        given: dict[str, Any] = dict(arrays)
        with atomic(arrays_beside(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **given)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> Any:
    """What the JSON file at ``path`` holds.

    Raises: DataError when there is none.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a JSON file written by sharpscope; problem: {error}.") from error


def names_of(provenances: Sequence[Mapping[str, Any]]) -> list[str]:
    """The checkpoints' file names, or whole paths where names come twice; models without a file are numbered."""
    paths = [str(provenance.get("checkpoint") or "model") for provenance in provenances]
    if paths.count("model") > 1:
        count = iter(range(1, len(paths) + 1))
        paths = [f"model {next(count)}" if path == "model" else path for path in paths]
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def examples_of(provenance: Mapping[str, Any]) -> str:
    """How many examples of which data: "1000 examples of digits (train)"."""
    where = f"{provenance.get('num_examples', '?')} examples"
    if provenance.get("data") and provenance.get("split"):
        noise = provenance.get("label_noise")
        wrong = f", {100 * noise:.3g}% wrong labels" if noise else ""
        where += f" of {provenance['data']} ({provenance['split']}{wrong})"
    return where


def origin(provenance: Mapping[str, Any]) -> str:
    """One sentence: which examples, how many parameters, which mode and precision, how the weights came about."""
    where = examples_of(provenance)
    how = f"{provenance.get('num_params', '?')} parameters, {provenance.get('mode', '?')} mode"
    return f"{where}, {how}, {provenance.get('dtype', '?')}{_training(provenance)}."


def origin_notes(name: str, provenance: Mapping[str, Any]) -> list[str]:
    """The origin under the checkpoint's name, and the matrix where it is not the Hessian by double backprop."""
    notes, operator = [f"{name}: {origin(provenance)}"], provenance.get("operator", "hessian")
    notes += _taken(name, provenance)
    if operator != "hessian":
        what = "finite differences of the gradient, approximate" if operator == "finite-difference" else operator
        notes.append(f"{name}: eigenvalues not of the Hessian by double backprop, but of: {what}.")
    return notes


def _taken(name: str, provenance: Mapping[str, Any]) -> list[str]:
    """Which of a file's weights were taken, where that is not all."""
    key, prefix, left = (provenance.get(key) for key in ("weights_key", "weights_prefix", "weights_left_out"))
    if not (key or prefix or left):
        return []
    said = [f"weights under {key!r}"] if key else []
    said += [f"the prefix {prefix!r} taken off their names"] if prefix else []
    if left:
        said.append(f"left out: {', '.join(map(str, left[:3]))}{f' and {len(left) - 3} more' if left[3:] else ''}")
    return [f"{name}: {'; '.join(said)}."]


def point_and_price(loss: float, gradient_norm: float, cost: Cost) -> list[str]:
    """The cells under ``POINT_AND_PRICE``."""
    paid = [f"{cost.gradients:.1f}", str(cost.passes), f"{cost.seconds:.1f}"]
    return [f"{loss:.4g}", f"{gradient_norm:.2g}", *paid]


def _training(provenance: Mapping[str, Any]) -> str:
    """How the weights came about, as far as the checkpoint says."""
    recipe, epoch = provenance.get("recipe") or {}, provenance.get("epoch")
    said = ""
    if recipe.get("optimizer"):
        rho = recipe.get("rho")
        variant, m = str(recipe.get("variant", "sam")).upper(), recipe.get("m")
        said += f", {recipe['optimizer']}" if rho is None else f", {variant} around {recipe['optimizer']}, rho {rho:g}"
        said += "" if m is None else f", m {m}"
    return said + (f", epoch {epoch}" if epoch is not None else "")
