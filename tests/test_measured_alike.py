"""What of the loss is not the default is in every table and caption, and is the same in what stands side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.text import Text
from torch import nn

from conftest import classifier
from sharpscope import (
    EigenResult,
    Problem,
    SharpnessMonitor,
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
from sharpscope.errors import ArgumentError, DataError
from sharpscope.plot import density_curve, m_sharpness_curves, slice_curves, surface_contour, surfaces_side_by_side
from sharpscope.report import page
from sharpscope.results import MonitorResult
from sharpscope.slices import Direction, eigenvector_directions

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


def on(rows: slice = slice(0, 20), **given: Any) -> Problem:
    """A classifier of 20 of 40 examples."""
    inputs, labels = classifier(examples=40).data
    return replace(classifier(), data=(inputs[rows], labels[rows]), **given)


def vectors(problem: Problem, operator: str = "hessian") -> EigenResult:
    return top_eigenvalues(problem, k=2, operator=operator, vectors=True)


def other_weights() -> Problem:
    problem = on()
    with torch.no_grad():
        next(problem.model.parameters()).mul_(1.05)
    return problem


OTHER: dict[str, tuple[Callable[[], EigenResult], str]] = {
    "examples": (lambda: vectors(on(slice(20, 40))), "loss at the weights differs"),
    "most examples": (lambda: vectors(on(slice(1, 21))), "loss at the weights differs"),
    "weights": (lambda: vectors(other_weights()), "loss at the weights differs"),
    "class weights": (
        lambda: vectors(on(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 3.0])))),
        "loss at the weights differs",
    ),
    "weight decay": (lambda: vectors(on(weight_decay=0.1)), r"weight decay differs \(0\.1 against 0\.0\)"),
    "operator": (lambda: vectors(on(), "ggn"), r"operator differs \(ggn against hessian\)"),
    "number of examples": (lambda: vectors(on(slice(0, 21))), r"num_examples differs \(21 against 20\)"),
    "split": (lambda: vectors(on(provenance={"split": "test"})), r"split differs \(test against train\)"),
}


@pytest.mark.parametrize("name", OTHER)
def test_eigenpairs_of_another_matrix_are_not_taken_over(name: str) -> None:
    """`known=`, lines and planes along eigenvectors, and marks on a density refuse those of anything else."""
    measured, message = OTHER[name]
    other, own, problem = measured(), vectors(on()), on(provenance={"split": "train"})
    density = spectral_density(problem, probes=2, known=own)
    assert density.num_known == 2
    for use in (
        lambda known: spectral_density(problem, probes=2, known=known),
        lambda known: loss_slice(problem, eigenvector_directions(known, [1]), points=3),
        lambda known: loss_surface(problem, eigenvector_directions(known), points=3),
        lambda known: density_curve(density, known),
    ):
        use(own)
        with pytest.raises((ArgumentError, DataError), match=message):
            use(other)
        plt.close("all")


def test_a_vector_of_another_matrix_is_a_direction_like_any_other() -> None:
    """What the message says works: without the name of an eigenvector it leads anywhere."""
    other = vectors(on(slice(20, 40)))
    assert other.eigenvectors is not None
    free = Direction(torch.from_numpy(other.eigenvectors[:, 0]).double(), "theirs")
    assert loss_slice(on(), free, points=3).complete


def test_the_command_line_takes_no_eigenvectors_of_another_weight_decay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--eigen` of slice, surface and density is of this loss; another weight decay or operator is named."""
    monkeypatch.chdir(tmp_path)
    Path("problem.py").write_text(PROBLEM)
    torch.save(nn.Linear(4, 3).state_dict(), "w.pt")
    shared = ["w.pt", "--problem", "problem.py"]
    assert main(["eigen", *shared, "--k", "2", "--vectors", "--out", "e.json"]) == 0
    for command in (["slice", "--points", "3"], ["surface", "--points", "3"], ["density", "--probes", "2"]):
        measured = [command[0], *shared, *command[1:], "--eigen", "e.json"]
        assert main(measured) == 0
        capsys.readouterr()
        assert main([*measured, "--weight-decay", "0.5"]) == 1
        assert "weight decay differs (0.0 against 0.5)" in capsys.readouterr().err


def test_a_line_along_an_eigenvector_of_a_network_of_equal_loss_is_refused() -> None:
    """Hidden units in another order have the same loss and another Hessian: its curvature there gives it away."""
    problem, order = on(), torch.arange(5).flip(0)
    theirs = on()
    with torch.no_grad():
        theirs.model[0].weight.copy_(problem.model[0].weight[order])  # type: ignore[index]
        theirs.model[0].bias.copy_(problem.model[0].bias[order])  # type: ignore[index]
        theirs.model[2].weight.copy_(problem.model[2].weight[:, order])  # type: ignore[index]
    for measure in (
        lambda known: loss_slice(problem, eigenvector_directions(known, [1]), points=3),
        lambda known: loss_surface(problem, eigenvector_directions(known), points=3),
    ):
        measure(vectors(on()))
        with pytest.raises(ArgumentError, match="eigenvector 1 has the eigenvalue"):
            measure(vectors(theirs))


@pytest.mark.parametrize("change", ["recipe", "data", "loss", "loss_settings", "sample"])
def test_a_monitor_goes_on_with_records_of_its_own_run_alone(change: str) -> None:
    """Records of another recipe, data set, loss, or of as many other examples are refused by what differs."""
    said = {"recipe": {"lr": 0.1, "betas": (0.9, 0.99)}, "data": "digits"}
    records = SharpnessMonitor(on(provenance=said), every=1, examples=16)
    records.measure(0)
    result = MonitorResult.from_dict(json.loads(json.dumps(records.result().to_dict())))
    SharpnessMonitor(on(provenance=said), every=1, examples=16).resume(result, 1)
    changed = {
        "recipe": on(provenance={**said, "recipe": {"lr": 0.2, "betas": (0.9, 0.99)}}),
        "data": on(provenance={**said, "data": "fashion-mnist"}),
        "loss": on(provenance=said, loss=nn.NLLLoss()),
        "loss_settings": on(provenance=said, loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
        "sample": on(slice(20, 40), provenance=said),
    }[change]
    with pytest.raises(ArgumentError, match=f"but {change if change != 'loss' else 'loss_function'} is"):
        SharpnessMonitor(changed, every=1, examples=16).resume(result, 1)
