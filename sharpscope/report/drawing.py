"""Draw figures for the page: HTML helpers, the style of each checkpoint, and inline SVG."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharpscope.plot import COLOURS
from sharpscope.results.comparison import Comparison, Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn in these, which nothing else has, and then given the page's own, which follow its theme.
INK, QUIET, RULE = "#010203", "#040506", "#070809"
THEMED = {INK: "currentColor", QUIET: "var(--quiet)", RULE: "var(--rule)"}
THEMED |= {colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS, start=1)}

# In inches; a point of type is 1.3 to 1.5 pixels where the page shows a panel half as wide as itself.
PAIR, THIRD, SMALL = (4.8, 3.2), (3.4, 2.5), (2.6, 2.3)
RC_PARAMS: dict[str, Any] = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlecolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "axes.formatter.use_mathtext": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 100,
    # Text stays text: it is found, read aloud and set in the reader's own type.
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "axes.unicode_minus": True,
    "text.usetex": False,
    # A checkpoint's name may hold dollars.
    "text.parse_math": False,
}
# What is drawn as pixels, at twice those of a common screen.
RASTER_DPI = 190

_ATTRIBUTES = re.compile(r'\b(?:d|x|y|x1|y1|x2|y2|points|transform|width|height)="[^"]*"')
_DIGITS = re.compile(r"-?\d+\.\d{3,}(?!\d|e)")


@dataclass(frozen=True)
class Panel:
    """One drawing of a figure as SVG, and the text above it."""

    title: str
    svg: str


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        name: of its anchor.
        heading: its subject.
        panels: its drawings.
        caption: how to read it, on what it was measured.
        layout: "pair", "wide" or "many".
        legend: which style belongs to which checkpoint, as HTML.
        after: HTML beneath it.
    """

    name: str
    heading: str
    panels: tuple[Panel, ...]
    caption: str
    layout: str = "pair"
    legend: str = ""
    after: str = ""


def panel(
    name: str,
    title: str,
    description: str,
    draw: Callable[[Axes], object],
    size: tuple[float, float] = PAIR,
    heading: str | None = None,
) -> Panel:
    """What ``draw`` draws, as inline SVG; the same drawing gives the same bytes.

    Args:
        name: that no other drawing of the page has.
        title: of the drawing, for who cannot see it.
        description: what it shows, with its main numbers.
        draw: on the Axes it is given.
        size: in inches.
        heading: the text above the drawing; by default the title.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    file = io.StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        style: dict[Any, Any] = {**RC_PARAMS, "svg.hashsalt": name}
        mpl.rcParams.update(style)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", dpi=RASTER_DPI)
    return Panel(title if heading is None else heading, _inline(file.getvalue(), name, title, description))


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """Inline an SVG: strip file metadata, prefix ids, map colours to CSS variables, add an accessible title."""
    svg = svg[svg.index("<svg") :]
    for dropped in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        svg = re.sub(dropped, "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    known = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in known else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = _ATTRIBUTES.sub(lambda m: _DIGITS.sub(lambda n: f"{float(n[0]):.2f}", m[0]), svg)
    for drawn, shown in THEMED.items():
        svg = svg.replace(drawn, shown)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    body = re.sub(r"\s*\n\s*", " ", svg[svg.index(">") + 1 :].strip())
    accessible_text = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    labelled = f'role="img" aria-labelledby="{name}-t" aria-describedby="{name}-d"'
    return f'<svg class="plot" viewBox="{box[1]}" {labelled}>{accessible_text}{body}'


def log_ticks(axis: Any, *, ticks: bool = True) -> None:
    """Label a logarithmic axis, whose limits are set, with short numbers or powers of ten, without mathematics.

    ``ticks``: choose them too, more than the powers where these are few.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if ticks:
        low, high = axis.get_view_interval()
        steps = next((steps for range_, steps in LOG_TICKS if high < range_ * low), (1.0,))
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axis.set_minor_formatter(NullFormatter())


# The range of an axis, and which multiples of powers of ten it then needs for a handful of ticks.
LOG_TICKS = ((4, (1, 1.5, 2, 3, 4, 5, 6, 8)), (50, (1, 2, 5)), (1000, (1, 3)))
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(value: float) -> str:
    if 1e-3 <= abs(value) < 1e5 or value == 0:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    raised = f"10{str(int(exponent)).translate(_RAISED)}"
    return raised if float(mantissa) == 1 else f"{float(mantissa):g}·{raised}"


# Dashes in units of the line's width, as matplotlib and SVG both take them.
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.6), (1, 1.4), (6, 1.4, 1, 1.4))
# Of matplotlib, and as polygons about the middle of a key's entry, (14, 6).
MARKERS = {
    "o": "",
    "s": "11,3 17,3 17,9 11,9",
    "^": "14,2 18,9.5 10,9.5",
    "D": "14,1.5 18.5,6 14,10.5 9.5,6",
    "v": "14,10 18,2.5 10,2.5",
    "P": "12.5,2 15.5,2 15.5,4.5 18,4.5 18,7.5 15.5,7.5 15.5,10 12.5,10 12.5,7.5 10,7.5 10,4.5 12.5,4.5",
}


@dataclass(frozen=True)
class Style:
    """Of a checkpoint, or of all of a group: the place of its colour in COLOURS, its dashes and its marker."""

    colour_index: int
    dashes: tuple[float, ...] = ()
    marker: str = "o"

    @property
    def colour(self) -> str:
        """As matplotlib draws it; the page then has a darker or lighter one of its theme in its place."""
        return COLOURS[self.colour_index]

    @property
    def linestyle(self) -> Any:
        """For matplotlib."""
        return (0, self.dashes) if self.dashes else "-"

    @property
    def line(self) -> dict[str, Any]:
        """Keywords of ``Axes.plot``."""
        return {"color": self.colour, "linestyle": self.linestyle, "marker": self.marker}


def group_by_style(subjects: Iterable[Subject]) -> list[tuple[str, list[Subject]]]:
    """Return the subjects that share a style, in order: each group, and each checkpoint without a group."""
    found: dict[tuple[str | None, str | None], list[Subject]] = {}
    for subject in subjects:
        found.setdefault((subject.group, None if subject.group else subject.name), []).append(subject)
    return [(group or name or "", members) for (group, name), members in found.items()]


def assign_styles(comparison: Comparison) -> dict[str, Style]:
    """Return the style of each subject by name; the runs of a group share one."""
    markers, count = list(MARKERS), len(COLOURS)
    styles: dict[str, Style] = {}
    for i, (_, members) in enumerate(group_by_style(comparison.subjects)):
        style = Style(i % count, DASHES[i // count % len(DASHES)], markers[(i + i // count) % len(markers)])
        styles |= {subject.name: style for subject in members}
    return styles


def legend(comparison: Comparison, styles: dict[str, Style], only: Sequence[str] | None = None) -> str:
    """Return the legend of checkpoints or groups as an HTML list; ``only`` of subjects with these names."""
    shown = [s for s in comparison.subjects if only is None or s.name in only]
    items = []
    for name, members in group_by_style(shown):
        runs = f" ({len(members)} run{'s' * (len(members) > 1)})"
        counted = tag("span", runs, class_="quiet") if members[0].group else ""
        items.append(tag("li", swatch(styles[members[0].name]), tag("span", escape(name)), counted))
    return tag("ul", *items, class_="key", aria_label="Key")


def swatch(style: Style) -> str:
    """Return a short line with its marker, as SVG."""
    colour = f"var(--c{style.colour_index + 1})"
    dashes = " ".join(f"{2 * dash:g}" for dash in style.dashes)
    line = tag(
        "line", x1="0", y1="6", x2="28", y2="6", stroke=colour, stroke_width="2", stroke_dasharray=dashes or None
    )
    corners = MARKERS[style.marker]
    shape = (
        tag("polygon", points=corners, fill=colour) if corners else tag("circle", cx="14", cy="6", r="3.4", fill=colour)
    )
    return tag("svg", line, shape, viewBox="0 0 28 12", class_="swatch", aria_hidden="true")


def escape(value: object) -> str:
    """Escape ``value`` for HTML text or a quoted attribute."""
    return html.escape(str(value))


def tag(name: str, *inside: str, **attributes: object) -> str:
    """An element around HTML; ``class_`` is class, ``aria_label`` is aria-label, None leaves an attribute out."""
    parts = []
    for attribute, value in attributes.items():
        if value is not None and value is not False:
            written = attribute.rstrip("_").replace("_", "-")
            parts.append(f" {written}" if value is True else f' {written}="{escape(value)}"')
    return f"<{name}{''.join(parts)}>{''.join(inside)}</{name}>"


def table(head: list[str], body: list[list[str]], caption: str, class_: str = "") -> str:
    """A table of HTML cells, or whole ``td``, in a focusable region that scrolls; a row's first cell heads it."""
    first, *others = head
    heads = tag("th", first, scope="col") + "".join(tag("th", cell, scope="col") for cell in others)
    rows = "".join(
        tag("tr", tag("th", row[0], scope="row"), *(cell if cell[:3] == "<td" else tag("td", cell) for cell in row[1:]))
        for row in body
    )
    inside = tag("caption", caption) + tag("thead", tag("tr", heads)) + tag("tbody", rows)
    whole = tag("table", inside, class_=class_ or None)
    return tag("div", whole, class_="scroll", tabindex="0", role="group", aria_label=caption)


def json_block(value: Any, name: str) -> str:
    """``value`` as JSON in a block that no browser runs; a "<" in it is written so that none ends the block."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{written}</script>'
