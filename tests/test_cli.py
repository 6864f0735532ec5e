"""The command line: what it prints, its exit status, and what it leaves on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sharpscope
from sharpscope.cli import main, options
from sharpscope.training import Recipe, train
from sharpscope.zoo import make_model, networks

KEYS = [
    "analysis",
    "checkpoint",
    "sha256",
    "num_params",
    "num_examples",
    "loss",
    "gradient_norm",
    "eigenvalues",
    "residuals",
    "lower",
    "upper",
    "converged",
    "lambda_max",
    "ratio",
    "cost",
    "method",
    "dtype",
    "device",
    "mode",
    "seed",
    "versions",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mlp on digits after two epochs."""
    out = tmp_path_factory.mktemp("trained") / "mlp.pt"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=2), out)
    return out


def run(*argv: str | Path) -> int:
    return main([str(arg) for arg in argv])


def test_train_with_a_monitor_prints_and_keeps_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of the steps measured stands before the last line, and the JSON beside the checkpoint has them."""
    out = tmp_path / "run.pt"
    argv = ["--model", "mlp", "--model-args", "hidden=8,8", "--batch-size", "512", "--epochs", "2", "--out", out]
    assert run("train", *argv, "--monitor", "2", "--monitor-examples", "32") == 0
    shown = capsys.readouterr().out
    kept = sharpscope.MonitorResult.load(tmp_path / "run.pt.monitor.json")
    assert kept.steps.tolist() == [0, 2, 4, 6]
    assert kept.summary() in shown
    assert "lambda_max of these 32 of 1437 examples" in shown
    assert shown.splitlines()[-1].startswith("Next: ")
    assert run("train", *argv, "--monitor", "2", "--resume") == 0
    assert kept.summary() in capsys.readouterr().out
    assert run("train", *argv, "--monitor", "0", "--overwrite") == 1


def test_eigen_prints_a_table_with_intervals(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column a checkpoint: eigenvalues, ratio, loss, gradient norm and cost, on stdout alone, in 80 characters."""
    assert run("eigen", trained, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.partition("\n\n")[0].splitlines())
    assert list(rows)[:3] == ["checkpoint", "lambda_max", "lambda_2"]
    assert rows["checkpoint"] == "mlp.pt"
    assert "lambda_max/lambda_5" in rows
    assert sum("±" in cell for cell in rows.values()) == 6
    assert max(map(len, out.partition("\n\n")[0].splitlines())) <= 80
    assert "1437 examples of digits (train)" in out
    assert err == ""


def test_json_is_one_object_with_the_agreed_keys(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints exactly one object, which agrees with the library, or an array for several checkpoints."""
    assert run("eigen", trained, "--json", "--k", "2", "--seed", "3", "--micro-batch", "256") == 0
    said = json.loads(capsys.readouterr().out)
    assert set(KEYS) <= set(said)
    again = sharpscope.top_eigenvalues(
        sharpscope.load(trained), k=2, generator=torch.Generator().manual_seed(3), micro_batch=256
    )
    assert said["eigenvalues"] == again.eigenvalues.tolist()
    assert said["sha256"] == again.provenance["sha256"]
    assert run("eigen", trained, trained, "--json", "--k", "1") == 0
    assert [entry["analysis"] for entry in json.loads(capsys.readouterr().out)] == ["eigen", "eigen"]


def test_options_reach_the_measurement(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--split, --examples, --params, --dtype, --method and --seed are in the result."""
    argv = ["--k", "1", "--json", "--split", "test", "--examples", "50", "--params", "*.bias", "--dtype", "float64"]
    assert run("eigen", trained, *argv, "--method", "power", "--tol", "0.01", "--seed", "5") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["split"], said["num_examples"], said["num_params"]) == ("test", 50, 18)
    assert (said["dtype"], said["method"], said["seed"], said["tol"]) == ("float64", "power", 5, 0.01)


def test_not_converged_exits_3(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tolerance that the passes do not reach is marked, and the exit status says so."""
    assert run("eigen", trained, "--tol", "1e-6", "--max-passes", "2") == 3
    assert "NOT CONVERGED" in capsys.readouterr().out


def test_results_are_written_once_and_never_over(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out and --vectors write JSON and .npz; a second run refuses until --overwrite; several make a folder."""
    out = tmp_path / "r.json"
    assert run("eigen", trained, "--k", "2", "--out", out, "--vectors") == 0
    result = sharpscope.EigenResult.load(out)
    assert result.eigenvectors is not None
    before = out.read_bytes()
    assert run("eigen", trained, "--k", "1", "--out", out) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run("eigen", trained, "--k", "1", "--out", out, "--overwrite") == 0
    assert len(sharpscope.EigenResult.load(out).eigenvalues) == 1
    assert run("eigen", trained, trained, "--k", "1", "--out", tmp_path / "both") == 0
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["1-mlp.json", "2-mlp.json"]


def test_a_result_never_takes_the_place_of_another_or_of_a_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of equal or numbered names get a file each, and --overwrite does not reach what is measured."""
    for name in ("a.pt", "1-a.pt"):
        (tmp_path / name).write_bytes(trained.read_bytes())
    files = [tmp_path / "a.pt", tmp_path / "a.pt", tmp_path / "1-a.pt"]
    assert run("eigen", *files, "--k", "1", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert run("eigen", files[0], "--k", "1", "--out", files[0], "--overwrite") == 1
    assert "is one of the files to be read" in capsys.readouterr().err
    assert files[0].read_bytes() == trained.read_bytes()


def test_a_reader_that_goes_away_is_no_error(trained: Path) -> None:
    """A closed pipe ends the command quietly, and a full device in one sentence."""
    command = f"{sys.executable} -m sharpscope inspect {trained}"
    gone = subprocess.run(f"{command} --json | true", shell=True, capture_output=True, text=True, check=False)
    assert gone.stderr == ""
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert full.stderr.startswith("sharpscope: Cannot write to standard output")


def test_what_was_finished_is_kept_when_interrupted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C during the second checkpoint exits 130 with the first in the table and on disk."""
    calls = []
    measure = sharpscope.top_eigenvalues

    def second_is_interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(sharpscope, "top_eigenvalues", second_is_interrupted)
    assert run("eigen", trained, trained, "--k", "1", "--out", tmp_path) == 130
    out, err = capsys.readouterr()
    assert "mlp.pt" in out
    assert "interrupted" in err
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["1-mlp.json"]


class Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def bad_files(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoints that must be refused, with a part of the sentence."""
    content = good.read_bytes()
    files = {
        "missing": (b"", "There is no checkpoint"),
        "empty": (b"", "empty"),
        "truncated": (content[: len(content) // 2], "truncated"),
        "foreign": (b"\x89PNG\r\n\x1a\n" + bytes(100), "must be a PyTorch checkpoint"),
        "corrupt": (content[:3000] + bytes([content[3000] ^ 255]) + content[3001:], "damaged"),
    }
    made = {}
    for name, (data, message) in files.items():
        path = folder / f"{name}.pt"
        if name != "missing":
            path.write_bytes(data)
        made[name] = (path, message)
    torch.save({"w": Touch(folder / "touched")}, folder / "pickled.pt")
    made["pickled"] = (folder / "pickled.pt", "pickled Python objects")
    torch.save({"0.weight": torch.zeros(3), "extra": torch.zeros(1)}, folder / "keys.pt")
    made["keys"] = (folder / "keys.pt", "keys that the model lacks")
    return made


@pytest.mark.parametrize("name", ["missing", "empty", "truncated", "foreign", "corrupt", "pickled", "keys"])
def test_bad_checkpoints_end_in_one_sentence(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, one line on stderr, nothing on stdout, no code run, before any other checkpoint is measured."""
    path, message = bad_files(tmp_path, trained)[name]
    assert run("eigen", trained, path, "--model", "mlp", "--data", "digits", "--model-args", "hidden=8,") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--k", "0"], "k must be at least 1"),
        (["--k", "100000"], "at most the number of parameters (610), got 100000"),
        (["--tol", "-1"], "tol must be"),
        (["--method", "lanzcos"], "Did you mean 'lanczos'?"),
        (["--data", "digit"], "Did you mean 'digits'?"),
        (["--model", "cn"], "Did you mean 'cnn'?"),
        (["--examples", "0"], "examples must be"),
        (["--params", "fc.*", "--params", "head.*"], "must match fc.* head.*"),
        (["--loss", "mes"], "Did you mean 'mse'?"),
        (["--tol", "2"], "between 0 and 1"),
        (["--vectors"], "Pass --out PATH"),
        (["--out", "/proc/nowhere/r.json"], "Cannot write"),
        (["--data", "fashion-mnist", "--data-root", "/nonexistent"], "apt install dataset-fashion-mnist"),
        (["--model-args", "hidden"], "KEY=VALUE"),
        (["--device", "nonsense"], "device"),
        (["--model", "os:getcwd"], "must return a torch.nn.Module, got str"),
        (["--model", "os:getcwd", "--model-args", "a=1"], "does not take these model arguments"),
        (["--max-passes", "1"], "at least 2 products"),
        (["--out", "r.npz"], "Name it .json"),
    ],
)
def test_bad_options_end_in_one_sentence(
    argv: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 and one line on stderr that says what must hold."""
    assert run("eigen", trained, *argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("_fashion_mnist")
def test_real_images_are_measured_and_what_does_not_fit_them_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eigen runs on Fashion-MNIST for a model of its shape; a model of digits ends in one sentence."""
    assert run("eigen", trained, "--data", "fashion-mnist", "--examples", "100") == 1
    assert "The model cannot take the data, here inputs of shape (100, 1, 28, 28)" in capsys.readouterr().err
    torch.save(make_model("cnn", seed=0, shape=(1, 28, 28)).state_dict(), tmp_path / "cnn.pt")
    argv = ["--model", "cnn", "--data", "fashion-mnist", "--examples", "50", "--k", "2", "--tol", "0.1", "--json"]
    assert run("eigen", tmp_path / "cnn.pt", *argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["num_params"], said["num_examples"], said["split_examples"]) == (52138, 50, 60000)
    assert said["lower"][0] < said["lambda_max"] < said["upper"][0]


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command, a missing argument and a word for a number are usage errors."""
    for argv in (["nonsense"], ["eigen"], ["eigen", "a.pt", "--k", "many"], ["train"], [], ["demo", "--seed", "-1"]):
        with pytest.raises(SystemExit) as ending:
            main(argv)
        assert ending.value.code == 2
        assert "usage:" in capsys.readouterr().err


def test_a_plain_state_dict_is_measured_with_model_and_data(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--model, --model-args and --data stand in for what a plain file does not say; the numbers are the same."""
    weights = torch.load(trained, weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "plain.pt")
    assert run("eigen", tmp_path / "plain.pt") == 1
    assert "Pass --model and --data" in capsys.readouterr().err
    argv = ["--model", "mlp", "--model-args", "hidden=8,", "--data", "digits", "--micro-batch", "256"]
    assert run("eigen", tmp_path / "plain.pt", *argv, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert run("eigen", trained, "--json", "--micro-batch", "256") == 0
    assert plain["eigenvalues"] == json.loads(capsys.readouterr().out)["eigenvalues"]


def test_a_users_own_factory_is_found_beside_him(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--model module:function is imported from the working directory, since the user named it."""
    (tmp_path / "his_models.py").write_text(
        "from torch import nn\ndef make(hidden=8):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))\n"
    )
    torch.save(torch.load(trained, weights_only=True)["state_dict"], tmp_path / "plain.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run("eigen", "plain.pt", "--model", "his_models:make", "--data", "digits", "--k", "1") == 0
    assert "plain.pt" in capsys.readouterr().out


def test_inspect_shows_what_the_file_holds(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layout, model, data, recipe, metrics and each tensor's name, shape and dtype."""
    assert run("inspect", trained) == 0
    text = capsys.readouterr().out
    for part in ("sharpscope checkpoint", "mlp", "digits", "cross_entropy", "lr=0.05", "epoch    2", "8x64  float32"):
        assert part in text
    assert run("inspect", trained, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["num_elements"] == 610
    assert said["model"] == "mlp"
    assert run("inspect", trained.with_name("nope.pt")) == 1


def test_train_writes_a_checkpoint_and_refuses_to_lose_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train exits 0 with its metrics on stdout; again it refuses, resumes, or overwrites as told."""
    argv = ["train", "--model", "mlp", "--optimizer", "sam", "--rho", "0.1", "--p", "inf", "--epochs", "1"]
    out = tmp_path / "m.pt"
    assert run(*argv, "--out", out, "--save-epochs", "0,last") == 0
    assert "test loss" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-epoch0.pt", "m-epoch1.pt", "m.pt"]
    before = out.read_bytes()
    assert run(*argv, "--out", out) == 1
    assert run(*argv, "--out", out, "--resume") == 0
    assert out.read_bytes() == before
    assert run(*argv, "--out", out, "--seed", "1", "--overwrite") == 0
    assert out.read_bytes() != before
    capsys.readouterr()
    assert run("train", "--out", out, "--optimizer", "adm") == 1
    assert "Did you mean 'adam'?" in capsys.readouterr().err
    assert run("train", "--out", tmp_path, "--epochs", "1") == 1


def test_demo_leaves_all_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short demo writes table, figure, JSON and checkpoints, and a second run measures the same again."""
    monkeypatch.setattr(networks.cnn, "__defaults__", ((1, 8, 8), 10, (2, 4), 8))  # a narrow cnn
    monkeypatch.setattr(sharpscope, "load", partial(sharpscope.load, examples=60))
    argv = ["demo", "--out", str(tmp_path / "d"), "--epochs", "2"]
    assert run(*argv) == 0
    first = capsys.readouterr().out
    names = {p.name for p in (tmp_path / "d").iterdir()}
    assert {"demo.json", "demo.png", "sgd.pt", "sam.pt", "sgd-2x.pt", "sgd-epoch0.pt", "sgd-2x-epoch4.pt"} <= names
    rows = json.loads((tmp_path / "d" / "demo.json").read_text())
    assert len(rows) == 9
    assert {row["run"] for row in rows} == {"SGD", "SAM rho=0.1", "SGD, 2x epochs"}
    assert (tmp_path / "d" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "2/eta" in first
    assert "Next: sharpscope eigen" in first
    assert run(*argv) == 0
    again = json.loads((tmp_path / "d" / "demo.json").read_text())
    assert [r["sha256"] for r in again] == [r["sha256"] for r in rows]
    assert np.allclose([r["lambda_max"] for r in again], [r["lambda_max"] for r in rows], rtol=1e-4)


def test_python_dash_m_and_a_real_interrupt(trained: Path) -> None:
    """As its own process: --version exits 0, and SIGINT during work exits 130 without a traceback."""
    command = [sys.executable, "-m", "sharpscope"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == f"sharpscope {sharpscope.__version__}"
    # The child says when it is at work, so that the signal meets it there; a shell's background job, as this may be
    # part of, ignores SIGINT unless told otherwise.
    code = (
        "import contextlib, signal, sys; from sharpscope import cli; from sharpscope.cli import terminal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "@contextlib.contextmanager\n"
        "def loud(what):\n"
        "    yield lambda *progress: print('at work', file=sys.stderr, flush=True)\n"
        "terminal.progress_bar = loud\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    argv = ["eigen", str(trained), "--tol", "1e-15", "--dtype", "float64", "--micro-batch", "1", "--k", "20"]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, *argv], stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "at work\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert out == ""
    assert err.replace("at work\n", "").strip() == "sharpscope: interrupted."


def test_values_on_the_command_line_become_python_values() -> None:
    """Numbers, lists and words are told apart."""
    assert options.key_values(["depth=16", "norm=none", "channels=8,16", "x=(1,)"]) == {
        "depth": 16,
        "norm": "none",
        "channels": (8, 16),
        "x": (1,),
    }


def test_help_does_not_wait_for_torch() -> None:
    """Building the parser of all commands leaves torch, SciPy and matplotlib alone."""
    code = (
        "import sys, sharpscope.cli; sharpscope.cli.parser();"
        "sys.exit(bool({'torch', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    """Each name of sharpscope.__all__ resolves, and an unknown one is an AttributeError."""
    assert all(getattr(sharpscope, name) is not None for name in sharpscope.__all__)
    with pytest.raises(AttributeError, match="no attribute 'top_eigenvalue'"):
        _ = sharpscope.top_eigenvalue  # type: ignore[attr-defined]


def test_sharpness_prints_measures_beside_their_predictions(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each m and rho, a column for each checkpoint; JSON and a figure beside it."""
    figure = tmp_path / "m.png"
    options_ = ("--examples", "64", "--m", "4,16", "--rho", "0.01,0.1", "--device", "cpu")
    assert run("sharpness", trained, "--out", tmp_path / "s.json", "--figure", figure, *options_) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    rows = [line.split("  ")[0] for line in shown.out.splitlines()]
    assert rows[1:5] == [f"m-sharpness, m={m}, rho={rho}" for m in (4, 16) for rho in (0.01, 0.1)]
    assert "predicted" in shown.out.splitlines()[0]
    assert "1 step" in shown.out
    assert figure.stat().st_size > 1000
    kept = sharpscope.SharpnessResult.load(tmp_path / "s.json")
    assert kept.find("m-sharpness", m=4, rho=0.1).examples == 64
    assert run("sharpness", trained, "--out", tmp_path / "s.json", *options_) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_radius_too_small_for_float32_is_said_with_what_helps(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 3, a mark and a note; with the dtype that the note names, status 0 and neither."""
    command = ("--measures", "m-sharpness,worst-case", "--examples", "64", "--m", "4", "--rho", "1e-8", "--ascent", "1")
    assert run("sharpness", trained, *command, "--device", "cpu") == 3
    said = capsys.readouterr().out
    for label in ("m-sharpness, m=4, rho=1e-08", "worst-case, rho=1e-08"):
        assert f"{label} is too small for float32" in said
    assert "Raise rho or compute in float64 (--dtype float64)" in said
    assert run("sharpness", trained, *command, "--device", "cpu", "--dtype", "float64") == 0
    assert "too small" not in capsys.readouterr().out


def test_every_measure_runs_on_two_checkpoints(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--measures all takes the learning rate and the rest from the checkpoint."""
    few = ("--examples", "32", "--m", "8", "--draws", "2", "--probes", "2", "--ascent", "2", "--device", "cpu")
    assert run("sharpness", trained, trained, "--measures", "all", "--json", *few) == 0
    first, second = json.loads(capsys.readouterr().out)
    names = {m["name"] for m in first["measures"]}
    assert len(names) == 10
    assert all(m["definition"] for m in first["measures"])
    # What goes side by side is chosen by the clock, and the last bits of a sum with it.
    assert [m["value"] for m in first["measures"]] == pytest.approx([m["value"] for m in second["measures"]], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--measures", "sharpnes"), "sharpnes"),
        (("--ascent", "many"), "--ascent must be a number of steps, apgd, or apgd:STEPS, got 'many'"),
        (("--ascent", "2", "--restarts", "3"), "--restarts goes with --ascent apgd"),
        (("--restarts", "3"), "--restarts goes with --ascent apgd"),
        (("--m", "100000"), "m must be at most the number of examples (1437), got 100000"),
        (("--measures", "trace", "--figure", "m.png"), "--figure is of m-sharpness"),
        (("--figure", "m.txt"), "must be one of .png, .pdf, .svg"),
    ],
)
def test_wrong_options_of_sharpness_are_one_sentence(
    trained: Path, given: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, and exit status 1."""
    assert run("sharpness", trained, "--device", "cpu", *given) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_invariance_shows_what_moves(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adaptive rows stand still, lambda_max does not."""
    assert run("invariance", trained, "--examples", "64", "--m", "16", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    change = {line.split("  ")[0]: float(line.split()[-1]) for line in lines if line.startswith(("lambda", "worst"))}
    assert change["lambda-max"] > 0.1
    assert change["lambda-max, adaptive (elementwise)"] < 1e-5
    assert change["worst-case, rho=0.05, adaptive (elementwise)"] < 1e-5


@pytest.mark.parametrize("variant", ["asam", "gsam", "looksam", "friendlysam"])
def test_train_takes_sams_relatives(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each trains by name around SGD, with its m, and the table of its result says so."""
    out = tmp_path / "net.pt"
    small = ("--model", "mlp", "--model-args", "hidden=4,4", "--epochs", "1", "--device", "cpu")
    assert run("train", "--optimizer", variant, "--m", "16", "--out", out, *small) == 0
    assert run("eigen", out, "--k", "1", "--tol", "0.1", "--device", "cpu") == 0
    assert f"{variant.upper()} around sgd, rho" in capsys.readouterr().out
    assert run("train", "--m", "16", "--out", tmp_path / "other.pt", *small) == 1
    assert "m, variant and sam_args belong to SAM" in capsys.readouterr().err
