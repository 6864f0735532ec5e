"""How a checkpoint looks in every figure of a page, and the key that says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sharpscope.plot import COLOURS
from sharpscope.report.markup import tag, text
from sharpscope.results.comparison import Comparison, Subject

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
class Look:
    """Of a checkpoint, or of all of a group: the place of its colour in COLOURS, its dashes and its marker."""

    place: int
    dashes: tuple[float, ...] = ()
    marker: str = "o"

    @property
    def colour(self) -> str:
        """As matplotlib draws it; the page then has a darker or lighter one of its theme in its place."""
        return COLOURS[self.place]

    @property
    def linestyle(self) -> Any:
        """For matplotlib."""
        return (0, self.dashes) if self.dashes else "-"

    @property
    def line(self) -> dict[str, Any]:
        """Keywords of ``Axes.plot``."""
        return {"color": self.colour, "linestyle": self.linestyle, "marker": self.marker}


def together(subjects: Iterable[Subject]) -> list[tuple[str, list[Subject]]]:
    """What looks alike, in order: each group with its runs, each checkpoint of no group by itself."""
    found: dict[tuple[str | None, str | None], list[Subject]] = {}
    for subject in subjects:
        found.setdefault((subject.group, None if subject.group else subject.name), []).append(subject)
    return [(group or name or "", members) for (group, name), members in found.items()]


def looks_of(comparison: Comparison) -> dict[str, Look]:
    """By name of the subject; runs of a group look alike."""
    markers, count = list(MARKERS), len(COLOURS)
    looks: dict[str, Look] = {}
    for i, (_, members) in enumerate(together(comparison.subjects)):
        look = Look(i % count, DASHES[i // count % len(DASHES)], markers[(i + i // count) % len(markers)])
        looks |= {subject.name: look for subject in members}
    return looks


def key(comparison: Comparison, looks: dict[str, Look], only: Sequence[str] | None = None) -> str:
    """Which checkpoint or group looks how, as a list; ``only`` of the subjects of these names."""
    shown = [s for s in comparison.subjects if only is None or s.name in only]
    items = []
    for name, members in together(shown):
        runs = f" ({len(members)} run{'s' * (len(members) > 1)})"
        counted = tag("span", runs, class_="quiet") if members[0].group else ""
        items.append(tag("li", swatch(looks[members[0].name]), tag("span", text(name)), counted))
    return tag("ul", *items, class_="key", aria_label="Key")


def swatch(look: Look) -> str:
    """A short line with its marker."""
    colour = f"var(--c{look.place + 1})"
    dashes = " ".join(f"{2 * dash:g}" for dash in look.dashes)
    line = tag(
        "line", x1="0", y1="6", x2="28", y2="6", stroke=colour, stroke_width="2", stroke_dasharray=dashes or None
    )
    corners = MARKERS[look.marker]
    shape = (
        tag("polygon", points=corners, fill=colour) if corners else tag("circle", cx="14", cy="6", r="3.4", fill=colour)
    )
    return tag("svg", line, shape, viewBox="0 0 28 12", class_="swatch", aria_hidden="true")
