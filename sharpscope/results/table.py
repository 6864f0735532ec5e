"""A table with notes, as text for ``print`` and as HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sharpscope.formatting import aligned

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells with notes below, which ``print`` shows as text and a notebook by itself.

    Attributes:
        rows: the first is the heading.
        notes: what a reader must know, each on a line.
        beside: rows of a second table, in text before the notes, in a notebook after them.
        title: a line above the rows in text, and in a notebook where there are tables below.
        below: tables that stand below this one.
    """

    rows: Rows
    notes: Sequence[str] = ()
    beside: Rows = ()
    title: str = ""
    below: tuple[Table, ...] = ()

    def __str__(self) -> str:
        return "\n\n".join(table._text() for table in (self, *self.below))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        if not self.below:
            return self._html()
        shown = [(f"<p>{html.escape(t.title)}</p>" if t.title else "") + t._html() for t in (self, *self.below)]
        return "".join(shown)

    def _text(self) -> str:
        above = f"{self.title}\n" if self.title else ""
        beside = [aligned(self.beside)] if self.beside else []
        notes = ["\n".join(self.notes)] if self.notes else []
        return "\n\n".join([above + aligned(self.rows), *beside, *notes])

    def _html(self) -> str:
        notes = f"<p>{'<br>'.join(map(html.escape, self.notes))}</p>" if self.notes else ""
        return _html(self.rows) + notes + (_html(self.beside) if self.beside else "")


def stacked(tables: Sequence[Table]) -> Table:
    """The first, with the others below it."""
    first, *others = tables
    return replace(first, below=tuple(others))


def _html(rows: Rows) -> str:
    """The first column is to the left and the others to the right, digits of one width beneath each other.

    Colours are the notebook's, light or dark. Styles are the cells' own, since each frontend aligns cells by a rule of
    its own.
    """
    head, *body = rows
    cells = "".join(_row("td", row) for row in body)
    return f"<table><thead>{_row('th', head)}</thead><tbody>{cells}</tbody></table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    first, *others = (html.escape(cell) for cell in cells)
    right = "text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums"
    shown = "".join(f'<{tag} style="{right}">{cell}</{tag}>' for cell in others)
    return f'<tr><{tag} style="text-align: left">{first}</{tag}>{shown}</tr>'
