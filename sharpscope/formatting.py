"""Numbers and rows as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def with_bound(value: float, lower: float, upper: float) -> str:
    """``value`` to the digits that its interval supports, and a half-width that holds all of it: "1.2345 ±0.0002"."""
    half = max(upper - value, value - lower)
    if not np.isfinite(half) or half <= 0:
        return f"{value:.6g}"
    # One digit of the half-width, or two that begin with 1: rounded up it is then at most half as long again.
    last = int(np.floor(np.log10(half / 2)))
    tried = [_rounded(value, lower, upper, last + i) for i in range(3)]
    most, written = next((reach, text) for reach, digits, text in tried if digits < 20)
    coarser = [text for reach, digits, text in tried[1:] if digits < 10 and reach <= most * (1 + 1e-9)]
    return coarser[0] if coarser else written


def with_mark(value: float, lower: float | None, upper: float | None, converged: bool, mark: str = "?") -> str:
    """``with_bound`` where there is an interval, else 4 digits; followed by ``mark`` where it has not converged."""
    text = f"{value:.4g}" if lower is None or upper is None else with_bound(value, lower, upper)
    return text if converged else text + mark


def _rounded(value: float, lower: float, upper: float, last: int) -> tuple[float, int, str]:
    """A half-width in units of ``10^last``, how many there are, and both numbers as text."""
    first, unit = int(np.floor(np.log10(abs(value)))) if value else last, 10.0**last
    plain = -4 <= max(first, last) < 6
    shown = f"{value:.{max(-last, 0)}f}" if plain else f"{value:.{max(first - last, 0)}e}"
    # From the digits shown, not from the value. Less a little, or the difference of two floats that stands for 0.01
    # would be rounded up to 0.02.
    units = int(np.ceil(max(upper - float(shown), float(shown) - lower) / unit * (1 - 1e-6)))
    half = units * unit
    reach = f"{half:.{max(-last, 0)}f}" if plain else f"{half:.{int(units >= 10)}e}"
    return half, units, f"{shown} ±{reach}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def transpose_if_narrower(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """``rows``, or with rows for columns where that takes less width as text: few results of many numbers fit so."""
    return min((list(zip(*rows, strict=True)), list(rows)), key=lambda each: _width(aligned(each)))


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))
