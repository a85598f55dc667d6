"""Helpers for tests of HTML pages."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path


class Links(HTMLParser):
    """The URLs that a page refers to, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action", "poster")
        ]


def chromium() -> str | None:
    """The Chromium or Chrome of this machine; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def rendered(page: Path, profile: Path) -> str:
    """The page's document after headless Chromium has run what it lets run, as HTML."""
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    )
    more = (
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--virtual-time-budget=2000",
    )
    command = [str(chromium()), *options, *more, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout
