"""HTML as text, escaped where it comes from outside."""

from __future__ import annotations

import html
import json
from typing import Any


def text(value: object) -> str:
    """``value`` as HTML shows it, whatever is in it, between tags or in a quoted attribute."""
    return html.escape(str(value))


def tag(name: str, *inside: str, **attributes: object) -> str:
    """An element around HTML; ``class_`` is class, ``aria_label`` is aria-label, None leaves an attribute out."""
    said = []
    for key, value in attributes.items():
        if value is not None and value is not False:
            written = key.rstrip("_").replace("_", "-")
            said.append(f" {written}" if value is True else f' {written}="{text(value)}"')
    return f"<{name}{''.join(said)}>{''.join(inside)}</{name}>"


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


def data(value: Any, name: str) -> str:
    """``value`` as JSON in a block that no browser runs; a "<" in it is written so that none ends the block."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{written}</script>'
