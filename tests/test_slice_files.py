"""A slice's files hold the very numbers of the slice, each at its own coordinates, for any reader."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comparisons import DIVERGED, DONE, PENDING
from sharpscope.cli import main
from sharpscope.errors import ArgumentError, DataError, OutputError
from sharpscope.results import Cost, SliceResult, read_loss_landscape, to_csv, to_vtk

X, Y = np.array([-1.0, -0.25, 0.0, 0.5, 2.0]), np.array([-0.5, 0.0, 3.0])
PLANE = ("x", "y")


def height(x: Any, y: Any) -> Any:
    """A function that no exchange, flip or shift of axes leaves as it is."""
    return 1 + x**2 + 0.1 * x + 10 * y**2 + 0.3 * y + x * y


def plane() -> SliceResult:
    """One point diverged, one pending, two splits, an uneven grid that is not square."""
    mesh = np.meshgrid(X, Y)
    loss = np.stack([height(*mesh), 2 * height(*mesh)])[:, None]
    status = np.full((1, 3, 5), DONE, dtype=np.int8)
    status[0, 2, 4], status[0, 0, 1] = DIVERGED, PENDING
    loss[:, 0, 2, 4], loss[:, 0, 0, 1] = np.inf, np.nan
    accuracy = np.where(np.isfinite(loss), 1 / loss, np.nan)
    directions = [{"label": f"direction {axis}", "length": 1.0, "kind": "plane"} for axis in PLANE]
    return SliceResult(
        axes=(X, Y),
        loss=loss,
        accuracy=accuracy,
        status=status,
        splits=("train", "test set"),
        directions=(tuple(directions),),
        centre=np.array([[1.0, 1.0], [2.0, 0.5]]),
        slopes=np.full((1, 2), np.nan),
        curvatures=np.full((1, 2, 2), np.nan),
        cost=Cost(1, 0, 1.0, 1.0),
        provenance={"checkpoint": "net.pt", "mode": "eval", "num_examples": 10},
    )


def test_each_row_of_the_csv_is_one_point_with_all_digits(tmp_path: Path) -> None:
    """Coordinates, status, loss and accuracy of every split come back bit for bit; pending cells are empty."""
    result = plane()
    to_csv(result, tmp_path / "plane.csv")
    with open(tmp_path / "plane.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for row in rows:
        x, y = float(row["x"]), float(row["y"])
        if row["status"] == "pending":
            assert (row["train_loss"], row["test set_accuracy"]) == ("", "")
        elif row["status"] == "diverged":
            assert (x, y, float(row["train_loss"])) == (2.0, 3.0, math.inf)
        else:
            assert float(row["train_loss"]) == height(x, y)
            assert float(row["test set_accuracy"]) == 1 / (2 * height(x, y))
    assert [row["status"] for row in rows].count("pending") == 1
    assert [row["status"] for row in rows].count("diverged") == 1


def test_lines_come_one_after_another_in_the_csv(tmp_path: Path) -> None:
    """A result of two lines has the points of both, each with the number and name of its line."""
    result = lines(2)
    to_csv(result, tmp_path / "lines.csv")
    with open(tmp_path / "lines.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["line"]), float(r["t"]), float(r["train_loss"])) for r in rows] == [
        (i, t, float(result.loss[0, i, j])) for i in range(2) for j, t in enumerate(X)
    ]
    assert rows[-1]["direction"] == "line 1"


def lines(count: int) -> SliceResult:
    loss = np.stack([(i + 1) * height(X, 0.0) for i in range(count)])[None]
    return replace(
        plane(),
        axes=(X,),
        loss=loss,
        accuracy=np.full_like(loss, np.nan),
        status=np.full((count, 5), DONE, dtype=np.int8),
        splits=("train",),
        directions=tuple(({"label": f"line {i}", "length": 1.0, "kind": "gradient"},) for i in range(count)),
        centre=np.array([[1.0, np.nan]]),
        slopes=np.full((count, 1), np.nan),
        curvatures=np.full((count, 1, 1), np.nan),
    )


def test_another_program_reads_the_vtk_file_as_the_arrays(tmp_path: Path) -> None:
    """meshio's points and point data are the grid's, x fastest, NaN where pending and infinite where diverged."""
    meshio = pytest.importorskip("meshio")
    result = plane()
    to_vtk(result, tmp_path / "plane.vtk")
    mesh = meshio.read(tmp_path / "plane.vtk")
    x, y = mesh.points[:, 0], mesh.points[:, 1]
    order = np.lexsort((x, y))
    np.testing.assert_array_equal(x[order].reshape(3, 5), np.meshgrid(X, Y)[0])
    np.testing.assert_array_equal(y[order].reshape(3, 5), np.meshgrid(X, Y)[1])
    for s, name in enumerate(("train", "test_set")):
        for what, values in (("loss", result.loss), ("accuracy", result.accuracy)):
            read = np.asarray(mesh.point_data[f"{name}_{what}"]).ravel()[order].reshape(3, 5)
            np.testing.assert_array_equal(read, values[s, 0])
    np.testing.assert_array_equal(np.asarray(mesh.point_data["status"]).ravel()[order].reshape(3, 5), result.status[0])


def test_a_vtk_file_numbers_its_points_with_x_fastest(tmp_path: Path) -> None:
    """The legacy format's rule, read from the text itself: the k-th value is at x[k mod nx], y[k div nx]."""
    to_vtk(plane(), tmp_path / "plane.vtk")
    text = (tmp_path / "plane.vtk").read_text(encoding="ascii").splitlines()
    assert text[0] == "# vtk DataFile Version 3.0"
    assert text[2:5] == ["ASCII", "DATASET RECTILINEAR_GRID", "DIMENSIONS 5 3 1"]
    at = text.index("SCALARS train_loss double 1")
    values = [float(v) for v in text[at + 2].split()]
    for k, value in enumerate(values):
        x, y = X[k % 5], Y[k // 5]
        assert value == height(x, y) or (k == 1 and math.isnan(value)) or (k == 14 and value == math.inf)


def test_a_line_that_is_not_there_is_no_vtk_file(tmp_path: Path) -> None:
    """The number of a line is checked before anything is written."""
    with pytest.raises(ArgumentError, match="line must be from 0 to 0, got 1"):
        to_vtk(plane(), tmp_path / "plane.vtk", line=1)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    """A folder's name is no file; nothing is left beside it."""
    (tmp_path / "taken").write_text("", encoding="ascii")
    for write in (to_csv, to_vtk):
        with pytest.raises(OutputError):
            write(plane(), tmp_path / "taken" / "file")


def written_by_loss_landscape(path: Path, losses: bool = True, **options: Any) -> None:
    """What plot_surface.py writes: shape (len(x), len(y)), filled at the flat places that scheduler.py numbers."""
    h5py = pytest.importorskip("h5py")
    x, y = options.get("x", X), options.get("y", Y)
    with h5py.File(path, "w") as file:
        file["dir_file"] = options.get(
            "name", "nets/model_300.t7_weights_xignore=biasbn_xnorm=filter_yignore=biasbn_ynorm=filter.h5"
        )
        file["xcoordinates"] = x
        if y is not None:
            file["ycoordinates"] = y
        if not losses:
            return
        train = -np.ones(x.shape if y is None else (len(x), len(y)))
        accuracies = -np.ones_like(train)
        indices = np.array(range(train.size))
        if y is None:
            places = np.c_[x.ravel()[indices], np.zeros(len(x))]
        else:
            xs, ys = np.meshgrid(x, y)
            places = np.c_[xs.ravel()[indices], ys.ravel()[indices]]
        for index, place in zip(indices, places, strict=True):
            if index in options.get("pending", ()):
                continue
            train.ravel()[index] = np.inf if index in options.get("diverged", ()) else height(*place)
            accuracies.ravel()[index] = 100 / height(*place)
        file["train_loss"] = train
        if options.get("accuracy", True):
            file["train_acc"] = accuracies


def test_a_plane_of_loss_landscape_that_is_not_square_is_read_right(tmp_path: Path) -> None:
    """Every point has its own loss although the file's shape says (len(x), len(y)); accuracies become shares."""
    written_by_loss_landscape(tmp_path / "surface.h5", pending=(3,), diverged=(7,))
    result = read_loss_landscape(tmp_path / "surface.h5")
    expected = height(*np.meshgrid(X, Y))
    done = result.status[0] == DONE
    assert result.loss.shape == (1, 1, 3, 5)
    np.testing.assert_array_equal(result.loss[0, 0][done], expected[done])
    np.testing.assert_allclose(result.accuracy[0, 0][done], 1 / expected[done], rtol=1e-15)
    assert np.argwhere(result.status[0] == PENDING).tolist() == [[0, 3]]
    assert np.argwhere(result.status[0] == DIVERGED).tolist() == [[1, 2]]
    assert math.isnan(result.loss[0, 0, 0, 3])
    assert math.isnan(result.accuracy[0, 0, 0, 3])
    assert result.splits == ("train",)


def test_the_directions_of_loss_landscape_are_read_from_their_name(tmp_path: Path) -> None:
    """Checkpoint, normalisation and what happened to biases; what the file does not say is not made up."""
    written_by_loss_landscape(tmp_path / "surface.h5")
    result = read_loss_landscape(tmp_path / "surface.h5")
    first = result.directions[0][0]
    assert result.provenance["checkpoint"] == "model_300.t7"
    assert (first["kind"], first["normalisation"], first["one_dimensional"]) == ("random", "filter", "fixed")
    assert (first["seed"], first["length"]) == ("unknown", None)
    assert "seed unknown" in result.summary()


def test_a_result_read_from_loss_landscape_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    """So that it can be kept, and drawn, without h5py."""
    written_by_loss_landscape(tmp_path / "surface.h5", diverged=(7,))
    result = read_loss_landscape(tmp_path / "surface.h5")
    result.save(tmp_path / "surface.json")
    loaded = SliceResult.load(tmp_path / "surface.json")
    np.testing.assert_array_equal(loaded.loss, result.loss)
    assert loaded.to_dict() == result.to_dict()


def test_a_line_of_loss_landscape_without_accuracy_is_read(tmp_path: Path) -> None:
    """One axis, towards another model, whose name has no normalisation; the centre is the loss at 0."""
    written_by_loss_landscape(tmp_path / "line.h5", y=None, accuracy=False, name="a/one.t7_two.t7_states.h5")
    result = read_loss_landscape(tmp_path / "line.h5")
    assert (result.dimensions, result.directions[0][0]["kind"]) == (1, "unknown")
    np.testing.assert_array_equal(result.loss[0, 0], height(X, 0.0))
    assert result.centre[0, 0] == height(0.0, 0.0)
    assert np.isnan(result.accuracy).all()


def test_a_loss_of_zero_is_done(tmp_path: Path) -> None:
    """Only -1 is pending, though loss-landscape itself measures what is 0 again and again."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "line.h5", "w") as file:
        file["xcoordinates"], file["train_loss"] = X, np.array([1.0, 0.0, -0.5, -1.0, 2.0])
    result = read_loss_landscape(tmp_path / "line.h5")
    assert result.status[0].tolist() == [DONE, DONE, DONE, PENDING, DONE]


def test_a_split_that_has_not_begun_is_left_out(tmp_path: Path) -> None:
    """plot_surface.py sets all of a split to -1 before its first point."""
    h5py = pytest.importorskip("h5py")
    written_by_loss_landscape(tmp_path / "surface.h5")
    with h5py.File(tmp_path / "surface.h5", "a") as file:
        file["test_loss"] = file["test_acc"] = -np.ones((5, 3))
    result = read_loss_landscape(tmp_path / "surface.h5")
    assert (result.splits, result.complete) == (("train",), True)


@pytest.mark.parametrize("losses", [False, None])
def test_what_is_no_surface_is_refused(tmp_path: Path, losses: bool | None) -> None:
    """A file without a finished point, or that is no h5 file, is a DataError."""
    pytest.importorskip("h5py")
    if losses is None:
        (tmp_path / "surface.h5").write_text("not h5", encoding="ascii")
    else:
        written_by_loss_landscape(tmp_path / "surface.h5", losses=False)
    with pytest.raises(DataError, match="must"):
        read_loss_landscape(tmp_path / "surface.h5")


def test_without_h5py_one_reads_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, and no ImportError reaches the user."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ArgumentError, match=r"pip install 'sharpscope\[h5\]'"):
        read_loss_landscape(tmp_path / "surface.h5")


@pytest.mark.parametrize("name", ["out.csv", "out.vtk", "out.png", "out.svg"])
def test_plot_writes_what_the_name_says(tmp_path: Path, name: str) -> None:
    """Each kind of file once, and never over one that exists unless that is asked for."""
    plane().save(tmp_path / "plane.json")
    command = ["plot", str(tmp_path / "plane.json"), "--out", str(tmp_path / name)]
    assert main(command) == 0
    assert (tmp_path / name).stat().st_size > 100
    assert main(command) == 1
    assert main([*command, "--overwrite"]) == 0


def test_plot_refuses_what_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another suffix, two results in one table, an unknown style: one sentence and status 1."""
    plane().save(tmp_path / "plane.json")
    path = str(tmp_path / "plane.json")
    assert main(["plot", path, "--out", str(tmp_path / "out.gif")]) == 1
    assert "FIGURE must be one of .png" in capsys.readouterr().err
    assert main(["plot", path, path, "--out", str(tmp_path / "out.csv")]) == 1
    assert "holds one result, got 2" in capsys.readouterr().err
    assert main(["plot", path, "--out", str(tmp_path / "out.png"), "--style", "dark_backgroud"]) == 1
    assert "Did you mean 'dark_background'" in capsys.readouterr().err


def test_plot_draws_lines_and_surfaces_of_either_kind(tmp_path: Path) -> None:
    """With every option, in the width that was asked for."""
    from PIL import Image

    lines(2).save(tmp_path / "lines.json")
    plane().save(tmp_path / "plane.json")
    out, wide = tmp_path / "out.png", ["--width", "3.3", "--style", "dark_background", "--overwrite"]
    for args in (
        ["lines.json", "--log", "--clip", "5"],
        ["plane.json", "--levels", "1,2,5", "--linear", "--split", "test set"],
        ["plane.json", "--levels", "6", "--kind", "3d", "--quantity", "accuracy"],
        ["plane.json", "plane.json", "--clip", "20"],
    ):
        paths = [str(tmp_path / a) if a.endswith(".json") else a for a in args]
        assert main(["plot", *paths, "--out", str(out), *wide]) == 0
        with Image.open(out) as image:
            assert image.width == round(3.3 * 150)


def test_plot_leaves_torch_alone(tmp_path: Path) -> None:
    """Drawing a saved result does not import torch, which takes seconds and may not be there."""
    plane().save(tmp_path / "plane.json")
    program = (
        "import sys; from sharpscope.cli import main; "
        f"assert main(['plot', {str(tmp_path / 'plane.json')!r}, '--out', {str(tmp_path / 'out.png')!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
