"""Numbers and rows as text."""

from __future__ import annotations

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


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))
