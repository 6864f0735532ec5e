"""A page in a real browser with the network off: in light, in dark, on paper and on a telephone."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comparisons import groups, two
from sharpscope.report import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--remote-debugging-pipe"),
)
PATIENCE = 60.0


class Tab:
    """One page of a browser, driven by the DevTools protocol through a pipe."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()

        def wire() -> None:
            # The browser reads 3 and writes 4; moved out of the way first, since either pipe may have these numbers.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (ours[0], theirs[1])]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        assert BROWSER is not None
        command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=wire, close_fds=False, **quiet)
        os.close(ours[0])
        os.close(theirs[1])
        self.to, self.of = os.fdopen(ours[1], "wb"), os.fdopen(theirs[0], "rb")
        os.set_blocking(theirs[0], False)
        self.rest, self.count = b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def call(self, method: str, **params: Any) -> Any:
        """The answer of the browser; what it reports meanwhile goes to ``events``."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.rest += self.of.read() or b""
            *whole, self.rest = self.rest.split(b"\0")
            found = [json.loads(text) for text in whole]
            self.events += [entry for entry in found if "method" in entry]
            for entry in found:
                if entry.get("id") == self.count:
                    assert "error" not in entry, entry
                    return entry["result"]
            time.sleep(0.01)
        raise AssertionError(f"{method} had no answer in {PATIENCE:.0f} s.")

    def run(self, script: str) -> Any:
        """The value of a script."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < end, f"{script} was never true."
            time.sleep(0.1)

    def open(self, path: Path, width: int = 1280, media: str = "screen", scheme: str = "light") -> None:
        self.events.clear()
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for(f"location.href === {path.as_uri()!r} && document.readyState === 'complete'")

    def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **text)

    def complaints(self) -> list[Any]:
        """Errors of the console, and requests for anything but the page and what it holds."""
        found: list[Any] = []
        for event in self.events:
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(params)
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
                found.append(params["args"])
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                found += [] if url.startswith(("data:", "blob:", "file:")) else [url]
        return found

    def close(self) -> None:
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.to.close()
            self.of.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if BROWSER is None:
        pytest.skip("There is no Chromium on this machine to open the page in.")
    tab = Tab(tmp_path_factory.mktemp("browser"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, comparison in (("two", two()), ("groups", groups(runs=2))):
        (folder / f"{name}.html").write_text(page(comparison), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in ("two", "groups")}


BOXES = """Array.from(document.querySelectorAll('figure, svg.plot'), e => {
  const box = e.getBoundingClientRect();
  return [e.id || e.getAttribute('aria-labelledby'), box.width, box.height];
})"""


@pytest.mark.parametrize("name", ["two", "groups"])
@pytest.mark.parametrize("how", ["light", "dark", "print"])
def test_every_figure_is_there_without_a_complaint(tab: Tab, pages: dict[str, Path], name: str, how: str) -> None:
    """From disk, without a network: no error, no request, and each figure and drawing takes up room."""
    tab.open(pages[name], 700 if how == "print" else 1280, "print" if how == "print" else "screen", scheme=how)
    boxes = tab.run(BOXES)
    assert len(boxes) > 12
    assert all(width > 100 and height > 20 for _, width, height in boxes), boxes
    dark = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (how == "dark")
    ink = tab.run("getComputedStyle(document.querySelector('svg.plot text')).fill")
    assert (ink == "rgb(231, 233, 237)") == (how == "dark")
    assert not tab.complaints()


@pytest.mark.parametrize("name", ["two", "groups"])
def test_a_telephone_scrolls_tables_and_not_the_page(tab: Tab, pages: dict[str, Path], name: str) -> None:
    """At 400 pixels nothing reaches beyond the window but what is in a region of its own."""
    tab.open(pages[name], 400)
    assert tab.run("document.documentElement.scrollWidth") == 400
    wider = (
        "Array.from(document.querySelectorAll('.scroll'), e => e.scrollWidth > e.clientWidth).filter(Boolean).length"
    )
    assert tab.run(wider) > 0


def test_keys_open_and_close_the_note_of_a_number(tab: Tab, pages: dict[str, Path]) -> None:
    """Enter on a number shows its note, Escape hides it and leaves the focus where it was."""
    tab.open(pages["two"])
    tab.call("Page.bringToFront")
    assert tab.run("document.querySelectorAll('.note:popover-open').length") == 0
    tab.run("document.querySelector('td .number').focus()")
    tab.key("Enter", 13)
    tab.wait_for("document.querySelectorAll('.note:popover-open').length === 1")
    assert "mean loss on the train data" in tab.run("document.querySelector('.note:popover-open').innerText")
    tab.key("Escape", 27)
    tab.wait_for("document.querySelectorAll('.note:popover-open').length === 0")
    assert tab.run("document.activeElement === document.querySelector('td .number')")


def test_the_reader_chooses_a_theme_and_paper_stays_white(tab: Tab, pages: dict[str, Path]) -> None:
    """The button goes from the system's to light to dark; printed, a dark page is light and shows all notes."""
    tab.open(pages["two"], scheme="light")
    tab.run("document.getElementById('theme').click(); document.getElementById('theme').click()")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "Array.from(document.querySelectorAll('.note')).filter(e => !e.getBoundingClientRect().height).length"
    assert tab.run(hidden) == 0
    assert tab.run("document.getElementById('theme').getBoundingClientRect().height") == 0
    tab.run("document.getElementById('theme').click()")
    paper = tab.call("Page.printToPDF", printBackground=True)["data"]
    assert 10_000 < len(base64.b64decode(paper)) < 3_000_000


def test_surfaces_turn_when_asked(tab: Tab, pages: dict[str, Path]) -> None:
    """Nothing of plotly runs before the button; then there is a scene a surface, in either theme, without errors."""
    pytest.importorskip("plotly")
    tab.open(pages["two"])
    assert tab.run("typeof Plotly") == "undefined"
    tab.run("document.querySelector('.start').click()")
    tab.wait_for("document.querySelector('.stage').dataset.ready === 'true'")
    sizes = tab.run("Array.from(document.querySelectorAll('.scene canvas'), e => e.getBoundingClientRect().height)")
    assert len(sizes) >= 2
    assert min(sizes) > 100
    tab.run("document.getElementById('theme').click()")
    assert not tab.complaints()
