"""Pump: a connection from one of the administrator's proxies, until its PROXY header has said who the client is."""

import socket
from typing import TYPE_CHECKING

from fxtunnel.engine.reactor import ERROR, HANGUP, STREAM_EVENTS
from fxtunnel.engine.splice import abort
from fxtunnel.kit.proxy_header import MAX_V2_BYTES, BadProxyHeader, ProxyHeader, parse_proxy_header

if TYPE_CHECKING:
    from fxgateway.doors.door import Door


class Proxied:
    """Waits for a header by peeking at what has arrived: bytes behind the header stay in the kernel for the client.

    Owns the socket until the header is complete. Calls the door's `header_came` or `header_failed`, once.
    """

    __slots__ = ("door", "is_over", "peer", "sock")

    def __init__(self, door: "Door", sock: socket.socket, peer: tuple[str, int]) -> None:
        self.door = door
        self.sock = sock
        self.peer = peer
        self.is_over = False

    def start(self) -> None:
        """Begin to listen to the socket."""
        self.door.reactor.register(self.sock, self, STREAM_EVENTS)

    def on_event(self, events: int) -> None:
        """From the reactor."""
        try:
            header = self._look()
        except BadProxyHeader as exc:
            self.fail("bad-proxy-header", str(exc))
        except BlockingIOError:
            pass
        except OSError:
            self.fail("bad-proxy-header", "the connection was reset")
        else:
            if header is not None:
                self._succeed(header)
            elif events & (HANGUP | ERROR):
                self.fail("bad-proxy-header", "the connection ended inside the header")

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; this connection ends, nothing else does."""
        self.fail("bad-proxy-header", "internal error")

    def fail(self, reason: str, text: str) -> None:
        """RST, and the door is told why."""
        if not self.is_over:
            self.is_over = True
            self.door.reactor.forget(self.sock)
            abort(self.sock)
            self.door.header_failed(self, reason, text)

    def _look(self) -> ProxyHeader | None:
        header = parse_proxy_header(self.sock.recv(MAX_V2_BYTES, socket.MSG_PEEK))
        if header is not None and len(self.sock.recv(header.length)) != header.length:
            raise BadProxyHeader("urgent data inside the header")
        return header

    def _succeed(self, header: ProxyHeader) -> None:
        self.is_over = True
        self.door.reactor.unregister(self.sock)
        self.door.header_came(self, (header.address, header.port) if header.address else self.peer)
