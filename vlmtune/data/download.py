"""Images from the web, at the URLs that a data file names. Data files may come from anybody.

Only public IP addresses are contacted, so that a data file cannot reach this machine or its network. The
address that was checked is the one that is connected to, also after each redirect. A proxy is never used,
because it would connect to addresses of its own choice.
"""

import http
import http.client
import io
import socket
import ssl
import threading
import time
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from vlmtune.shown_text import redacted
from vlmtune.storage import one_line

REDIRECTS = 5
READ_BYTES = 1 << 16
NAT64 = IPv6Network("64:ff9b::/96")  # the last 32 bits are an IPv4 address
PORTS = {"http": 80, "https": 443}
SAFE = "%/:=&?~#+!$,;'@()*[]"  # characters that are not quoted again in a URL's path and query


class DownloadError(Exception):
    """Why a URL could not be fetched, in one line."""


def download(url: str, *, max_bytes: int, seconds: float) -> bytes:
    """The content at an http(s) URL.

    Args:
        max_bytes: the largest content that is accepted.
        seconds: the time limit, from the look-up of the host's name to the last byte, with all redirects.

    Raises:
        DownloadError: the URL is wrong, its address is not public, the server fails, or a limit is exceeded.
    """
    deadline = time.monotonic() + seconds
    try:
        for _ in range(REDIRECTS + 1):
            parts = _parts(url)
            answer, connection = _ask(parts, deadline)
            try:
                if (target := _redirect(answer)) is None:
                    return _content(answer, max_bytes)
            finally:
                connection.end()
            url = urljoin(url, target)
        raise DownloadError(f"more than {REDIRECTS} redirects")
    except TimeoutError as error:
        raise DownloadError(f"it takes longer than {seconds:g} s") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(one_line(error)) from error


def public_reason(address: str) -> str | None:
    """Why an IP address must not be contacted; None for a public one."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip_address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        if inner is not None:
            return public_reason(str(inner))
    if ip.is_loopback or ip.is_unspecified:
        return f"{ip} is this machine itself"
    if not ip.is_global or ip.is_multicast or ip.is_reserved or (ip.version == 6 and ip.teredo):
        return f"{ip} is no public address"
    return None


def _parts(url: str) -> SplitResult:
    """The parts of a URL. Raises DownloadError or ValueError if it is not http(s) or has no host."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS:
        raise DownloadError(f"it leads to {redacted(url):.100}, which is neither http nor https")
    if parts.username is not None:
        raise DownloadError("an address with a user's name in it is not asked")
    if not parts.hostname:
        raise DownloadError("the address names no host")
    return parts


def _ask(parts: SplitResult, deadline: float) -> "tuple[http.client.HTTPResponse, _CheckedConnection]":
    host = str(parts.hostname)
    port = parts.port or PORTS[parts.scheme]
    connection = _CheckedConnection(host, port, parts.scheme == "https", deadline)
    path = quote(parts.path or "/", SAFE) + (f"?{quote(parts.query, SAFE)}" if parts.query else "")
    try:
        connection.request("GET", path, headers={"User-Agent": "vlmtune", "Accept-Encoding": "identity"})
        return connection.getresponse(), connection
    except BaseException:
        connection.end()
        raise


def _redirect(answer: http.client.HTTPResponse) -> str | None:
    """The URL that the answer redirects to; None if the answer is the content itself."""
    if answer.status == http.HTTPStatus.OK:
        return None
    target = answer.headers.get("Location")
    if answer.status in (301, 302, 303, 307, 308) and target:
        return str(target)
    raise DownloadError(f"the server answers {answer.status} {answer.reason:.60}".rstrip())


def _content(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    content = bytearray()
    while block := answer.read(READ_BYTES):
        content += block
        if len(content) > max_bytes:
            raise DownloadError(f"it is larger than {max_bytes / 1e6:g} MB")
    return bytes(content)


class _CheckedConnection(http.client.HTTPConnection):
    """A connection to a public address of a host. No wait in it lasts beyond the deadline."""

    def __init__(self, host: str, port: int, encrypted: bool, deadline: float) -> None:
        super().__init__(host, port)
        self._encrypted, self._deadline = encrypted, deadline
        self._inner: socket.socket | None = None

    def connect(self) -> None:
        found = _look_up(self.host, self.port, self._deadline)
        for _, address in found:
            if (reason := public_reason(address[0])) is not None:
                raise DownloadError(f"{self.host}: {reason}, and data may name public servers only")
        failure: OSError = OSError(f"{self.host} has no address")
        for family, address in found:
            plain = socket.socket(family, socket.SOCK_STREAM)
            try:
                plain.settimeout(_left(self._deadline))
                plain.connect(address)
                self._inner = self._encrypt(plain)
                self.sock: Any = _TimedSocket(self._inner, self._deadline)
                return
            except OSError as error:
                plain.close()
                failure = error
        raise failure

    def end(self) -> None:
        """Close the socket. `close` cannot do it, because http.client calls it before the content is read."""
        if self._inner is not None:
            self._inner.close()

    def _encrypt(self, plain: socket.socket) -> socket.socket:
        if not self._encrypted:
            return plain
        plain.settimeout(_left(self._deadline))
        return ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _TimedSocket:
    """The methods of a socket that http.client uses.

    A server that sends a byte now and then gains no time.
    """

    def __init__(self, inner: socket.socket, deadline: float) -> None:
        self._inner, self._deadline = inner, deadline

    def sendall(self, content: bytes) -> None:
        self._inner.settimeout(_left(self._deadline))
        self._inner.sendall(content)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._inner, self._deadline))

    def close(self) -> None:
        """Nothing: http.client calls it before the answer is read."""


class _TimedReader(io.RawIOBase):
    def __init__(self, inner: socket.socket, deadline: float) -> None:
        super().__init__()
        self._inner, self._deadline = inner, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._inner.settimeout(_left(self._deadline))
        return self._inner.recv_into(buffer)


def _look_up(host: str, port: int, deadline: float) -> list[tuple[int, Any]]:
    """(family, socket address) of each address of a host. A look-up has no timeout of its own."""
    results: list[Any] = []

    def look_up() -> None:
        try:
            results.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            results.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if thread.is_alive():
        raise TimeoutError
    if results and isinstance(results[0], Exception):
        raise DownloadError(f"{host} cannot be looked up: {one_line(results[0])}") from results[0]
    return [(found[0], found[4]) for found in results]


def _left(deadline: float) -> float:
    """Seconds until the deadline. Raises TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
