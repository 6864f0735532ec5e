"""What results and bars show in a notebook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sharpscope
from sharpscope import (
    Cost,
    DataError,
    EigenResult,
    InvarianceResult,
    MonitorRecord,
    MonitorResult,
    Problem,
    progress_bar,
    side_by_side,
)
from sharpscope.results import Table


def eigen(value: float) -> EigenResult:
    """One eigenvalue."""
    values, off = np.array([value]), np.array([0.01])
    found = {"eigenvalues": values, "residuals": off, "lower": values - off, "upper": values + off}
    return EigenResult(**found, converged=values > 0, loss=1, gradient_norm=0, cost=Cost(1, 1, 3.0, 0.1))


def test_numbers_are_to_the_right_and_names_to_the_left_in_no_colour() -> None:
    """Every cell but a row's first is aligned to the right, and nothing says a colour, so that dark themes do."""
    html = Table([["a", "b", "c"], ["one", "2", "3"]], ["note"])._repr_html_()
    first = re.findall(r'<tr><t[hd] style="([^"]*)">', html)
    assert first == ["text-align: left"] * 2
    others = re.findall(r'</t[hd]><t[hd] style="([^"]*)">', html)
    assert len(others) == 4
    assert all("text-align: right" in style for style in others)
    assert "color" not in html
    assert "background" not in html


def test_few_results_of_many_numbers_are_columns() -> None:
    """A notebook's table of eigenvalues has the shape of the text, whichever is narrower."""
    shown = eigen(2.0)._repr_html_()
    assert shown.count("<tr>") == str(eigen(2.0)).split("\n\n")[0].count("\n") + 1 > 3


def test_results_in_memory_stand_side_by_side_under_their_names() -> None:
    """A mapping names its results, in text and HTML, and leaves them as they are."""
    one, two = eigen(2.0), eigen(1.0)
    shown = side_by_side({"SGD": one, "SAM": two})
    for text in (str(shown), shown._repr_html_()):
        assert text.index("SGD") < text.index("SAM")
        assert "2.00 ±0.01" in text
        assert "1.00 ±0.01" in text
    assert "checkpoint" not in one.provenance
    assert str(side_by_side([one])) == str(one)


@pytest.mark.parametrize("results", [[], [eigen(1.0), 2.0], [3.0], {"number": 3.0}])
def test_only_results_of_one_kind_stand_side_by_side(results: Any) -> None:
    """Nothing, a number, and a mixture are refused in a sentence that names what is possible."""
    with pytest.raises(DataError, match=r"must be of one kind .*EigenResult.* got"):
        side_by_side(results)


@pytest.mark.parametrize("kind", [getattr(sharpscope, name) for name in sharpscope.__all__ if name.endswith("Result")])
def test_side_by_side_of_one_is_its_own_display(kind: type) -> None:
    """Of a single result of each kind, the table is what the result shows by itself."""
    problem = Problem(
        model=torch.nn.Linear(3, 2),
        loss=torch.nn.CrossEntropyLoss(),
        data=(torch.randn(8, 3), torch.arange(8) % 2),
    )
    measured = {
        "EigenResult": lambda: sharpscope.top_eigenvalues(problem, 2),
        "DensityResult": lambda: sharpscope.spectral_density(problem, 2, 4),
        "TraceResult": lambda: sharpscope.trace(problem, 2),
        "BlockResult": lambda: sharpscope.block_spectra(problem, tol=0.1),
        "InvarianceResult": lambda: InvarianceResult((), (), 4.0, (), 1.0, Cost(1, 1, 1.0, 0.1)),
        "MonitorResult": lambda: MonitorResult((MonitorRecord(step=0),)),
        "SharpnessResult": lambda: sharpscope.measure_sharpness(problem, m=2),
        "SliceResult": lambda: sharpscope.loss_slice(problem, points=3),
    }
    result = measured[kind.__name__]()
    assert isinstance(result, kind)
    shown = side_by_side([result])
    assert (str(shown), shown._repr_html_()) == (str(result), result._repr_html_())


def test_what_does_not_fit_one_table_stands_below() -> None:
    """Two rescalings are a table each under its name, two runs each above its notes; of one HTML needs no name."""
    rescaled = InvarianceResult((), (), 4.0, (), 1.0, Cost(1, 1, 1.0, 0.1))
    shown = side_by_side({"SGD": rescaled, "SAM": rescaled})
    assert re.match(r"SGD\nmeasure .*\n\nSAM\nmeasure .*\n\nSGD: .*", str(shown))
    assert re.match("<p>SGD</p><table>.*<p>SAM</p><table>.*<p>SGD: ", shown._repr_html_())
    assert "<p>SGD</p>" not in side_by_side({"SGD": rescaled})._repr_html_()
    run = MonitorResult((MonitorRecord(step=7),))
    shown = side_by_side({"SGD": run, "SAM": run})
    assert [text.split()[0] for text in str(shown).split("\n\n")] == ["step", "SGD:", "step", "SAM:"]
    assert re.match("<table>.*7.*</table><p>SGD: .*<table>.*7.*</table><p>SAM: ", shown._repr_html_())


def test_a_saved_notebook_holds_the_table_as_text() -> None:
    """IPython's text of a result is its table, in a list too: of a comparison, dataclasses' own is 100 kB of arrays."""
    pretty = pytest.importorskip("IPython.lib.pretty").pretty
    assert pretty(eigen(2.0)) == str(eigen(2.0))
    assert str(eigen(2.0)) in pretty([eigen(2.0)])
    assert pretty(side_by_side([eigen(2.0)])) == str(eigen(2.0))


class Kernel:
    """What IPython's shell is in a kernel, as far as a bar uses it: the outputs beneath a cell, by their place."""

    def __init__(self) -> None:
        self.config = {"IPKernelApp": {}}
        self.display_pub = self
        self.outputs: dict[str, dict[str, str]] = {}
        self.lines: list[str] = []

    def publish(self, data: dict[str, str], *, transient: dict[str, str], update: bool) -> None:
        """A display_data message, or an update_display_data message for a place that is there."""
        assert update == (transient["display_id"] in self.outputs)
        self.outputs[transient["display_id"]] = data
        self.lines += data.values()


def test_a_bar_in_a_notebook_is_one_line_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages share one output of plain text, which holds nothing in the end, also after an exception."""
    for fails in (False, True):
        kernel = Kernel()
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda kernel=kernel: kernel))
        try:
            with progress_bar("SGD") as progress:
                progress("one", 5, 10)
                progress("two", 1, None)
                assert not fails
        except AssertionError:
            assert fails
        assert list(kernel.outputs.values()) == [{}]
        assert any(line.startswith("SGD: one") for line in kernel.lines)
        assert any(line.startswith("SGD: two") for line in kernel.lines)


def test_a_bar_that_was_not_used_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that reports no progress leaves no output in the notebook."""
    kernel = Kernel()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    with progress_bar():
        pass
    assert kernel.outputs == {}


STAGES = """
import sharpscope
with sharpscope.progress_bar("SGD") as progress:
    progress("one", 1, 10)
    progress("two", 1, None)
"""
STEPS = """
from sharpscope.cli import terminal
with terminal.steps_bar("SGD: one, SGD: two") as progress:
    progress(1, 10, {"loss": 1.0, "accuracy": 0.5})
"""


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize("code", [STAGES, STEPS])
def test_a_bar_at_a_terminal_is_one_line_that_is_taken_away(code: str) -> None:
    """Stages, or steps, share a line on stderr, which is blank in the end, also where the terminal says no size."""
    master, slave = os.openpty()
    assert os.get_terminal_size(slave).columns == 0
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=slave, check=True)
    os.set_blocking(master, False)
    shown = os.read(master, 100_000).decode()
    os.close(slave)
    os.close(master)
    assert done.stdout == b""
    assert "SGD: one" in shown
    assert "SGD: two" in shown
    assert "\n" not in shown
    assert [line for line in shown.split("\r") if line][-1].isspace()


def test_a_bar_outside_of_notebooks_is_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal, and IPython is not there or no kernel, nothing is shown."""
    with progress_bar("SGD") as progress:
        progress("one", 5, 10)
    assert capsys.readouterr() == ("", "")
