"""The docstrings of the package as reStructuredText: their sections as fields, everything else as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

TITLES = {"Args": "Arguments"}
SECTION = re.compile(r"((?:Args|Attributes|Cost|Raises|Returns|Sources?)(?: of [\w ]+)?(?:, Raises)?):(?: (.*))?$")
SEVERAL = re.compile(r"(?<=\.) (?=(?:Cost|Raises|Sources?): )")
ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")
ERROR = re.compile(r"\b(Sharpscope|Argument|Problem|Data|Audit|Checkpoint|Output)Error\b")


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook: ``Raises: X when ...`` on one line, or ``Args:`` with an entry a line, becomes a field."""
    lines[:] = [without_substitutions(line) for line in with_fields(lines)]


def with_fields(lines: list[str]) -> Iterator[str]:
    """The lines with each section, which goes on to the next or to an empty line, as a field."""
    section = ""
    apart = [SEVERAL.split(line) if SECTION.match(line) else [line] for line in lines]
    for line in chain.from_iterable(apart):
        shown, found, entry = line, SECTION.match(line), ENTRY.match(line)
        if found:
            section = found[1]
            shown = f":{TITLES.get(section, section)}: {found[2] or ''}"
        elif not line:
            section = ""
        elif section and entry:
            shown = f"    * {entry[1]}: {entry[2]}" if "Raises" in section else f"    * **{entry[1]}**: {entry[2]}"
        elif section:
            shown = f"      {line.strip()}"
        yield ERROR.sub(r":py:exc:`~sharpscope.\g<0>`", shown) if "Raises" in section else shown


def without_substitutions(line: str) -> str:
    """``|x|`` is no substitution; literals and examples are as they should be."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = line.split("``")
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return "``".join(parts)


def with_names(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Sphinx's hook: types and defaults whose ``repr`` is long or no Python, as one would write them."""
    return _written(signature), _written(returns)


def _written(text: str | None) -> str | None:
    if text is None:
        return None
    text = _unannotated(text)
    text = re.sub(r"~numpy\.ndarray\[.*?~numpy\.dtype\[([^\]]*)\]\]", r"~numpy.typing.NDArray[\1]", text)
    text = re.sub(r"Curvature\([^()]*\)", "HESSIAN", text.replace("<factory>", "{}"))
    return re.sub(r"<function (\w+)[^>]*>", r"\1", text)


def _unannotated(text: str) -> str:
    """``Annotated[x, y]`` as ``x``: what the annotations of results add is for reading their files."""
    found = re.search(r"~[\w.]*\bAnnotated\[", text)
    if not found:
        return text
    before, after = text[: found.start()], text[found.end() :]
    depth, ends = 0, []
    for i, character in enumerate(after):
        depth += (character in "[(") - (character in "])")
        if (character == "," and depth == 0) or depth < 0:
            ends.append(i)
        if depth < 0:
            break
    return _unannotated(before + after[: ends[0]] + after[ends[-1] + 1 :])
