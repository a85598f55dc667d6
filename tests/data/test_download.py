"""What a data file may make this machine fetch: public addresses, in bounded time and size."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from vlmtune.data import download as module
from vlmtune.data.download import DownloadError, download, public_reason

LOCAL = [
    "http://127.0.0.1:{port}/a",
    "http://localhost:{port}/a",
    "http://2130706433:{port}/a",  # 127.0.0.1 as one number
    "http://0x7f000001:{port}/a",
    "http://0177.0.0.1:{port}/a",
    "http://127.1:{port}/a",
    "http://0.0.0.0:{port}/a",
    "http://[::ffff:127.0.0.1]:{port}/a",
    "http://[::1]:{port}/a",
]


class Handler(http.server.BaseHTTPRequestHandler):
    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requested.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/drip-headers":
            self.drip(b"HTTP/1.0 200 OK\r\nX: " + b"x" * 1000)
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            self.drip(b"x" * 1000)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000 if self.path == "/big" else b"image")

    def drip(self, content: bytes) -> None:
        for byte in content:
            try:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def requested() -> list[str]:
    Handler.requested.clear()
    return Handler.requested


@pytest.fixture
def one_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of these tests counts as public under the address 127.0.0.1, and under no other."""
    real = public_reason
    monkeypatch.setattr(
        module, "public_reason", lambda address: None if address == "127.0.0.1" else real(address)
    )


def fetch(url: str, seconds: float = 10, max_bytes: int = 1000) -> bytes:
    return download(url, max_bytes=max_bytes, seconds=seconds)


@pytest.mark.parametrize("url", LOCAL)
def test_this_machine_is_not_asked(url: str, port: int, requested: list[str]) -> None:
    with pytest.raises(DownloadError, match=r"machine itself|no public|looked up|refused"):
        fetch(url.format(port=port))
    assert requested == []


@pytest.mark.parametrize(
    "address",
    [
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:1::1",
        "ff02::1",
        "::",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert public_reason(address) is not None


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert public_reason(address) is None


@pytest.mark.usefixtures("one_public_address")
def test_each_redirect_is_checked(port: int, requested: list[str]) -> None:
    site = f"http://127.0.0.1:{port}"
    assert fetch(f"{site}/to//a") == fetch(f"{site}/to/{site}/to/{site}/a") == b"image"
    requested.clear()
    for target, reason in (
        (f"http://127.0.0.2:{port}/secret", "this machine itself"),
        (f"http://[::ffff:127.0.0.2]:{port}/secret", "this machine itself"),
        ("http://169.254.169.254/latest/meta-data", "no public address"),
        ("ftp://127.0.0.1/secret", "neither http nor https"),
        ("file:///etc/passwd", "neither http nor https"),
        ("//user:word@127.0.0.1/", "user's name"),
        ("http://[::1/x", "Invalid IPv6 URL"),
    ):
        with pytest.raises(DownloadError, match=reason) as refusal:
            fetch(f"{site}/to/{target}")
        assert "\n" not in str(refusal.value)
    assert not [path for path in requested if not path.startswith("/to/")]
    with pytest.raises(DownloadError, match="more than 5 redirects"):
        fetch(f"{site}{'/to/' * 20}{site}")


def test_a_name_that_also_has_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, ("93.184.215.14", 80)), (socket.AF_INET, ("10.0.0.1", 80))]
    monkeypatch.setattr(module, "_look_up", lambda *_: found)
    with pytest.raises(DownloadError, match=r"rebind.example: 10.0.0.1 is no public address"):
        fetch("http://rebind.example/a")


@pytest.mark.usefixtures("one_public_address")
@pytest.mark.parametrize("path", ["drip", "drip-headers"])
def test_one_deadline_for_the_whole_fetch(path: str, port: int) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"it takes longer than 0.5 s"):
        fetch(f"http://127.0.0.1:{port}/{path}", seconds=0.5)
    assert time.monotonic() - start < 2


@pytest.mark.usefixtures("one_public_address")
def test_size_is_bounded(port: int) -> None:
    with pytest.raises(DownloadError, match=r"it is larger than 0.001 MB"):
        fetch(f"http://127.0.0.1:{port}/big")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/x",
        "http:///a",
        "http://a:b/c",
        "http://a:99999999/",
        "http://a b/",
        "http://a\r\nX: y/",
        "http://" + "a" * 70 + "/",
        "http://..",
        "https://%00/",
        "http://x@/",
    ],
)
def test_addresses_that_are_none_are_one_line(url: str) -> None:
    with pytest.raises(DownloadError) as refusal:
        fetch(url, seconds=5)
    assert "\n" not in str(refusal.value)
