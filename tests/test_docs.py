"""What the README and the pages of docs/ show is true, and what they point at is there."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
WITH_LINKS = [*PAGES, ROOT / "CONTRIBUTING.md"]
# By the folders of the project that a text may name.
NAMED = re.compile(r"(?<![\w/.-])(?:docs|benchmarks|tests|cli|sharpscope|\.ci)/[\w./-]*[\w/]")
COMMAND = r"^    (?:\$ )?sharpscope (.*)$"
NUMBER = re.compile(r"(?<![\w-])\d[\d.,]*(?:e[+-]\d+)?")


def blocks(page: Path) -> list[str]:
    """The Python blocks that are meant to run; others are opened as ``python noexec`` or ``text``."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page is called, as GitHub and myst-parser make it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page == README or blocks(page)], ids=lambda page: page.stem)
def test_python_examples_of_a_page_run_as_printed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python blocks of a page run one after another in an empty folder; the README's print a table and save it."""
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(page)), {})
    if page == README:
        assert "lambda_max/lambda_5" in capsys.readouterr().out
        assert (tmp_path / "result.json").exists()


def test_the_monitor_of_the_pages_logs_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that docs/your-own-checkpoint.md saves can be plotted."""
    monkeypatch.chdir(tmp_path)
    exec(blocks(DOCS / "your-own-checkpoint.md")[0], {})
    assert "sharpness/lambda_max" in capsys.readouterr().out
    from sharpscope.cli import main

    assert main(["plot", "run.json", "--out", "run.png"]) == 0
    assert (tmp_path / "run.png").stat().st_size > 0


def test_commands_of_the_pages_name_real_commands_and_options() -> None:
    """Every `sharpscope ...` line parses, and the README has some."""
    from sharpscope.cli import parser

    lines = {page: re.findall(COMMAND, page.read_text(encoding="utf-8"), flags=re.MULTILINE) for page in PAGES}
    assert len(lines[README]) >= 3
    assert sum(map(len, lines.values())) >= 23
    for line in itertools.chain(*lines.values()):
        parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A relative link names a file that is there, and a heading in it."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            other = page.parent / name if name else page
            assert other.is_file(), link
            assert not anchor or anchor in anchors(other), link


def test_files_that_are_named_are_there() -> None:
    """A page in backticks, and the source anywhere, names no file of the project that is not in it."""
    texts = {page: " ".join(re.findall(r"`[^`\n]+`", page.read_text(encoding="utf-8"))) for page in WITH_LINKS}
    sources = [*(ROOT / "sharpscope").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    texts |= {path: path.read_text(encoding="utf-8") for path in sources}
    found = [(path, name) for path, text in texts.items() for name in NAMED.findall(text)]
    assert len(found) > 30
    assert [(path, name) for path, name in found if not (ROOT / name).exists()] == []


def test_the_reference_lists_every_public_name() -> None:
    """docs/reference.md has a line for each function and class that a public package offers, and none twice."""
    names = re.findall(r"^- `([\w.]+)`: .*\.$", (DOCS / "reference.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = [offered(*name.rsplit(".", 1)) for name in names]
    assert len(names) == len(set(listed))
    for package in ("sharpscope", *(f"sharpscope.{name}" for name in ("linalg", "optim", "plot", "results", "slices"))):
        everything = [offered(package, name) for name in importlib.import_module(package).__all__]
        missing = {one for one in everything if inspect.isfunction(one) or inspect.isclass(one)} - set(listed)
        assert missing == set(), f"docs/reference.md needs a line for each of these, of {package}."


def test_sections_of_a_docstring_become_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one line or an entry a line, with nothing lost; the example below stays apart."""
    monkeypatch.syspath_prepend(str(DOCS))
    lines = """The cosine |c|, ``|c|`` in code.

    Args:
        dtype, device: of the vectors,
            and more.
    Cost: 2 gradients. Source: a book.
    Raises: DataError for one thing; ArgumentError for
        another.

    >>> 1 | 2
    3"""
    shown = inspect.cleandoc(lines).splitlines()
    importlib.import_module("docstrings").as_rst(None, "function", "f", None, None, shown)
    expected = r"""The cosine \|c\|, ``|c|`` in code.

    :Arguments:
        * **dtype, device**: of the vectors,
          and more.
    :Cost: 2 gradients.
    :Source: a book.
    :Raises: :py:exc:`~sharpscope.DataError` for one thing; :py:exc:`~sharpscope.ArgumentError` for
          another.

    >>> 1 | 2
    3"""
    assert [line.rstrip() for line in shown] == inspect.cleandoc(expected).splitlines()


def offered(package: str, name: str) -> Any:
    """What a package offers by that name."""
    return getattr(importlib.import_module(package), name)


def test_figures_that_are_quoted_are_in_the_results() -> None:
    """Every number of a table of the README and docs/engine.md stands in the file of benchmarks/ its section names."""
    checked = 0
    text = "\n".join(page.read_text(encoding="utf-8") for page in (README, DOCS / "engine.md"))
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE):
        named = [ROOT / name for name in re.findall(r"`(benchmarks/\w+\.md)`", section)]
        results = "\n".join(path.read_text(encoding="utf-8") for path in named)
        known = {number.rstrip(".,") for number in NUMBER.findall(results)}
        for row in re.findall(r"^\| .*", section, flags=re.MULTILINE) if named else ():
            for number in NUMBER.findall(row):
                checked += 1
                assert number.rstrip(".,") in known, f"{number} in: {row}"
    assert checked > 100
