"""One page of HTML that holds everything it shows."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from pathlib import Path

from sharpscope.errors import SharpscopeError
from sharpscope.report import numbers, sharpness, slices, spectra
from sharpscope.report.drawing import PageFigure, Style, assign_styles, escape, tag
from sharpscope.report.numbers import Notes, every_number, groups_table
from sharpscope.report.reproduction import costs, facts, reproduction
from sharpscope.results.comparison import Comparison
from sharpscope.results.comparison.rows import Row
from sharpscope.results.statistics import INTERVAL_KINDS

HERE = Path(__file__).parent
# A browser that keeps to it fetches nothing; plotly compiles its shaders' callers, hence the last word on scripts.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

FigureFunction = Callable[[Comparison, dict[str, Style], list[Row]], PageFigure | None]
FIGURES: dict[str, FigureFunction] = {
    "Run by run": numbers.runs,
    "Largest eigenvalues": spectra.eigenvalues,
    "Spectral density": spectra.densities,
    "m-sharpness": sharpness.m_sharpness,
    "Edge of stability": sharpness.edge,
    "Loss along random lines": slices.lines,
    "Between minima": slices.between,
    "Loss over random planes": slices.planes,
}


def page(comparison: Comparison) -> str:
    """The comparison as one HTML page that fetches nothing; equal comparisons give equal bytes.

    Its findings, the first of which stands out; numbers with their intervals, figures, definitions, costs and origin;
    surfaces to turn where plotly is installed.
    """
    rows, styles = comparison.rows, assign_styles(comparison)
    figures, left_out = _figures(comparison, styles, rows)
    title = page_title(comparison)
    notes = Notes()
    grouped = groups_table(comparison, rows, styles, notes)
    every = every_number(comparison, rows, styles, notes)
    sections = {
        "numbers": ("Numbers", _reading_guide() + grouped + (tag("h3", "Every run") if grouped else "") + every),
        "figures": ("Figures", "".join(map(_figure, figures)) + left_out),
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
    main = tag("main", _summary(comparison, title), contents, body, notes.html(), id="main")
    compressed = _compressed(slices.plotly_script()) if 'data-scenes="scenes"' in main else ""
    return _document(title, main, compressed)


def _document(title: str, main: str, compressed: str) -> str:
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    theme = tag("button", "Theme: system", type="button", class_="theme", id="theme", hidden=True)
    bar = tag("header", tag("span", "sharpscope", class_="brand"), theme, class_="bar")
    foot = tag("footer", tag("p", "Made by sharpscope. This file holds all it shows and fetches nothing."))
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} · sharpscope</title><style>{style}</style>"
    )
    skip = tag("a", "Skip to the content", href="#main", class_="skip")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>{skip}{bar}\n{main}\n{foot}\n{compressed}'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _summary(comparison: Comparison, title: str) -> str:
    first, *others = comparison.findings or [""]
    answer = tag("p", escape(first), class_="answer") if first else ""
    answer += (
        tag("ul", *(tag("li", escape(description)) for description in others), class_="findings") if others else ""
    )
    known = "".join(
        tag("div", tag("dt", term), tag("dd", escape(description))) for term, description in facts(comparison).items()
    )
    return tag("div", tag("h1", escape(title)), answer, tag("dl", known, class_="facts"), class_="opening")


def _reading_guide() -> str:
    return tag(
        "p",
        "Each number opens its definition, the kind of its interval, what it cost and what it was measured on. ± is "
        "the wider side of the interval.",
        class_="quiet guide",
    )


def _figures(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> tuple[list[PageFigure], str]:
    """All figures there are data for, and a sentence for each that could not be drawn."""
    figures, left_out = [], ""
    for heading, make in FIGURES.items():
        try:
            found = make(comparison, styles, rows)
        except SharpscopeError as error:  # as of slices that were not measured alike
            left_out += tag("p", escape(f"No figure “{heading}”: {error}"), class_="quiet")
            continue
        figures += [found] if found is not None else []
    return figures, left_out


def _figure(d: PageFigure) -> str:
    panels = "".join(
        tag("div", tag("p", escape(p.title), class_="above") if p.title else "", p.svg, class_="panel")
        for p in d.panels
    )
    heading = tag("h3", escape(d.heading), id=f"{d.name}-heading")
    inside = heading + d.legend + tag("div", panels, class_=f"panels {d.layout}") + d.after
    return tag(
        "figure",
        inside,
        tag("figcaption", escape(d.caption)),
        id=f"figure-{d.name}",
        aria_labelledby=f"{d.name}-heading",
    )


def _compressed(script: str | None) -> str:
    """A script that runs when it is asked for: compressed, a quarter of its size, and no work for who never asks."""
    if script is None:
        return ""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)  # gzip without a time in its head
    compressed = compressor.compress(script.encode()) + compressor.flush()
    return f'<script type="text/plain" id="plotly">{base64.b64encode(compressed).decode()}</script>\n'


TERMS = {
    "Hessian": "the matrix of second derivatives of the mean loss by the weights; its eigenvalues are the curvatures "
    "of the loss along its eigenvectors",
    "lambda_k": "the k-th largest algebraic eigenvalue of the Hessian, with multiplicity",
    "spectral density": "the share of eigenvalues near each value, (1/n) sum_i delta(t - lambda_i), smoothed by a "
    "Gaussian of the width stated",
    "random line, random plane": "weights w + t d with normal random d, each filter of d scaled to the size of its "
    "filter of w (Li et al. 2018), alike for all checkpoints",
    "barrier": "max over 0 <= t <= 1 of L(t) - ((1 - t) L(0) + t L(1)) on the straight line between two checkpoints "
    "(Frankle et al. 2020)",
    "gradient, as a unit of cost": "one forward and backward pass over all the examples of an analysis; a "
    "Hessian-vector product costs about two more",
    "pass": "one walk over all the examples of an analysis",
}


def page_title(comparison: Comparison) -> str:
    """What is compared, in a line."""
    groups = comparison.groups
    if groups:
        named = [f"{group} ({len(runs)} run{'s' * (len(runs) > 1)})" for group, runs in groups.items()]
    else:
        named = [subject.name for subject in comparison.subjects]
    if len(named) == 1:
        return f"Sharpness of {named[0]}"
    if len(named) > 3:
        return f"Sharpness of {len(named)} {'groups' if groups else 'checkpoints'} side by side"
    return f"Sharpness of {', '.join(named[:-1])} and {named[-1]}"


def glossary(rows: list[Row]) -> str:
    """Every quantity of the table by what defines it, the figures' terms, and the kinds of interval."""
    labels_by_definition: dict[str, list[str]] = {}
    for row in rows:
        labels_by_definition.setdefault(row.definition, []).append(row.label)
    kinds = dict.fromkeys(r.interval for row in rows for r in row.cells if r is not None)
    entries = [_entry(labels, definition) for definition, labels in labels_by_definition.items()]
    entries += [_entry([term], description) for term, description in TERMS.items()]
    entries += [_entry([f"Interval: {kind}"], INTERVAL_KINDS[kind].meaning) for kind in kinds if kind in INTERVAL_KINDS]
    return tag("dl", *entries, class_="glossary")


def _entry(terms: list[str], description: str) -> str:
    return tag("div", *(tag("dt", escape(term)) for term in terms), tag("dd", escape(f"{_capitalised(description)}.")))


def _capitalised(description: str) -> str:
    """A sentence's first letter, unless it begins with a symbol's name."""
    return f"{description[:1].upper()}{description[1:]}" if description.split()[0].isalpha() else description


def limits(comparison: Comparison, rows: list[Row]) -> str:
    """What the numbers of this comparison do not say."""
    limitations = [_seed_limits(comparison), _flatness_limits(), *_data_limits(comparison, rows)]
    return tag(
        "ul",
        *(tag("li", tag("strong", escape(head)), " ", escape(rest)) for head, rest in limitations if rest),
        class_="limits",
    )


def _seed_limits(comparison: Comparison) -> tuple[str, str]:
    groups = comparison.groups
    fewest = min(map(len, groups.values()), default=1)
    if fewest < 2 and max(map(len, groups.values()), default=1) > 1:
        alone = ", ".join(group for group, runs in groups.items() if len(runs) == 1)
        return (
            "One run says nothing of the scatter.",
            f"There is a single run of {alone}, which has no interval over runs: another seed of it may differ by as "
            "much as two runs of the other group do.",
        )
    if fewest < 2:
        return (
            "One seed says nothing in general.",
            "These are single runs. Another seed of the same recipe may differ by as much as two of them do; several "
            "runs of each recipe, compared as groups, tell the recipe from chance.",
        )
    return (
        f"{fewest} runs of a group are few.",
        "The intervals are of these recipes with other seeds, on this model and these data, and take the scatter over "
        "runs for normal. They say nothing of another architecture, data set or learning rate.",
    )


def _flatness_limits() -> tuple[str, str]:
    return (
        "Flatter is not better by itself.",
        "Rescaling a ReLU network changes its eigenvalues and not its function (Dinh et al. 2017), and over many "
        "settings sharpness is only weakly tied to test error, at times the wrong way (Andriushchenko et al. 2023). "
        "Test loss and accuracy are in the table; look there for what is better.",
    )


def _data_limits(comparison: Comparison, rows: list[Row]) -> list[tuple[str, str]]:
    found = [
        (
            "A bound on the numerical error is no more than that.",
            "It holds on the examples measured. Fewer or other examples have another Hessian: the largest eigenvalue "
            "of a subset is often tens of per cent off that of all the data.",
        )
    ]
    subsets = sorted(
        {
            (what, int(counted), int(whole))
            for s in comparison.subjects
            for what, r in s.results.items()
            if (counted := r.provenance.get("num_examples")) and (whole := r.provenance.get("split_examples"))
            if counted < whole
        }
    )
    if subsets:
        sentence = "; ".join(f"{what} on {counted:,} of {whole:,} examples" for what, counted, whole in subsets)
        found.append(("Not all the data were used for everything:", f"{sentence}."))
    if any(s.line is not None or s.surface is not None for s in comparison.subjects):
        found.append(
            (
                "A slice shows one or two of all directions.",
                "In a random direction the curvature is near the mean eigenvalue, not near lambda_max: a slice that "
                "looks round does not contradict a sharp direction that it misses.",
            )
        )
    if any(row.label.startswith("m-sharpness") for row in rows):
        found.append(
            (
                "An ascent finds a lower bound of a maximum.",
                "m-sharpness is as large as these steps found it; a longer ascent may find more, and not equally much "
                "more for every checkpoint.",
            )
        )
    unsure = [f"{row.label} of {s.name}" for row in rows for s, r in zip(comparison.subjects, row.cells, strict=True)
              if r is not None and not r.converged]  # fmt: skip
    if unsure:
        found.append(("Not converged, marked with a question mark:", f"{'; '.join(unsure)}."))
    return found
