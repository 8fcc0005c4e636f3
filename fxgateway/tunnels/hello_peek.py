"""Task: peeks at the first bytes of a connection: a ClientHello is not encrypted, and TLS still has to read it afterwards."""

import socket
from typing import Final

import trio

from fxtunnel.kit.client_hello import MAX_RECORDS_BYTES, ClientHello, NeedMore, NotTls, read_client_hello

LOOK_AGAIN_S: Final = 0.02
"""Between two looks at an incomplete hello. Real hellos arrive whole; only somebody who means to sends them in pieces."""


async def peek_client_hello(sock: socket.socket) -> ClientHello | None:
    """The ClientHello, once it has arrived; None if the peer sends something else or hangs up. Takes nothing out of the socket.

    `sock` must be non-blocking. Set a deadline around it. Safe to cancel.
    """
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(MAX_RECORDS_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        except OSError:
            return None
        match read_client_hello(data):
            case NeedMore() if data:
                await trio.sleep(LOOK_AGAIN_S)
            case ClientHello() as hello:
                return hello
            case NeedMore() | NotTls():
                return None
