"""The pages of docs/ as a site: ``sphinx-build -W --keep-going -b html docs build/docs``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["COLUMNS"] = "100"  # of the help texts

from sharpscope.cli import parser
from sharpscope.version import __version__

project = "sharpscope"
version = release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
nitpicky = True
html_theme = "furo"
html_title = f"sharpscope {__version__}"

PAGES = ("your-own-checkpoint", "notebooks", "definitions", "trust", "engine", "coming-from", "commands")


def _added(app: Any, name: str, source: list[str]) -> None:
    """What the pages need not hold themselves: the table of contents, and each command's help."""
    if name == "index":
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(PAGES) + "\n```\n"
    if name == "commands":
        commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
        for command, its_parser in commands.choices.items():
            source[0] += f"\n## {command}\n\n```text\n{its_parser.format_help()}```\n"


def setup(app: Any) -> None:
    """Sphinx's hook."""
    app.connect("source-read", _added)
