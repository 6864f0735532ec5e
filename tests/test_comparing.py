"""A comparison from Python: the same numbers as from the command line, in memory, on disk and after an interruption."""

from __future__ import annotations

import gc
import json
import shlex
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import sharpscope
from comparisons import DIVERGED, groups, subject, two
from conftest import classifier
from sharpscope import Comparison, Problem, report
from sharpscope.cli import comparing, main, parser
from sharpscope.comparing import LEVELS, compare
from sharpscope.errors import ArgumentError, DataError, SharpscopeError
from sharpscope.report import page
from sharpscope.results import SliceResult
from sharpscope.results.comparison import ANALYSES, Performance, Subject

FEW = replace(
    replace(LEVELS["quick"], density_examples=20, sharpness_examples=20, slice_examples=20, surface_examples=20),
    probes=2,
    steps=3,
    trace_probes=4,
    seeds=1,
    line_points=3,
    between_points=8,
    surface_points=3,
)
TORCH = torch.Generator().manual_seed(0)
DATA = torch.randn(40, 4, generator=TORCH), torch.randint(0, 3, (40,), generator=TORCH)
TEST = torch.randn(24, 4, generator=TORCH), torch.randint(0, 3, (24,), generator=TORCH)


def problem(seed: int, data: Any = DATA, **provenance: Any) -> Problem:
    """A network of its own weights on the data of all."""
    return classifier(seed, data=data, provenance=provenance)


WEIGHTS = [1.0, 1.0, 3.0]


def sorted_by_class(seed: int, weights: list[float] | None = None) -> Problem:
    """1,200 examples sorted by class, with a loss of one's own where there are ``weights`` of classes."""
    found = problem(seed, (torch.randn(1200, 4, generator=torch.Generator().manual_seed(5)), torch.arange(1200) // 400))

    def own(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(output, target, reduction="none")
        return (each * torch.tensor(weights)[target]).mean()

    return found if weights is None else replace(found, loss=own)


def with_loss(seed: int, factor: float = 1.0, penalty: float = 0.0) -> Problem:
    """The problem with a loss of one's own, times ``factor``, which may read the model's weights."""
    found = problem(seed)

    def own(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = factor * torch.nn.functional.cross_entropy(output, target)
        return value + penalty * sum(p.square().sum() for p in found.model.parameters()) if penalty else value

    return replace(found, loss=own)


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without its figures, which take most of the command's time."""
    monkeypatch.setattr(report, "page", lambda comparison: "<!DOCTYPE html>")


def names(comparison: Comparison) -> list[tuple[str | None, str]]:
    return [(one.group, one.name) for one in comparison.subjects]


def test_checkpoints_and_functions_give_the_numbers_of_each_analysis() -> None:
    """Of Problems and of functions that return them: lambda_max alone, loss and accuracy by hand, the line between."""
    given = {"a": problem(0), "b": problem(1)}
    comparison = compare({"a": given["a"], "b": lambda: problem(1)}, test=TEST, level=FEW)
    assert names(comparison) == [(None, "a"), (None, "b")]
    for one in comparison.subjects:
        alone = sharpscope.top_eigenvalues(given[one.name], 5, FEW.tol)
        assert one.eigen is not None
        assert one.eigen.eigenvalues.tolist() == alone.eigenvalues.tolist()
        for split, (inputs, labels) in {"train": DATA, "test": TEST}.items():
            output = given[one.name].model(inputs).detach()
            assert one.performance[split].loss == pytest.approx(
                float(torch.nn.functional.cross_entropy(output, labels)), rel=1e-5
            )
            assert one.performance[split].accuracy == pytest.approx(float((output.argmax(1) == labels).float().mean()))
        assert one.line is not None
        assert one.line.splits == ("train", "test")
    assert [(a, b) for a, b, _ in comparison.between] == [("a", "b")]
    assert comparison.findings[0].startswith("lambda_max of b is ")
    assert comparison.command == ""


def test_a_group_is_a_list_or_a_mapping_of_runs() -> None:
    """Runs of lists are numbered, those of mappings keep their names; equal seeds are paired, none are not."""
    seeded = {g: [problem(2 * s + (g == "sam"), recipe={"rho": g, "seed": s}) for s in (0, 1)] for g in ("sgd", "sam")}
    comparison = compare(seeded, level=FEW)
    assert names(comparison) == [("sgd", "sgd 1"), ("sgd", "sgd 2"), ("sam", "sam 1"), ("sam", "sam 2")]
    assert [(a, b) for a, b, _ in comparison.between] == [("sgd 1", "sam 1")]
    assert "over 2 pairs of seeds" in comparison.findings[0]
    mapped = compare({"sgd": {"one": problem(0), "two": problem(1)}, "sam": [problem(2), problem(3)]}, level=FEW)
    assert [name for _, name in names(mapped)] == ["one", "two", "sam 1", "sam 2"]
    assert "over 2 and 2 runs, not paired" in mapped.findings[0]


def test_runs_of_files_are_called_by_them_where_that_tells_them_apart() -> None:
    """By the file's name where each of the group has one that nothing else has, else by number."""
    files = {"sgd": ["runs/a.pt", "runs/b.pt"], "sam": ["x/last.pt", "y/last.pt"], "adam": ["c.pt", None]}
    seeds = iter(range(6))
    given = {g: [problem(next(seeds), **({"checkpoint": f} if f else {})) for f in fs] for g, fs in files.items()}
    found = [name for _, name in names(compare(given, level=FEW))]
    assert found == ["a.pt", "b.pt", "sam 1", "sam 2", "adam 1", "adam 2"]


def test_no_more_than_two_checkpoints_are_in_memory_at_once() -> None:
    """Functions are called when their turn comes: the first once, of two each once, of more the others three times."""
    for count, calls in ((2, [1, 1]), (3, [1, 3, 3])):
        built = [0] * count
        alive: list[weakref.ref[torch.nn.Module]] = []

        def make(i: int, built: list[int] = built, alive: list[Any] = alive) -> Callable[[], Problem]:
            def build() -> Problem:
                gc.collect()
                assert sum(model() is not None for model in alive) < 2
                built[i] += 1
                made = problem(i)
                alive.append(weakref.ref(made.model))
                return made

            return build

        compare({str(i): make(i) for i in range(count)}, level=FEW)
        assert built == calls


def refilled() -> dict[str, Any]:
    """Two functions that fill one model."""
    shared = problem(0)

    def fill(seed: int) -> Callable[[], Problem]:
        def build() -> Problem:
            shared.model.load_state_dict(problem(seed).model.state_dict())
            return shared

        return build

    return {"a": fill(0), "b": fill(1)}


def nan() -> Problem:
    found = problem(1)
    next(found.model.parameters()).data.fill_(float("nan"))
    return found


RUN = {"recipe": {"lr": 0.1, "seed": 0}}
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (dict, "at least one checkpoint, got none"),
    "a file": (lambda: {"a": "sgd.pt"}, "but a is a str. sharpscope.load makes a Problem of a file"),
    "a model": (lambda: {"a": problem(0).model}, "but a is a Sequential"),
    "a function of no Problem": (lambda: {"a": lambda: None}, "The function of a must return a Problem, got NoneType"),
    "both ways": (lambda: {"a": problem(0), "b": [problem(1)]}, "in groups, got both"),
    "a group alone": (lambda: {"a": [problem(0), problem(1)]}, "got 'a' alone"),
    "an empty group": (lambda: {"a": [problem(0)], "b": []}, "'b' is empty"),
    "a name twice": (lambda: {"a": {"0": problem(0)}, "b": {"0": problem(1)}}, "got '0' twice"),
    "same weights": (lambda: {"a": problem(0), "b": problem(0)}, "but a and b hold the same"),
    "one run twice": (lambda: {"a": [problem(0, **RUN), problem(1, **RUN)], "b": [problem(2)]}, "a 1 and a 2 of a are"),
    "one model": (refilled, "a and b share one"),
    "diverged": (lambda: {"a": problem(0), "b": nan()}, "b has diverged"),
    "other data": (
        lambda: {"a": problem(0), "b": problem(1, TEST)},
        "the train data of a (tuple) and b (tuple) differ",
    ),
    "other loss": (
        lambda: {"a": problem(0), "b": replace(problem(1), loss=torch.nn.MultiMarginLoss())},
        "compared on one loss",
    ),
    "other weight decay": (
        lambda: {"a": problem(0), "b": replace(problem(1), weight_decay=0.01)},
        "a has weight_decay 0.0 and b 0.01",
    ),
    "other parameters": (
        lambda: {"a": problem(0), "b": replace(problem(1), params="0.*")},
        "a has params '*' and b '0.*'",
    ),
    "other mode": (
        lambda: {"a": problem(0), "b": replace(problem(1), mode="train")},
        "a has mode 'eval' and b 'train'",
    ),
    "other class weights": (
        lambda: {"a": problem(0), "b": replace(problem(1), loss=torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS)))},
        "differ on the same outputs and targets",
    ),
    "other label smoothing": (
        lambda: {"a": problem(0), "b": replace(problem(1), loss=torch.nn.CrossEntropyLoss(label_smoothing=0.1))},
        "differ on the same outputs and targets",
    ),
    "another ignore_index of a late class": (
        lambda: {
            "a": sorted_by_class(0),
            "b": replace(sorted_by_class(1), loss=torch.nn.CrossEntropyLoss(ignore_index=2)),
        },
        "differ on the same outputs and targets",
    ),
    "another weight of a late class": (
        lambda: {"a": sorted_by_class(0, [1.0, 1.0, 1.0]), "b": sorted_by_class(1, WEIGHTS)},
        "differ on the same outputs and targets",
    ),
    "another factor": (
        lambda: {"a": with_loss(0, factor=1.0), "b": with_loss(1, factor=2.0)},
        "differ on the same outputs and targets",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compared_is_said_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    """One sentence that names the checkpoint, and no part is written."""
    given, message = WRONG[name]
    with pytest.raises(SharpscopeError) as caught:
        compare(given(), level=FEW, folder=tmp_path / "parts")
    assert message in str(caught.value)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("given", [{}, {"factor": 2.0}, {"penalty": 0.1}])
def test_losses_alike_in_other_objects_are_compared(given: dict[str, float]) -> None:
    """Functions that compute one loss are one loss, also where each reads the weights of its own model."""
    found = compare({"a": with_loss(0, **given), "b": with_loss(1, **given)}, level=FEW)
    assert len(found.subjects) == 2


def test_test_data_are_data() -> None:
    """A Problem of the test split in their place is told apart from its data, an unknown level from those there are."""
    with pytest.raises(ArgumentError, match="test must be data, got a Problem"):
        compare({"a": problem(0)}, test=problem(0), level=FEW)
    with pytest.raises(ArgumentError, match="Did you mean 'quick'"):
        compare({"a": problem(0)}, level="quik")


def test_a_level_is_called_what_it_is() -> None:
    """Changed it says so, changed back it does not, and the comparison has its name; a name of one's own stays."""
    quick = LEVELS["quick"]
    changed = replace(quick, seeds=1)
    assert [level.name for level in LEVELS.values()] == list(LEVELS)
    assert (quick.name, changed.name, replace(changed, tol=0.5).name) == ("quick", "quick, changed", "quick, changed")
    assert replace(changed, seeds=quick.seeds).name == "quick"
    assert replace(LEVELS["default"], name="quick").name == "quick, changed"
    assert quick.within(None).name == "quick"
    assert quick.within(100).name == "quick, changed"
    assert replace(changed, name="mine").name == "mine"
    assert compare({"a": problem(0)}, level=replace(FEW, name="mine")).level == "mine"


def test_the_analyses_are_the_same_everywhere() -> None:
    """Table of results, results of a comparison and attributes of Subject have the same names, and each that result."""
    others = {"name", "group", "pair", "performance", "provenance"}
    measured = compare({"a": problem(0)}, level=FEW).subjects[0].results
    assert list(ANALYSES) == list(measured) == [f.name for f in fields(Subject) if f.name not in others]
    assert all(type(result) is ANALYSES[name].result for name, result in measured.items())
    assert list(subject("a").results) == list(ANALYSES)


def test_the_same_call_goes_on_in_its_folder(tmp_path: Path) -> None:
    """Stopped by an error in any part, it measures no finished part again and ends in the numbers of a whole call."""
    given = {"a": problem(0), "b": problem(1)}
    whole = compare(given, test=TEST, level=FEW)
    calls: list[str] = []

    def run(given: dict[str, Problem], stop: int = 0) -> Comparison:
        """The comparison, which is stopped at the first progress of the ``stop``-th part that is measured."""
        now: set[str] = set()

        def progress(stage: str, done: int, total: int | None) -> None:
            part, _, _ = stage.partition(":")
            if part not in now:
                now.add(part)
                calls.append(part)
                if len(calls) == stop:
                    raise KeyboardInterrupt

        return compare(given, test=TEST, level=FEW, folder=tmp_path, progress=progress)

    for stop in (4, 8, 13):
        with pytest.raises(KeyboardInterrupt):
            run(given, stop)
    found = run(given)
    parts = 2 * (len(ANALYSES) + 1) + 1  # with loss and accuracy of each, and the line between
    assert len(set(calls)) == parts
    assert len(calls) == parts + 3
    run(given)
    assert len(calls) == parts + 3
    assert found.summary() == whole.summary()
    for one, two_ in zip(found.subjects, whole.subjects, strict=True):
        np.testing.assert_array_equal(one.results["surface"].loss, two_.results["surface"].loss)
    other = run({**given, "b": problem(2)})
    assert len(calls) == parts + 3 + len(ANALYSES) + 2
    assert not any(call.startswith("a,") for call in calls[parts + 3 :])
    assert other.subjects[1].results["eigen"].lambda_max != found.subjects[1].results["eigen"].lambda_max
    fewer = compare({"a": given["a"]}, test=tuple(part[:12] for part in TEST), level=FEW, folder=tmp_path)
    assert fewer.subjects[0].performance["test"].examples == 12


def test_a_journal_that_outlived_its_part_is_removed(tmp_path: Path) -> None:
    """Killed between writing a part and removing its journal, the next call removes it and measures nothing again."""
    given = {"sgd.pt": problem(0)}
    compare(given, level=FEW, folder=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    journal = tmp_path / "sgd.pt-performance.partial"
    journal.mkdir()
    (journal / "loss.points").write_bytes(b"")
    compare(given, level=FEW, folder=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_a_part_that_is_none_is_measured_again(tmp_path: Path) -> None:
    """A file that is empty, cut short or of something else counts as absent."""
    given = {"a": problem(0)}
    whole = compare(given, level=FEW, folder=tmp_path).subjects[0].trace
    path = tmp_path / "a-trace.json"
    record = json.loads(path.read_text())
    assert whole is not None
    for text in ("", "{", "[]", '{"analysis": "part"}', json.dumps({k: v for k, v in record.items() if k != "holds"})):
        path.write_text(text)
        again = compare(given, level=FEW, folder=tmp_path).subjects[0].trace
        assert again is not None
        assert (again.trace, again.frobenius) == (whole.trace, whole.frobenius)
        assert json.loads(path.read_text()).keys() == record.keys()


def diverged() -> Comparison:
    """With a surface and the way between minima that have points of infinite loss, and of none."""
    found = two()
    (first, second, way), *_ = found.between
    return replace(
        found, between=((first, second, _broken(way)),), subjects=(_wrong(found.subjects[0]), *found.subjects[1:])
    )


def _wrong(one: Subject) -> Subject:
    assert one.surface is not None
    return replace(
        one, surface=_broken(one.surface), line=None, provenance={**one.provenance, "left_out": {"line": "?"}}
    )


def _broken(result: SliceResult) -> SliceResult:
    loss, status = result.loss.copy(), result.status.copy()
    loss[..., 1], loss[..., 2], status[..., 1:3] = np.inf, np.nan, DIVERGED
    return replace(result, loss=loss, status=status)


MADE = {
    "two": two,
    "groups": groups,
    "diverged": diverged,
    "alone": lambda: Comparison(subjects=(Subject(name="a", performance={"train": Performance(1.0, None, 3)}),)),
    "measured": lambda: compare({"a": problem(0), "b": problem(1)}, test=TEST, level=FEW),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_saved_is_loaded_whole(name: str, tmp_path: Path) -> None:
    """Table, findings, page and file are those of what was saved, to the byte, and so is every array.

    The page, which draws all of it, is compared where everything in it was measured.
    """
    made = replace(MADE[name](), provenance={"asked": {"seed": "0"}})
    made.save(tmp_path / "compare.json")
    loaded = Comparison.load(tmp_path / "compare.json")
    assert (loaded.summary(), loaded.findings, loaded.level) == (made.summary(), made.findings, made.level)
    assert name != "measured" or page(loaded) == page(made)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "compare.json").read_bytes()
    for one, other in zip(made.subjects, loaded.subjects, strict=True):
        assert list(one.results) == list(other.results)
        for key in set(one.results) & {"line", "surface"}:
            for array in ("loss", "accuracy", "status", "centre", "slopes", "curvatures"):
                np.testing.assert_array_equal(getattr(one.results[key], array), getattr(other.results[key], array))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(analysis="eigen"), "must be an object with analysis 'comparison'"),
        (lambda r: r.pop("subjects"), "must have the keys of Comparison.to_dict"),
        (lambda r: r["subjects"][0].pop("performance"), "must have the keys of Comparison.to_dict"),
        (lambda r: r["between"][0].pop("loss"), "must have the keys of SliceResult.to_dict\\(grid=True\\)"),
        (lambda r: r["subjects"][0]["surface"].update(loss=[[1.0]]), "needs losses of shape"),
        (lambda r: r.update(format=99), "format 99"),
    ],
)
def test_what_is_no_comparison_is_refused(change: Callable[[Any], Any], message: str) -> None:
    """Another analysis, a later format, what lacks a key or has an array of another shape."""
    record = two().to_dict()
    change(record)
    with pytest.raises(DataError, match=message):
        Comparison.from_dict(record)


def test_provenance_keeps_off_the_keys_of_the_record() -> None:
    """What is kept with a comparison cannot hide its subjects."""
    with pytest.raises(DataError, match="subjects"):
        replace(two(), provenance={"subjects": []})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a.pt b.pt --quick --json --out x", "a.pt b.pt --quick --out x"),
        ("--overwrite a.pt b.pt --js", "a.pt b.pt"),
        (
            "--sgd 'sgd *.pt' --group sam='sam-?.pt' more.pt --over --seed 3",
            "--sgd 'sgd *.pt' --group 'sam=sam-?.pt' more.pt --seed 3",
        ),
        ("--model mlp --model-args hidden=8 --json a.pt b.pt", "--model mlp --model-args hidden=8 --json a.pt b.pt"),
        (
            "--params '*.weight' --params 'head.*' --json -- --json.pt",
            "--params '*.weight' --params 'head.*' -- --json.pt",
        ),
        ("a.pt --rho 0.1 --dtype float64 --device cpu --trust-pickle --examples 100", None),
    ],
)
def test_the_recorded_command_is_the_one_that_was_given(given: str, kept: str | None) -> None:
    """Without --json and --overwrite, however abbreviated, where that changes nothing; it parses to the same."""
    words = ["compare", *shlex.split(given)]
    args = parser().parse_args(words)
    command = comparing.command(Namespace(**vars(args), argv=words))
    assert shlex.split(command) == ["sharpscope", "compare", *shlex.split(given if kept is None else kept)]
    again = vars(parser().parse_args(shlex.split(command)[1:]))
    either = {"json": None, "overwrite": None}
    assert again | either == vars(args) | either


OWN = """
import torch, sharpscope
def problem(split="train"):
    g = torch.Generator().manual_seed({seed})
    data = torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    return sharpscope.Problem(model=torch.nn.Linear(4, 3), loss=torch.nn.CrossEntropyLoss(), data=data)
"""


def test_the_test_data_of_all_checkpoints_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A problem() whose test data are others at each call ends in one sentence, before anything is measured."""
    (tmp_path / "own.py").write_text(OWN.replace("{seed}", "0 if split == 'train' else torch.seed()"))
    for i in range(2):
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"{i}.pt")
    argv = ["compare", *(str(tmp_path / f"{i}.pt") for i in range(2)), "--problem", str(tmp_path / "own.py"), "--quick"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 1
    assert "the test data of 0.pt (tuple) and 1.pt (tuple) differ" in capsys.readouterr().err
    assert not (tmp_path / "out" / "parts").exists()


@pytest.mark.parametrize("command", ["eigen", "density", "sharpness", "slice"])
def test_checkpoints_of_one_table_are_of_the_same_data(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A problem() that draws anew at each call is refused by every command that takes several checkpoints."""
    (tmp_path / "own.py").write_text(OWN.replace("{seed}", "torch.seed()"))
    for i in range(2):
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"{i}.pt")
    paths = [str(tmp_path / f"{i}.pt") for i in range(2)]
    assert main([command, *paths, "--problem", str(tmp_path / "own.py")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "must be measured on the same data" in said.err
    assert "seed what draws or splits them" in said.err


@pytest.mark.usefixtures("_no_figures")
def test_runs_without_a_recipe_are_paired_by_the_numbers_in_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sgd-1.pt belongs to sam-1.pt; other numbers have no partner."""
    (tmp_path / "own.py").write_text(OWN.replace("{seed}", "0 if split == 'train' else 1"))
    for name in ("sgd-1", "sgd-2", "sam-1", "sam-2", "sam-3"):
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"{name}.pt")
    monkeypatch.setitem(LEVELS, "quick", FEW)
    own = ["--problem", str(tmp_path / "own.py"), "--quick", "--out", str(tmp_path / "out"), "--overwrite"]
    sgd = ["--sgd", f"{tmp_path}/sgd-*.pt"]
    assert main(["compare", *sgd, "--sam", f"{tmp_path}/sam-[12].pt", *own]) == 0
    assert "over 2 pairs of seeds" in capsys.readouterr().out
    assert main(["compare", *sgd, "--sam", f"{tmp_path}/sam-[23].pt", *own]) == 0
    assert "over 2 and 2 runs, not paired" in capsys.readouterr().out


def test_the_command_line_s_record_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compare.json loads to the table, findings and page that the command wrote, and to the numbers of the call."""
    (tmp_path / "own.py").write_text(OWN.replace("{seed}", "0 if split == 'train' else 1"))
    for i in range(2):
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"{i}.pt")
    monkeypatch.setitem(LEVELS, "quick", FEW)
    paths = {f"{i}.pt": str(tmp_path / f"{i}.pt") for i in range(2)}
    argv = [*paths.values(), "--problem", str(tmp_path / "own.py"), "--quick", "--out", str(tmp_path / "out")]
    assert main(["compare", *argv, "--device", "cpu"]) == 0
    loaded = Comparison.load(tmp_path / "out" / "compare.json")
    assert page(loaded) == (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert loaded.command == shlex.join(["sharpscope", "compare", *argv, "--device", "cpu"])

    def load(path: str, split: str) -> Problem:
        return sharpscope.load(path, problem=tmp_path / "own.py", split=split)

    given = {name: load(path, "train") for name, path in paths.items()}
    called = compare(given, test=load(paths["0.pt"], "test").data, level=FEW)
    assert (loaded.level, loaded.findings) == (called.level, called.findings)
    assert loaded.summary() == called.summary()
    for one, two_ in zip(called.subjects, loaded.subjects, strict=True):
        np.testing.assert_array_equal(one.results["line"].loss, two_.results["line"].loss)
        assert one.performance == two_.performance


SCALE = {"loss": 1.0}


def scaled(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that depends on a number of its module, which no hash of its code shows."""
    return SCALE["loss"] * torch.nn.functional.cross_entropy(output, target)


def test_a_part_of_other_code_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of a number that the loss reads, or of a forward pass, the folder's parts are not used."""

    def tops() -> list[float]:
        given = {str(seed): replace(problem(seed), loss=scaled) for seed in (0, 1)}
        return [s.eigen.lambda_max for s in compare(given, level=FEW, folder=tmp_path).subjects if s.eigen is not None]

    first = tops()
    monkeypatch.setitem(SCALE, "loss", 10.0)
    assert tops() == pytest.approx([10 * top for top in first], rel=1e-4)
    monkeypatch.setitem(SCALE, "loss", 1.0)
    monkeypatch.setattr(torch.nn.Tanh, "forward", lambda self, x: torch.sin(3 * x))
    assert tops() != pytest.approx(first, rel=1e-2)


def test_a_line_leads_to_another_checkpoint_only_where_all_that_differs_moves() -> None:
    """With some of the weights chosen, networks that differ in others have no line between them."""
    one, other = problem(0), problem(1)
    bare = compare({"a": replace(one, params="2.*"), "b": replace(other, params="2.*")}, level=FEW)
    assert bare.between == ()
    other.model[0].load_state_dict(one.model[0].state_dict())  # type: ignore[index]
    ((_, _, way),) = compare({"a": replace(one, params="2.*"), "b": replace(other, params="2.*")}, level=FEW).between
    at = int(np.flatnonzero(way.axes[0] == 1.0)[0])
    assert way.loss[0, 0, at] == pytest.approx(way.marks[0].loss[way.splits[0]], rel=1e-5)


def test_an_accuracy_is_of_the_examples_that_have_a_label() -> None:
    """Of 40 examples with 10 labels the interval is Wilson's for 10."""
    labels = DATA[1].clone()
    labels[10:] = -100
    comparison = compare({"a": problem(0, (DATA[0], labels)), "b": problem(1, (DATA[0], labels))}, level=FEW)
    row = next(row for row in comparison.rows if row.label == "train accuracy")
    cell = row.cells[0]
    assert cell is not None
    expected = scipy.stats.binomtest(round(10 * cell.value), 10).proportion_ci(method="wilson")
    assert (cell.lower, cell.upper) == pytest.approx((expected.low, expected.high))
