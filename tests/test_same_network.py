"""Lines, planes, marks and paths are between networks of one architecture that differ in their weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import classifier
from sharpscope import Problem, compare, loss_slice, loss_surface
from sharpscope.cli import main
from sharpscope.comparing import LEVELS
from sharpscope.errors import ProblemError
from sharpscope.slices import plane_through, random_directions, span_of, towards, trajectory_plane

PROBLEM = """
import torch
import sharpscope

class Normalised(torch.nn.Module):
    def __init__(self, wider=False):
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("seen", torch.zeros(()))
        self.layer = torch.nn.Linear(4, 3)
        if wider:
            self.extra = torch.nn.Linear(3, 3)

    def forward(self, x):
        out = self.layer(x * self.scale)
        return self.extra(out) if hasattr(self, "extra") else out

def problem(split="train"):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    return sharpscope.Problem(model=Normalised(), loss=torch.nn.CrossEntropyLoss(), data=data)
"""


class Normalised(nn.Module):
    """A linear layer between constants and an activation, with a layer more if it is ``wider``."""

    def __init__(
        self,
        seed: int,
        scale: float = 1.0,
        seen: float = 0.0,
        wider: bool = False,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        self.activation = activation
        torch.manual_seed(seed)
        self.register_buffer("scale", torch.full((4,), scale, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(seen))
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        if wider:
            self.extra = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.layer(x * self.scale))
        return self.extra(out) if hasattr(self, "extra") else out


def at(seed: int, **given: Any) -> Problem:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(40, 4, generator=draw, dtype=torch.float64), torch.randint(3, (40,), generator=draw)
    return Problem(model=Normalised(seed, **given), loss=nn.CrossEntropyLoss(), data=data)


USES: dict[str, Callable[[Problem, Problem], Any]] = {
    "towards": lambda p, q: towards(p, q),
    "plane_through": lambda p, q: plane_through(p, {"one": at(2), "two": q}),
    "trajectory_plane": lambda p, q: trajectory_plane(p, [at(2), q]),
    "span_of": lambda p, q: span_of(p, random_directions(p, 2), [at(2), q]),
    "mark of a line": lambda p, q: loss_slice(p, points=3, marks={"q": q}),
    "mark of a surface": lambda p, q: loss_surface(p, points=3, marks={"q": q}),
    "path on a surface": lambda p, q: loss_surface(p, points=3, trajectory={"two": at(2), "q": q}),
}

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "more parameters": ({"wider": True}, r"same weights, but for extra\.weight"),
    "other constants": ({"scale": 2.0}, "the buffer scale differs"),
    "another activation": ({"activation": torch.relu}, "an activation or another setting differs"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("use", USES)
def test_a_network_with_more_parameters_or_another_function_is_refused(use: str, name: str) -> None:
    """Its parameters include ours, at a distance that says nothing: it is another function of the weights."""
    given, message = OTHERS[name]
    for seed in (1, 0):  # with other weights, and with ours
        if use == "towards" and seed == 0 and name != "more parameters":
            continue
        with pytest.raises(ProblemError, match=message):
            USES[use](at(0), at(seed, **given))
    if "wider" in given:
        with pytest.raises(ProblemError, match=message):
            USES[use](at(0, **given), at(1))


def test_a_buffer_that_does_not_change_the_loss_may_differ() -> None:
    """A counter of steps is no constant of the function: the line ends at the other network's own loss."""
    here, there = at(0), at(1, seen=7.0)
    result = loss_slice(here, towards(here, there), points=5, marks={"there": there})
    expected = nn.functional.cross_entropy(there.model(there.data[0]), there.data[1]).item()
    assert result.loss[0, 0][result.axes[0] == 1.0] == pytest.approx(expected, rel=1e-12)
    assert result.marks[0].loss["data"] == pytest.approx(expected, rel=1e-12)
    assert float(there.model.seen) == 7.0


def test_what_is_asked_leaves_both_networks_as_they_were() -> None:
    """Trying the other's constants changes no bit of either model, nor the random state."""
    here, there = at(0), at(1, scale=2.0)
    before = [{k: v.clone() for k, v in p.model.state_dict().items()} for p in (here, there)]
    state = torch.get_rng_state()
    with pytest.raises(ProblemError):
        towards(here, there)
    for problem, known in zip((here, there), before, strict=True):
        assert all(torch.equal(value, known[name]) for name, value in problem.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_running_statistics_may_differ_and_the_result_says_whose_they_are() -> None:
    """BatchNorm's are part of each network: a line goes between them, and says that it keeps those of its centre."""

    def normed(seed: int) -> Problem:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        model[1].running_mean.fill_(seed)
        model[1].num_batches_tracked.fill_(seed)
        return replace(classifier(), model=model)

    here, there = normed(0), normed(1)
    result = loss_slice(here, towards(here, there), points=3, marks={"there": there})
    assert "running statistics stay those of the centre" in str(result)
    followed = loss_slice(here, towards(here, there), points=3, batchnorm="interpolate", marks={"there": there})
    assert followed.loss[0, 0][followed.axes[0] == 1.0] == pytest.approx(followed.marks[0].loss["data"], rel=1e-5)


def test_a_comparison_has_no_line_to_a_network_with_other_constants() -> None:
    """It measures both, and shows the line between networks of one function alone."""
    both = {"a": at(0), "b": at(1, scale=2.0)}
    few = replace(LEVELS["quick"], probes=2, steps=2, trace_probes=2, seeds=1, line_points=3, surface_points=3)
    assert compare(both, level=few).between == ()
    assert len(compare({**both, "b": at(1)}, level=few).between) == 1


@pytest.mark.parametrize("command", ["slice --to", "surface --trajectory", "surface --through"])
def test_the_command_line_refuses_other_constants(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--to`, `--trajectory` and `--through` of a file with another scale end in one sentence that names it."""
    monkeypatch.chdir(tmp_path)
    Path("problem.py").write_text(PROBLEM)
    for name, model in (("a", Normalised(0)), ("b", Normalised(1)), ("c", Normalised(2)), ("d", Normalised(3, 2.0))):
        torch.save(model.float().state_dict(), f"{name}.pt")
    words, option = command.split()
    ends = {"--to": ["b.pt"], "--trajectory": ["b.pt", "c.pt"], "--through": ["b.pt", "c.pt"]}[option]
    common = [words, "a.pt", "--problem", "problem.py", "--points", "3", option]
    assert main([*common, *ends]) == 0
    capsys.readouterr()
    assert main([*common, *ends[:-1], "d.pt"]) == 1
    assert "the buffer scale differs" in capsys.readouterr().err
