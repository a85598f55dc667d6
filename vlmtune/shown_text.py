"""Remove secrets from texts that are shown or written, and escape control characters."""

import re
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit, urlunsplit

# In a URI: user name and password before the host, and options that grant access (signed URLs, pyarrow's
# options).
USER = re.compile(r"(?<=://)(?:[^\s/@\"'<>]*:[^\s@\"'<>]*|[^\s/@\"'<>]+)@")
SECRETS = re.compile(
    r"([?&](?:[\w-]*(?:secret|token|password|signature|credential)[\w-]*|sig|access_?key(?:_?id)?)=)"
    r"[^&\s\"'<>#]+",
    re.IGNORECASE,
)
# Control characters except tab and line feed, and characters that change the direction of text.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def redacted(text: str) -> str:
    """`text` without the user names, passwords and keys of URIs in it."""
    if "://" not in text:
        return text
    return SECRETS.sub(r"\1***", USER.sub("", text))


def with_secrets_of(path: str, given: Iterable[str]) -> str:
    """Add to a redacted `path` the user and options of the URI in `given` that has the same host."""
    parts = urlsplit(path) if "://" in path else None
    for uri in given if parts is not None else ():
        own = urlsplit(uri)
        if parts is not None and redacted(uri) != uri and _host(own) == _host(parts):
            return urlunsplit(parts._replace(netloc=own.netloc, query=own.query))
    return path


def _host(parts: SplitResult) -> tuple[str, str]:
    return parts.scheme, parts.netloc.rpartition("@")[2]


def printable(text: str) -> str:
    """`text` with control characters as escapes, because a terminal would execute them."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown_name(path: str) -> str:
    """A path for files that may be published: the last name of a local path; a URI without secrets."""
    return (
        redacted(path) if "://" in path or not path.startswith("/") else path.rstrip("/").rpartition("/")[2]
    )


def redacted_values(value: object) -> object:
    """A value of dicts, lists and texts, with every text `redacted`."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: redacted_values(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(one) for one in value]
    return value
