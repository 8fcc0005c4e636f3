"""A WebSocket server that sends back each message, one thing after the other: its answer depends on what it gets, not on how that comes."""

import socket

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Message, Ping, RejectConnection, RejectData, Request
from wsproto.utilities import RemoteProtocolError

from tests.system.peers import Service


def websocket_echo() -> Service:
    """The server, until it is closed. A handshake for /no is answered with 403."""
    return Service(_serve)


def _serve(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link = WSConnection(ConnectionType.SERVER)
    parts: list[str | bytes | bytearray] = []
    while True:
        data = sock.recv(1 << 18)
        if not data:
            return
        try:
            link.receive_data(data)
            for event in link.events():
                match event:
                    case Request(target="/no"):
                        sock.sendall(
                            link.send(RejectConnection(403, [(b"content-length", b"3")], has_body=True)) + link.send(RejectData(b"no\n"))
                        )
                        return
                    case Request():
                        sock.sendall(link.send(AcceptConnection()))
                    case Ping():
                        sock.sendall(link.send(event.response()))
                    case CloseConnection():
                        sock.sendall(link.send(event.response()))
                        _end(sock)
                        return
                    case Message():
                        parts.append(event.data)
                        if event.message_finished:
                            whole = (b"" if isinstance(event, BytesMessage) else "").join(parts)
                            parts.clear()
                            sock.sendall(link.send(Message(data=whole)))
        except RemoteProtocolError as exc:
            if exc.event_hint is not None:
                sock.sendall(link.send(exc.event_hint))
            _end(sock)
            return


def _end(sock: socket.socket) -> None:
    """Take what is still coming, so that what was said is no victim of a RST."""
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(5)
    while sock.recv(1 << 18):
        pass
