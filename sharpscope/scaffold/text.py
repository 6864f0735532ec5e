"""The text of a problem file."""

from __future__ import annotations

from pathlib import Path

from sharpscope.scaffold.command import command
from sharpscope.scaffold.forms import PLACEHOLDER, Form, form
from sharpscope.scaffold.header import header
from sharpscope.scaffold.seen import Seen

TODO = "data() must return your data. Take one of the forms above this line."


def problem_text(seen: Seen, out: Path) -> str:
    """The problem file for what was seen, to lie at ``out``: Python that runs once class and data are filled in.

    Until then it ends in a ProblemError. Nothing of the checkpoint gets into it as code: its names are comments or
    literals.
    """
    code = form(seen, out)
    lines = [
        *header(seen, f"Model, loss and data for `{command(seen, out)}`."),
        "",
        *_imports(code),
        "",
        *([*code.constants, ""] if code.constants else []),
        "",
        'def problem(split="train"):',
        *(f"    {line}" for line in code.model),
        f"    loss = {code.loss}",
        "    return sharpscope.Problem(model=model, loss=loss, data=data(split))",
        "",
        "",
        "def data(split):",
        "    # The same examples in the same order at every pass, so without shuffling and augmentation:",
        *(f"    {line}" for line in code.data),
        f'    raise sharpscope.ProblemError("{TODO}")',
    ]
    return "\n".join(lines) + "\n"


def open_lines(text: str) -> list[str]:
    """What of a problem file is to be filled in, as "line 12 (your class)"."""
    marks = {f"from {PLACEHOLDER} import": "your class", TODO: "your data"}
    return [
        f"line {i} ({what})"
        for i, line in enumerate(text.splitlines(), start=1)
        for mark, what in marks.items()
        if mark in line and not line.startswith("#")
    ]


def _imports(code: Form) -> list[str]:
    standard = ["from pathlib import Path", ""] if any("Path(" in line for line in code.constants) else []
    modules = sorted(["import sharpscope", "import torch", *(f"import {name}" for name in code.modules)])
    return [*standard, *modules, *(["", code.own] if code.own else [])]
