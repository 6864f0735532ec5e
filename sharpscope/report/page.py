"""One page of HTML that holds everything it shows."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from pathlib import Path

from sharpscope.errors import SharpscopeError
from sharpscope.report import lines, planes, runs, sharpness, spectra
from sharpscope.report.drawing import Drawn
from sharpscope.report.look import Look, looks_of
from sharpscope.report.markup import tag, text
from sharpscope.report.numbers import Notes, every_number, groups_table
from sharpscope.report.origin import costs, facts, reproduction
from sharpscope.report.prose import glossary, limits, title_of
from sharpscope.results.comparison import Comparison
from sharpscope.results.comparison.rows import Row

HERE = Path(__file__).parent
# A browser that keeps to it fetches nothing; plotly compiles its shaders' callers, hence the last word on scripts.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

Maker = Callable[[Comparison, dict[str, Look], list[Row]], Drawn | None]
FIGURES: dict[str, Maker] = {
    "Run by run": runs.runs,
    "Largest eigenvalues": spectra.eigenvalues,
    "Spectral density": spectra.densities,
    "m-sharpness": sharpness.m_sharpness,
    "Edge of stability": sharpness.edge,
    "Loss along random lines": lines.lines,
    "Between minima": lines.between,
    "Loss over random planes": planes.planes,
}


def page(comparison: Comparison) -> str:
    """The comparison as one HTML page that fetches nothing; equal comparisons give equal bytes.

    Its findings, the first of which stands out; numbers with their intervals, figures, definitions, costs and origin;
    surfaces to turn where plotly is installed.
    """
    rows, looks = comparison.rows, looks_of(comparison)
    drawn, left_out = _figures(comparison, looks, rows)
    title = title_of(comparison)
    notes = Notes()
    grouped = groups_table(comparison, rows, looks, notes)
    every = every_number(comparison, rows, looks, notes)
    sections = {
        "numbers": ("Numbers", _guide() + grouped + (tag("h3", "Every run") if grouped else "") + every),
        "figures": ("Figures", "".join(map(_figure, drawn)) + left_out),
        "limits": ("What these numbers do not say", limits(comparison, rows)),
        "glossary": ("Definitions", glossary(rows)),
        "costs": ("Costs", costs(comparison)),
        "reproduce": ("How to reproduce", reproduction(comparison)),
    }
    sections = {name: (heading, inside) for name, (heading, inside) in sections.items() if inside}
    body = "".join(
        tag("section", tag("h2", heading, id=f"{name}-heading"), inside, id=name, aria_labelledby=f"{name}-heading")
        for name, (heading, inside) in sections.items()
    )
    links = "".join(tag("li", tag("a", heading, href=f"#{name}")) for name, (heading, _) in sections.items())
    contents = tag("nav", tag("ul", links), aria_label="Contents")
    main = tag("main", _opening(comparison, title), contents, body, notes.html(), id="main")
    packed = _packed(planes.plotly_script()) if 'data-scenes="scenes"' in main else ""
    return _document(title, main, packed)


def _document(title: str, main: str, packed: str) -> str:
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    theme = tag("button", "Theme: system", type="button", class_="theme", id="theme", hidden=True)
    bar = tag("header", tag("span", "sharpscope", class_="brand"), theme, class_="bar")
    foot = tag("footer", tag("p", "Made by sharpscope. This file holds all it shows and fetches nothing."))
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{text(title)} · sharpscope</title><style>{style}</style>"
    )
    skip = tag("a", "Skip to the content", href="#main", class_="skip")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>{skip}{bar}\n{main}\n{foot}\n{packed}'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _opening(comparison: Comparison, title: str) -> str:
    first, *others = comparison.findings or [""]
    answer = tag("p", text(first), class_="answer") if first else ""
    answer += tag("ul", *(tag("li", text(said)) for said in others), class_="findings") if others else ""
    known = "".join(tag("div", tag("dt", term), tag("dd", text(said))) for term, said in facts(comparison).items())
    return tag("div", tag("h1", text(title)), answer, tag("dl", known, class_="facts"), class_="opening")


def _guide() -> str:
    return tag(
        "p",
        "Each number opens its definition, the kind of its interval, what it cost and what it was measured on. ± is "
        "the wider side of the interval.",
        class_="quiet guide",
    )


def _figures(comparison: Comparison, looks: dict[str, Look], rows: list[Row]) -> tuple[list[Drawn], str]:
    """All figures there are data for, and a sentence for each that could not be drawn."""
    drawn, left_out = [], ""
    for heading, make in FIGURES.items():
        try:
            found = make(comparison, looks, rows)
        except SharpscopeError as error:  # as of slices that were not measured alike
            left_out += tag("p", text(f"No figure “{heading}”: {error}"), class_="quiet")
            continue
        drawn += [found] if found is not None else []
    return drawn, left_out


def _figure(d: Drawn) -> str:
    panels = "".join(
        tag("div", tag("p", text(p.title), class_="above") if p.title else "", p.svg, class_="panel") for p in d.panels
    )
    heading = tag("h3", text(d.heading), id=f"{d.name}-heading")
    inside = heading + d.key + tag("div", panels, class_=f"panels {d.layout}") + d.after
    return tag(
        "figure", inside, tag("figcaption", text(d.caption)), id=f"figure-{d.name}", aria_labelledby=f"{d.name}-heading"
    )


def _packed(script: str | None) -> str:
    """A script that runs when it is asked for: compressed, a quarter of its size, and no work for who never asks."""
    if script is None:
        return ""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)  # gzip without a time in its head
    packed = squeeze.compress(script.encode()) + squeeze.flush()
    return f'<script type="text/plain" id="plotly">{base64.b64encode(packed).decode()}</script>\n'
