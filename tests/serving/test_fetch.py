"""One test for each way in which an address of a picture could be misused."""

from __future__ import annotations

import base64
import http.server
import socket
import threading
import time

import pytest

from mmlm.serving.fetch import Fetcher, FetchError, FetchRules, is_public

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 64
PUBLIC = "93.184.216.34"


def data_url(data=PNG, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Site(http.server.BaseHTTPRequestHandler):
    """Answers by path; what is asked for is written down."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append((self.headers["Host"], self.path))
        kind, length, status, place = "image/png", None, 200, None
        body = PNG
        if self.path.startswith("/to/"):
            status, place = 302, self.path[4:]
        elif self.path == "/page":
            kind = "text/html"
        elif self.path == "/missing":
            status = 404
        elif self.path == "/lies":
            length = 10**12
        elif self.path in ("/endless", "/slow"):
            length = ""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if place is not None:
            self.send_header("Location", place)
        if length != "":
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"0" * 65536)
            for _ in range(200 if self.path == "/slow" else 0):
                self.wfile.write(b"0")
                time.sleep(0.05)
            self.wfile.write(body)
        except OSError:
            pass

    def log_message(self, format, *args):  # noqa: A002
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture
def fetcher(site):
    """A fetcher for which two hosts are public, though both are served from here."""
    Site.asked.clear()
    connected: list[str] = []

    def connect(address, host, timeout_seconds):
        connected.append(address)
        return socket.create_connection(("127.0.0.1", site), timeout_seconds)

    rules = FetchRules(
        allowed_hosts=("pictures.example", "mirror.example"), max_bytes=100_000, timeout_seconds=1.0
    )
    fetcher = Fetcher(rules, resolve=names(PUBLIC), connect=connect)
    fetcher.connected = connected
    return fetcher


def names(*addresses):
    return lambda host, port, **_: [(0, 0, 0, "", (address, port)) for address in addresses]


def test_a_data_address_is_decoded():
    assert Fetcher().fetch(data_url()) == PNG
    assert Fetcher().fetch(data_url().replace("data:image", "DATA:IMAGE")) == PNG


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,QUJD QUJD", "not valid base64"),
        ("data:image/png;base64,QUJ", "not valid base64"),
        ("data:image/png;base64,QUJDé", "not valid base64"),
        ("data:image/png,QUJD", "not data in base64"),
        ("data:image/png;base64", "not data in base64"),
        ("data:" + "x" * 300 + ",QUJD", "not data in base64"),
        ("data:text/html;base64,QUJD", "does not hold a picture"),
        ("data:;base64,QUJD", "does not hold a picture"),
    ],
)
def test_data_that_is_not_strictly_base64_of_a_picture_is_refused(url, words):
    with pytest.raises(FetchError, match=words) as caught:
        Fetcher().fetch(url)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 300


def test_data_that_is_too_long_is_refused_before_it_is_decoded(monkeypatch):
    small = Fetcher(FetchRules(max_bytes=100))
    assert small.fetch(data_url(b"0" * 100)) == b"0" * 100
    with pytest.raises(FetchError, match="limit") as caught:
        small.fetch(data_url(b"0" * 101))
    assert caught.value.status == 413
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(FetchError, match="limit"):
        small.fetch(data_url(b"").ljust(1000, "0"))


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "../a.png", "a.png", "",
        "http://pictures.example/a.png", "ftp://pictures.example/a.png", "gopher://x", "blob:x",
        "//pictures.example/a.png", " https://pictures.example/a.png", "\\\\host\\share\\a.png",
    ],
)  # fmt: skip
def test_paths_and_other_schemes_are_refused(fetcher, url):
    with pytest.raises(FetchError, match="not an address that pictures are taken from"):
        fetcher.fetch(url)
    assert fetcher.connected == []


def test_an_address_must_be_text():
    with pytest.raises(FetchError, match="must be text"):
        Fetcher().fetch(None)  # pyright: ignore[reportArgumentType]


def test_remote_pictures_are_off_unless_allowed():
    silent = Fetcher(resolve=lambda *_, **__: pytest.fail("resolved"))
    with pytest.raises(FetchError, match="off on this server"):
        silent.fetch("https://pictures.example/a.png")


def test_an_allowed_host_is_fetched_from_the_address_that_was_checked(fetcher):
    assert fetcher.fetch("https://pictures.example/a.png?x=1#part") == PNG
    assert Site.asked == [("pictures.example", "/a.png?x=1")]
    assert fetcher.connected == [PUBLIC]


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/a.png",
        "https://pictures.example.evil.example/a.png",
        "https://evil.example/pictures.example",
        "https://sub.pictures.example/a.png",
        "https://127.0.0.1/a.png",
        "https://[::1]/a.png",
        "https://pictures.example@evil.example/a.png",
        "https://evil.example\\@pictures.example/a.png",
        "https://pictures.example:22/a.png",
        "https://name:word@pictures.example/a.png",
        "https://pictures.example:port/a.png",
        "https://pictures.example/a\r\nX-Evil: 1",
        "https://pictures.example/ä.png",
        "https://",
    ],
)
def test_other_hosts_ports_names_and_odd_letters_are_refused(fetcher, url):
    with pytest.raises(FetchError):
        fetcher.fetch(url)
    assert fetcher.connected == []


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",), ("10.0.0.8",), ("192.168.1.1",), ("169.254.169.254",), ("0.0.0.0",),
        ("100.64.0.1",), ("224.0.0.1",), ("255.255.255.255",), ("::1",), ("fe80::1%eth0",),
        ("fc00::1",), ("::ffff:127.0.0.1",), ("64:ff9b::7f00:1",), ("2002:7f00:1::",), ("ff02::1",),
        (PUBLIC, "127.0.0.1"), ("127.0.0.1", PUBLIC), (), ("nonsense",),
    ],
    ids=str,
)  # fmt: skip
def test_a_host_that_leads_into_a_private_network_is_refused(fetcher, addresses):
    fetcher._resolve = names(*addresses)
    with pytest.raises(FetchError, match="not a public one"):
        fetcher.fetch("https://pictures.example/a.png")
    assert fetcher.connected == []


def test_a_name_that_changes_its_address_after_the_check_is_not_followed(fetcher):
    answers = iter([names(PUBLIC), names("127.0.0.1")])
    fetcher._resolve = lambda *a, **k: next(answers)(*a, **k)
    assert fetcher.fetch("https://pictures.example/a.png") == PNG
    assert fetcher.connected == [PUBLIC]  # the name was asked once, and that answer was used


def test_redirects_are_checked_like_first_addresses(fetcher):
    assert fetcher.fetch("https://pictures.example/to/https://mirror.example/b.png") == PNG
    assert fetcher.fetch("https://pictures.example/to//c.png") == PNG
    assert Site.asked[1::2] == [("mirror.example", "/b.png"), ("pictures.example", "/c.png")]
    for target in ("http://mirror.example/", "https://evil.example/", "file:///etc/passwd"):
        with pytest.raises(FetchError):
            fetcher.fetch(f"https://pictures.example/to/{target}")


def test_a_redirect_into_a_private_network_is_refused(fetcher):
    fetcher._resolve = lambda host, port, **_: names(
        "127.0.0.1" if host == "mirror.example" else PUBLIC
    )(host, port)
    with pytest.raises(FetchError, match="not a public one"):
        fetcher.fetch("https://pictures.example/to/https://mirror.example/b.png")


def test_redirects_come_to_an_end(fetcher):
    chain = "https://pictures.example" + "/to/https://pictures.example" * 5 + "/a.png"
    with pytest.raises(FetchError, match="more than 3 redirects"):
        fetcher.fetch(chain)
    assert len(Site.asked) == 4


@pytest.mark.parametrize(
    ("path", "words", "status"),
    [
        ("page", "sent 'text/html' and not a picture", 422),
        ("missing", "status 404", 422),
        ("lies", "limit is 0.1 MB", 413),
        ("endless", "limit is 0.1 MB", 413),
        ("slow", "took longer than 1 s", 422),
    ],
)
def test_answers_that_are_no_picture_too_large_or_too_slow_are_refused(
    fetcher, path, words, status
):
    began = time.monotonic()
    with pytest.raises(FetchError, match=words) as caught:
        fetcher.fetch(f"https://pictures.example/{path}")
    assert caught.value.status == status
    assert time.monotonic() - began < 5


def test_no_proxy_is_asked(fetcher, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetcher.fetch("https://pictures.example/a.png") == PNG


def test_a_host_that_is_not_there_is_said_so(fetcher):
    def unknown(*_, **__):
        raise socket.gaierror

    fetcher._resolve = unknown
    with pytest.raises(FetchError, match="is not known"):
        fetcher.fetch("https://pictures.example/a.png")
    fetcher._resolve = names(PUBLIC)

    def refuse(*_):
        raise ConnectionRefusedError

    fetcher._connect = refuse
    with pytest.raises(FetchError, match="cannot be reached: ConnectionRefusedError"):
        fetcher.fetch("https://pictures.example/a.png")


def test_public_addresses_are_public():
    assert is_public(PUBLIC)
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert not is_public("2001:db8::1")
