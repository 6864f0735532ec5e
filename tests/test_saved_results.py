"""Result files that 0.1.0 wrote: they load for good, with every number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saved import FILES, SAVED, read
from sharpscope.results import EigenResult, SliceResult


def missing(saved: Any, now: Any, where: str = "") -> list[str]:
    """The places of ``saved`` whose key or value ``now`` lacks; derived numbers may differ in their last digits."""
    if isinstance(saved, dict):
        if not isinstance(now, dict):
            return [where]
        lost = [f"{where}/{key}" for key in saved if key not in now]
        return lost + [p for key in saved if key in now for p in missing(saved[key], now[key], f"{where}/{key}")]
    if isinstance(saved, list):
        if not isinstance(now, list) or len(saved) != len(now):
            return [where]
        return [p for i, (a, b) in enumerate(zip(saved, now, strict=True)) for p in missing(a, b, f"{where}/{i}")]
    # Intervals over runs have since become wider: each run's own error counts.
    if isinstance(saved, float) and re.search("/(spreads|differences)/.*/lower$", where) and now <= saved:
        return []
    if isinstance(saved, float) and re.search("/(spreads|differences)/.*/upper$", where) and now >= saved:
        return []
    if isinstance(saved, float):
        return [] if now == pytest.approx(saved, rel=1e-9, abs=1e-15) else [where]
    # The sentences of a comparison are written anew.
    return [] if "/findings/" in where or (type(saved) is type(now) and saved == now) else [where]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_0_1_0_loads_with_every_key_and_number(name: str) -> None:
    """``to_dict()`` of what was loaded holds every key of the file, with the same numbers, and null where it has it."""
    assert missing(read(name), FILES[name].load(SAVED / f"{name}.json").to_dict()) == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_0_1_0_shows_its_table(name: str) -> None:
    """``summary()`` has lines of text, and ``str()`` is the same."""
    result = FILES[name].load(SAVED / f"{name}.json")
    assert len(result.summary().splitlines()) > 1
    assert str(result) == result.summary()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_0_1_0_survives_another_round(name: str, tmp_path: Path) -> None:
    """What was loaded, saved and loaded again is the same record, with the same arrays."""
    first = FILES[name].load(SAVED / f"{name}.json")
    arrays = (SAVED / f"{name}.npz").is_file()
    first.save(tmp_path / "again.json", **({"vectors": True} if arrays and name.startswith("eigen") else {}))
    again = FILES[name].load(tmp_path / "again.json")
    assert again.to_dict() == first.to_dict()
    if arrays:
        with np.load(SAVED / f"{name}.npz") as old, np.load(tmp_path / "again.npz") as new:
            assert set(old) == set(new)
            assert all(np.array_equal(old[key], new[key], equal_nan=True) for key in old)


def test_the_arrays_beside_a_file_of_0_1_0_are_read() -> None:
    """Eigenvectors are orthonormal columns; a slice has a status for each point, pending and diverged ones among them.

    Where a point is pending or its loss is NaN the array says NaN; an infinite loss stays infinite.
    """
    vectors = EigenResult.load(SAVED / "eigen-largest.json").eigenvectors
    assert vectors is not None
    assert np.allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-5)
    plane = SliceResult.load(SAVED / "plane.json")
    assert set(plane.status.ravel().tolist()) == {0, 1, 2}
    assert np.isnan(plane.loss[0][plane.status == 0]).all()
    assert np.isfinite(plane.loss[0][plane.status == 1]).all()
    assert not np.isfinite(plane.loss[0][plane.status == 2]).any()


def test_keys_that_later_versions_added_may_be_missing() -> None:
    """A record without an optional key loads, and says None, or no marks, in its place."""
    optional = {
        "eigen-largest": ("missed_probability", "sampling", "certificate", "ratio", "lambda_max"),
        "trace": ("sampling_error",),
        "density": ("curve", "mean", "second_moment", "negative_mass", "near_zero_mass"),
        "blocks": ("trace",),
        "invariance": ("changes",),
        "monitor": ("cost",),
        "comparison-groups": ("findings", "rows"),
    }
    for name, keys in optional.items():
        values = {key: value for key, value in read(name).items() if key not in keys}
        result = FILES[name].from_dict(values)
        for key in ("missed_probability", "sampling", "certificate", "sampling_error"):
            assert key not in keys or getattr(result, key) is None
        assert result.summary()


def test_the_files_hold_no_machine_paths() -> None:
    """Each names its checkpoint without a folder."""
    for path in SAVED.glob("*.json"):
        assert not any(root in path.read_text(encoding="utf-8") for root in ("/home/", "/root/", "/tmp/", "/work/"))
