"""Checkpoints side by side: the numbers are those of each analysis alone, and an interrupted comparison goes on."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import processes
import sharpscope
from sharpscope import report
from sharpscope.cli import main
from sharpscope.comparing import LEVELS, Level
from sharpscope.training import Recipe, train

QUICK, DEFAULT = LEVELS["quick"], LEVELS["default"]

# Small enough for a second or two a checkpoint.
TINY = replace(
    QUICK, eigen_examples=200, density_examples=100, sharpness_examples=64, slice_examples=100, line_points=3
)
TINY = replace(TINY, surface_points=3, surface_examples=50, between_points=8, probes=2, steps=4, trace_probes=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three mlps by SGD and three by SAM on digits, an epoch each."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in range(3):
        recipe = Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1, seed=seed)
        train(recipe, folder / f"sgd-{seed}.pt")
        train(replace(recipe, rho=0.05), folder / f"sam-{seed}.pt")
    return folder


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEVELS, "quick", TINY)
    monkeypatch.setitem(LEVELS, "default", replace(TINY, eigen_examples=None, tol=1e-3))


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without its figures, which take most of the time: test_comparing.py has the whole one."""
    monkeypatch.setattr(report, "page", lambda comparison: "<!DOCTYPE html>")


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a quick report of a.pt beside it, which is sgd-0.pt, and what the command printed with --json."""
    folder, printed = tmp_path_factory.mktemp("alone") / "out", io.StringIO()
    path = shutil.copy(trained / "sgd-0.pt", folder.with_name("a.pt"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(LEVELS, "quick", TINY)
        patch.setattr(report, "page", lambda comparison: "<!DOCTYPE html>")
        assert run(path, "--quick", "--json", "--out", folder) == 0
    return folder, printed.getvalue()


def run(*argv: str | Path) -> int:
    return main(["compare", *(str(arg) for arg in argv), "--device", "cpu"])


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def numbers(found: dict[str, Any]) -> str:
    """All that was measured but what clocks decide: seconds, and the last bits of m-sharpness, grouped by timing."""
    subjects = [{k: v for k, v in s.items() if k not in ("sharpness", "provenance")} for s in found["subjects"]]
    text = json.dumps([subjects, found["between"]], sort_keys=True)
    # A slice that went on has repeated fewer points, and says so.
    return re.sub(r'"repeated": \d+|"(passes|gradients|seconds)": [\d.e+-]+', "", text)


def test_each_number_is_that_of_the_analysis_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eigenvalues on the sample --examples draws, loss and accuracy those of training; table, findings, page, JSON."""
    files = trained / "sgd-0.pt", trained / "sam-0.pt"
    assert run(*files, "--quick", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "lambda_max of sam-0.pt is " in out
    assert "One run each: this says nothing of SAM in general." in out
    assert (tmp_path / "index.html").read_text().startswith("<!DOCTYPE html>")
    found = record(tmp_path)
    assert not judges(found)
    for path, subject in zip(files, found["subjects"], strict=True):
        problem = sharpscope.load(path, examples=200)
        alone = sharpscope.top_eigenvalues(problem, 5, TINY.tol, population=True)
        assert subject["eigen"]["eigenvalues"] == alone.eigenvalues.tolist()
        assert alone.sampling is not None
        assert subject["eigen"]["sampling"]["lower"] == alone.sampling["lower"]
        metrics = subject["provenance"]["metrics"]
        for split in ("train", "test"):
            performance = subject["performance"][split]
            assert performance["loss"] == pytest.approx(metrics[f"{split}_loss"], rel=1e-5)
            assert performance["accuracy"] == pytest.approx(metrics[f"{split}_accuracy"])
        edge = sharpscope.measure_sharpness(sharpscope.load(path), "edge").measures[0]
        ours = next(m for m in subject["sharpness"]["measures"] if m["name"] == "edge")
        assert ours["settings"]["SGD's edge"] == pytest.approx(edge.settings["SGD's edge"])
        assert ours["settings"]["lambda_max"] == subject["eigen"]["lambda_max"]
        assert ours["settings"]["SAM's edge"] if "sam" in path.name else True
    labels = [row["label"] for row in found["rows"]]
    assert {"test loss", "test accuracy", "lambda_max/lambda_5", "trace", "edge"} < set(labels)
    assert sum(label.startswith("m-sharpness, m=") for label in labels) == 4


def test_all_data_need_no_sampling_interval(trained: Path, tmp_path: Path) -> None:
    """The default level takes eigenvalues of every training example; the interval is then numerical alone."""
    assert run(trained / "sgd-0.pt", "--out", tmp_path) == 0
    found = record(tmp_path)
    eigen = found["subjects"][0]["eigen"]
    assert (eigen["num_examples"], eigen["sampling"], eigen["tol"]) == (1437, None, 1e-3)
    row = next(row for row in found["rows"] if row["label"] == "lambda_max")
    assert row["readings"][0]["interval"] == "bound on the numerical error"
    assert row["readings"][0]["data"] == "1437 examples of digits (train)"


def test_checkpoints_share_lines_planes_and_samples(trained: Path, tmp_path: Path) -> None:
    """Directions of the same seeds on the same axes; the line between ends at both checkpoints' own losses."""
    run(trained / "sgd-0.pt", trained / "sam-0.pt", "--quick", "--out", tmp_path, "--seed", "3")
    found = record(tmp_path)
    one, two = found["subjects"]
    for part in ("line", "surface"):
        assert one[part]["axes"] == two[part]["axes"]
        seeds = [[d["seed"] for line in s[part]["directions"] for d in line] for s in (one, two)]
        assert seeds[0] == seeds[1] == ([3, 4, 5] if part == "line" else [3, 3])
    assert one["line"]["splits"] == ["train", "test"]
    (way,) = found["between"]
    assert (way["from"], way["to"]) == ("sgd-0.pt", "sam-0.pt")
    x = np.array(way["axes"][0])
    for end, subject in ((0.0, one), (1.0, two)):
        at = int(np.flatnonzero(x == end)[0])
        at_w = [centre[0] for centre in subject["line"]["centre"]]
        np.testing.assert_allclose(np.array(way["loss"])[:, 0, at], at_w, rtol=1e-5)
    assert min(way["barrier"].values()) >= 0


def test_groups_are_compared_by_their_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal seeds are paired, others not; the table has means and the ratio, findings its interval and the number."""
    sgd, sam = f"{trained}/sgd-*.pt", f"{trained}/sam-*.pt"
    assert run("--sgd", sgd, "--sam", sam, "--quick", "--out", tmp_path / "paired") == 0
    out = capsys.readouterr().out
    found = record(tmp_path / "paired")
    tops = {g: [s["eigen"]["lambda_max"] for s in found["subjects"] if s["group"] == g] for g in ("sgd", "sam")}
    rises = np.log(tops["sam"]) - np.log(tops["sgd"])
    value, interval = np.exp(rises.mean()), scipy.stats.ttest_1samp(rises, 0).confidence_interval()
    row = next(row for row in found["rows"] if row["label"] == "lambda_max")
    own = []  # the mean over the runs of each group of the error of their own number
    for group in ("sgd", "sam"):
        runs = [r for s, r in zip(found["subjects"], row["readings"], strict=True) if s["group"] == group]
        assert {r["interval"] for r in runs} == {"95 % over examples, for all the data"}
        own.append(np.mean([max(np.log(r["value"] / r["lower"]), np.log(r["upper"] / r["value"])) for r in runs]))
    half = np.sqrt(((interval.high - interval.low) / 2) ** 2 + own[0] ** 2 + own[1] ** 2)
    lower, upper = np.exp(rises.mean() - half), np.exp(rises.mean() + half)
    expected = {"value": value, "lower": lower, "upper": upper, "ratio": True, "by": "pairs", "runs": 3, "freedom": 2}
    assert row["differences"]["sam"] == pytest.approx({**expected, "converged": True})
    told = f"lambda_max: sam/sgd = {value:.3g}, 95 % interval {lower:.3g} to {upper:.3g}"
    assert f"{told} over 3 pairs of seeds" in out
    assert not judges(found)
    assert "sam against sgd" in out.splitlines()[0]
    assert [(way["from"], way["to"]) for way in found["between"]] == [("sgd-0.pt", "sam-0.pt")]
    odd = [f"sgd={trained}/sgd-[01].pt", f"sam={trained}/sam-[12].pt"]
    again = ["--quick", "--out", tmp_path / "paired", "--overwrite"]  # what was measured there is not measured again
    assert run("--group", odd[0], "--group", odd[1], *again) == 0
    assert "over 2 and 2 runs, not paired" in capsys.readouterr().out
    alone = ["--sgd", trained / "sgd-0.pt", "--sam", trained / "sam-0.pt", trained / "sam-1.pt"]
    assert run(*alone, *again) == 0
    assert "a group of one run says nothing of the scatter over runs" in capsys.readouterr().out


def judges(found: dict[str, Any]) -> bool:
    """Whether the findings go beyond what was measured; they begin with what was asked for."""
    said = " ".join(found["findings"])
    assert said.startswith("lambda_max")
    return re.search(r"better|worse|generali|flatter|good|bad\b", said) is not None


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_three_times_a_comparison_ends_in_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    """kill -9 in three parts: what was finished is not measured again, and every number is an uninterrupted run's."""
    files = [str(trained / name) for name in ("sgd-0.pt", "sam-0.pt")]
    command = ["compare", *files, "--quick", "--examples", "100", "--out"]
    killed, whole, parts = tmp_path / "killed", tmp_path / "whole", tmp_path / "killed" / "parts"
    stamps: dict[str, int] = {}
    for wanted in (2, 5, 9):
        process = processes.command(*command, str(killed), page=False, quick=TINY)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(list(parts.glob("*.json"))) < wanted and process.is_alive():
            time.sleep(0.005)
        process.kill()
        process.join()
        now = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.json")}
        assert stamps.items() <= now.items()
        assert len(now) >= wanted
        stamps = now
    assert not (killed / "compare.json").exists()
    processes.finished(*command, str(killed), page=False, quick=TINY)
    assert stamps.items() <= {path.name: path.stat().st_mtime_ns for path in parts.glob("*.json")}.items()
    assert not list(parts.glob("*.partial"))
    assert run(*command[1:], whole) == 0
    assert numbers(record(killed)) == numbers(record(whole))


INTERRUPTED = """
import pathlib, torch, sharpscope
folder = pathlib.Path(__file__).parent
class Model(torch.nn.Linear):
    def forward(self, x):
        if (folder / "interrupt").exists() and len(list((folder / "out" / "parts").glob("*-*.json"))) == 8:
            raise KeyboardInterrupt
        return super().forward(x)
def problem():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(80, 4, generator=g), torch.randint(0, 3, (80,), generator=g)
    return sharpscope.Problem(model=Model(4, 3), loss=torch.nn.CrossEntropyLoss(), data=data)
"""


def test_interrupted_it_goes_on_with_the_parts_that_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C exits 130 and says that the same command goes on; it then measures no finished part anew."""
    (tmp_path / "own.py").write_text(INTERRUPTED)
    (tmp_path / "interrupt").touch()
    for i in range(2):
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"{i}.pt")

    def stamps() -> dict[str, int]:
        parts = (tmp_path / "out" / "parts").glob("*-*.json")
        return {path.name: path.stat().st_mtime_ns for path in parts}

    command = [tmp_path / "0.pt", tmp_path / "1.pt", "--problem", tmp_path / "own.py", "--quick"]
    assert run(*command, "--out", tmp_path / "out") == 130
    assert "The same command goes on from there." in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.json").exists()
    finished = stamps()
    assert len(finished) == 8
    (tmp_path / "interrupt").unlink()
    assert run(*command, "--out", tmp_path / "out") == 0
    whole = stamps()
    assert len(whole) == 15
    assert finished.items() <= whole.items()
    assert run(*command, "--out", tmp_path / "out") == 0
    assert stamps() == whole


@pytest.mark.parametrize("change", ["seed", "level", "weights", "rho", "dtype"])
def test_another_command_takes_no_wrong_part(
    trained: Path, alone: tuple[Path, str], tmp_path: Path, change: str
) -> None:
    """In the folder of a finished report it refuses, and with --overwrite gives the numbers of a fresh folder."""
    content = torch.load(trained / "sgd-0.pt", weights_only=True)
    path, out = alone[0].with_name("a.pt"), tmp_path / "out"
    shutil.copytree(alone[0], out)
    before = (out / "compare.json").read_bytes()
    more = {"seed": ["--seed", "1"], "rho": ["--rho", "0.1"], "dtype": ["--dtype", "float64"]}.get(change, [])
    level = ["--quick"] if change != "level" else ["--quick", "--examples", "150"]
    if change == "weights":
        next(iter(content["state_dict"].values())).mul_(1.5)
        torch.save(content, path)
    assert run(path, *level, *more, "--out", out) == 1
    assert (out / "compare.json").read_bytes() == before
    assert run(path, *level, *more, "--out", out, "--overwrite") == 0
    assert run(path, *level, *more, "--out", tmp_path / "fresh") == 0
    assert numbers(record(out)) == numbers(record(tmp_path / "fresh"))
    rises = [
        [m["value"] for m in record(folder)["subjects"][0]["sharpness"]["measures"]]
        for folder in (out, tmp_path / "fresh")
    ]
    assert rises[0] == pytest.approx(rises[1], rel=1e-3)
    assert json.loads(before)["subjects"] != record(out)["subjects"]
    shutil.copy(trained / "sgd-0.pt", path)


def _other_data(folder: Path) -> list[str | Path]:
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1, label_noise=0.2), folder / "noisy.pt")
    return [folder / "noisy.pt"]


def _changed(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> list[str | Path]:
    content = torch.load(folder / "sam-0.pt", weights_only=True)
    change(content)
    torch.save(content, folder / name)
    return [folder / name]


def _blow_up(content: dict[str, Any]) -> None:
    next(iter(content["state_dict"].values())).fill_(float("nan"))


def _overflow(content: dict[str, Any]) -> None:
    for value in content["state_dict"].values():
        value.fill_(1e30)


WRONG: dict[str, tuple[Callable[[Path], list[str | Path]], str]] = {
    "twice": (lambda f: [f / "sgd-0.pt"], "needs each checkpoint once"),
    "same weights": (lambda f: [*_changed(f, "copy.pt", lambda c: None), f / "sam-0.pt"], "hold the same"),
    "other data": (_other_data, "the train data of sgd-0.pt (digits) and noisy.pt (digits, 20 % wrong labels) differ"),
    "other loss": (lambda f: _changed(f, "mse.pt", lambda c: c.update(loss="nll")), "compared on one loss"),
    "diverged": (lambda f: _changed(f, "nan.pt", _blow_up), "nan.pt has diverged"),
    "infinite loss": (lambda f: _changed(f, "inf.pt", _overflow), "inf.pt has diverged: its train loss is"),
    "missing": (lambda f: [f / "nope.pt"], "There is no checkpoint"),
    "both ways": (lambda f: ["--sgd", f / "sgd-1.pt", "--sam", f / "sam-1.pt"], "in groups, got both"),
    "no examples": (lambda f: ["--examples", "0"], "examples must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compared_ends_in_one_sentence(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, one line that names the checkpoint and what to do, before any long measurement."""
    more, message = WRONG[name]
    assert run(trained / "sgd-0.pt", *more(trained), "--quick", "--out", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("parts/*eigen*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sgd", "{}/sgd-0.pt"], "got 'sgd' alone"),
        (["--sgd", "{}/no-*.pt", "--sam", "{}/sam-0.pt"], "No checkpoint matches"),
        (["--group", "{}/sgd-0.pt"], "must be NAME=PATTERN"),
        (["--sgd", "{}/sgd-0.pt", "--group", "sgd={}/sgd-1.pt"], "got 'sgd' twice"),
        (["--sgd", "{}/sgd-0.pt", "{}/run-again.pt", "--sam", "{}/sam-0.pt"], "of one recipe and seed"),
        (["--sgd", "{}/sgd-epoch1.pt", "{}/sgd-epoch2.pt", "--sam", "{}/sam-0.pt"], "differ in the epoch alone"),
        ([], "needs checkpoints"),
    ],
)
def test_groups_that_are_none_end_in_one_sentence(
    argv: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A group alone or twice, a pattern without files, two checkpoints of one run."""
    content = torch.load(trained / "sgd-0.pt", weights_only=True)
    next(iter(content["state_dict"].values())).mul_(1.01)
    for name in ("run-again", "sgd-epoch1", "sgd-epoch2"):
        torch.save(content, trained / f"{name}.pt")
    assert run(*(a.format(trained) for a in argv), "--quick", "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    for name in ("run-again", "sgd-epoch1", "sgd-epoch2"):
        (trained / f"{name}.pt").unlink()


def test_different_models_have_no_line_between(trained: Path, tmp_path: Path) -> None:
    """Another architecture on the same data is compared in all but the straight line, which does not exist."""
    train(Recipe(model="mlp", model_args={"hidden": (6,)}, epochs=1), tmp_path / "narrow.pt")
    assert run(trained / "sgd-0.pt", tmp_path / "narrow.pt", "--quick", "--out", tmp_path / "out") == 0
    found = record(tmp_path / "out")
    assert found["between"] == []
    assert all(r is not None for row in found["rows"] for r in row["readings"])


PROBLEM = """
import torch, sharpscope
def problem({split}):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(80, 4, generator=g), torch.randint(0, 3, (80,), generator=g)
    return sharpscope.Problem(model=torch.nn.Linear(4, 3), loss=torch.nn.CrossEntropyLoss(), data=data)
"""


@pytest.mark.parametrize("split", ["", "split='train'"])
def test_a_problem_without_test_data_has_no_test_rows(tmp_path: Path, split: str) -> None:
    """problem() without a split leaves test loss and accuracy out, of slices too; with one they are there."""
    (tmp_path / "own.py").write_text(PROBLEM.format(split=split))
    for i in range(2):
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"{i}.pt")
    argv = ["--problem", tmp_path / "own.py", "--quick", "--out", tmp_path / "out"]
    assert run(tmp_path / "0.pt", tmp_path / "1.pt", *argv) == 0
    found = record(tmp_path / "out")
    assert ("test loss" in [row["label"] for row in found["rows"]]) == bool(split)
    assert ("test" in found["subjects"][0]["line"]["splits"]) == bool(split)
    assert "edge" not in [row["label"] for row in found["rows"]]


def test_what_a_checkpoint_cannot_have_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of one dimension give random directions no size; the eigenvalues are there all the same."""
    (tmp_path / "flat.py").write_text(
        PROBLEM.format(split="").replace("torch.nn.Linear(4, 3)", "torch.nn.LayerNorm(4)").replace("(0, 3", "(0, 4")
    )
    for i in range(2):
        state = torch.nn.LayerNorm(4).state_dict()
        torch.save({name: value + i for name, value in state.items()}, tmp_path / f"{i}.pt")
    argv = ["--problem", tmp_path / "flat.py", "--quick", "--out", tmp_path / "out"]
    assert run(tmp_path / "0.pt", tmp_path / "1.pt", *argv) == 0
    assert "0.pt: no line. Random directions must have weights to move" in capsys.readouterr().out
    subject = record(tmp_path / "out")["subjects"][0]
    assert "line" not in subject
    assert subject["eigen"]["converged"]


def test_not_converged_exits_3_and_shows_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tolerance beyond float32 is marked in the table; the finding draws no conclusion from it."""
    monkeypatch.setitem(LEVELS, "quick", replace(TINY, tol=1e-12, eigen_examples=50))
    assert run(trained / "sgd-0.pt", trained / "sam-0.pt", "--quick", "--out", tmp_path) == 3
    out = capsys.readouterr().out
    assert re.search(r"^lambda_max .*\?", out, flags=re.MULTILINE)
    assert "has not converged in" in out


def test_json_prints_the_record(alone: tuple[Path, str]) -> None:
    """--json prints what compare.json holds, the values over the grids included."""
    folder, printed = alone
    said, kept = json.loads(printed), record(folder)
    kept.pop("asked")
    assert said == kept
    assert np.array(said["subjects"][0]["surface"]["loss"]).shape == (1, 1, 3, 3)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("a/sgd.pt", "b/sam.pt"), "sgd.pt and sam.pt"),
        (("r/sgd/last.pt", "r/sam/last.pt"), "sgd/last.pt and sam/last.pt"),
    ],
)
def test_names_are_the_shortest_ends_of_paths(
    paths: tuple[str, str], names: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File names where they differ, with as many folders as tell them apart where not."""
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True)
        shutil.copy(trained / "sgd-0.pt", tmp_path / path)
    assert run(*(tmp_path / path for path in paths), "--quick", "--out", tmp_path / "out") == 1
    assert f"but {names} hold the same" in capsys.readouterr().err


@pytest.mark.parametrize(("less", "more"), [(QUICK, DEFAULT), (DEFAULT, LEVELS["thorough"])])
def test_levels_ascend(less: Level, more: Level) -> None:
    """No part of a level is smaller, or known less well, than of the one below; None is all there are."""
    assert more.tol <= less.tol
    for name, value in vars(less).items():
        other = getattr(more, name)
        assert name in ("name", "tol", "certify") or other is None or (value is not None and value <= other)


def test_findings_of_one_checkpoint_are_none(alone: tuple[Path, str]) -> None:
    """Alone it is not compared with anything."""
    assert record(alone[0])["findings"] == []
