"""A slice that was killed goes on where it was, to the same bits, and never with another's points."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import processes
from conftest import classifier
from sharpscope import Problem, SliceResult, loss_slice, loss_surface
from sharpscope.cli import main
from sharpscope.errors import ArgumentError
from sharpscope.objective import fastest_micro_batch
from sharpscope.resume import PointLog, discard
from sharpscope.slices import Direction, random_directions
from sharpscope.slices.evaluation import PointEvaluator


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """Each point whose loss is taken, in order."""
    seen: list[tuple[float, ...]] = []
    at = PointEvaluator.evaluate

    def counted(self: PointEvaluator, line: int, coefficients: Any) -> list[float]:
        seen.append((line, *coefficients))
        return at(self, line, coefficients)

    monkeypatch.setattr(PointEvaluator, "evaluate", counted)
    return seen


def stopped(problem: Problem, after: int, **options: Any) -> None:
    """A surface that is interrupted after so many points."""
    calls: list[int] = []

    def stop(stage: str, done: int, total: int | None) -> None:
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_surface(problem, points=7, progress=stop, **options)


def test_a_resumed_surface_repeats_no_finished_point(tmp_path: Path, visits: list[Any]) -> None:
    """Interrupted twice, it takes each point once in all, and ends in the bits of an uninterrupted one."""
    whole = loss_surface(classifier(examples=20), points=7)
    visits.clear()
    stopped(classifier(examples=20), 10, journal=tmp_path)
    stopped(classifier(examples=20), 30, journal=tmp_path)
    resumed = loss_surface(classifier(examples=20), points=7, journal=tmp_path)
    assert len(set(visits)) == 49
    # w itself is taken anew each time: were its loss another, no point would be of this one.
    assert sorted(visits).count((0, 0.0, 0.0)) == 3
    assert len(visits) == 49 + 2
    np.testing.assert_array_equal(resumed.loss, whole.loss)
    np.testing.assert_array_equal(resumed.accuracy, whole.accuracy)
    assert resumed.provenance["repeated"] == 29


def test_a_finer_grid_takes_only_the_points_between(tmp_path: Path, visits: list[Any]) -> None:
    """Points are known by their coordinates: a wider or finer grid of the same plane uses those that are there."""
    loss_surface(classifier(examples=20), points=5, journal=tmp_path)
    visits.clear()
    loss_surface(classifier(examples=20), points=9, journal=tmp_path)
    assert len(visits) == 81 - 25 + 1


@pytest.mark.parametrize("change", ["weights", "buffers", "data", "plane", "test", "batchnorm", "micro-batch", "decay"])
def test_a_changed_problem_uses_no_old_point(tmp_path: Path, visits: list[Any], change: str) -> None:
    """Points are keyed by what decides the loss, not by a name: change any of it, and every point is taken anew."""

    def normed() -> Problem:
        base = classifier(examples=20)
        model = nn.Sequential(base.model, nn.BatchNorm1d(3))
        return Problem(model=model, loss=base.loss, data=base.data)

    first: dict[str, Any] = {"also": {"test": classifier(examples=20).data}, "journal": tmp_path}
    loss_surface(normed(), points=3, **first)
    problem, options, plane = normed(), dict(first), None
    with torch.no_grad():
        if change == "weights":
            problem.model[0][0].bias[2] += 1e-6  # type: ignore[index,operator]
        elif change == "buffers":
            problem.model[1].running_mean[0] += 1e-6  # type: ignore[index,union-attr,operator]
        elif change == "data":
            problem.data[0][3, 1] += 1e-6
        elif change == "plane":
            plane = random_directions(problem, 2, torch.Generator().manual_seed(1))
        elif change == "test":
            options["also"] = {"test": (classifier(examples=20).data[0] + 1e-6, classifier(examples=20).data[1])}
        elif change == "batchnorm":
            options["batchnorm"] = "recalibrate"
        elif change == "micro-batch":
            options["micro_batch"] = 7
        else:
            problem = replace(problem, weight_decay=0.1)
    visits.clear()
    changed = loss_surface(problem, plane, 3, **options)
    assert len(visits) == 9
    options.pop("journal")
    np.testing.assert_array_equal(changed.loss, loss_surface(problem, plane, 3, **options).loss)


def test_zero_and_negative_losses_count_as_done(tmp_path: Path, visits: list[Any]) -> None:
    """Whether a point is finished is its status, not the sign of its loss."""

    def signed(output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - output[:, 0].detach() + output[:, 1]).mean()

    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    problem = Problem(model=model, loss=signed, data=(torch.ones(3, 2), torch.zeros(3)))
    line = [Direction(torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64), "d")]
    first = loss_slice(problem, line, 5, journal=tmp_path)
    assert first.loss[0, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    visits.clear()
    assert loss_slice(problem, line, 5, journal=tmp_path).loss.tolist() == first.loss.tolist()
    assert visits == [(0, 0.0)]


def test_a_record_of_another_key_in_the_file_is_not_believed(tmp_path: Path) -> None:
    """A process that goes on appending after another has taken the file over does not put its points under that key."""
    first = PointLog(tmp_path, "one", 1, 1)
    first.add((0.0,), (5.0,))
    second = PointLog(tmp_path, "two", 1, 1)
    second.add((1.0,), (6.0,))
    first.add((2.0,), (7.0,))
    second.add((3.0,), (8.0,))
    again = PointLog(tmp_path, "two", 1, 1)
    assert (2.0,) not in again
    assert again[(1.0,)] == (6.0,)


@pytest.mark.parametrize("change", ["constant", "forward", "curvature"])
def test_changed_code_uses_no_old_point(tmp_path: Path, visits: list[Any], change: str) -> None:
    """A loss or a model whose code is another at the same weights is another loss, also where it agrees at w."""

    def made(slope: float) -> Problem:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = classifier(examples=20).model
                self.start = float(self.inner[0].weight.detach().sum())  # type: ignore[index,union-attr,operator]

            def forward(self, x: Tensor) -> Tensor:
                away = self.inner[0].weight.sum() - self.start  # type: ignore[index,union-attr,operator]
                return self.inner(x) * FACTOR["value"] + FACTOR["bend"] * away**2 * torch.eye(3)[0]

        FACTOR["value"] = slope if change == "forward" else 1.0
        FACTOR["bend"] = slope if change == "curvature" else 1.0
        losses = {1.0: lambda o, t: 1.0 * nn.functional.cross_entropy(o, t)}
        losses[5.0] = lambda o, t: 5.0 * nn.functional.cross_entropy(o, t)
        loss = losses[slope] if change == "constant" else nn.CrossEntropyLoss()
        return Problem(model=Scaled(), loss=loss, data=classifier(examples=20).data)

    plane = random_directions(made(1.0), 2)
    loss_surface(made(1.0), plane, 3, journal=tmp_path)
    visits.clear()
    changed = loss_surface(made(5.0), plane, 3, journal=tmp_path)
    assert len(visits) == 9
    np.testing.assert_array_equal(changed.loss, loss_surface(made(5.0), plane, 3).loss)


FACTOR = {"value": 1.0, "bend": 1.0}


def test_shards_meet_in_the_whole(tmp_path: Path) -> None:
    """Three processes' shards together are the surface of one, bit for bit; before the last it is unfinished."""
    results = [loss_surface(classifier(examples=20), points=6, journal=tmp_path, shard=(i, 3)) for i in (1, 2, 3)]
    assert [r.complete for r in results] == [False, False, True]
    np.testing.assert_array_equal(results[-1].loss, loss_surface(classifier(examples=20), points=6).loss)
    done = [int((r.status != 0).sum()) for r in results]
    assert done[0] <= 49 // 3 + 2
    discard(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    ("shard", "options", "message"),
    [
        ((0, 3), {}, "1/n"),
        ((4, 3), {}, "1/n"),
        ((1, 2), {"journal": None}, "journal"),
        ((1, 2), {"refine": 2}, "refine"),
    ],
)
def test_shards_that_cannot_meet_are_refused(tmp_path: Path, shard: Any, options: Any, message: str) -> None:
    """A shard out of range, without a place to meet, or with a refinement that needs the whole grid."""
    with pytest.raises(ArgumentError, match=message):
        loss_surface(classifier(examples=20), points=3, shard=shard, **{"journal": tmp_path, **options})


def test_a_record_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    """Whatever byte a kill falls on, whole records stay and the torn one is written again over its remains."""
    log = PointLog(tmp_path, "key", 1, 2)
    for i in range(4):
        log.add((float(i),), (i / 3, -float("inf")))
    log.close()
    file = tmp_path / "points.points"
    whole = file.read_bytes()
    record = (len(whole) - whole.index(b"\n") - 1) // 4
    for cut in range(1, record + 1):
        file.write_bytes(whole[:-cut])
        again = PointLog(tmp_path, "key", 1, 2)
        assert again.replayed == 3
        again.add((3.0,), (1.0, -float("inf")))
        again.close()
        assert file.read_bytes() == whole


def test_a_flipped_bit_ends_the_points_that_are_believed(tmp_path: Path) -> None:
    """A record whose checksum is wrong, and all after it, count as absent."""
    log = PointLog(tmp_path, "key", 1, 1)
    for i in range(4):
        log.add((float(i),), (float(i),))
    log.close()
    file = tmp_path / "points.points"
    data = bytearray(file.read_bytes())
    data[data.index(b"\n") + 1 + 20 + 9] ^= 1
    file.write_bytes(data)
    again = PointLog(tmp_path, "key", 1, 1)
    assert again.replayed == 1
    assert (0.0,) in again
    assert (1.0,) not in again


def test_the_points_of_another_key_are_never_used_and_give_way(tmp_path: Path) -> None:
    """Another key, or another number of values, sees nothing of what is there, and its first point replaces it."""
    PointLog(tmp_path, "one", 1, 1).add((0.0,), (5.0,))
    other = PointLog(tmp_path, "two", 1, 1)
    assert other.replayed == 0
    other.add((1.0,), (6.0,))
    other.close()
    assert PointLog(tmp_path, "one", 1, 1).replayed == 0
    assert PointLog(tmp_path, "two", 1, 1)[(1.0,)] == (6.0,)


@pytest.mark.parametrize("kind", ["curvature", "gradient"])
def test_a_clock_that_chose_otherwise_loses_no_point(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """How derivatives are taken is chosen by timing; the points of an earlier run are used whatever it chose."""
    options = ["--quadratic"] if kind == "curvature" else ["--directions", "gradient"]
    command = ["slice", "sgd.pt", *options, "--points", "5", "--out", str(tmp_path / "s.json"), "--shard"]
    for shard, size in (("1/2", 64), ("2/2", 256)):
        monkeypatch.setattr(fastest_micro_batch, "autotune", lambda *args, size=size: size)
        assert run(checkpoints, *command, shard) == 0
    assert SliceResult.load(tmp_path / "s.json").complete


# The command line.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    common = ["train", "--model", "mlp", "--data", "digits", "--epochs", "2"]
    assert main([*common, "--out", str(folder / "sgd.pt"), "--save-epochs", "0,1"]) == 0
    assert main([*common, "--optimizer", "sam", "--out", str(folder / "sam.pt")]) == 0
    return folder


def run(folder: Path, *arguments: str) -> int:
    return main([*arguments[:1], *(str(folder / a) if a.endswith(".pt") else a for a in arguments[1:])])


def test_killed_three_times_a_surface_ends_in_the_same_bits(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 at three moments, then the same command to its end: no point twice, the file of an uninterrupted run."""
    out = tmp_path / "surface.json"
    command = ["surface", str(checkpoints / "sgd.pt"), "--points", "11x13"]
    log = tmp_path / "surface.json.partial" / "points.points"
    sizes = [0]
    for _ in range(3):
        process = processes.command(*command, "--out", str(out))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not log.exists() or log.stat().st_size < sizes[-1] + 1000):
            time.sleep(0.005)
        process.kill()
        process.join()
        sizes.append(log.stat().st_size)
    assert sizes == sorted(set(sizes))
    before = log.read_bytes()
    assert main([*command, "--out", str(out)]) == 0
    record = 3 * 8 + 2 * 8 + 4
    done = (len(before) - before.index(b"\n") - 1) // record
    assert f"{done - 1} of them from disk" in capsys.readouterr().out
    found = SliceResult.load(out)
    assert found.provenance["repeated"] == done - 1
    assert found.cost.passes == 11 * 13 - done + 1
    assert not log.parent.exists()
    processes.finished(*command, "--out", str(tmp_path / "whole.json"))
    whole = SliceResult.load(tmp_path / "whole.json")
    np.testing.assert_array_equal(found.loss, whole.loss)
    np.testing.assert_array_equal(found.accuracy, whole.accuracy)


def test_a_finished_surface_is_replaced_only_on_demand(checkpoints: Path, tmp_path: Path) -> None:
    """Whatever lies beside it, a finished result asks for --overwrite, and stays until the new one is finished."""
    out, state = tmp_path / "s.json", tmp_path / "s.json.partial"
    command = ["surface", "sgd.pt", "--out", str(out), "--points"]
    assert run(checkpoints, *command, "3") == 0
    assert not state.exists()
    state.mkdir()
    (state / "points.points").write_bytes(b"left over")
    assert run(checkpoints, *command, "4") == 1
    before = out.read_bytes()
    for name in ("shard", "whole"):
        assert run(checkpoints, *command, "5", "--overwrite", *(["--shard", "1/2"] if name == "shard" else [])) == 0
        assert (out.read_bytes() == before) == (name == "shard")


def test_an_unfinished_run_of_several_goes_on_with_the_same_command(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visits: list[Any]
) -> None:
    """Interrupted at its second checkpoint it repeats no point of either; another command finds its results taken."""
    command = ["surface", "sgd.pt", "sam.pt", "--points", "5", "--out", str(tmp_path)]
    at = PointEvaluator.evaluate

    def failing(self: PointEvaluator, line: int, coefficients: Any) -> list[float]:
        if len(visits) == 40:
            raise KeyboardInterrupt
        return at(self, line, coefficients)

    monkeypatch.setattr(PointEvaluator, "evaluate", failing)
    assert run(checkpoints, *command) == 130
    assert (tmp_path / "sgd.json").exists()
    monkeypatch.setattr(PointEvaluator, "evaluate", at)
    assert run(checkpoints, *command[:-3], "7", *command[-2:]) == 1
    before = len(visits)
    assert run(checkpoints, *command) == 0
    assert len(visits) - before == 50 - before + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sam.json", "sam.npz", "sgd.json", "sgd.npz"]


def test_a_path_is_in_the_order_of_training(checkpoints: Path, tmp_path: Path) -> None:
    """A centre that is an early step stands where its epoch says, not at the end."""
    out = tmp_path / "t.json"
    later = [str(checkpoints / name) for name in ("sgd-epoch1.pt", "sgd.pt")]
    command = ["surface", "sgd-epoch0.pt", "--trajectory", *later, "--points", "3", "--out", str(out)]
    assert run(checkpoints, *command) == 0
    assert [m.name for m in SliceResult.load(out).marks] == ["sgd-epoch0.pt", "sgd-epoch1.pt", "sgd.pt"]


def test_a_slice_between_checkpoints_prints_the_barrier(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--to draws the line from the one to the other, with both splits and the other's own loss."""
    out = tmp_path / "line.json"
    assert (
        run(checkpoints, "slice", "sgd.pt", "--to", str(checkpoints / "sam.pt"), "--split", "both", "--out", str(out))
        == 0
    )
    said = capsys.readouterr().out
    result = SliceResult.load(out)
    assert result.splits == ("train", "test")
    assert f"{result.barrier('test'):.4g}" in said
    assert "sam.pt" in said
    assert result.marks[0].loss["train"] == pytest.approx(result.loss[0, 0][result.axes[0] == 1.0][0], rel=1e-5)


def test_several_checkpoints_share_directions_grid_and_data(checkpoints: Path, tmp_path: Path) -> None:
    """SGD and SAM in one call: the same seed, range, points and examples, a file each."""
    assert (
        run(checkpoints, "surface", "sgd.pt", "sam.pt", "--points", "5", "--examples", "200", "--out", str(tmp_path))
        == 0
    )
    one, two = (SliceResult.load(tmp_path / f"{name}.json") for name in ("sgd", "sam"))
    for key in ("num_examples", "examples_seed", "split", "data", "mode", "statistics"):
        assert one.provenance[key] == two.provenance[key]
    assert [a.tolist() for a in one.axes] == [a.tolist() for a in two.axes]
    for key in ("kind", "seed", "normalisation", "one_dimensional"):
        assert one.directions[0][0][key] == two.directions[0][0][key]


def test_eigenvector_planes_carry_the_prediction_and_resume(checkpoints: Path, tmp_path: Path) -> None:
    """Eigenvectors measured by a run that was killed are kept for the next one; --eigen takes those of another run."""
    command = ["surface", "sgd.pt", "--directions", "eigenvectors", "--points", "5", "--examples", "300"]
    out = tmp_path / "e.json"
    assert run(checkpoints, *command, "--out", str(out), "--shard", "1/2") == 0
    assert not out.exists()
    kept = tmp_path / "e.json.partial" / "directions.npz"
    assert kept.exists()
    assert run(checkpoints, *command, "--out", str(out), "--shard", "2/2") == 0
    result = SliceResult.load(out)
    assert result.complete
    assert np.diagonal(result.curvatures[0]) == pytest.approx([d["eigenvalue"] for d in result.directions[0]], rel=1e-3)
    assert not kept.exists()
    eigen = tmp_path / "eigen.json"
    assert run(checkpoints, "eigen", "sgd.pt", "--k", "2", "--examples", "300", "--vectors", "--out", str(eigen)) == 0
    assert run(checkpoints, *command, "--eigen", str(eigen)) == 0
    assert run(checkpoints, *command[:-1], "299", "--eigen", str(eigen)) == 1


def test_directions_measured_on_other_examples_are_not_taken_over(checkpoints: Path, tmp_path: Path) -> None:
    """Eigenvectors kept by an unfinished run on some examples are not those of another number of them."""
    command = ["slice", "sgd.pt", "--directions", "eigenvectors", "--points", "5", "--examples"]
    assert run(checkpoints, *command, "300", "--out", str(tmp_path / "e.json"), "--shard", "1/2") == 0
    assert (tmp_path / "e.json.partial" / "directions.npz").exists()
    assert run(checkpoints, *command, "200", "--out", str(tmp_path / "e.json")) == 1
    assert run(checkpoints, *command, "200", "--out", str(tmp_path / "e.json"), "--overwrite") == 0
    assert run(checkpoints, *command, "200", "--out", str(tmp_path / "fresh.json")) == 0
    found, fresh = (SliceResult.load(tmp_path / f"{name}.json").directions[0][0] for name in ("e", "fresh"))
    assert found["eigenvalue"] == pytest.approx(fresh["eigenvalue"], rel=1e-3)


def test_a_trajectory_ends_at_its_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    """The plane of a training run shows its steps in order, with the loss of each and the distance off the plane."""
    steps = [str(checkpoints / f"sgd-epoch{i}.pt") for i in (0, 1)]
    out = tmp_path / "t.json"
    assert run(checkpoints, "surface", "sgd.pt", "--trajectory", *steps, "--points", "5x4", "--out", str(out)) == 0
    result = SliceResult.load(out)
    assert [m.name for m in result.marks] == ["sgd-epoch0.pt", "sgd-epoch1.pt", "sgd.pt"]
    assert all(m.on_path for m in result.marks)
    assert result.marks[-1].coordinates == (0.0, 0.0)
    assert all(a[0] < m.coordinates[i] < a[-1] for m in result.marks for i, a in enumerate(result.axes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slice", "sgd.pt", "--directions", "checkpoint"], "--to go together"),
        (["slice", "sgd.pt", "--seeds", "0"], "at least 1"),
        (["slice", "sgd.pt", "--range", "1", "-1"], "lower to a higher"),
        (["slice", "sgd.pt", "--points", "1"], "at least 2 points"),
        (["surface", "sgd.pt", "--directions", "plane"], "needs --through"),
        (["surface", "sgd.pt", "sam.pt", "--through", "sam.pt", "sgd.pt"], "one centre"),
        (["surface", "sgd.pt", "--shard", "1/2"], "needs --out"),
        (["surface", "sgd.pt", "--batchnorm", "recalibrate"], "has none"),
    ],
)
def test_wrong_slices_end_in_one_sentence(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Exit status 1 and a sentence on stderr, no traceback."""
    assert run(checkpoints, *arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
