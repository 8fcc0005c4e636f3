"""Pages of key sets, from real servers: good ones, and whatever else may be there."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fxtunnel.kit.certificates import issue_server_certificate, new_authority
from fxtunnel.kit.key_page import MAX_PAGE_BYTES, PageError, fetch_page

PAGE = b'{"keys": []}'


class Handler(http.server.BaseHTTPRequestHandler):
    """A key set, and beside it what is none."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match self.path:
            case "/keys?of=us":
                self._say(200, PAGE, ("Content-Length", str(len(PAGE))))
            case "/keys?of=us-in-chunks":
                self._say(200, b"%x\r\n%b\r\n0\r\n\r\n" % (len(PAGE), PAGE), ("Transfer-Encoding", "chunked"))
            case "/full":
                self._say(200, b" " * MAX_PAGE_BYTES)
            case "/long":
                self._say(200, b" " * (MAX_PAGE_BYTES + 1))
            case "/elsewhere":
                self._say(302, b"", ("Location", "/keys?of=us"), ("Content-Length", "0"))
            case "/half":
                self._say(200, PAGE, ("Content-Length", "1000"))
            case "/garbage":
                self.wfile.write(b"SSH-2.0-nothing\r\n\r\n")
            case _:
                self._say(404, b"")
        self.close_connection = True

    def _say(self, status: int, body: bytes, *fields: tuple[str, str]) -> None:
        self.send_response(status)
        for field in fields:
            self.send_header(*field)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that has these pages."""
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("path", ["/keys?of=us", "/keys?of=us-in-chunks"])
async def test_a_page_of_this_host_is_fetched(path: str) -> None:
    with serving() as port:
        assert await fetch_page(f"http://127.0.0.1:{port}{path}", None) == PAGE
        assert len(await fetch_page(f"http://127.0.0.1:{port}/full", None)) == MAX_PAGE_BYTES


@pytest.mark.parametrize(
    ("path", "why"),
    [("/elsewhere", "302"), ("/none", "404"), ("/long", "longer than"), ("/half", "closed"), ("/garbage", "illegal|malformed")],
)
async def test_what_is_no_page_is_told(path: str, why: str) -> None:
    with serving() as port, pytest.raises(PageError, match=why):
        await fetch_page(f"http://127.0.0.1:{port}{path}", None)


async def test_nobody_there(tmp_path: Path) -> None:
    with serving() as port:
        pass
    with pytest.raises(PageError, match="refused"):
        await fetch_page(f"http://127.0.0.1:{port}/", None)
    with pytest.raises(PageError, match="No such file"):
        await fetch_page("https://127.0.0.1/", tmp_path / "none.pem")
    with pytest.raises(PageError):
        await fetch_page("https://a..b/", None)


async def test_who_serves_it_over_tls_has_to_show_who_he_is(tmp_path: Path) -> None:
    authority, another = new_authority("keys"), new_authority("others")
    certificate, key = issue_server_certificate(authority, ("127.0.0.1",))
    for name, text in (("server.pem", certificate), ("ca.pem", authority.cert_pem), ("other.pem", another.cert_pem)):
        (tmp_path / name).write_text(text)
    (tmp_path / "server.key").write_bytes(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with serving(context) as port:
        assert await fetch_page(f"https://127.0.0.1:{port}/keys?of=us", tmp_path / "ca.pem") == PAGE
        for ca in (None, tmp_path / "other.pem"):
            with pytest.raises(PageError, match="certificate verify failed"):
                await fetch_page(f"https://127.0.0.1:{port}/keys?of=us", ca)
        with pytest.raises(PageError, match="certificate verify failed"):
            await fetch_page(f"https://localhost:{port}/keys?of=us", tmp_path / "ca.pem")
