"""What a user's own model, loss and data do to the command line: print, raise, die, and give numbers of any size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dense import dense_hessian
from sharpscope import Problem, loss_slice, loss_surface, measure_sharpness, spectral_density, top_eigenvalues
from sharpscope.cli import main
from sharpscope.comparing import LEVELS, compare
from sharpscope.errors import DataError, ProblemError
from sharpscope.slices import random_directions

CHATTY = """
import os
import torch
import sharpscope

print("import")
os.write(1, b"below Python\\n") if os.environ.get("BELOW") else None

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x):
        print("model")
        return self.two(torch.relu(self.one(x)))

def loss(output, target):
    print("loss")
    return (output - target).square().mean()

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        print("loader", flush=True)
        os.write(1, b"below Python\\n") if os.environ.get("BELOW") else None
        return torch.arange(3.0) + i, torch.ones(2) * (i % 3)

def problem(split="train"):
    print("problem")
    workers = int(os.environ.get("WORKERS", "0"))
    data = torch.utils.data.DataLoader(Data(), batch_size=5, num_workers=workers)
    return sharpscope.Problem(model=Net(), loss=loss, data=data)
"""


@pytest.fixture
def chatty(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and a problem file all of whose code prints on stdout."""
    (tmp_path / "problem.py").write_text(CHATTY)
    torch.save(nn.ModuleDict({"one": nn.Linear(3, 4), "two": nn.Linear(4, 2)}).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt", tmp_path / "problem.py"


@pytest.mark.parametrize(
    "options",
    [
        ["eigen", "--k", "1"],
        ["eigen", "--per-layer"],
        ["density", "--probes", "2"],
        ["sharpness", "--m", "4"],
        ["invariance", "--m", "4", "--draws", "2", "--probes", "2"],
        ["slice", "--seeds", "1", "--points", "3"],
        ["surface", "--points", "2"],
    ],
    ids=lambda options: "-".join(options[:2]),
)
def test_json_stays_json_when_user_code_prints(
    options: list[str], chatty: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout is one JSON object, though file, problem(), model, loss and data print; that is on stderr."""
    path, problem = chatty
    assert main([options[0], str(path), "--problem", str(problem), "--json", *options[1:]]) in (0, 3)
    out, err = capsys.readouterr()
    assert json.loads(out)["analysis"]
    printed = set(err.split("\n"))
    assert {"import", "problem", "model", "loss", "loader"} <= printed


def test_json_of_a_comparison_stays_json_when_user_code_prints(
    chatty: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sharpscope compare --json` prints JSON alone, though all of the user's code prints."""
    path, problem = chatty
    other = tmp_path / "v.pt"
    torch.save({name: 2 * value for name, value in torch.load(path).items()}, other)
    given = ["--problem", str(problem), "--quick", "--json", "--out", str(tmp_path / "out")]
    assert main(["compare", str(path), str(other), *given]) in (0, 3)
    assert len(json.loads(capsys.readouterr().out)["subjects"]) == 2


@pytest.mark.parametrize("workers", ["0", "1"])
def test_json_stays_json_when_child_processes_and_libraries_print(workers: str, chatty: tuple[Path, Path]) -> None:
    """Writing to file descriptor 1 itself, as C libraries and a loader's workers do, does not reach the JSON."""
    path, problem = chatty
    done = subprocess.run(
        [sys.executable, "-m", "sharpscope", "eigen", path, "--problem", problem, "--k", "1", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "BELOW": "1", "WORKERS": workers},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["analysis"] == "eigen"
    assert "below Python" in done.stderr


def test_without_json_stdout_is_as_before(chatty: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A table on stdout is mixed with what user code prints there."""
    path, problem = chatty
    assert main(["eigen", str(path), "--problem", str(problem), "--k", "1"]) == 0
    out = capsys.readouterr().out
    assert "lambda_max" in out
    assert "loss\n" in out


class Broken(Dataset[Any]):
    """Twelve examples, the ninth of which does something else."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 8:
            self.act()
        return torch.arange(3.0) + i, torch.ones(2)


class Stream(IterableDataset[Any]):
    """Batches without a length, the third of which cannot be read."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.ones(4, 3), torch.ones(4, 2)
        yield torch.ones(4, 3), torch.zeros(4, 2)
        raise LookupError("shard 3 is missing")


def truncated() -> None:
    raise OSError("image 8 is truncated")


def asserted() -> None:
    raise AssertionError


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "data set": (lambda: Broken(truncated), "OSError: image 8 is truncated"),
    "loader": (lambda: DataLoader(Broken(asserted), batch_size=4), "batch 2 failed: AssertionError"),
    "stream": (lambda: DataLoader(Stream(), batch_size=None), "batch 2 failed: LookupError: shard 3 is missing"),
    "worker": (lambda: DataLoader(Broken(truncated), batch_size=4, num_workers=1), "OSError: image 8 is truncated"),
    "dead worker": (
        lambda: DataLoader(Broken(partial(os._exit, 7)), batch_size=4, num_workers=1),
        "num_workers=0 to see its error",
    ),
}


def chosen() -> Problem:
    """The problem of the data set that is named in the environment."""
    return Problem(model=nn.Linear(3, 2), loss=nn.MSELoss(), data=BROKEN[os.environ["BROKEN"]][0]())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", [["eigen", "--k", "1"], ["slice", "--points", "3"], ["sharpness", "--m", "4"]])
def test_data_that_cannot_be_read_end_in_one_sentence(
    kind: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set, a loader or its worker that raises, or dies, ends a command with status 1 and its own error."""
    monkeypatch.setenv("BROKEN", kind)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    given = [command[0], str(tmp_path / "w.pt"), "--problem", f"{__name__}:chosen", *command[1:]]
    assert main(given) == 1
    err = capsys.readouterr().err
    assert BROKEN[kind][1] in err
    assert "Traceback" not in err
    assert sum(line.startswith("sharpscope: ") for line in err.splitlines()) == 1


def test_data_that_cannot_be_read_are_a_data_error() -> None:
    """From Python, too, the error of a loader is named, with its line, and chained."""
    problem = Problem(model=nn.Linear(3, 2), loss=nn.MSELoss(), data=Broken(truncated))
    for analysis in (top_eigenvalues, spectral_density, measure_sharpness):
        with pytest.raises(
            DataError, match=r"OSError: image 8 is truncated \(.*test_user_code.py, line \d+\)"
        ) as caught:
            analysis(problem)
        assert isinstance(caught.value.__cause__, OSError)


def raises(error: BaseException) -> Callable[..., Tensor]:
    def raising(output: Tensor, target: Tensor) -> Tensor:
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ValueError("temperature is not set"), "ValueError: temperature is not set"),
        (KeyError("weights"), "KeyError: 'weights'"),
        (RuntimeError("no gradient scale was given"), "RuntimeError: no gradient scale was given"),
        (AssertionError("labels before logits"), "AssertionError: labels before logits"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_a_loss_that_raises_is_named_with_its_own_error(
    error: Exception, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of a loss is named with its type and line, whatever its type, and shapes are not blamed."""
    problem = Problem(model=nn.Linear(3, 2), loss=raises(error), data=(torch.ones(5, 3), torch.ones(5, 2)))
    for analysis in (top_eigenvalues, measure_sharpness):
        with pytest.raises(ProblemError) as caught:
            analysis(problem)
        said = str(caught.value)
        assert f"raised {named} (" in said
        assert "test_user_code.py, line " in said
        assert "cannot take" not in said


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("attention of odd length")


def test_a_model_that_raises_is_named_with_its_own_error() -> None:
    """The error of a model is named with its type and line."""
    problem = Problem(model=Raising(), loss=nn.MSELoss(), data=(torch.ones(5, 3), torch.ones(5, 2)))
    with pytest.raises(ProblemError, match=r"NotImplementedError: attention of odd length \(.*test_user_code.py, line"):
        top_eigenvalues(problem)


def scaled(factor: float, dtype: torch.dtype = torch.float32) -> Problem:
    draw = torch.Generator().manual_seed(1)
    data = torch.randn(20, 3, generator=draw, dtype=dtype), torch.randn(20, 2, generator=draw, dtype=dtype)
    return Problem(model=nn.Linear(3, 2, dtype=dtype), loss=lambda z, y: (z - y).square().mean() * factor, data=data)


@pytest.mark.parametrize(
    ("factor", "dtype", "said"),
    [
        (1e200, torch.float64, "Divide the loss by a constant"),
        (1e-200, torch.float64, "Multiply the loss by a constant"),
        (1e200, torch.float32, "must be finite"),
        (1e-200, torch.float32, "Multiply the loss by a constant"),
    ],
)
@pytest.mark.parametrize("analysis", [top_eigenvalues, spectral_density, measure_sharpness])
def test_a_loss_out_of_range_is_refused(
    factor: float, dtype: torch.dtype, said: str, analysis: Callable[..., Any]
) -> None:
    """A loss is refused, with what to do, where squares of its derivatives leave the range of numbers."""
    with pytest.raises(DataError, match=said):
        analysis(scaled(factor), dtype=dtype)


def test_a_loss_that_underflows_is_refused_where_only_its_values_are_taken() -> None:
    """Slices, surfaces and comparisons in float32 do not show 0 for 1e-200; a loss that is 0 is 0."""
    line, level = random_directions(scaled(1.0), 1), LEVELS["quick"]
    for measure in (
        lambda given: loss_slice(given, line, 3),
        lambda given: loss_surface(given, random_directions(given, 2), 3),
        lambda given: compare({"a": given}, level=level),
    ):
        with pytest.raises(DataError, match=r"torch.float32 can hold, but .*e-(199|200) becomes 0. Multiply"):
            measure(scaled(1e-200))
    assert (loss_slice(scaled(0.0), line, 3).loss == 0).all()
    assert (loss_slice(scaled(1e-200, torch.float64), line, 3, dtype=torch.float64).loss > 0).all()


@pytest.mark.parametrize("factor", [1e-140, 1e-30, 1e30, 1e140])
def test_a_loss_within_range_scales_its_eigenvalues(factor: float) -> None:
    """Eigenvalues and gradient norm scale with a loss times 1e-140 to 1e140 (float32: 1e-30 to 1e30)."""
    problem = scaled(1.0, torch.float64)
    weights = list(problem.model.parameters())
    x, y = problem.data

    def mean(call: Callable[..., Tensor]) -> Tensor:
        return (call(x) - y).square().mean()

    lambda_max = float(torch.linalg.eigvalsh(dense_hessian(problem.model, mean))[-1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(mean(problem.model), weights)])
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32 and not 1e-31 < factor < 1e31:
            continue
        other = Problem(
            model=problem.model, loss=lambda z, y: (z - y).square().mean() * factor, data=(x.to(dtype), y.to(dtype))
        )
        found = top_eigenvalues(other, k=1, dtype=dtype)
        assert found.lambda_max / factor == pytest.approx(lambda_max, rel=1e-3)
        assert found.gradient_norm / factor == pytest.approx(float(gradient.norm()), rel=1e-5)
