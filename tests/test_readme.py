"""What the README shows is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_examples_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python blocks run one after another in an empty folder and print a table."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})
    assert "lambda_max/lambda_5" in capsys.readouterr().out
    assert (tmp_path / "result.json").exists()


def test_commands_name_real_commands_and_options() -> None:
    """Every `sharpscope ...` line parses."""
    from sharpscope.cli import parser

    lines = re.findall(r"^    sharpscope (.*)$", README, flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        parser().parse_args(line.split())
