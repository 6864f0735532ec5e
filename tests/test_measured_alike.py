"""What of the loss is not the default is in every table and caption, and is the same in what stands side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from torch import nn

from conftest import classifier
from sharpscope import (
    Problem,
    block_spectra,
    compare,
    loss_slice,
    loss_surface,
    measure_sharpness,
    spectral_density,
    top_eigenvalues,
    trace,
)
from sharpscope.cli import main
from sharpscope.errors import DataError
from sharpscope.plot import m_sharpness_curves, slice_curves, surface_contour, surfaces_side_by_side
from sharpscope.report import page

PROBLEM = """
import torch
import sharpscope

def problem(split="train"):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    return sharpscope.Problem(model=torch.nn.Linear(4, 3), loss=torch.nn.CrossEntropyLoss(), data=data)
"""

SMALL: dict[str, Callable[..., Any]] = {
    "eigenvalues": lambda p: top_eigenvalues(p, k=1),
    "density": lambda p: spectral_density(p, probes=2),
    "trace": lambda p: trace(p, probes=2),
    "layers": block_spectra,
    "sharpness": lambda p: measure_sharpness(p, "m-sharpness", m=8),
    "slice": lambda p: loss_slice(p, points=3),
    "surface": lambda p: loss_surface(p, points=3),
}

DEPARTURES = {
    "with weight decay 0.0005": {"weight_decay": 5e-4},
    "parameters matching 0.*": {"params": "0.*"},
    "parameters matching 0.*, 2.bias": {"params": ["0.*", "2.bias"]},
}


def normed(**given: Any) -> Problem:
    """A classifier with BatchNorm, whose statistics are the batch's in train mode."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return replace(classifier(), model=model, **given)


@pytest.mark.parametrize("said", DEPARTURES)
@pytest.mark.parametrize("name", SMALL)
def test_tables_say_what_is_not_the_default(name: str, said: str) -> None:
    """The notes below a table name weight decay and chosen parameters, and say nothing of the default."""
    assert said in str(SMALL[name](classifier(**DEPARTURES[said])).table()).replace("\n", " ")
    plain = str(SMALL[name](classifier()).table())
    assert "with weight decay" not in plain
    assert "parameters matching" not in plain


def test_tables_say_that_batchnorm_takes_the_statistics_of_the_batch() -> None:
    """In train mode the table says so, in eval mode it does not."""
    assert "train mode, BatchNorm by batch statistics" in str(top_eigenvalues(normed(mode="train"), k=1).table())
    assert "batch statistics" not in str(top_eigenvalues(normed(), k=1).table())


@pytest.mark.parametrize("said", DEPARTURES)
def test_captions_say_what_is_not_the_default(said: str) -> None:
    """The captions of lines and planes name it, too."""
    problem = classifier(**DEPARTURES[said])
    for axes in (slice_curves([loss_slice(problem, points=3)]), surface_contour(loss_surface(problem, points=3))):
        texts = [text.get_text() for text in axes.figure.findobj(Text)]
        assert any(said in " ".join(text.split()) for text in texts), texts


@pytest.mark.parametrize("said", DEPARTURES)
def test_results_measured_otherwise_are_not_drawn_on_one_scale(said: str) -> None:
    """Lines, planes and curves of m-sharpness with and without weight decay, or of other parameters, are refused."""
    pairs = [classifier(), classifier(seed=1, **DEPARTURES[said])]
    with pytest.raises(DataError, match="alike"):
        slice_curves([loss_slice(p, points=3) for p in pairs])
    with pytest.raises(DataError, match="alike"):
        surfaces_side_by_side([loss_surface(p, points=3) for p in pairs])
    with pytest.raises(DataError, match="alike"):
        m_sharpness_curves([measure_sharpness(p, "m-sharpness", m=8) for p in pairs])


def test_the_command_line_does_not_draw_them_on_one_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sharpscope plot` of surfaces with and without weight decay ends in one sentence that names it."""
    (tmp_path / "problem.py").write_text(PROBLEM)
    paths = [tmp_path / "plain.json", tmp_path / "decayed.json"]
    for i, path in enumerate(paths):
        torch.save(nn.Linear(4, 3).state_dict(), tmp_path / f"{i}.pt")
        given = ["surface", str(tmp_path / f"{i}.pt"), "--problem", str(tmp_path / "problem.py"), "--points", "3"]
        assert main([*given, "--out", str(path), *(["--weight-decay", "0.5"] if i else [])]) == 0
    assert "with weight decay 0.5" in " ".join(capsys.readouterr().out.split())
    assert json.loads(paths[1].read_text())["weight_decay"] == 0.5
    assert main(["plot", *map(str, paths), "--out", str(tmp_path / "both.png")]) == 1
    assert "weight decay differs (0.0 against 0.5)" in capsys.readouterr().err


def test_a_comparison_says_what_is_not_the_default() -> None:
    """Table and page name the weight decay; the page does not say that it is left out."""
    decayed = compare({str(i): classifier(seed=i, weight_decay=5e-4) for i in range(2)}, level="quick")
    assert "Measured with weight decay 0.0005." in str(decayed.table())
    written = page(decayed)
    assert "with weight decay 0.0005" in written
    assert "without weight decay" not in written
    plain = compare({str(i): classifier(seed=i) for i in range(2)}, level="quick")
    assert "weight decay" not in str(plain.table())
    assert "without weight decay" in page(plain)
