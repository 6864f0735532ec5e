"""The numbers of a comparison: tables in which each number opens its definition, and a figure of every run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from sharpscope.report.drawing import (
    QUIET,
    SMALL,
    PageFigure,
    Panel,
    Style,
    escape,
    legend,
    log_ticks,
    panel,
    swatch,
    table,
    tag,
)
from sharpscope.results.comparison import Comparison
from sharpscope.results.comparison.rows import Row, reference_and_others
from sharpscope.results.statistics import ENDS, PAIRS, Cell, Difference, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Columns that fit side by side on paper, interval beside value.
MAX_COLUMNS = 6
DEFINED = "Definition"
# By how many digits a number is given where it stands alone, behind the table.
DIGITS = 7


@dataclass
class Notes:
    """The notes that numbers open, in order: popovers on a screen, numbered endnotes on a printed page."""

    entries: list[str] = field(default_factory=list)

    def button(self, shown: str, heading: str, facts: dict[str, str], label: str | None = None) -> str:
        """Return a button with the HTML ``shown`` that opens a note of ``heading`` and ``facts``, text by term."""
        place = len(self.entries) + 1
        name = f"note-{place}"
        # A printed note of a value leaves out the definition, which that of its quantity has.
        entries = "".join(
            tag(
                "div",
                tag("dt", escape(k)),
                tag("dd", escape(v)),
                class_="again" if k == DEFINED and len(facts) > 3 else None,
            )
            for k, v in facts.items()
            if v
        )
        number = tag("span", str(place), class_="place")
        head = tag("p", number, escape(heading), class_="heading")
        self.entries.append(tag("div", head, tag("dl", entries), id=name, class_="note", popover="auto"))
        return tag(
            "button", shown, type="button", class_="number", popovertarget=name, data_note=str(place), aria_label=label
        )

    def html(self) -> str:
        """All of them; a browser that knows no popovers shows them at the end too."""
        heading = tag("h2", "Notes to the numbers", id="notes-heading")
        return tag("section", heading, tag("div", *self.entries), class_="notes", aria_labelledby="notes-heading")


def every_number(comparison: Comparison, rows: list[Row], styles: dict[str, Style], notes: Notes) -> str:
    """The table with a column a checkpoint, and of two one for how they differ."""
    first, others = reference_and_others(comparison.subjects)
    others = [] if comparison.groups else others  # of groups the other table tells
    head = ["Quantity", *(swatch(styles[s.name]) + escape(s.name) for s in comparison.subjects)]
    head += [escape(f"{name} against {first}") for name in others]
    body = []
    for row in rows:
        cells = [_quantity(row, notes)]
        for subject, cell in zip(comparison.subjects, row.cells, strict=True):
            cells.append(_missing() if cell is None else _cell(row, subject.name, cell, notes))
        cells += [_difference(row, first, name, row.differences.get(name), notes) for name in others]
        body.append(cells)
    return table(
        head, body, "Every number of every checkpoint", "numbers broad" if len(head) > MAX_COLUMNS else "numbers"
    )


def groups_table(comparison: Comparison, rows: list[Row], styles: dict[str, Style], notes: Notes) -> str:
    """The table with a column a group, and one for how each later group differs from the first; "" without groups."""
    groups = comparison.groups
    if not groups:
        return ""
    first, others = reference_and_others(comparison.subjects)
    head = ["Quantity", *(swatch(styles[members[0].name]) + escape(group) for group, members in groups.items())]
    head += [escape(f"{group} against {first}") for group in others]
    body = []
    for row in rows:
        if row.spreads:
            quantity = _quantity(row, notes)
            means = [_mean(row, group, row.spreads.get(group), notes) for group in groups]
            against = [_difference(row, first, group, row.differences.get(group), notes) for group in others]
            body.append([quantity, *means, *against])
    return table(head, body, "Groups: mean, 95 % interval of the mean, difference", "numbers groups")


def _quantity(row: Row, notes: Notes) -> str:
    kinds = dict.fromkeys(r.interval for r in row.cells if r is not None)
    facts = {DEFINED: row.definition, "Intervals": "; ".join(kinds)}
    facts["Groups are compared by"] = ("ratios" if row.factor else "differences") if row.spreads else ""
    return notes.button(escape(row.label), row.label, facts)


def _missing() -> str:
    dash, spoken = tag("span", "&ndash;", aria_hidden="true"), tag("span", "not measured", class_="spoken")
    return tag("td", dash, spoken, class_="none")


def _cell(row: Row, name: str, r: Cell, notes: Notes) -> str:
    bound = _interval(r.lower, r.upper)
    facts = {
        "Value": digits(r.value),
        "Interval": f"{bound} ({r.interval})" if bound else r.interval,
        "Convergence": "" if r.converged else "not converged: the interval does not meet the tolerance",
        DEFINED: row.definition,
        "Also": r.more,
        "Cost": r.price,
        "Measured on": r.origin,
    }
    value, _, half = str(r).partition(" ±")
    # A mark of what has not converged belongs to the number.
    mark = tag("span", "?", class_="query", title="not converged") if str(r).endswith("?") else ""
    value, half = value.removesuffix("?"), half.removesuffix("?")
    shown = (
        tag("span", escape(value), class_="value")
        + (" " + tag("span", f"±{escape(half)}", class_="half") if half else "")
        + mark
    )
    return tag("td", notes.button(shown, f"{row.label}, {name}", facts))


def _mean(row: Row, group: str, found: Spread | None, notes: Notes) -> str:
    if found is None:
        return _missing()
    kind = "geometric mean" if row.factor else "mean"
    none = ONE_RUN if found.runs < 2 else ALIKE
    bounds = _interval(found.lower, found.upper)
    facts = {
        "Value": f"{digits(found.value)}, the {kind} of {found.runs} run{'s' * (found.runs > 1)}",
        "Interval": f"{bounds} (95 % for the mean over runs, Student 1908, widened by the runs' own errors)"
        if bounds
        else none,
        DEFINED: row.definition,
    }
    return tag(
        "td",
        notes.button(
            tag("span", f"{found.value:.4g}", class_="value") + _half(found.ends), f"{row.label}, {group}", facts
        ),
    )


ONE_RUN = "none: one run says nothing of how runs scatter"
ALIKE = "none: alike in all runs, which says nothing of how they scatter"


def _difference(row: Row, first: str, second: str, d: Difference | None, notes: Notes) -> str:
    if d is None:
        return _missing()
    bounds = _interval(d.lower, d.upper)
    kinds = "; ".join(dict.fromkeys(r.interval for r in row.cells if r is not None))
    if d.by == ENDS:
        of, how, runs = "", f"what the ends of both intervals leave possible: {kinds}", ""
        none, mark = kinds, "not told apart" if d.sure is False else ""
    else:
        alone = min(row.spreads[name].runs for name in (first, second)) < 2
        of, how = " of means", f"95 %, Student's t, {d.freedom} degrees of freedom, widened by the runs' own errors"
        none = ONE_RUN if alone else ALIKE
        pairs = f"{d.runs} pairs of one seed each"
        runs = pairs if d.by == PAIRS else f"{d.runs} runs of both groups, not paired (Welch 1947)"
        mark = "one run" if alone else "" if d.sure else "not told apart"
    what = f"{second} over {first}, a ratio" if d.ratio else f"{second} less {first}, a difference"
    verdict = bounds and ("leaves out" if d.sure else "holds")
    facts = {
        "Value": f"{digits(d.value)}: {what}{of}",
        "Interval": f"{bounds} ({how})" if bounds else none,
        "Says": f"the interval {verdict} {'a ratio of 1' if d.ratio else 'a difference of 0'}" if verdict else "",
        "Convergence": "" if d.converged else "not converged: an interval does not meet the tolerance",
        "Runs": runs,
        DEFINED: row.definition,
    }
    shown = tag("span", escape(d.head.replace("x ", "\u00d7 ")), class_="value") + _half(d.ends)
    shown += " " + tag("span", mark, class_="unsure") if mark else ""
    return tag("td", notes.button(shown, f"{row.label}, {second} against {first}", facts))


def _half(ends: str) -> str:
    return " " + tag("span", escape(ends.strip()), class_="half") if ends else ""


def _interval(lower: float | None, upper: float | None) -> str:
    return "" if lower is None or upper is None else f"{digits(lower)} to {digits(upper)}"


def digits(value: float) -> str:
    """A number to more digits than the table has."""
    return f"{value:.{DIGITS}g}" if math.isfinite(value) else str(value)


# Values that range over more are drawn on a logarithmic scale.
LOG_RANGE = 20.0


def runs(comparison: Comparison, styles: dict[str, Style], rows: list[Row]) -> PageFigure | None:
    """A small panel for each quantity that every run of two groups has."""
    groups = comparison.groups
    if len(groups) < 2 or max(map(len, groups.values())) < 2:
        return None
    chosen = [row for row in rows if len(row.spreads) == len(groups)]
    if not chosen:
        return None
    panels = tuple(_runs_panel(f"runs-{i}", comparison, row, styles) for i, row in enumerate(chosen, start=1))
    paired = [pair for pair in pairwise(groups) if comparison.paired(*pair) is not None]
    tied = " Grey lines tie runs of one seed in neighbouring groups." if paired else ""
    facts = (
        "Each point is a run; beside them the mean (geometric, where groups are compared by ratios) and Student's 95 % "
        f"interval of it.{tied} Scales are each panel's own and need not start at zero."
    )
    return PageFigure("runs", "Run by run", panels, facts, "small", legend(comparison, styles))


def _runs_panel(name: str, comparison: Comparison, row: Row, styles: dict[str, Style]) -> Panel:
    means = []
    for group, spread in row.spreads.items():
        sure = "" if spread.lower is None or spread.upper is None else f" ({spread.lower:.4g} to {spread.upper:.4g})"
        means.append(f"{group} mean {spread.value:.4g}{sure} of {spread.runs} runs")
    for group, d in row.differences.items():
        means.append(f"{group} against the first group: {d}")
    title = f"{row.label} of every run"
    return panel(
        name, title, "; ".join(means) + ".", lambda axes: _strip(axes, comparison, row, styles), SMALL, row.label
    )


def _strip(axes: Axes, comparison: Comparison, row: Row, styles: dict[str, Style]) -> None:
    at = {s.name: r.value for s, r in zip(comparison.subjects, row.cells, strict=True) if r is not None}
    groups = list(comparison.groups)
    for left, right in pairwise(groups):
        for one, two in comparison.paired(left, right) or []:
            place = groups.index(left)
            axes.plot([place, place + 1], [at[one.name], at[two.name]], color=QUIET, alpha=0.5, linewidth=0.8, zorder=1)
    for x, (group, members) in enumerate(comparison.groups.items()):
        style, mean = styles[members[0].name], row.spreads[group]
        values = [at[s.name] for s in members]
        axes.plot([x] * len(values), values, linestyle="", marker=style.marker, color=style.colour, alpha=0.75)
        low, high = mean.lower, mean.upper
        reach = [[0.0], [0.0]] if low is None or high is None else [[mean.value - low], [high - mean.value]]
        axes.errorbar(
            x + 0.22, mean.value, yerr=reach, marker="_", markersize=9, capsize=3, color=style.colour, linewidth=2
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    finite = [value for value in at.values() if math.isfinite(value)]
    if row.factor and min(finite) > 0 and max(finite) > LOG_RANGE * min(finite):
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
