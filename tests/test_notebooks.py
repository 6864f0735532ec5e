"""The notebooks run from top to bottom, and end in checks that can fail.

Every cell is run, on smaller networks with less training than is printed: SHORTER has the numbers.
``SHARPSCOPE_NOTEBOOKS=full`` runs them as printed, and ``SHARPSCOPE_NOTEBOOKS=write pytest tests/test_notebooks.py``
also writes what they show back into notebooks/.
"""

from __future__ import annotations

import ast
import base64
import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import sharpscope

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sharpscope.__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ASKED = os.environ.get("SHARPSCOPE_NOTEBOOKS")
WRITE = ASKED == "write"

# Of each notebook: what is printed, and what is run in its place.
SHORTER = {
    "landscapes": {"epochs=25": "epochs=8", "points=25": "points=9", "points=17": "points=7"},
    "m-sharpness-and-measures": {"(16,)": "(8,)", "epochs=40": "epochs=10"},
    "sgd-against-sam": {"(16,)": "(8,)", "epochs=30": "epochs=10", "epochs=60": "epochs=20", "range(5)": "range(2)"},
    "your-own-model": {"in range(60)": "in range(20)"},
}

SECONDS, BYTES = 120, 300_000
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

# Of each check of the closing cell, sharpscope's number is moved by a hundredth, and the cell must then fail.
BREAK = """
_closing, _checks = {closing!r}, dict(checks)
assert _checks
for _name, (_value, *_rest) in _checks.items():
    checks = {{**_checks, _name: (1.01 * _value, *_rest)}}
    try:
        exec(_closing)
    except AssertionError:
        continue
    raise RuntimeError(f"The check of {{_name}} holds though the number is off by a hundredth.")
checks = _checks
"""

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def notebook(*cells: str) -> Any:
    """A notebook of these code cells."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def code(book: Any) -> list[Any]:
    """Its code cells."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def shortened(book: Any, name: str) -> Any:
    """The notebook with the numbers of SHORTER, each of which must stand in it."""
    for printed, instead in SHORTER[name].items():
        holding = [cell for cell in code(book) if printed in cell.source]
        assert holding, f"SHORTER has {printed!r} of {name}, where it does not stand. Give what is printed there."
        for cell in holding:
            cell.source = cell.source.replace(printed, instead)
    return book


def run(book: Any, folder: Path, *also: str) -> Any:
    """Run the cells, and then ``also``, in ``folder`` by this interpreter and the sharpscope that is under test.

    Raises: CellExecutionError as soon as one fails.
    """
    with pytest.MonkeyPatch.context() as patched:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
            patched.setenv(name, str(folder.parent / name.lower()))
        patched.delenv("MPLBACKEND", raising=False)  # the kernel has its own
        patched.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")]))
        # No kernels of the machine: what is then called python3 is this interpreter's own ipykernel.
        kernels = KernelSpecManager(kernel_dirs=[])
        client = NotebookClient(
            book,
            km=AsyncKernelManager(kernel_spec_manager=kernels),
            timeout=SECONDS,
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
            resources={"metadata": {"path": str(folder)}},
        )
        with client.setup_kernel(cleanup_kc=True):
            for index, cell in enumerate(book.cells):
                client.execute_cell(cell, index)
            for source in also:
                extra = nbformat.v4.new_code_cell(source)
                book.cells.append(extra)
                client.execute_cell(extra, len(book.cells) - 1)
                book.cells.pop()
    return book


def cleaned(book: Any) -> Any:
    """What is committed: pictures of few colours, and nothing that changes without the results doing so."""
    from PIL import Image  # matplotlib's own dependency

    book.metadata = nbformat.from_dict(METADATA)
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type != "code":
            continue
        # A progress bar that is gone has left an output without content.
        cell.outputs = [output for output in cell.outputs if output.get("data") != {}]
        for output in cell.outputs:
            picture = output.get("data", {}).get("image/png")
            if picture:
                smaller = io.BytesIO()
                with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
                    image.convert("RGB").quantize(96).save(smaller, "PNG", optimize=True)
                output["data"]["image/png"] = base64.b64encode(smaller.getvalue()).decode()
                output["metadata"] = nbformat.from_dict({})
    return book


def test_there_are_notebooks() -> None:
    """All four are here, so that the tests below are of something."""
    assert {path.stem for path in NOTEBOOKS} == {
        *("landscapes", "m-sharpness-and-measures", "sgd-against-sam", "your-own-model"),
    }


@each
def test_a_notebook_runs_and_its_checks_can_fail(path: Path, tmp_path: Path) -> None:
    """From top to bottom without an error or warning, in time; then each closing check fails on a number 1 % off."""
    folder = tmp_path / "work"
    folder.mkdir()
    book = nbformat.read(path, 4)
    if ASKED not in ("full", "write"):
        book = shortened(book, path.stem)
    start = time.monotonic()
    run(book, folder, BREAK.format(closing=code(book)[-1].source))
    took = time.monotonic() - start
    assert took < SECONDS, f"{took:.0f} seconds"
    assert not [output for cell in code(book) for output in cell.outputs if output.get("name") == "stderr"]
    if WRITE:
        nbformat.write(cleaned(book), path)


@pytest.mark.skipif(WRITE, reason="the notebooks are being written")
@each
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    """Run once from top to bottom, without errors, warnings, bars, paths of a machine, or more than 300 kB."""
    text = path.read_text(encoding="utf-8")
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert len(text) < BYTES
    assert book.metadata == METADATA
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1))
    assert all(cell.metadata == {} for cell in book.cells)
    outputs = [output for cell in code(book) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert sum("text/html" in output.get("data", {}) for output in outputs) >= 2
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert output.get("data") != {}
        assert not any("widget" in kind for kind in output.get("data", {}))
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert "Warning" not in words
    assert not re.search(r"/(home|root|Users|tmp|usr|opt|work)/|[A-Z]:\\\\|site-packages|ipykernel_", words)
    assert "\\r" not in words
    assert "\\u001b" not in words


@each
def test_a_notebook_ends_in_checks(path: Path) -> None:
    """The last cell but one fills ``checks``, each two values of different names and how far apart; the last asserts.

    That the second value is computed without sharpscope is for a reader to see: its data may be sharpscope's.
    """
    filling, closing = (ast.parse(cell.source) for cell in code(nbformat.read(path, 4))[-2:])
    filled = [node.value for node in ast.walk(filling) if isinstance(node, ast.Assign) and "checks" in names(node)]
    values = [value for node in filled for value in (node.values if isinstance(node, ast.Dict) else [node])]
    assert values
    for value in values:
        assert isinstance(value, ast.Tuple), ast.unparse(value)
        measured, other, _ = value.elts
        assert names(other) - names(measured), ast.unparse(value)
    assert any(isinstance(node, ast.Assert) for node in ast.walk(closing))
    assert "checks" in names(closing)
    assert "sharpscope" not in names(closing)


def names(tree: ast.AST) -> set[str]:
    """Every name in a piece of source."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_the_kernel_has_the_sharpscope_under_test(tmp_path: Path) -> None:
    """Interpreter and package are those of this process."""
    book = run(notebook("import sys, sharpscope", "print(sys.executable, sharpscope.__file__)"), tmp_path)
    assert book.cells[1].outputs[0].text.split() == [sys.executable, sharpscope.__file__]


def test_every_figure_of_a_session_shows(tmp_path: Path) -> None:
    """A function of sharpscope.plot shows its figure beneath the cell, in the first cell that draws and in the next."""
    setup = (
        "import torch, sharpscope\n"
        "from sharpscope.plot import density_curve, m_sharpness_curves, slice_curves, surface_3d, surface_contour\n"
        "from sharpscope.plot import surfaces_side_by_side\n"
        "data = (torch.randn(20, 3), torch.arange(20) % 2)\n"
        "problem = sharpscope.Problem(model=torch.nn.Linear(3, 2), loss=torch.nn.CrossEntropyLoss(), data=data)\n"
        "plane = sharpscope.loss_surface(problem, points=3)"
    )
    drawn = (
        "slice_curves(sharpscope.loss_slice(problem, points=3));",
        "surface_contour(plane);",
        "surface_3d(plane);",
        "surfaces_side_by_side([plane, plane]);",
        "density_curve(sharpscope.spectral_density(problem, 2, 3));",
        "m_sharpness_curves([sharpscope.measure_sharpness(problem, m=(1, 4))]);",
    )
    book = run(notebook(setup, *drawn), tmp_path)
    for cell in book.cells[1:]:
        assert ["image/png" in output.get("data", {}) for output in cell.outputs] == [True], cell.source


def test_a_bar_leaves_nothing_beneath_a_cell(tmp_path: Path) -> None:
    """After it, or after an interrupt, there is an output without content, and what the cell shows itself."""
    cell = (
        "import sharpscope\n"
        "with sharpscope.progress_bar('SGD') as progress:\n"
        "    progress('one', 1, 10)\n"
        "    progress('two', 1, None)\n"
        "    {}\n"
        "print('done')"
    )
    empty, printed = run(notebook(cell.format("pass")), tmp_path).cells[0].outputs
    assert empty.data == {}
    assert printed.text == "done\n"
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        run(book := notebook(cell.format("raise KeyboardInterrupt")), tmp_path)
    empty, error = book.cells[0].outputs
    assert empty.data == {}
    assert error.ename == "KeyboardInterrupt"
