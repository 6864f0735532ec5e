"""A user's own problem.py gives every command his model, loss and data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sharpscope import EigenResult, Problem, load, top_eigenvalues
from sharpscope.cli import main
from sharpscope.errors import ArgumentError, CheckpointError, DataError, ProblemError

SOURCE = """
import sharpscope, torch
from beside import Net

def problem(split="train"):
    n = 40 if split == "train" else 15
    g = torch.Generator().manual_seed(n)
    data = torch.randn(n, 3, generator=g), torch.randn(n, 2, generator=g)
    return sharpscope.Problem(model=Net(), loss=torch.nn.MSELoss(), data=data, weight_decay=0.25)
"""
BESIDE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "problem.py").write_text(SOURCE)
    (tmp_path / "beside.py").write_text(BESIDE)
    torch.manual_seed(3)
    weights = {f"module.layer.{name}": value for name, value in nn.Linear(3, 2).state_dict().items()}
    torch.save({"model_state_dict": weights, "epoch": 9}, tmp_path / "w.pt")
    return tmp_path


def test_the_eigenvalues_are_those_of_the_users_problem(folder: Path) -> None:
    """The command line gives what the library gives for the same model, loss and data at the file's weights."""
    out = folder / "e.json"
    assert (
        main(["eigen", str(folder / "w.pt"), "--problem", str(folder / "problem.py"), "--k", "2", "--out", str(out)])
        == 0
    )
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(40))
    a = torch.cat([x, torch.ones(40, 1)], 1).double()
    # The mean over outputs too: each output has the Hessian 2 a'a/(40 * 2), and the decay is on the diagonal.
    expected = torch.linalg.eigvalsh(a.T @ a / 40)[-1] + 0.25
    found = EigenResult.load(out)
    assert found.eigenvalues.tolist() == pytest.approx([float(expected)] * 2, rel=1e-3)
    assert found.provenance["weights_prefix"] == "module."
    assert found.provenance["weights_key"] == "model_state_dict"
    assert found.provenance["problem"].endswith("problem.py")


def test_splits_examples_and_options_are_those_asked_for(folder: Path) -> None:
    """A problem() that takes a split is given it; --examples, --params and weight decay go before its own."""
    test = load(
        folder / "w.pt", problem=folder / "problem.py", split="test", examples=7, params="*.weight", weight_decay=0.5
    )
    assert len(test.data[0]) == 7
    assert (test.params, test.weight_decay, test.provenance["split_examples"]) == ("*.weight", 0.5, 15)
    assert load(folder / "w.pt", problem=folder / "problem.py").weight_decay == 0.25


def test_a_function_of_a_module_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """package.module:function in place of a file."""
    monkeypatch.syspath_prepend(folder)
    (folder / "mine.py").write_text(SOURCE.replace("def problem", "def make"))
    assert isinstance(load(folder / "w.pt", problem="mine:make"), Problem)


def test_every_command_takes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """density, sharpness, slice and surface measure the same problem; one without accuracy says none."""
    given = [str(folder / "w.pt"), "--problem", str(folder / "problem.py")]
    loss = top_eigenvalues(load(folder / "w.pt", problem=folder / "problem.py"), k=1).loss
    assert main(["sharpness", *given, "--m", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss)
    for command in (
        ["density", *given, "--steps", "3"],
        ["slice", *given, "--points", "3"],
        ["surface", *given, "--points", "3"],
    ):
        assert main(command) == 0
        assert f"{loss:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("def other(): pass", ArgumentError, r"must define problem\(\)"),
        ("def problem(path): pass", ArgumentError, "needs path"),
        ("def problem(): return 3", ProblemError, "got int"),
        (SOURCE.replace("Net()", "torch.nn.Linear(4, 2)"), CheckpointError, r"w\.pt.*another shape"),
    ],
)
def test_what_is_no_problem_is_told(folder: Path, source: str, error: type[Exception], message: str) -> None:
    """A file without the function, with another, or of another model ends in a sentence that names it."""
    (folder / "problem.py").write_text(source)
    with pytest.raises(error, match=message):
        load(folder / "w.pt", problem=folder / "problem.py")


def test_a_problem_stands_in_place_of_model_data_and_loss(folder: Path) -> None:
    """Said twice, or a file that is not there, or a split that it does not have."""
    with pytest.raises(ArgumentError, match="leave data out"):
        load(folder / "w.pt", problem=folder / "problem.py", data="digits")
    with pytest.raises(ArgumentError, match="there is no file"):
        load(folder / "w.pt", problem=folder / "none.py")
    (folder / "problem.py").write_text(SOURCE.replace('split="train"', "").replace("split ==", "'train' =="))
    with pytest.raises(ArgumentError, match="takes no split"):
        load(folder / "w.pt", problem=folder / "problem.py", split="test")


def test_a_mistake_in_the_users_file_keeps_its_traceback(folder: Path) -> None:
    """What his own code raises is his to see, not a sentence of ours."""
    (folder / "problem.py").write_text("def problem():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load(folder / "w.pt", problem=folder / "problem.py")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "\nfrom nowhere_at_all import Net\n",
            ProblemError,
            r"problem\.py, line 2: No module named 'nowhere_at_all'\. ",
        ),
        ("\n\nfrom beside import Nett\n", ProblemError, r"problem\.py, line 3: cannot import name 'Nett'"),
        (
            SOURCE.replace("model=Net()", "model=3"),
            ProblemError,
            r"problem\.py, line 9: model must be a torch\.nn\.Mod",
        ),
        ("def problem():\n    import nowhere_at_all\n", ProblemError, r"problem\.py, line 2: No module"),
        (
            SOURCE.replace("Net()", "Net(3)"),
            ProblemError,
            r"problem\.py, line 9: Net\.__init__\(\) takes 1 .* given\.$",
        ),
        (SOURCE.replace("    return", "     return"), ProblemError, r"problem\.py, line 9: unexpected indent\.$"),
        (SOURCE.replace("data=data", "data=date"), ProblemError, r"problem\.py, line 9: name 'date' is not defined"),
        (
            "import sharpscope\ndef problem():\n    raise sharpscope.DataError('No data.')\n",
            DataError,
            r"problem\.py, line 3: No data\.$",
        ),
    ],
)
def test_what_the_file_lacks_is_told_with_its_line(
    folder: Path, source: str, error: type[Exception], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An import, a call, a name or an indent that is wrong, or a SharpscopeError: one sentence."""
    (folder / "problem.py").write_text(source)
    with pytest.raises(error, match=message):
        load(folder / "w.pt", problem=folder / "problem.py")
    assert main(["eigen", str(folder / "w.pt"), "--problem", str(folder / "problem.py")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_fails_in_another_module_keeps_its_traceback(folder: Path) -> None:
    """A fault of a module of his is told where it is, not as a fault of problem.py."""
    (folder / "beside.py").write_text("import nowhere_at_all\n")
    sys.modules.pop("beside", None)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        load(folder / "w.pt", problem=folder / "problem.py")


def test_problem_imports_from_the_files_folder_when_it_is_called(folder: Path) -> None:
    """An import inside problem() finds what lies beside the file, as one at its top does; the path is as before."""
    sys.modules.pop("beside", None)
    inside = SOURCE.replace("from beside import Net\n", "").replace("    n =", "    from beside import Net\n    n =")
    (folder / "problem.py").write_text(inside)
    before = list(sys.path)
    assert isinstance(load(folder / "w.pt", problem=folder / "problem.py"), Problem)
    assert sys.path == before


def test_a_model_that_two_checkpoints_share_is_refused(folder: Path) -> None:
    """Where problem() gives one model for all, the second checkpoint would replace the first one's weights."""
    (folder / "problem.py").write_text(
        "import sharpscope, torch\nfrom beside import Net\nimport holder\n\ndef problem():\n"
        "    data = torch.ones(4, 3), torch.ones(4, 2)\n"
        "    return sharpscope.Problem(model=holder.MODEL, loss=torch.nn.MSELoss(), data=data)\n"
    )
    (folder / "holder.py").write_text("from beside import Net\n\nMODEL = Net()\n")
    torch.save({f"layer.{name}": value + 1 for name, value in nn.Linear(3, 2).state_dict().items()}, folder / "b.pt")
    load(folder / "w.pt", problem=folder / "problem.py")
    load(folder / "w.pt", problem=folder / "problem.py")
    with pytest.raises(ProblemError, match="must build a new model"):
        load(folder / "b.pt", problem=folder / "problem.py")


def test_a_file_that_ends_the_program_or_moves_does_neither(folder: Path) -> None:
    """sys.exit() is a sentence, not a success; another working directory is left again."""
    (folder / "problem.py").write_text("import sys\n\ndef problem():\n    sys.exit()\n")
    with pytest.raises(ProblemError, match=r"ends the program"):
        load(folder / "w.pt", problem=folder / "problem.py")
    (folder / "problem.py").write_text(SOURCE.replace("def problem", "import os\nos.chdir('/')\n\ndef problem"))
    stands = Path.cwd()
    load(folder / "w.pt", problem=folder / "problem.py")
    assert Path.cwd() == stands


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("open('nothing.pt')", r"line 6: .*No such file.*Path\(__file__\)"),
        ("{}['key']", r"line 6: KeyError: 'key'"),
        ("torch.ones(2) @ torch.ones(3)", r"line 6: RuntimeError"),
    ],
)
def test_slips_in_the_users_lines_are_sentences(folder: Path, line: str, said: str) -> None:
    """A file that is not there, a key, a shape: the line and what was said of it."""
    (folder / "problem.py").write_text(SOURCE.replace("    n = 40", f"    {line}\n    n = 40"))
    with pytest.raises(ProblemError, match=said):
        load(folder / "w.pt", problem=folder / "problem.py")


def test_options_of_the_call_go_before_those_of_the_file(folder: Path) -> None:
    """What is asked for counts even where it is the usual value, and what would be ignored is refused."""
    (folder / "problem.py").write_text(SOURCE.replace("weight_decay=0.25", 'weight_decay=0.25, mode="train"'))
    found = load(folder / "w.pt", problem=folder / "problem.py", weight_decay=0.0, mode="eval", params="*")
    assert (found.weight_decay, found.mode) == (0.0, "eval")
    with pytest.raises(ArgumentError, match="leave data_root out"):
        load(folder / "w.pt", problem=folder / "problem.py", data_root=folder)
