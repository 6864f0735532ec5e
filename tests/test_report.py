"""A page holds every number with its meaning and every figure in words, and fetches nothing."""

from __future__ import annotations

import base64
import gzip
import html
import re
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from comparisons import groups, plane, subject, two
from sharpscope import Problem, measure_sharpness
from sharpscope.plot import COLOURS
from sharpscope.report import page
from sharpscope.results import Comparison


def digits(value: float) -> str:
    """To more digits than the table has."""
    return f"{value:.7g}"


# Elements without an end tag.
VOID = {"meta", "link", "br", "hr", "img", "input"}
PAGES = {
    "two": two(),
    "groups": groups(),
    "ten": Comparison(subjects=tuple(subject(f"run-{i}", 0.5 + 0.2 * i) for i in range(10))),
}


class Tree(HTMLParser):
    """Every element with its attributes and text; fails where a tag is not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {[entry['tag'] for entry in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice: {names}"
        above = [e["tag"] for e in self.open]
        entry = {"tag": tag, "text": "", "above": above, "figure": self.open_figure(), **dict(attrs)}
        self.elements.append(entry)
        if tag not in VOID:
            self.open.append(entry)

    def open_figure(self) -> str | None:
        return next((e.get("id") for e in reversed(self.open) if e["tag"] == "figure"), None)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1]["tag"] == tag, f"</{tag}> ends <{self.open[-1]['tag']}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        for entry in self.open:
            entry["text"] += text

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [entry for entry in self.elements if entry["tag"] == tag]


@cache
def page_of(name: str) -> tuple[Comparison, str, Tree]:
    text = page(PAGES[name])
    return PAGES[name], text, Tree(text)


@pytest.fixture(scope="module", params=PAGES)
def made(request: pytest.FixtureRequest) -> tuple[Comparison, str, Tree]:
    return page_of(request.param)


def test_a_page_is_well_formed_and_its_ids_are_its_own(made: tuple[Comparison, str, Tree]) -> None:
    """Every tag is closed in order, no id comes twice, and what points at an id finds it."""
    _, _, tree = made
    ids = [entry["id"] for entry in tree.elements if entry.get("id")]
    assert len(set(ids)) == len(ids)
    for entry in tree.elements:
        for name in ("aria-labelledby", "aria-describedby", "popovertarget"):
            assert set((entry.get(name) or "").split()) <= set(ids), entry
        for target in re.findall(r"url\(#([^)]+)\)", " ".join(str(value) for value in entry.values())):
            assert target in ids
        if (entry.get("href") or "").startswith("#"):
            assert entry["href"][1:] in ids


def test_nothing_is_fetched(made: tuple[Comparison, str, Tree]) -> None:
    """No address but data and fragments, in tags and styles; and the page's own policy forbids more."""
    _, text, tree = made
    for entry in tree.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = entry.get(name)
            assert value is None or value.startswith(("data:", "#")), (entry["tag"], name, value)
    assert all(found.startswith(("#", "data:")) for found in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text
    assert not tree.all("iframe")
    (policy,) = [e["content"] for e in tree.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_every_figure_says_in_words_what_it_shows(made: tuple[Comparison, str, Tree]) -> None:
    """Each drawing has a title and a description with numbers, each figure a heading and a caption."""
    _, _, tree = made
    drawings = [e for e in tree.all("svg") if e.get("class") == "plot"]
    texts = {e["id"]: e["text"] for e in tree.elements if e.get("id")}
    assert len(drawings) > 6
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert len(texts[drawing["aria-labelledby"]]) > 8
        assert len(re.findall(r"\d", texts[drawing["aria-describedby"]])) > 2
    for figure in tree.all("figure"):
        assert [e for e in tree.all("figcaption") if e["figure"] == figure["id"] and len(e["text"]) > 60]
        assert [e for e in drawings if e["figure"] == figure["id"]]


def test_every_number_is_in_the_page_with_its_definition(made: tuple[Comparison, str, Tree]) -> None:
    """A note behind each cell holds value, interval, its kind, definition, cost and origin; none is left out."""
    comparison, _, tree = made
    notes = {e["id"]: e["text"] for e in tree.elements if e.get("class") == "note"}
    said = {notes[e["popovertarget"]]: e["text"] for e in tree.all("button") if e.get("popovertarget")}
    assert len(said) == len(notes)
    for row in comparison.rows:
        for subject_, cell in zip(comparison.subjects, row.cells, strict=True):
            if cell is None:
                continue
            (note,) = [n for n in said if f"{row.label}, {subject_.name}Value" in n]
            assert said[note].replace(" ", "") == str(cell).replace(" ", "")
            for expected in (row.definition, cell.interval, cell.price, cell.origin, digits(cell.value)):
                assert expected in note
            for end in (cell.lower, cell.upper):
                assert end is None or digits(end) in note


def test_groups_have_their_means_intervals_and_differences() -> None:
    """The page of groups holds each spread and difference, and says which intervals leave out no difference."""
    comparison, _, tree = page_of("groups")
    words = " ".join(e["text"] for e in tree.elements if e.get("class") == "note")
    for row in comparison.rows:
        for found in (*row.spreads.values(), *row.differences.values()):
            assert digits(found.value) in words
            assert found.lower is None or f"{digits(found.lower)} to {digits(found.upper)}" in words
    assert "3 pairs of one seed each" in words
    assert "the interval leaves out a ratio of 1" in words
    assert "not told apart" in "".join(e["text"] for e in tree.all("button"))


def test_the_figures_are_those_that_the_data_allow() -> None:
    """All of them where all was measured, none where nothing was, and no run-by-run figure without groups."""
    names = [{e["id"].removeprefix("figure-") for e in page_of(key)[2].all("figure")} for key in PAGES]
    common = {"eigenvalues", "density", "m-sharpness", "edge", "lines", "planes"}
    assert names == [common | {"between"}, common | {"runs"}, common]
    bare = replace(two().subjects[0], eigen=None, density=None, sharpness=None, line=None, surface=None)
    tree = Tree(page(Comparison(subjects=(bare,))))
    assert not tree.all("figure")
    assert "Figures" not in [e["text"] for e in tree.all("h2")]


def test_the_edge_of_sam_is_drawn_where_it_was_measured() -> None:
    """The caption names the triangle at SAM's edge for a checkpoint trained by SAM, not for one trained by SGD."""
    data = (torch.randn(20, 3), torch.arange(20) % 2)
    recipe = {"lr": 0.1, "optimizer": "sgd"}
    captions = []
    for rho in (0.05, None):
        problem = Problem(
            model=nn.Linear(3, 2), loss=nn.CrossEntropyLoss(), data=data, provenance={"recipe": {**recipe, "rho": rho}}
        )
        bare = replace(two().subjects[0], eigen=None, density=None, line=None, surface=None)
        subject = replace(bare, sharpness=measure_sharpness(problem, "edge"))
        captions.append(page(Comparison(subjects=(subject,))))
    assert ["triangle: SAM's edge" in html.unescape(text) for text in captions] == [True, False]


def test_slices_that_were_not_measured_alike_leave_a_sentence_in_place_of_a_figure() -> None:
    """The rest of the page is there."""
    first, second = two().subjects
    text = page(Comparison(subjects=(first, replace(second, surface=plane("sam", 1.0, seed=8)))))
    names = {e["id"] for e in Tree(text).all("figure")}
    assert "figure-planes" not in names
    assert "figure-lines" in names
    assert "must be alike, but the seed differs" in text


def test_names_are_text_whatever_is_in_them() -> None:
    """A checkpoint called like a script is shown as it is called, and runs nowhere."""
    name = "</script><script>alert(1)</script>$x_1$&\"'"
    text = page(two(name, "b<i>"))
    tree = Tree(text)
    assert "alert(1)" not in "".join(e["text"] for e in tree.all("script") if e.get("type") != "application/json")
    assert not tree.all("i")
    assert name in tree.all("h1")[0]["text"]
    assert "<script>alert" not in text
    assert [e for e in tree.all("text") if e["text"].endswith("$x_1$&\"'")]


def test_equal_comparisons_give_equal_bytes() -> None:
    """No time, no address in memory, no random id; and the reader's own style changes nothing."""
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 20, "axes.grid": False, "lines.linewidth": 5}):
        assert page(two()) == page_of("two")[1]


def test_drawings_follow_the_theme() -> None:
    """The theme's own colours are drawn with, and others only where a picture is filled, as in either theme."""
    _, text, _ = page_of("two")
    drawn = "".join(re.findall(r'<svg class="plot".*?</svg>', text, flags=re.DOTALL))
    for shown in ("currentColor", "var(--quiet)", "var(--rule)", "var(--c1)", "var(--c2)"):
        assert shown in drawn
    assert not any(colour.lower() in drawn for colour in COLOURS)
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#ffffff", "#000000", "#cc0000", "#666666", "#bfbfbf"}
    style = text[text.index("<style>") : text.index("</style>")]
    for name in set(re.findall(r"var\((--\w+)", text)):
        # On paper, on a light screen, on a dark one by the system and by the reader's choice.
        assert style.count(f"{name}:") == (1 if name in ("--sans", "--mono") else 3)


def _luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_contrast_is_enough_in_both_themes() -> None:
    """Text at least 4.5 on its ground, lines at least 3 (WCAG 2.2, AA)."""
    _, style, _ = page_of("two")
    for colours in re.findall(r"\{([^{}]*--paper:[^{}]*)\}", style):
        found = dict(re.findall(r"(--\w+): (#[0-9a-f]{6})", colours))
        for ground in ("--paper", "--raised"):
            for name, least in {"--ink": 4.5, "--quiet": 4.5, "--link": 4.5}.items():
                assert _contrast(found[name], found[ground]) >= least, (name, ground)
        for i in range(1, 7):
            assert _contrast(found[f"--c{i}"], found["--paper"]) >= 3, i


def _contrast(one: str, two: str) -> float:
    low, high = sorted((_luminance(one), _luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_surfaces_turn_where_plotly_is_and_stand_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With plotly its own code is in the page once, compressed; without it the page is small and as complete."""
    plotly = pytest.importorskip("plotly.offline")
    _, _, tree = page_of("two")
    (packed,) = [e["text"] for e in tree.all("script") if e.get("id") == "plotly"]
    assert gzip.decompress(base64.b64decode(packed)).decode() == plotly.get_plotlyjs()
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    plain = page(two())
    assert "Turn the surfaces" not in plain
    assert len(plain) < 1_000_000
    assert {e["id"] for e in Tree(plain).all("figure")} == {e["id"] for e in tree.all("figure")}


def test_ten_checkpoints_are_a_small_page() -> None:
    """Under 6 MB with plotly's code, of which the drawings are under 2."""
    _, text, _ = page_of("ten")
    assert len(text.encode()) < 6_000_000
    assert sum(map(len, re.findall(r'<svg class="plot".*?</svg>', text, flags=re.DOTALL))) < 2_000_000


def test_a_page_says_what_it_does_not_say_and_how_it_came_about() -> None:
    """One seed, flatness that is not worth, unconverged numbers; command, hashes, seeds and versions; all costs."""
    comparison, text, tree = page_of("two")
    first, *others = comparison.findings
    assert [e["text"] for e in tree.elements if e.get("class") == "answer"] == [first]
    assert [e["text"] for e in tree.all("ul") if e.get("class") == "findings"] == ["".join(others)]
    for said in ("One seed says nothing in general", "Flatter is not better by itself"):
        assert said in text
    assert "lambda_max/lambda_5 of sgd" in text  # of which one eigenvalue has not converged
    for s in comparison.subjects:
        assert s.provenance["sha256"] in text
    assert comparison.command in text
    assert "training 7" in text
    assert "torch 2.9.0" in text
    assert f"{sum(s.cost.gradients for s in comparison.subjects) + 30.5:,.1f}" in text
    assert "One seed says nothing" not in page_of("groups")[1]


def test_a_notebook_shows_the_numbers_and_what_they_are() -> None:
    """Every reading or, of groups, every mean; each definition once."""
    for comparison in (two(), groups()):
        shown = comparison._repr_html_()
        words = Tree(shown).all("table")[0]["text"]
        for row in comparison.rows:
            assert row.label in words
            if not comparison.groups:
                assert all(str(cell) in words for cell in row.cells)
            assert all(f"{spread.value:.4g}" in words for spread in row.spreads.values())
        assert len(shown) < 20_000
        assert "largest eigenvalue of the Hessian of the mean training loss" in str(comparison)
