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

# What each module or package may import of the project; all may import errors and the version.
GROUND = {"errors", "version"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "precision": set(),
    "files": set(),
    "preserve": set(),
    "problem": set(),
    "params": set(),
    "tables": set(),
    "progress": set(),
    "edges": set(),
    "ball": {"precision"},
    "perturbation": {"ball", "precision"},
    "linalg": {"precision"},
    "results": {"files", "tables"},
    "objective": {"params", "precision", "preserve", "problem", "progress"},
    "operators": {"objective", "params", "perturbation", "precision"},
    "audit": {"objective", "params", "precision"},
    "guide": {"objective"},
    "resume": {"files", "objective", "preserve"},
    "sampling": {"objective", "results"},
    "measurement": {"audit", "objective", "operators", "problem", "results", "resume"},
    "spectrum": {
        *("audit", "guide", "linalg", "measurement", "objective", "operators", "params", "precision", "problem"),
        *("results", "sampling"),
    },
    "sharpness": {
        *("audit", "ball", "edges", "linalg", "measurement", "objective", "params", "perturbation"),
        *("precision", "problem", "results"),
    },
    "slices": {
        *("ball", "files", "measurement", "objective", "params", "perturbation", "precision", "problem", "results"),
        "resume",
    },
    "comparing": {
        *("examples", "measurement", "objective", "params", "problem", "results", "resume", "sharpness", "slices"),
        "spectrum",
    },
    "optim": {"ball", "perturbation", "precision"},
    "monitor": {
        *("edges", "examples", "importing", "linalg", "measurement", "objective", "optim", "preserve"),
        *("problem", "results"),
    },
    "zoo": set(),
    "checkpoint": {"files"},
    "importing": set(),
    "problem_file": {"importing", "problem"},
    "examples": {"objective"},
    "loading": {"checkpoint", "examples", "importing", "objective", "problem", "problem_file", "zoo"},
    "scaffold": {"checkpoint", "zoo"},
    "recipe": {"optim", "zoo"},
    "run_files": {"checkpoint", "recipe"},
    "train": {
        *("checkpoint", "files", "monitor", "optim", "precision"),
        *("problem", "recipe", "results", "run_files", "zoo"),
    },
    "plot": {"results"},
    "report": {"plot", "results", "tables"},
    "__main__": {"cli"},
    "__init__": {
        "comparing",
        "errors",
        "loading",
        "monitor",
        "objective",
        "problem",
        "progress",
        "results",
        "sharpness",
        "slices",
        "spectrum",
        "version",
    },
}
# What each module of these packages may import of its own package.
INSIDE: dict[str, set[str]] = {
    "comparing.levels": set(),
    "comparing.samples": set(),
    "comparing.performance": set(),
    "comparing.entrants": set(),
    "comparing.steps": {"levels", "samples"},
    "comparing.parts": set(),
    "comparing.assembling": {"entrants", "levels", "parts", "performance", "samples", "steps"},
    "objective.data": set(),
    "objective.likelihoods": set(),
    "objective.losses": {"likelihoods"},
    "objective.convolutions": set(),
    "objective.piecewise": set(),
    "objective.plain": set(),
    "objective.kernels": {"convolutions", "piecewise", "plain"},
    "objective.microbatch": {"data"},
    "objective.float64_mode": set(),
    "objective.graph": {"data", "forward"},  # of the latter types alone
    "objective.guards": {"data", "graph"},
    "objective.forward": {"data", "float64_mode", "losses"},
    "objective.hessian": {"data", "forward", "graph"},
    "objective.accumulate": {"data", "forward", "graph", "guards"},
    "objective.objective": {
        *("accumulate", "data", "forward", "graph", "guards", "hessian", "kernels", "microbatch"),
    },
    "audit.agreement": set(),
    "audit.twin": {"agreement"},
    "audit.audit": {"agreement", "twin"},
    "guide.importance": set(),
    "guide.subset": {"importance"},
    "checkpoint.contents": set(),
    "checkpoint.foreign": set(),
    "checkpoint.folders": set(),
    "checkpoint.distributed": set(),
    "checkpoint.transformers_names": set(),
    "checkpoint.weights": {"transformers_names"},
    "checkpoint.layouts": {"foreign"},
    "checkpoint.bundled": {"contents", "layouts"},
    "checkpoint.files": {"bundled", "contents", "distributed", "folders", "foreign", "layouts"},
    "scaffold.zoo_model": set(),
    "scaffold.seen": {"zoo_model"},
    "scaffold.command": {"seen"},
    "scaffold.forms": {"seen"},
    "scaffold.header": {"command", "seen"},
    "scaffold.text": {"command", "forms", "header", "seen"},
    "monitor.sample": set(),
    "monitor.model": set(),
    "monitor.optimizer": set(),
    "monitor.sink": set(),
    "monitor.adapters": set(),
    "monitor.monitor": {"adapters", "model", "optimizer", "sample", "sink"},
    "resume.fingerprint": set(),
    "resume.key": {"fingerprint"},
    "resume.journal": {"fingerprint"},
    "resume.journaled_hvp": {"journal"},
    "resume.points": set(),
    "report.markup": set(),
    "report.drawing": {"markup"},
    "report.look": {"markup"},
    "report.numbers": {"look", "markup"},
    "report.origin": {"markup"},
    "report.prose": {"markup"},
    "report.spectra": {"drawing", "look"},
    "report.sharpness": {"drawing", "look", "spectra"},
    "report.lines": {"drawing", "look", "markup"},
    "report.planes": {"drawing", "look", "markup"},
    "report.runs": {"drawing", "look"},
    "report.page": {
        *("drawing", "lines", "look", "markup", "numbers", "origin", "planes", "prose", "runs", "sharpness", "spectra"),
    },
    "slices.axes": set(),
    "slices.direction": set(),
    "slices.evaluation": set(),
    "slices.running_statistics": set(),
    "slices.curvature": {"axes", "direction"},
    "slices.random_directions": {"direction"},
    "slices.loss_directions": {"direction"},
    "slices.checkpoint_directions": {"direction", "running_statistics"},
    "slices.walk": {"direction", "evaluation", "running_statistics"},
    "slices.grid": {"axes", "walk"},
    "slices.marks": {"checkpoint_directions", "direction", "evaluation"},
    "slices.measure": {
        *("axes", "curvature", "direction", "evaluation", "grid", "marks", "random_directions", "walk"),
    },
}
# What is no core dependency is imported late, and only where it is named here.
MAY_IMPORT: dict[str, set[str]] = {
    "results": {"numpy", "h5py"},
    "tables": {"numpy"},
    "progress": {"tqdm"},
    "errors": set(),
    "files": set(),
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


@pytest.mark.parametrize("name", INSIDE)
def test_imports_inside_a_package_follow_the_layering(name: str) -> None:
    """Within a package of this table no module reaches upwards."""
    package, _, module = name.partition(".")
    start = f"sharpscope.{package}."
    found = imports(PACKAGE / package / f"{module}.py")
    assert {other.removeprefix(start).split(".")[0] for other in found if other.startswith(start)} <= INSIDE[name]


def test_every_module_of_those_packages_has_a_row() -> None:
    """A new module there must say where it stands."""
    packages = {name.partition(".")[0] for name in INSIDE}
    modules = {f"{package}.{path.stem}" for package in packages for path in (PACKAGE / package).glob("*.py")}
    assert {name for name in modules if not name.endswith("__init__")} == set(INSIDE)


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
