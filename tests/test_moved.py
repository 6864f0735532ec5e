"""Modules that have another name now."""

from __future__ import annotations

import importlib
import sys

import pytest

MOVED = {"sharpscope.edges": "sharpscope.edge_of_stability", "sharpscope.train": "sharpscope.training"}


@pytest.mark.parametrize("old", MOVED)
def test_the_former_name_warns_once_and_gives_the_same_objects(old: str) -> None:
    """What was importable from it still is, and the warning says where it is now."""
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=MOVED[old]):
        former = importlib.import_module(old)
    importlib.import_module(old)  # a second warning would be an error
    now = importlib.import_module(MOVED[old])
    assert former.__all__
    assert all(getattr(former, name) is getattr(now, name) for name in former.__all__)


def test_the_former_name_of_a_function_warns_and_gives_it() -> None:
    """``sharpscope.sampling.sampling_of`` is the function that has a longer name now."""
    sampling = importlib.import_module("sharpscope.sampling")
    with pytest.warns(FutureWarning, match="sampling_error_of_batches"):
        former = sampling.sampling_of
    assert former is sampling.sampling_error_of_batches
