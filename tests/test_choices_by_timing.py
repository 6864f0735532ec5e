"""A run resumed after a kill repeats what was chosen by timing, and ends in the bits of one that went through."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import processes
import sharpscope
from conftest import tiny_mlp
from sharpscope import Problem
from sharpscope.cli import main
from sharpscope.comparing import LEVELS, compare
from sharpscope.objective import fastest_micro_batch
from sharpscope.sharpness import worst_case
from sharpscope.slices import random_directions
from sharpscope.training import Recipe, train

# Enough for the micro-batch to be timed.
COUNT = 4200


def problem() -> Problem:
    """A network of 99 weights in float32, on COUNT examples of three classes."""
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(COUNT, 4, generator=draw), torch.randint(3, (COUNT,), generator=draw)
    return Problem(model=tiny_mlp(4, 12, 3), loss=nn.CrossEntropyLoss(), data=data)


def clock(ratio: float) -> Any:
    """A clock in whose time each next piece of work takes ``ratio`` times as long as the last."""
    times = itertools.accumulate(ratio**i for i in itertools.count())
    return SimpleNamespace(perf_counter=lambda: next(times))


def set_clocks(patch: pytest.MonkeyPatch, ratio: float) -> None:
    """1000 chooses the smallest micro-batch and subsets side by side, 0.001 the largest and one after another."""
    for module in (fastest_micro_batch, worst_case):
        patch.setattr(module, "time", clock(ratio))


def numbers(result: Any) -> Any:
    """All that a result holds but seconds."""
    if isinstance(result, dict):
        return {key: numbers(value) for key, value in result.items() if key != "seconds"}
    return [numbers(value) for value in result] if isinstance(result, list) else repr(result)


def of(result: Any) -> Any:
    return numbers(result.to_dict() if hasattr(result, "to_dict") else asdict(result))


class Killed(BaseException):
    """The end of a process, as far as one that goes on can show it."""


def until(stage: str) -> Callable[[str, int, int | None], None]:
    """A progress that ends the run where ``stage`` is reported."""

    def report(now: str, done: int, total: int | None) -> None:
        if stage in now:
            raise Killed(now)

    return report


LEVEL = replace(
    replace(
        LEVELS["quick"],
        performance_examples=50,
        eigen_examples=50,
        density_examples=COUNT,
        sharpness_examples=64,
        slice_examples=50,
        surface_examples=50,
    ),
    probes=2,
    steps=3,
    trace_probes=4,
    seeds=1,
    line_points=3,
    surface_points=3,
)


def compared(folder: Path | None, progress: Any) -> Any:
    (found,) = compare({"a": problem()}, level=LEVEL, folder=folder, progress=progress).subjects
    return found


Run = Callable[[Path | None, Any], Any]

# Each analysis that resumes, and stages at which it is killed: before the first pass is stored, and later.
RUNS: dict[str, tuple[Run, tuple[str, ...]]] = {
    "eigenvalues": (
        lambda folder, progress: sharpscope.top_eigenvalues(
            problem(), 2, method="lanczos", progress=progress, journal=folder
        ),
        ("pass 1", "pass 3"),
    ),
    "guided eigenvalues": (
        lambda folder, progress: sharpscope.top_eigenvalues(problem(), 2, progress=progress, journal=folder),
        ("scouting", "pass 2"),
    ),
    "trace": (
        lambda folder, progress: sharpscope.trace(problem(), 4, progress=progress, population=True, journal=folder),
        ("pass 1", "pass 2"),
    ),
    "density": (
        lambda folder, progress: sharpscope.spectral_density(problem(), 2, 3, progress=progress, journal=folder),
        ("pass 1", "pass 3"),
    ),
    "m-sharpness": (
        lambda folder, progress: sharpscope.measure_sharpness(
            problem(), progress=progress, m=64, rho=(0.05, 0.5), journal=folder
        ),
        ("m = 64",),
    ),
    "density of a comparison": (
        lambda folder, progress: compared(folder, progress).density,
        ("density: pass 2",),
    ),
    "m-sharpness of a comparison": (
        lambda folder, progress: compared(folder, progress).sharpness.find("m-sharpness", m=1),
        ("m-sharpness: m = 1",),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_after_the_choice_a_run_ends_in_the_same_bits_whatever_the_clock_says_then(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number and the cost are those of a run that went through with the first choice, not with the second."""
    measure, stages = RUNS[name]
    # Of a comparison, which measures much besides, one order of the two clocks.
    for first, then in ((1000.0, 0.001), (0.001, 1000.0))[: 1 if "comparison" in name else 2]:
        set_clocks(monkeypatch, first)
        whole = of(measure(None, None))
        set_clocks(monkeypatch, then)
        assert of(measure(None, None)) != whole  # the choice is seen in the last bits
        for stage in stages:
            folder = tmp_path / f"{first}-{stage.replace(' ', '-')}"
            set_clocks(monkeypatch, first)
            with pytest.raises(Killed):
                measure(folder, until(stage))
            set_clocks(monkeypatch, then)
            assert of(measure(folder, None)) == whole, stage


def test_the_curvature_along_a_slice_repeats_the_micro_batch_of_a_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the pass that gives slope and curvature, or after it: the same bits, and the cost of one such pass."""

    def measure(folder: Path | None) -> Any:
        lines = random_directions(problem(), 2)
        return sharpscope.loss_slice(problem(), lines, 3, curvature=True, journal=folder)

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    for first, then in ((1000.0, 0.001), (0.001, 1000.0)):
        set_clocks(monkeypatch, first)
        whole = measure(None)
        set_clocks(monkeypatch, then)
        assert of(measure(None)) != of(whole)
        for i, owner in enumerate(("sharpscope.objective.Objective.products", "sharpscope.slices.grid.Grid.centre")):
            folder = tmp_path / f"{first}-{i}"
            set_clocks(monkeypatch, first)
            with monkeypatch.context() as patch:
                patch.setattr(owner, killed)
                with pytest.raises(Killed):
                    measure(folder)
            set_clocks(monkeypatch, then)
            again = measure(folder)
            assert again.slopes.tolist() == whole.slopes.tolist()
            assert again.curvatures.tolist() == whole.curvatures.tolist()
            assert again.cost.gradients == whole.cost.gradients


def test_gradient_directions_depend_on_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured again after a kill, with the same bits."""
    found = []
    for ratio in (1000.0, 0.001):
        set_clocks(monkeypatch, ratio)
        found.append([d.vector.tolist() for d in sharpscope.slices.gradient_directions(problem())])
    assert found[0] == found[1]


def held(argv: tuple[str, ...], ratio: float) -> None:
    """In a process of its own: ``sharpscope ARGV`` with such a clock, which stops after the first choice is stored."""
    set_clocks(pytest.MonkeyPatch(), ratio)
    worst_case.VmapRises.unless_out_of_memory = lambda *_: time.sleep(600)  # type: ignore[method-assign, assignment]
    main(list(argv))


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_the_command_resumed_after_a_kill_repeats_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of `compare` once subsets are taken side by side: resumed, m-sharpness is that of a run not killed."""
    checkpoint, whole, killed = tmp_path / "a.pt", tmp_path / "whole", tmp_path / "killed"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1), checkpoint)
    monkeypatch.setattr(sharpscope.report, "page", lambda comparison: "<!DOCTYPE html>")
    command = ("compare", str(checkpoint), "--quick", "--examples", "100", "--device", "cpu", "--out")

    def sharpness(folder: Path) -> Any:
        (subject,) = json.loads((folder / "compare.json").read_text())["subjects"]
        return numbers(subject["sharpness"]["measures"])

    process = processes.start(held, (*command, str(killed)), 1000.0)
    partial, deadline = killed / "parts" / "a.pt-sharpness.partial", time.monotonic() + 120
    while time.monotonic() < deadline and len(list(partial.glob("[0-9]*.entry"))) < 2 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    set_clocks(monkeypatch, 0.001)
    assert main([*command, str(killed)]) == 0
    resumed = sharpness(killed)
    set_clocks(monkeypatch, 1000.0)
    assert main([*command, str(whole)]) == 0
    first = resumed[0]
    assert first["settings"]["side by side"] == "True"
    assert first == sharpness(whole)[0]


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def test_subsets_without_loss_terms_do_not_decide_how_the_others_are_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same clock subsets go side by side wherever masked labels or an infinite loss are among them."""
    draw = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 4, generator=draw), torch.randint(3, (64,), generator=draw)
    masked = {name: labels.clone() for name in ("none", "first", "all but one")}
    masked["first"][:16], masked["all but one"][1:] = -100, -100
    for target in masked.values():
        # Batches, which keep their order: the first subsets are those of the first examples.
        batches = [(inputs[i : i + 32], target[i : i + 32]) for i in (0, 32)]
        given = Problem(model=nn.Sequential(tiny_mlp(4, 3), Cube()), loss=nn.CrossEntropyLoss(), data=batches)
        set_clocks(monkeypatch, 1000.0)
        found, _ = sharpscope.measure_sharpness(given, m=1, rho=(0.05, 1e19)).measures  # the loss overflows there
        assert found.settings["side by side"]
        set_clocks(monkeypatch, 0.001)
        alone, _ = sharpscope.measure_sharpness(given, m=1, rho=(0.05, 1e19)).measures
        assert not alone.settings["side by side"]
        assert found.value == pytest.approx(alone.value, rel=1e-3)
