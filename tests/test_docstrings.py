"""What the docstrings show is true: whatever a user calls has an example, and every example prints what it says."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import sharpscope

PACKAGE = Path(sharpscope.__file__).parent
PLACES = ("sharpscope", *(f"sharpscope.{name}" for name in ("edge_of_stability", "linalg", "optim", "plot", "slices")))

# Dataclasses of these are records, which other functions make and whose examples show them.
RECORDS = ("sharpscope.results.", "sharpscope.linalg.")


def public(place: str) -> list[Any]:
    """The functions and classes that ``place`` offers: those of its ``__all__``, or defined in it."""
    module = importlib.import_module(place)
    names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if inspect.isfunction(v)]
    found = [getattr(module, name) for name in names]
    return [one for one in found if inspect.isfunction(one) or inspect.isclass(one)]


def called(one: Any) -> bool:
    """Whether a user calls it: no exception, no record, and of linalg what takes an operator."""
    if inspect.isclass(one):
        record = dataclasses.is_dataclass(one) and one.__module__.startswith(RECORDS)
        return not record and not issubclass(one, Exception)
    return not one.__module__.startswith("sharpscope.linalg.") or "matmat" in inspect.signature(one).parameters


def name_of(one: Any) -> str:
    """Module and name, by which a docstring is found in the source."""
    return f"{one.__module__}.{one.__qualname__}"


OBJECTS = {name_of(one): one for place in PLACES for one in public(place) if called(one)}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_example_of_a_docstring_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted as it is, imports included, in an empty folder."""
    if name.endswith("interactive_surface"):
        pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(OBJECTS[name]) or "", {}, name, None, None)
    assert any(example.want for example in test.examples), f"{name} has no example: add one of 2 to 8 lines."
    said: list[str] = []
    try:
        failed, _ = doctest.DocTestRunner().run(test, out=said.append)
    finally:
        plt.close("all")
    assert not failed, "".join(said)


def test_no_example_is_left_unrun() -> None:
    """A docstring of the package that has an example is one of those above."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("sharpscope", *path.relative_to(PACKAGE).with_suffix("").parts))
        nodes = [(module, ast.parse(path.read_text(encoding="utf-8")))]
        for name, node in nodes:
            inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            nodes += [(f"{name}.{child.name}", child) for child in node.body if isinstance(child, inner)]
            if ">>>" in (ast.get_docstring(node) or ""):
                found.add(name)
    assert found == set(OBJECTS)
