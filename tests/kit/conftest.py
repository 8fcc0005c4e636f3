"""What several tests of the kit need: an authority, a server's context, and TLS over a pair of sockets."""

import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import trio

from fxtunnel.kit.certificates import SERVER_DAYS, Authority, issue_server_certificate, new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.link_tls import LinkContext, LinkSocket
from fxtunnel.kit.tls import client_context, handshake_client, handshake_server, server_context

ALPN = ("http/1.1", "fx-data/1")


@dataclass(frozen=True)
class Tls:
    """A directory with certificates, and the contexts made from them."""

    directory: Path
    authority: Authority

    def server(self, *hosts: str, valid_from: datetime | None = None, valid_days: int = SERVER_DAYS) -> LinkContext:
        certificate, key = issue_server_certificate(
            self.authority, hosts or ("localhost", "127.0.0.1"), valid_from=valid_from, valid_days=valid_days
        )
        (self.directory / "server.pem").write_text(certificate)
        write_secret(self.directory / "server.key", key)
        return server_context(self.directory / "server.pem", self.directory / "server.key", ALPN)

    def client(self, *alpn: str) -> LinkContext:
        return client_context(self.authority.cert_pem, alpn or ALPN[:1])

    async def pair(self, sockets: tuple[socket.socket, socket.socket] | None = None) -> tuple[LinkSocket, LinkSocket]:
        """(client, server) over a socket pair, or over the connected sockets given."""
        return await join(self.client(), self.server(), sockets)


async def join(
    client: LinkContext, server: LinkContext, sockets: tuple[socket.socket, socket.socket] | None = None
) -> tuple[LinkSocket, LinkSocket]:
    near, far = sockets or socket.socketpair()
    result: list[LinkSocket] = []

    async def answer() -> None:
        result.append(await handshake_server(far, server))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            opened = await handshake_client(near, client, "localhost")
    return opened, result[0]


@pytest.fixture(scope="session")
def authority() -> Authority:
    return new_authority("test authority")


@pytest.fixture
def tls(tmp_path: Path, authority: Authority) -> Tls:
    return Tls(tmp_path, authority)
