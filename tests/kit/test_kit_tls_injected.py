"""Plaintext in front of TLS: whoever can put bytes before a genuine peer gets the connection ended and nothing delivered."""

import socket
from typing import Any

import pytest
import trio

from fxtunnel.kit.tls import HandshakeFailed, handshake_client, handshake_server

INJECTED = (b"HTTP/1.1 200 OK\r\n\r\n", b"\x00", b"\x17\x03\x03\x00\x05hello", b"\x14\x03\x03\x00\x01\x01")


@pytest.mark.parametrize("words", INJECTED)
async def test_a_client_speaks_with_no_server_that_said_something_before_tls(tls: Any, words: bytes) -> None:
    near, far = socket.socketpair()
    far.sendall(words)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_vain, handshake_server(far, tls.server()))
            with pytest.raises(HandshakeFailed):
                await handshake_client(near, tls.client(), "localhost")


@pytest.mark.parametrize("words", INJECTED)
async def test_a_server_speaks_with_no_client_that_said_something_before_tls(tls: Any, words: bytes) -> None:
    near, far = socket.socketpair()
    far.sendall(words)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_vain, handshake_client(far, tls.client(), "localhost"))
            with pytest.raises(HandshakeFailed):
                await handshake_server(near, tls.server())


async def in_vain(handshake: Any) -> None:
    """The genuine peer, which must not come to an end with it either."""
    with pytest.raises(HandshakeFailed):
        await handshake
