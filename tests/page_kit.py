"""Helpers for tests of HTML pages."""

from html.parser import HTMLParser


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
