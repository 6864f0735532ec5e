"""No result and no saved pass is lost to another command, or to another process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import processes
from conftest import classifier
from sharpscope import EigenResult, compare, loss_slice, report, top_eigenvalues
from sharpscope.cli import main
from sharpscope.errors import ArgumentError, OutputError
from sharpscope.results import MonitorResult
from sharpscope.training import Recipe, monitor_path, snapshot_path, train

fcntl = pytest.importorskip("fcntl")

PROBLEM = """
import torch
import sharpscope

def problem(split="train"):
    g = torch.Generator().manual_seed(0 if split == "train" else 1)
    data = torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    return sharpscope.Problem(model=torch.nn.Linear(4, 3), loss=torch.nn.CrossEntropyLoss(), data=data)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with two checkpoints and their problem file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "page", lambda comparison: "")  # its figures take most of a comparison's time
    Path("problem.py").write_text(PROBLEM)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(nn.Linear(4, 3).state_dict(), f"{seed}.pt")
    return tmp_path


def run(command: str) -> int:
    words = command.split()
    return main([*words, "--problem", "problem.py"] if words[0] not in ("train", "plot", "init", "demo") else words)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def held(path: str | Path) -> Iterator[None]:
    """As if another process were writing ``path``."""
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


UNCONVERGED = "eigen 0.pt --k 2 --tol 1e-9 --dtype float64 --max-passes 2 --out r.json"


@pytest.mark.parametrize(
    "other",
    [
        "eigen 0.pt --k 1 --tol 1e-9 --dtype float64 --out r.json",
        "eigen 0.pt --k 2 --out r.json",
        "eigen 0.pt --k 2 --tol 1e-9 --dtype float64 --weight-decay 0.1 --out r.json",
        "eigen 1.pt --k 2 --tol 1e-9 --dtype float64 --out r.json",
        "eigen 0.pt --tol 1e-9 --dtype float64 --per-layer --out r.json",
        "density 0.pt --out r.json",
        "sharpness 0.pt --m 8 --out r.json",
        "slice 0.pt --points 3 --out r.json",
        "surface 0.pt --points 3 --shard 1/2 --out r.json",
    ],
)
def test_an_unconverged_result_and_its_passes_stay_until_the_same_command_goes_on(
    folder: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another command with its --out changes no byte and says so; the same with more passes finishes it."""
    assert run(UNCONVERGED) == 3
    before = contents(folder)
    assert any(name.endswith(".entry") for name in before)
    assert run(other) == 1
    assert "r.json exists already" in capsys.readouterr().err
    assert contents(folder) == before
    assert run(UNCONVERGED.replace("--max-passes 2", "--max-passes 50 --vectors")) == 0
    assert sorted(contents(folder).keys() - before.keys()) == ["r.npz"]
    assert [p.name for p in folder.glob("*r.json*")] == ["r.json"]


def test_arrays_of_another_result_stay_beside_an_unconverged_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command goes on with --vectors, but not where an .npz lies that it did not write."""
    assert run(UNCONVERGED) == 3
    Path("r.npz").write_bytes(b"of another result")
    assert run(UNCONVERGED.replace("--max-passes 2", "--max-passes 50 --vectors")) == 1
    assert "r.npz exists already" in capsys.readouterr().err
    assert Path("r.npz").read_bytes() == b"of another result"


def test_a_module_that_the_problem_file_imports_is_part_of_the_command(folder: Path) -> None:
    """Saved passes of another constant there, which the first examples do not show, are not gone on with."""
    code = PROBLEM.replace("import torch\n", "import torch\nimport constants\n", 1)
    code = code.replace("torch.nn.CrossEntropyLoss()", "loss").replace(
        "    return", "    data[1][:32] %= 2\n    return"
    )
    code = code.replace(
        "def problem",
        "def loss(output, target):\n"
        "    each = torch.nn.functional.cross_entropy(output, target, reduction='none')\n"
        "    return (each * (1 + constants.OF_TWO * (target == 2))).mean()\n\n"
        "def problem",
    )
    values = []
    for more in (0, 1):
        Path("problem.py").write_text(code)
        Path("constants.py").write_text(f"OF_TWO = {more}")
        sys.modules.pop("constants", None)
        shutil.rmtree("__pycache__", ignore_errors=True)
        assert run(UNCONVERGED + (" --overwrite" if more else "")) == 3
        values.append(EigenResult.load("r.json").loss)
    assert values[0] != values[1]


@pytest.mark.parametrize("kind", ["eigenvectors", "gradient", "random"])
def test_a_slice_along_any_direction_has_a_place(folder: Path, kind: str) -> None:
    """With --out, whose folder of passes also keeps the directions, and leaves the result alone."""
    assert run(f"slice 0.pt --points 3 --directions {kind} --out s.json") == 0
    assert sorted(p.name for p in folder.glob("*s.json*")) == ["s.json"]


def test_overwrite_replaces_an_unconverged_result(folder: Path) -> None:
    """With --overwrite the other command has the place, and nothing of the first is left."""
    assert run(UNCONVERGED) == 3
    assert run("eigen 0.pt --k 1 --out r.json --overwrite") == 0
    assert len(EigenResult.load("r.json").eigenvalues) == 1
    assert not Path("r.json.partial").exists()


def interrupted(monkeypatch: pytest.MonkeyPatch, command: str, after: int) -> None:
    """Run ``command`` until it has saved so many passes, points or parts, and press Ctrl-C."""
    from sharpscope.comparing.run import StepCache
    from sharpscope.resume import Journal, PointLog

    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return original(*args, **given)

        return call

    with monkeypatch.context() as patch:
        if command.startswith("compare"):
            patch.setattr(StepCache, "get", counted(StepCache.get))
        elif command.startswith("eigen"):
            patch.setattr(Journal, "once", counted(Journal.once))
        else:
            patch.setattr(PointLog, "add", counted(PointLog.add))
        assert run(command) == 130


UNFINISHED = [
    ("eigen 0.pt --k 2 --out r.json", "eigen 0.pt --k 3 --out r.json"),
    ("slice 0.pt --points 9 --out r.json", "slice 0.pt --points 7 --out r.json"),
    ("surface 0.pt --points 5 --out r.json", "eigen 0.pt --out r.json"),
    ("slice 0.pt --to 1.pt --points 9 --out r.json", "slice 0.pt --points 9 --out r.json"),
    ("compare 0.pt 1.pt --quick --out r", "compare 0.pt 1.pt --quick --seed 1 --out r"),
]


@pytest.mark.parametrize(("first", "other"), UNFINISHED, ids=[first for first, _ in UNFINISHED])
def test_what_an_interrupted_command_saved_is_not_lost_to_another(
    folder: Path, first: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no result yet, its saved work keeps another command away, changes no byte, and is gone on with."""
    interrupted(monkeypatch, first, 3)
    before = contents(folder)
    assert any("r" in Path(name).parts[0] and name.count("/") for name in before)
    assert run(other) == 1
    assert "holds the unfinished work of another command" in capsys.readouterr().err
    assert contents(folder) == before
    assert run(other + " --overwrite") == 0
    for path in [p for p in contents(folder) if p.startswith("r")]:
        Path(path).unlink()
    interrupted(monkeypatch, first, 3)
    assert run(first) == 0


def test_a_changed_file_that_a_command_names_makes_it_another_command(folder: Path) -> None:
    """The same words are another command where the checkpoint or the problem file has other contents."""
    assert run(UNCONVERGED) == 3
    before = Path("r.json").read_bytes()
    for name, text in (("problem.py", PROBLEM.replace("40,", "41,").encode()), ("0.pt", Path("1.pt").read_bytes())):
        kept = Path(name).read_bytes()
        Path(name).write_bytes(text)
        assert run(UNCONVERGED) == 1
        Path(name).write_bytes(kept)
    assert Path("r.json").read_bytes() == before


def test_a_command_that_fails_before_its_first_pass_keeps_no_other_away(folder: Path) -> None:
    """A wrong option leaves nothing behind."""
    before = contents(folder)
    assert run("eigen 0.pt --k 0 --out r.json") == 1
    assert contents(folder) == before
    assert run("eigen 0.pt --k 1 --out r.json") == 0


WRITES = {
    "eigen 0.pt --k 1 --out r.json": "r.json",
    "eigen 0.pt --per-layer --out r.json": "r.json",
    "density 0.pt --probes 2 --steps 2 --out r.json --figure d.png": "d.png",
    "sharpness 0.pt --m 8 --out r.json": "r.json",
    "invariance 0.pt --out r.json": "r.json",
    "slice 0.pt 1.pt --points 3 --out r": "r/1.json",
    "surface 0.pt --points 3 --shard 1/1 --out r.json": "r.json",
    "compare 0.pt --quick --out r": "r/compare.json",
    "train --model mlp --epochs 1 --out t.pt": "t.pt",
    "plot s.json --out s.csv": "s.csv",
    "init 0.pt --out mine.py": "mine.py",
    "demo --out d": "d/demo.json",
}


@pytest.mark.parametrize("command", WRITES)
def test_the_second_of_two_commands_that_write_one_file_is_refused(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """While another process writes the file a command ends in one sentence, --overwrite or not, and writes nothing."""
    if command.startswith("plot"):
        assert run("slice 0.pt --points 3 --out s.json") == 0
        capsys.readouterr()
    for words in (command, f"{command} --overwrite"):
        with held(WRITES[command]):
            before = contents(folder)
            assert run(words) == 1
            assert "is being written by another process" in capsys.readouterr().err
            assert contents(folder) == before
    if not command.startswith(("train", "demo", "compare", "invariance")):
        Path(WRITES[command]).with_name(f".{Path(WRITES[command]).name}.lock").unlink()
        assert run(command) == 0  # and by itself it works
        assert not list(folder.rglob(".*.lock"))


def test_of_two_commands_at_once_one_has_the_place(folder: Path) -> None:
    """Two processes with one --out, two commands: one ends with 0, and the result is its own; the other with 1."""
    common = ["0.pt", "--problem", "problem.py", "--out", "r.json"]
    both = {k: processes.command("eigen", *common, "--k", str(k)) for k in (1, 2)}
    for process in both.values():
        process.join()
    assert sorted(process.exitcode or 0 for process in both.values()) == [0, 1]
    (won,) = (k for k, process in both.items() if process.exitcode == 0)
    assert len(EigenResult.load("r.json").eigenvalues) == won


def _hold(path: str) -> None:
    from sharpscope.atomic_io import locked

    with locked(path):
        Path("locked").touch()
        time.sleep(600)


def test_a_process_that_was_forked_under_a_lock_does_not_keep_it(folder: Path) -> None:
    """A loader's worker that outlives the block has the lock file open, and blocks nobody."""
    from sharpscope.atomic_io import locked

    for shared in (False, True):
        with locked("place", shared=shared):
            child = os.fork()
            if not child:
                time.sleep(600)
                os._exit(0)
        try:
            with locked("place"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_process_that_is_killed_blocks_nobody(folder: Path) -> None:
    """kill -9 of the process that writes: its lock file stays behind, and the next command takes it."""
    process = processes.start(_hold, str(folder / "r.json"))
    while not Path("locked").exists():
        time.sleep(0.01)
    assert run("eigen 0.pt --k 1 --out r.json") == 1
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert Path(".r.json.lock").exists()
    assert run("eigen 0.pt --k 1 --out r.json") == 0
    assert not Path(".r.json.lock").exists()


PYTHON: dict[str, Callable[[], Any]] = {
    "train": lambda: train(Recipe(model="mlp", epochs=1), "place"),
    "compare": lambda: compare({"a": classifier()}, level="quick", folder="place"),
    "top_eigenvalues": lambda: top_eigenvalues(classifier(), k=1, journal="place"),
    "loss_slice": lambda: loss_slice(classifier(), points=3, journal="place"),
}


@pytest.mark.parametrize("name", PYTHON)
def test_functions_that_go_on_from_files_refuse_those_of_a_running_process(folder: Path, name: str) -> None:
    """In Python, too, what another process is writing is left alone."""
    with held("place"), pytest.raises(OutputError, match="is being written by another process"):
        PYTHON[name]()
    assert not Path("place").exists()


def test_one_shard_runs_once_at_a_time(folder: Path) -> None:
    """Different shards share a folder; the second process of one shard is refused."""
    measured = lambda shard: loss_slice(classifier(), points=5, journal="place", shard=shard)  # noqa: E731
    with held("place.shard-1-of-2"):
        assert not measured((2, 2)).complete
        with pytest.raises(OutputError, match="is being written by another process"):
            measured((1, 2))
    assert measured((1, 2)).complete


def test_a_report_replaces_no_page_of_its_users(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index.html without a compare.json, and a demo.json of other runs, stay."""
    Path("site").mkdir()
    Path("site/index.html").write_text("mine")
    assert run("compare 0.pt --quick --out site") == 1
    assert "index.html exists already" in capsys.readouterr().err
    Path("site/demo.json").write_text(json.dumps([{"recipe": {"model": "cnn", "seed": 7}}]))
    assert run("demo --epochs 1 --out site") == 1
    assert "demo.json exists already" in capsys.readouterr().err
    assert Path("site/index.html").read_text() == "mine"


SMALL: dict[str, Any] = {"model": "mlp", "model_args": {"hidden": (4,)}, "batch_size": 512, "epochs": 2}


def test_a_resumed_run_replaces_no_file_of_another(folder: Path) -> None:
    """Without the run's own checkpoint, saved epochs and records of another recipe keep `resume` away."""
    for name, given in (("e.pt", {"save_epochs": "1"}), ("m.pt", {"monitor": 2})):
        train(Recipe(**SMALL), name, **given)  # type: ignore[arg-type]
        Path(name).unlink()
        before = contents(folder)
        with pytest.raises(ArgumentError, match=r"lr is 0\.01"):
            train(Recipe(**SMALL, lr=0.01), name, resume=True, **given)  # type: ignore[arg-type]
        assert contents(folder) == before
        train(Recipe(**SMALL), name, resume=True, **given)  # type: ignore[arg-type]
    assert snapshot_path("e.pt", 1).exists()


def test_records_of_an_overwritten_run_are_not_continued(folder: Path) -> None:
    """A run that replaces a monitored one without a monitor deletes its records: resumed, it has its own alone."""
    command = "train --model mlp --model-args hidden=4, --batch-size 512 --epochs 2 --out t.pt"
    assert run(f"{command} --monitor 2") == 0
    with pytest.raises(KeyboardInterrupt):
        train(Recipe(**SMALL, lr=0.01), "t.pt", overwrite=True, progress=_stop_in_epoch_2)
    assert run(f"{command} --lr 0.01 --resume --monitor 2") == 0
    steps = MonitorResult.load(monitor_path("t.pt")).steps.tolist()
    assert steps == [4, 6]  # of three steps an epoch, those of the second


def _stop_in_epoch_2(step: int, steps: int, metrics: dict[str, float]) -> None:
    if step > steps // 2:
        raise KeyboardInterrupt
