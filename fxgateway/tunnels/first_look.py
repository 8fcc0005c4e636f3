"""Task: a look at what a connection says first, which is left where it is: a ClientHello is in the clear."""

import socket
from typing import Final

import trio

from fxtunnel.kit.client_hello import MAX_RECORDS_BYTES, ClientHello, NeedMore, NotTls, read_client_hello

LOOK_AGAIN_S: Final = 0.02
"""Between two looks at a hello that has come in part. Hellos come whole, but for those who try."""


async def look_at_hello(sock: socket.socket) -> ClientHello | None:
    """The hello, as soon as it is there; None for what is none. `sock` is non-blocking. Set a deadline around it."""
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
