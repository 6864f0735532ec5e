"""A result file that was damaged, cut short or edited by hand ends in DataError and in nothing else."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saved import FILES, SAVED, read
from sharpscope.errors import DataError
from sharpscope.results import SliceResult

COST = ("cost.passes", "cost.hvps", "cost.gradients", "cost.seconds")
LOSS = ("loss", "gradient_norm", *COST)
PAIRS = ("eigenvalues.0", "residuals.0", "lower.0", "upper.0", "converged.0")
SAMPLED = ("sampling.se.0", "sampling.lower.0", "sampling.upper.0")
ESTIMATES = tuple(f"{name}.{key}" for name in ("trace", "frobenius") for key in ("value", "standard_error"))
DENSITY = ("nodes.0.0", "weights.0.0", "num_known", "num_params", *ESTIMATES, *LOSS)
BLOCK = ("num_params", "lambda_max", "residual", "lower", "upper", "converged", "trace", "trace_error")

# Where a number belongs, and null does not.
NUMBERS: dict[str, tuple[str, ...]] = {
    "eigen-largest": (*PAIRS, *LOSS, *SAMPLED, "certificate.above", "certificate.probability"),
    "density": DENSITY,
    "trace": (*ESTIMATES, *LOSS),
    "blocks": (*(f"blocks.0.{key}" for key in BLOCK), *LOSS),
    "sharpness": ("measures.0.gradients", *LOSS),
    "invariance": ("before.0.gradients", "after.1.gradients", "factor", "loss", *COST),
    "line": ("dimensions", "marks.0.coordinates.0", *COST),
    "monitor": ("records.0.step", "records.0.products"),
    "comparison-checkpoints": (
        "subjects.0.performance.train.examples",
        *(f"subjects.0.eigen.{key}" for key in (*PAIRS, *LOSS)),
        *(f"subjects.1.density.{key}" for key in DENSITY),
        *(f"subjects.1.trace.{key}" for key in ESTIMATES),
        *(f"subjects.1.line.{key}" for key in ("axes.0.0", "status.0.0", *COST)),
        *(f"between.0.{key}" for key in ("axes.0.0", "status.0.0", "infinite", *COST)),
    ),
}

# Where a number belongs, and null stands for one that is not finite, not known or not measured.
NULLABLE: dict[str, tuple[str, ...]] = {
    "eigen-largest": ("missed_probability.0",),
    "trace": ("sampling_error",),
    "sharpness": (
        *(f"measures.0.{key}" for key in ("value", "standard_error", "lower", "upper", "examples")),
        "measures.0.prediction.first order",
    ),
    "invariance": ("before.0.value", "after.1.value"),
    "line": ("marks.0.distance", "marks.0.length", "marks.0.loss.train", "marks.0.accuracy.train"),
    "monitor": tuple(
        f"records.0.{key}" for key in ("lambda_max", "lower", "upper", "loss", "sam_edge", "gradients", "seconds")
    ),
    "comparison-checkpoints": (
        "subjects.0.performance.train.loss",
        "subjects.0.performance.train.accuracy",
        "subjects.0.sharpness.measures.0.value",
        *(f"between.0.{key}" for key in ("loss.0.0.0", "accuracy.0.0.0", "centre.0.0", "slopes.0.0")),
        "between.0.marks.0.distance",
    ),
}

# Arrays and lists whose length another decides.
ARRAYS: dict[str, tuple[str, ...]] = {
    "eigen-largest": (
        *("eigenvalues", "residuals", "lower", "upper", "converged", "missed_probability"),
        *("sampling.se", "sampling.lower", "sampling.upper"),
    ),
    "density": ("nodes", "weights", "nodes.0", "weights.1"),
    "invariance": ("before", "after", "layers.0"),
    "line": ("splits", "directions", "directions.0", "marks.0.coordinates"),
    "comparison-checkpoints": (
        *(f"subjects.0.eigen.{key}" for key in ("eigenvalues", "residuals", "converged", "missed_probability")),
        *(f"between.0.{key}" for key in ("loss", "loss.0", "loss.0.0", "accuracy.0.0", "status.0", "centre", "axes.0")),
        *(f"between.0.{key}" for key in ("centre.0", "slopes", "slopes.0", "curvatures", "curvatures.0.0", "splits")),
        *(f"subjects.0.surface.{key}" for key in ("axes", "directions.0", "loss.0.0.0", "curvatures.0")),
    ),
}

POINT = ("analysis", "loss", "gradient_norm", "cost")
REQUIRED: dict[str, tuple[str, ...]] = {
    "eigen-largest": (*POINT, "eigenvalues", "residuals", "lower", "upper", "converged"),
    "density": (*POINT, "nodes", "weights", "num_known", "num_params", "trace", "frobenius"),
    "trace": (*POINT, "trace", "frobenius"),
    "blocks": (*POINT, "blocks"),
    "sharpness": (*POINT, "measures"),
    "invariance": ("analysis", "before", "after", "factor", "layers", "loss", "cost"),
    "line": ("analysis", "dimensions", "splits", "directions", "digest", "cost"),
    "monitor": ("analysis", "records"),
    "comparison-checkpoints": ("analysis", "level", "command", "subjects", "between"),
}


def refused(name: str, text: str | bytes, folder: Path, place: str) -> None:
    """Assert that a file of this text, with the arrays of ``name`` beside it, is refused; ``place`` is wrong in it."""
    path = saved(name, text, folder)
    try:
        FILES[name].load(path)
    except DataError:
        return
    pytest.fail(f"{name} with a wrong {place} was read.")


def at(values: Any, place: str) -> tuple[Any, Any]:
    """What holds the place, and its key there."""
    *way, last = (int(step) if step.isdigit() else step for step in place.split("."))
    for step in way:
        values = values[step]
    return values, last


def with_value(name: str, place: str, wrong: Any) -> str:
    """The text of a record with ``wrong`` at the place."""
    values = read(name)
    holder, key = at(values, place)
    holder[key] = wrong
    return json.dumps(values)


def saved(name: str, text: str | bytes, folder: Path) -> Path:
    """A file of this text, with the arrays of ``name`` beside it."""
    path = folder / f"{name}.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    if (SAVED / f"{name}.npz").is_file():
        shutil.copy(SAVED / f"{name}.npz", folder)
    return path


@pytest.mark.parametrize("name", NUMBERS)
def test_text_for_a_number_is_refused(name: str, tmp_path: Path) -> None:
    """A word where the record has a number is DataError when the file is loaded, not later."""
    for place in (*NUMBERS[name], *NULLABLE.get(name, ())):
        refused(name, with_value(name, place, "many"), tmp_path, place)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_list_or_an_object_for_a_number_is_refused(name: str, tmp_path: Path) -> None:
    """So is a list of lists, even one too deep for an array, and an object."""
    deep: Any = 1.0
    for _ in range(100):
        deep = [deep]
    for place in (*NUMBERS[name], *NULLABLE.get(name, ())):
        for wrong in ([[1.0, 2.0], [3.0]], deep, {"value": {}}):
            refused(name, with_value(name, place, wrong), tmp_path, place)


@pytest.mark.parametrize("name", NUMBERS)
def test_null_for_a_number_is_refused(name: str, tmp_path: Path) -> None:
    """Null is DataError wherever it does not stand for a number that is not finite or not known."""
    for place in NUMBERS[name]:
        refused(name, with_value(name, place, None), tmp_path, place)


@pytest.mark.parametrize("name", NULLABLE)
def test_null_for_what_is_not_finite_or_not_known_is_read(name: str, tmp_path: Path) -> None:
    """A record that says null there loads, and shows its table."""
    for place in NULLABLE[name]:
        assert FILES[name].load(saved(name, with_value(name, place, None), tmp_path)).summary(), place


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_one_entry_short_is_refused(name: str, tmp_path: Path) -> None:
    """An array whose length does not fit the others is DataError."""
    for place in ARRAYS[name]:
        values = read(name)
        holder, key = at(values, place)
        holder[key] = holder[key][:-1]
        refused(name, json.dumps(values), tmp_path, place)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_key_is_refused(name: str, tmp_path: Path) -> None:
    """A record without one of its required keys is DataError, which names it."""
    for key in REQUIRED[name]:
        values = read(name)
        del values[key]
        refused(name, json.dumps(values), tmp_path, key)


@pytest.mark.parametrize("name", REQUIRED)
def test_ten_thousand_nested_lists_in_a_field_are_refused(name: str, tmp_path: Path) -> None:
    """Nesting beyond the interpreter's recursion limit is DataError, not RecursionError."""
    for key in REQUIRED[name]:
        text = json.dumps({**read(name), key: "HERE"})
        refused(name, text.replace('"HERE"', "[" * 10_000 + "]" * 10_000), tmp_path, key)


WRONG_FILES = {
    "brackets": "[" * 100_000,
    "empty": "",
    "cut": '{"format": 1, "analysis": ',
    "binary": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "list": "[]",
    "null": "null",
    "number": "1",
    "later": '{"format": 99}',
}


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_another_kind_of_file_is_refused(name: str, wrong: str, tmp_path: Path) -> None:
    """No text, no JSON, no object, 100,000 open brackets: DataError of each class."""
    refused(name, WRONG_FILES[wrong], tmp_path, wrong)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_record_of_another_analysis_or_a_later_format_is_refused(name: str, tmp_path: Path) -> None:
    """The analysis and the format that a record says are checked first."""
    values = read(name)
    for wrong in ({"analysis": "other"}, {"analysis": ["eigen"]}, {"format": 2}, {"format": None}):
        refused(name, json.dumps({**values, **wrong}), tmp_path, str(wrong))


@pytest.mark.parametrize("key", ["axis0", "loss", "accuracy", "status", "centre", "slopes", "curvatures"])
@pytest.mark.parametrize("damage", ["missing", "short", "text", "other"])
def test_a_slice_with_damaged_arrays_is_refused(key: str, damage: str, tmp_path: Path) -> None:
    """An array of the .npz that is missing, one entry short, of text, or of other values is DataError."""
    shutil.copy(SAVED / "line.json", tmp_path)
    with np.load(SAVED / "line.npz") as file:
        arrays = dict(file)
    kept = arrays.pop(key)
    changed = {"short": kept[..., :-1], "text": kept.astype(str), "other": np.nan_to_num(kept) + 1}
    with open(tmp_path / "line.npz", "wb") as out:
        np.savez(out, **arrays, **({key: changed[damage]} if damage != "missing" else {}))
    with pytest.raises(DataError):
        SliceResult.load(tmp_path / "line.json")


# NumPy leaves the file open where it is no whole archive.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_slice_with_a_damaged_file_of_arrays_is_refused(damage: str, tmp_path: Path) -> None:
    """A .npz that is missing, empty, cut in half or no archive is DataError."""
    shutil.copy(SAVED / "line.json", tmp_path)
    whole = (SAVED / "line.npz").read_bytes()
    if damage != "missing":
        (tmp_path / "line.npz").write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"x" * 99}[damage])
    with pytest.raises(DataError):
        SliceResult.load(tmp_path / "line.json")
    gc.collect()


# Of another type than ours, whatever the key.
STRANGE: tuple[Any, ...] = ("20 %", 3, -0.5, True, None, ["a", 1], {"a": [1]})


@pytest.mark.parametrize("name", FILES)
def test_a_provenance_of_any_values_is_shown(name: str) -> None:
    """Provenance may be a user's own: whatever is under a key of ours, the result prints, or is refused."""
    kind, good = FILES[name], read(name)
    inside = {
        "comparison-checkpoints": ("subjects", 0, "provenance"),
        "comparison-groups": ("subjects", 0, "provenance"),
    }
    record = good
    for step in inside.get(name, ()):
        record = record[step]
    own = {"format", "analysis", *kind.derived, *(field.name for field in dataclasses.fields(kind))}
    for key in (set(record) | {"label_noise", "recipe", "weights_left_out", "left_out", "cosine", "repeated"}) - own:
        before = record.get(key)
        for value in STRANGE:
            record[key] = value
            try:
                result = kind.from_dict(good)
            except DataError:
                continue
            assert str(result)
            assert result._repr_html_()
        record[key] = before
