"""A run that is killed goes on where it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sharpscope import Problem, top_eigenvalues
from sharpscope.train import Recipe, train


def entries(folder: Path) -> int:
    return len(list(folder.glob("[0-9]*.entry")))


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_three_times_the_command_ends_with_the_same_values(tmp_path: Path) -> None:
    """kill -9 at three random moments: the same eigenvalues bit for bit, and the state is gone when all is done."""
    checkpoint, plain, killed = tmp_path / "a.pt", tmp_path / "plain.json", tmp_path / "killed.json"
    train(Recipe(model="cnn", epochs=2), checkpoint)
    state = killed.with_name("killed.json.partial")
    command = [sys.executable, "-m", "sharpscope", "eigen", str(checkpoint), "--tol", "1e-5", "--out"]
    subprocess.run([*command, str(plain)], check=True, capture_output=True)
    draw, before = random.Random(0), 0
    for _ in range(3):
        run = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL)
        wanted = before + 1 + draw.randrange(2)
        while entries(state) < wanted and run.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not killed.exists()
        assert entries(state) >= wanted  # what was finished is not lost
        before = entries(state)
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    first, second = (json.loads(path.read_text()) for path in (plain, killed))
    for name in ("eigenvalues", "residuals", "lower", "upper", "loss", "gradient_norm"):
        assert first[name] == second[name], name
    assert {k: v for k, v in first["cost"].items() if k != "seconds"} == {
        k: v for k, v in second["cost"].items() if k != "seconds"
    }
    assert not state.exists()


def test_no_finished_pass_is_repeated_and_nothing_else_reused(tmp_path: Path) -> None:
    """A second call with the same journal walks the data for key, audit and memory alone; other weights start anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, labels = torch.randn(300, 4), torch.randint(3, (300,))
    walks = 0

    class Counting:
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal walks
            walks += 1
            return iter([(inputs, labels)])

    def measured() -> tuple[list[float], int]:
        nonlocal walks
        walks = 0
        problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=Counting())
        return top_eigenvalues(problem, k=2, journal=tmp_path / "state").eigenvalues.tolist(), walks

    first, again = measured(), measured()
    assert first[0] == again[0]
    assert again[1] == 5 < first[1]  # key, probe, audit twice, memory
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    changed = measured()
    assert changed[0] != first[0]
    assert changed[1] > 5


def test_another_loss_of_the_same_name_reuses_nothing(tmp_path: Path) -> None:
    """What a loss computes decides, not what it is called: label smoothing and a factor in a closure are seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = (torch.randn(300, 4), torch.randint(3, (300,)))

    def times(factor: float):  # type: ignore[no-untyped-def]
        return lambda output, target: factor * nn.functional.cross_entropy(output, target)

    weighted = (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, w])) for w in (1.0, 50.0))
    data[1][:260] = torch.randint(2, (260,))  # the probe's examples have no label 2
    smoothed = (nn.CrossEntropyLoss(label_smoothing=s) for s in (0.0, 0.3))
    for one, other in (tuple(weighted), tuple(smoothed), (times(1.0), times(3.0))):
        state = tmp_path / "state"
        top_eigenvalues(Problem(model=model, loss=one, data=data), k=1, journal=state)
        alone = top_eigenvalues(Problem(model=model, loss=other, data=data), k=1)
        again = top_eigenvalues(Problem(model=model, loss=other, data=data), k=1, journal=state)
        assert again.eigenvalues.tolist() == alone.eigenvalues.tolist()
        assert again.loss == alone.loss


def test_of_several_checkpoints_the_finished_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second of two, the same command finishes both, though the first result is there already."""
    import sharpscope
    from sharpscope.cli import main

    checkpoints = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for seed, path in enumerate(checkpoints):
        train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1, seed=seed), path)
    measure, calls = sharpscope.top_eigenvalues, 0

    def interrupted(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(sharpscope, "top_eigenvalues", interrupted)
    command = ["eigen", *map(str, checkpoints), "--k", "2", "--out", str(tmp_path / "results")]
    assert main(command) == 130
    assert (tmp_path / "results" / "a.json").exists()
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["a.json", "b.json"]


def test_more_passes_go_on_with_a_result_that_has_not_converged(tmp_path: Path) -> None:
    """Its passes are kept, no --overwrite is needed, and it ends with the values of a run that was never short."""
    from sharpscope.cli import main

    checkpoint, whole, short = tmp_path / "a.pt", tmp_path / "whole.json", tmp_path / "short.json"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=2), checkpoint)
    command = ["eigen", str(checkpoint), "--tol", "1e-4", "--out"]
    assert main([*command, str(whole)]) == 0
    assert main([*command, str(short), "--max-passes", "3"]) == 3
    kept = entries(tmp_path / "short.json.partial")
    assert kept >= 3
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1), tmp_path / "other.pt")
    before = short.read_bytes()
    assert main(["eigen", str(tmp_path / "other.pt"), "--out", str(short)]) == 1  # another checkpoint's is not its own
    assert short.read_bytes() == before
    assert entries(tmp_path / "short.json.partial") == kept
    assert not json.loads(short.read_text())["converged"][-1]
    assert main([*command, str(short), "--max-passes", "50"]) == 0
    first, second = (json.loads(path.read_text()) for path in (whole, short))
    for name in ("eigenvalues", "residuals", "lower", "upper", "loss"):
        assert first[name] == second[name], name
    assert first["cost"]["gradients"] == second["cost"]["gradients"]
    assert not (tmp_path / "short.json.partial").exists()


def test_seconds_are_those_of_the_passes_wherever_they_were_run(tmp_path: Path) -> None:
    """Taken from disk a pass still counts the time that it took."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(300, 4), torch.randint(3, (300,))

    class Slow:
        def __iter__(self):  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return iter([(inputs, labels)])

    problem = Problem(model=nn.Linear(4, 3), loss=nn.CrossEntropyLoss(), data=Slow())
    first, again = (top_eigenvalues(problem, k=2, journal=tmp_path / "state").cost for _ in range(2))
    assert first.seconds > 0.05 * first.passes
    assert again.seconds > 0.05 * first.passes


def test_vectors_written_before_a_kill_are_the_runs_own(tmp_path: Path) -> None:
    """Killed between the .npz and the .json, the same command goes on; without its passes neither is replaced."""
    from sharpscope.cli import main

    checkpoint, out = tmp_path / "a.pt", tmp_path / "r.json"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1), checkpoint)
    command = ["eigen", str(checkpoint), "--k", "2", "--vectors", "--out", str(out)]
    assert main([*command, "--max-passes", "2"]) == 3
    out.unlink()
    assert main(command) == 0
    out.unlink()
    assert main(command) == 1
