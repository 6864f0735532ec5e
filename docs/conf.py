"""The pages of docs/ as a site: ``sphinx-build -W --keep-going -b html docs build/docs``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
os.environ["COLUMNS"] = "100"  # of the help texts

from docstrings import as_rst, with_names

from sharpscope.cli import parser
from sharpscope.results.base import Result
from sharpscope.version import __version__

project = "sharpscope"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
smartquotes = False  # in the docstrings, quoted words are arguments
nitpicky = True
# Types of Python, torch and others are named, not linked: a build needs no network.
nitpick_ignore_regex = [("py:.*", r"(?!sharpscope\.).*")]
# Of the package itself, what signatures mention and no user makes.
INNER = (
    "objective.micro_batches.MicroBatch",
    "objective.curvature_interface.Curvature",
    "objective.curvature_interface.Graph",
)
INNER += ("objective.accumulate.PerBatch", "objective.accumulate.Sums", "optim.sam.Loss")
INNER += ("linalg.missed_eigenvalues.MissedEigenvalueBound", "results.base.Self", "results.comparison.rows.Row")
nitpick_ignore = [("py:class", f"sharpscope.{name}") for name in INNER]
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
html_theme = "furo"
html_title = f"sharpscope {__version__}"

PAGES = ("tour", "your-own-checkpoint", "notebooks", "definitions", "trust", "engine", "coming-from", "commands")
PAGES += ("reference", "contributing")


def _added(app: Any, name: str, source: list[str]) -> None:
    """What the pages need not hold themselves: contents, each command's help, the docstrings, and CONTRIBUTING.md."""
    if name == "index":
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(PAGES) + "\n```\n"
    if name == "commands":
        commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
        for command, its_parser in commands.choices.items():
            source[0] += f"\n## {command}\n\n```text\n{its_parser.format_help()}```\n"
    if name == "reference":
        source[0] = "\n## ".join(map(_documented, source[0].split("\n## ")))
    if name == "contributing":
        source[0] = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _documented(section: str) -> str:
    """A section whose list of names links to their docstrings, which follow it."""
    names = re.findall(r"^- `([\w.]+)`", section, flags=re.MULTILINE)
    linked = re.sub(r"^- `([\w.]+)`", r"- {py:obj}`\1`", section, flags=re.MULTILINE)
    return f"{linked}\n```{{eval-rst}}\n" + "\n".join(map(_directive, names)) + "\n```\n" if names else section


def _directive(name: str) -> str:
    """What makes autodoc show an object."""
    module, _, last = name.rpartition(".")
    one = getattr(importlib.import_module(module), last)
    if not inspect.isclass(one):
        return f".. autofunction:: {name}\n"
    kind = "autoexception" if issubclass(one, Exception) else "autoclass"
    inherited = "   :inherited-members:\n" if issubclass(one, Result) else ""
    return f".. {kind}:: {name}\n   :members:\n{inherited}"


def setup(app: Any) -> None:
    """Sphinx's hooks."""
    app.connect("source-read", _added)
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("autodoc-process-signature", with_names)
