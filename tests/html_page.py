"""Pages as tests read them: their tags and texts, and how a browser lays them out."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks nesting while it reads, and keeps what the tests ask for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))  # of SVG

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data.strip())

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def luminance(color: str) -> float:
    """Relative luminance of a colour, by which WCAG measures contrast."""
    full = color if len(color) == 7 else "#" + "".join(2 * letter for letter in color[1:])
    parts = [int(full[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def browser_command(folder: Path) -> list[str]:
    """Headless Chromium with a profile of its own in the folder; the test is skipped where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was checked by its text alone")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    return [*command, "--disable-quic"]


def in_browser(page: str, folder: Path, width: int, probe: str) -> str:
    """What the JavaScript expression `probe` gives once headless Chromium has loaded the page at this width.

    The test is skipped where there is no Chromium.
    """
    script = f"<script>addEventListener('load', () => document.body.setAttribute('data-seen', {probe}))</script></body>"
    (folder / "page.html").write_text(page.replace("</body>", script), encoding="utf-8")
    command = [*browser_command(folder), f"--window-size={width},900", "--dump-dom", (folder / "page.html").as_uri()]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return re.search(r'data-seen="([^"]*)"', told)[1]


def check_stands_alone(page: str) -> Page:
    """Assert that a page is well-formed and asks for nothing outside of it; returns its tags and texts."""
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>") and parsed.of("html") == [{"lang": "en"}]
    assert not any(parsed.of(tag) for tag in ("script", "link", "iframe", "img", "base", "object"))
    addresses = [a[name] for _, a in parsed.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert all(address.startswith("#") for address in addresses)
    assert "url(" not in page and "@import" not in page
    assert not any(name.startswith("on") for _, a in parsed.tags for name in a)
    anchors = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(anchors) == len(set(anchors)), "an id twice"
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:])), "no level of headings is left out"
    assert len(parsed.text.get("caption", ())) == len(parsed.of("table")) == len(parsed.of("thead"))
    assert all(cell["scope"] in ("col", "row") for cell in parsed.of("th"))
    return parsed
