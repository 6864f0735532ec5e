"""Nothing right of the matvec knows a model; nothing right of a result knows torch; only the command line prints."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sharpscope"

# What each folder or module of sharpscope/ may import of the others; all may import GROUND. Imports for type checking
# count here, and not as a circle.
GROUND = {"errors", "random_streams", "version"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "random_streams": set(),
    "precision": set(),
    "problem": set(),
    "progress": set(),
    "atomic_io": set(),
    "formatting": set(),
    "edge_of_stability": set(),
    "importing": set(),
    "weights": {"precision"},
    "linalg": {"precision"},
    "results": {"atomic_io", "formatting"},
    "objective": {"precision", "problem", "progress", "weights"},
    "operators": {"objective", "precision", "weights"},
    "fingerprint": {"objective", "weights"},
    "resume": {"atomic_io", "fingerprint", "objective", "weights"},
    "sampling": {"objective", "results"},
    "measurement": {"atomic_io", "fingerprint", "objective", "operators", "problem", "results", "resume", "weights"},
    "spectrum": {
        *("linalg", "measurement", "objective", "operators", "precision", "problem", "results", "resume", "sampling"),
        "weights",
    },
    "sharpness": {
        *("edge_of_stability", "linalg", "measurement", "objective", "precision", "problem", "results", "resume"),
        *("sampling", "weights"),
    },
    "slices": {
        "atomic_io",
        "fingerprint",
        "measurement",
        "objective",
        "precision",
        "problem",
        "results",
        "resume",
        "weights",
    },
    "comparing": {
        *("atomic_io", "fingerprint", "measurement", "objective", "problem", "results", "resume", "sampling"),
        *("sharpness", "slices"),
        *("spectrum", "weights"),
    },
    "optim": {"weights"},
    "monitor": {
        *("edge_of_stability", "importing", "linalg", "measurement", "objective", "optim", "problem", "results"),
        *("fingerprint", "sampling", "weights"),
    },
    "zoo": set(),
    "checkpoint": {"atomic_io", "importing", "problem"},
    "loading": {"checkpoint", "importing", "objective", "problem", "sampling", "zoo"},
    "templates": {"checkpoint", "zoo"},
    "training": {"atomic_io", "checkpoint", "monitor", "optim", "precision", "problem", "results", "zoo"},
    "edges": {"edge_of_stability"},  # former names
    "train": {"training"},
    "plot": {"results"},
    "report": {"formatting", "plot", "results"},
    "__main__": {"cli"},
    "__init__": {
        *("comparing", "edge_of_stability", "edges", "linalg", "loading", "monitor", "objective", "operators", "optim"),
        *("plot", "problem", "progress", "report", "results", "sharpness", "slices", "spectrum"),
    },
}
# What is no core dependency is imported late, and only where it is named here.
MAY_IMPORT: dict[str, set[str]] = {
    "results": {"numpy", "h5py"},
    "formatting": {"numpy"},
    "progress": {"tqdm"},
    "errors": set(),
    "atomic_io": set(),
    "plot": {"numpy", "matplotlib", "plotly"},
    "report": {"numpy", "matplotlib", "plotly"},
    "linalg": {"torch", "scipy"},
    "optim": {"torch"},
    "zoo": {"torch", "numpy"},
    "checkpoint": {"torch", "safetensors"},
    "loading": {"torch"},
}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    """The row of the table that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layering(path: Path) -> None:
    """Each file imports of the project only what the table allows its place."""
    here = place(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("sharpscope.")}
    assert own <= ALLOWED[here] | GROUND | {here}


def dependencies(path: Path) -> set[Path]:
    """The files of the package that a file imports, wherever in it, but for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    types = {id(inner) for block in blocks for inner in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in types and str(node.module).startswith("sharpscope"):
            folder = ROOT.joinpath(*str(node.module).split("."))
            for alias in node.names:
                places = (folder / f"{alias.name}.py", folder / alias.name / "__init__.py", folder.with_suffix(".py"))
                found |= {next((p for p in places if p.is_file()), folder / "__init__.py")}
    return found - {path, PACKAGE / "__init__.py"}


def test_no_imports_go_in_a_circle() -> None:
    """Files can be put in an order in which each imports earlier ones only, imports inside functions included."""
    waiting = {path: dependencies(path) for path in FILES if path != PACKAGE / "__init__.py"}
    while free := [path for path, needs in waiting.items() if not needs & waiting.keys()]:
        for path in free:
            del waiting[path]
    assert not waiting, sorted(str(path.relative_to(PACKAGE)) for path in waiting)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_imports_stay_in_their_layer(path: Path) -> None:
    """A result needs NumPy alone, a solver torch and SciPy, and nobody what is not a core dependency."""
    heads = {name.split(".")[0] for name in imports(path)}
    foreign = heads - sys.stdlib_module_names - {"sharpscope"}
    assert foreign <= MAY_IMPORT.get(place(path), {"torch", "numpy", "scipy"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints(path: Path) -> None:
    """No core module calls print, or touches the standard streams."""
    if place(path) == "__main__":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in names
    assert not {"stdout", "stderr"} & attributes


def test_every_module_has_a_row() -> None:
    """A new module must say where it stands."""
    assert {place(path) for path in FILES} == set(ALLOWED)


def test_every_package_is_installed() -> None:
    """setup.cfg lists each folder of modules, or it would be missing wherever this is not a checkout."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(config["options"]["packages"].split()) == found | {"sharpscope.cli"}


def test_a_newcomer_finds_every_package() -> None:
    """CONTRIBUTING.md has a row for each package of setup.cfg, and no other."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(sharpscope[\w.]*)` \|", text, flags=re.MULTILINE)
    assert sorted(rows) == sorted(config["options"]["packages"].split())


def test_every_test_file_holds_tests() -> None:
    """A file that was emptied by mistake is not passed by in silence."""
    for path in (ROOT / "tests").glob("test_*.py"):
        assert "def test_" in path.read_text(encoding="utf-8"), path.name
