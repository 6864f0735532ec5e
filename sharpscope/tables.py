"""Numbers and rows as text."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np


def with_bound(value: float, lower: float, upper: float) -> str:
    """``value`` to the digits that its interval supports, with the half-width rounded up: "1.2345 ±0.0002"."""
    half = max(upper - value, value - lower)
    if not np.isfinite(half) or half <= 0:
        return f"{value:.6g}"
    last = int(np.floor(np.log10(half)))
    # Less a little, or the difference of two floats that stands for 0.01 would be rounded up to 0.02.
    half = float(np.ceil(half / 10.0**last * (1 - 1e-6)) * 10.0**last)
    first = int(np.floor(np.log10(abs(value)))) if value else last
    if -4 <= max(first, last) < 6:
        return f"{value:.{max(-last, 0)}f} ±{half:.{max(-last, 0)}f}"
    return f"{value:.{max(first - last, 0)}e} ±{half:.0e}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def narrower(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """``rows``, or with rows for columns where that takes less width as text: few results of many numbers fit so."""
    return min((list(zip(*rows, strict=True)), list(rows)), key=lambda each: _width(aligned(each)))


def narrowest(rows: Sequence[Sequence[str]]) -> str:
    """``aligned`` of what is ``narrower``."""
    return aligned(narrower(rows))


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def as_html(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Rows of cells, the first the heading, as an HTML table with notes below, for notebooks.

    The first column is to the left and the others to the right, digits of one width beneath each other; colours are the
    notebook's, light or dark. Styles are the cells' own, since each frontend aligns cells by a rule of its own.
    """
    head, *body = rows
    heading = _row("th", head)
    cells = "".join(_row("td", row) for row in body)
    said = f"<p>{'<br>'.join(map(html.escape, notes))}</p>" if notes else ""
    return f"<table><thead>{heading}</thead><tbody>{cells}</tbody></table>{said}"


def _row(tag: str, cells: Sequence[str]) -> str:
    first, *others = (html.escape(cell) for cell in cells)
    right = "text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums"
    shown = "".join(f'<{tag} style="{right}">{cell}</{tag}>' for cell in others)
    return f'<tr><{tag} style="text-align: left">{first}</{tag}>{shown}</tr>'
