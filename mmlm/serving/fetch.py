"""Obtaining the bytes of a picture that a stranger names, without being used by the stranger.

    url ──► fetch ──► bytes ──► mmlm.images opens them
            you are here

`data:` addresses are decoded strictly, after their length was checked. `https:` addresses are
off until hosts are allowed by name; then every address that the name resolves to must be
public, the connection goes to the very address that was checked, each redirect is checked
anew, no proxy is asked, and bytes and time are limited. Paths and all other schemes are
refused: nothing on this machine or in its network can be read through here.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from mmlm.config import Config
from mmlm.errors import ImageError

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
_SHOWN = 80


class FetchRules(Config):
    """What may be obtained from where."""

    allowed_hosts: tuple[str, ...] = ()
    """Hosts that `https:` addresses may name, exactly; empty turns remote pictures off."""

    max_bytes: int = 20_000_000
    """Most bytes of one picture."""

    max_redirects: int = 3
    """Most redirects, each of which is checked like the first address."""

    timeout_seconds: float = 10.0
    """Longest time for one picture, redirects included."""


class FetchError(ImageError):
    """A picture could not be obtained; `status` is the HTTP status that says so best."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def connect_tls(address: str, host: str, timeout_seconds: float) -> socket.socket:
    """Open a TLS connection to one address, whose certificate must be that of `host`."""
    plain = socket.create_connection((address, 443), timeout_seconds)
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


class Fetcher:
    """Obtains pictures by the rules.

    Args:
        rules: What may be obtained from where.
        resolve: Turns a host into socket addresses, as `socket.getaddrinfo` does.
        connect: Opens a connection to an address that was checked.
    """

    def __init__(
        self,
        rules: FetchRules | None = None,
        *,
        resolve: Callable[..., Any] = socket.getaddrinfo,
        connect: Callable[[str, str, float], socket.socket] = connect_tls,
    ) -> None:
        self.rules = rules or FetchRules()
        self._resolve = resolve
        self._connect = connect

    def fetch(self, url: str) -> bytes:
        """Return the bytes of a picture.

        Raises:
            FetchError: if the address is not allowed, cannot be reached, or gives no picture.
        """
        if not isinstance(url, str):
            raise FetchError(f"The address of a picture must be text (got {type(url).__name__}).")
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            return self._decode(url)
        if scheme == "https":
            return self._download(url)
        raise FetchError(
            f"{_short(url)} is not an address that pictures are taken from. Send the picture "
            f"itself, as data:image/png;base64,…"
        )

    def _decode(self, url: str) -> bytes:
        """Decode a `data:` address, strictly."""
        head, comma, body = url.partition(",") if len(url) < 256 else _head_and_body(url)
        if not comma or not head.lower().endswith(";base64"):
            raise FetchError(
                f"{_short(url)} is not data in base64; data:image/png;base64,… was expected."
            )
        if not head[5:].lower().startswith("image/"):
            raise FetchError(f"{_short(head)} does not hold a picture; data:image/… was expected.")
        if len(body) > 4 * (self.rules.max_bytes + 2) // 3 + 4:
            raise FetchError(self._too_large(3 * len(body) // 4), 413)
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FetchError(f"{_short(url)} is not valid base64: {error}.") from None
        if len(data) > self.rules.max_bytes:
            raise FetchError(self._too_large(len(data)), 413)
        return data

    def _download(self, url: str) -> bytes:
        """Fetch an `https:` address and what it redirects to."""
        if not self.rules.allowed_hosts:
            raise FetchError(
                "Remote pictures are off on this server. Send the picture itself, as "
                "data:image/png;base64,…, or ask whoever runs the server to allow the host."
            )
        deadline = time.monotonic() + self.rules.timeout_seconds
        for _ in range(self.rules.max_redirects + 1):
            parts = self._checked(url)
            host = str(parts.hostname)
            try:
                moved, data = self._get(parts, self._public_address(host), deadline)
            except FetchError:
                raise
            except TimeoutError:
                raise FetchError(
                    f"{host} took longer than {self.rules.timeout_seconds:g} s.", 422
                ) from None
            except (OSError, http.client.HTTPException) as error:
                raise FetchError(
                    f"{host} cannot be reached: {type(error).__name__}.", 422
                ) from None
            if data is not None:
                return data
            url = urljoin(url, moved)
        raise FetchError(
            f"{_short(url)} is behind more than {self.rules.max_redirects} redirects.", 422
        )

    def _checked(self, url: str) -> SplitResult:
        """Return the parts of an address that may be asked."""
        try:
            parts = urlsplit(url)
            port, host = parts.port, (parts.hostname or "").lower()
        except ValueError as error:
            raise FetchError(f"{_short(url)} is not a valid address: {error}.") from None
        if parts.scheme.lower() != "https" or parts.username is not None or port not in (None, 443):
            raise FetchError(
                f"{_short(url)} must be a plain https address, without user name or port."
            )
        if any(ord(letter) < 33 or ord(letter) > 126 for letter in url):
            raise FetchError(f"{_short(url)} has letters that must be written as %XX.")
        if host not in (allowed.lower() for allowed in self.rules.allowed_hosts):
            raise FetchError(
                f"Pictures from {host[:_SHOWN]!r} are not allowed here. Allowed: "
                f"{', '.join(self.rules.allowed_hosts)}."
            )
        return parts

    def _public_address(self, host: str) -> str:
        """Resolve a host; every one of its addresses must be public."""
        try:
            found = self._resolve(host, 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise FetchError(f"The host {host!r} is not known.", 422) from None
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(is_public(address) for address in addresses):
            raise FetchError(f"The host {host!r} is not a public one.")
        return addresses[0]

    def _get(self, parts: SplitResult, address: str, deadline: float) -> tuple[str, bytes | None]:
        """Ask one address; returns where it moved to, or the bytes."""
        host = str(parts.hostname)
        connection = http.client.HTTPConnection(host, timeout=_left(deadline))
        connection.sock = self._connect(address, host, _left(deadline))
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "mmlm"}
            connection.request("GET", path, headers={**headers, "Connection": "close"})
            # What is read through the response obeys the socket's timeout, chunk by chunk.
            connection.sock.settimeout(_left(deadline))
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return response.headers.get("Location", ""), None
            self._check_answer(host, response)
            return "", self._read(response, connection.sock, deadline)
        finally:
            connection.close()

    def _check_answer(self, host: str, response: http.client.HTTPResponse) -> None:
        if response.status != 200:
            raise FetchError(f"{host} answered with status {response.status}.", 422)
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if not kind.startswith("image/"):
            raise FetchError(f"{host} sent {kind[:_SHOWN]!r} and not a picture.", 422)
        if response.length is not None and response.length > self.rules.max_bytes:
            raise FetchError(self._too_large(response.length), 413)

    def _read(
        self, response: http.client.HTTPResponse, sock: socket.socket | None, deadline: float
    ) -> bytes:
        """Read a body up to the limit, and no longer than the deadline."""
        chunks: list[bytes] = []
        size = 0
        while chunk := response.read1(_CHUNK_BYTES):
            size += len(chunk)
            if size > self.rules.max_bytes:
                raise FetchError(self._too_large(size), 413)
            chunks.append(chunk)
            left = _left(deadline)
            if sock is not None and sock.fileno() >= 0:
                sock.settimeout(left)
        return b"".join(chunks)

    def _too_large(self, size: int) -> str:
        return (
            f"The picture has {size / 1e6:,.1f} MB or more; the limit is "
            f"{self.rules.max_bytes / 1e6:,.1f} MB."
        )


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, and not to this machine or network.

    >>> [is_public(a) for a in ("93.184.216.34", "127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1")]
    [True, False, False, False]
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        if inner is not None and not inner.is_global:
            return False
        if parsed in ipaddress.ip_network("64:ff9b::/96"):  # NAT64 leads into IPv4 networks
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _head_and_body(url: str) -> tuple[str, str, str]:
    """Split a long `data:` address without searching through all of it for the comma."""
    head, comma, _ = url[:256].partition(",")
    return head, comma, url[len(head) + 1 :]


def _short(url: str) -> str:
    return repr(url if len(url) <= _SHOWN else url[:_SHOWN] + "…")
