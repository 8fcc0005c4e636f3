"""Pure: which service a client's first bytes (TLS, HTTP, SSH) lead to."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final
from urllib.parse import parse_qs

from fxgateway.routing.hosts import HostTable
from fxgateway.routing.request_head import BadHead, RequestHead, one_request, read_request_head
from fxtunnel.kit.client_hello import MAX_RECORDS_BYTES, UNRECOGNIZED_NAME, ClientHello, NeedMore, read_client_hello
from fxtunnel.model import RelayId, ServiceName, is_name
from fxtunnel.protocol.opening import MAX_TICKET_BYTES

MAX_FIRST_BYTES: Final = MAX_RECORDS_BYTES
"""How much of a client's first bytes is looked at, TLS record headers included."""
MAX_REMEMBERED: Final = 1_024
"""Hosts whose `Destination` is kept, so that most clients need no look-up."""
STREAM_PATH: Final = "/.fx/stream/"
STREAM_PROTOCOL: Final = "fx-stream"
SWITCHING: Final = f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {STREAM_PROTOCOL}\r\n\r\n".encode()
_REQUEST: Final = re.compile(rb"[A-Z]{2,20} [/*h]")
_PERHAPS_REQUEST: Final = re.compile(rb"[A-Z]{1,20} ?")
_TLS_HANDSHAKE: Final = 0x16
_SSH: Final = b"SSH-"


class DoorKind(StrEnum):
    """What a door takes in."""

    TCP = "tcp"
    SNI = "sni"
    HTTP = "http"
    HTTPS = "https"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class NeedBytes:
    """No decision is possible before this many bytes have arrived."""

    at_least_bytes: int


@dataclass(frozen=True, slots=True)
class Destination:
    """The client goes to `service`.

    `head` is the HTTP request that decided it, for answers to that; `instead`, if not None, is sent to the service in its place. `greeting`
    goes to the client once the service is reached. `node` is the only node that will do; `ticket` is what the client showed.
    """

    service: ServiceName
    host: str = ""
    scheme: str = ""
    head: RequestHead | None = None
    instead: bytes | None = None
    greeting: bytes = b""
    node: RelayId | None = None
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class TurnAway:
    """The client goes nowhere. `status` is that of an HTTP answer, `last_bytes` the bytes to send instead; RST if there is neither."""

    reason: str
    text: str
    status: int = 0
    last_bytes: bytes = b""
    accept: bytes = b""
    host: str = ""


Decision = NeedBytes | Destination | TurnAway


@dataclass(frozen=True, slots=True)
class PrereadRouter:
    """Decides where a door's clients go: by the door's kind, the routes, and `default`, the service of clients that do not say.

    `ssh` is the service of clients that open with SSH's greeting at an `auto` door (RFC 4253, 4.2). `streams` are services that can be
    asked for by name, with an HTTP upgrade (PROTOCOL.md, 9).
    """

    kind: DoorKind
    routes: HostTable
    default: ServiceName | None
    ssh: ServiceName | None = None
    streams: frozenset[ServiceName] = frozenset()
    _by_host: dict[str, Destination] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Where clients go that ask by TLS for hosts which were asked for before."""

    def services(self) -> frozenset[ServiceName]:
        """Everything it leads to."""
        return self.routes.services() | self.streams | {service for service in (self.default, self.ssh) if service is not None}

    def receive(self, data: bytes) -> Decision:
        """What to do with a client that has said `data` so far."""
        if not data:
            return NeedBytes(1)
        if self.kind is DoorKind.SNI:
            return self.receive_tls(data)
        if self.kind is DoorKind.AUTO:
            return self._receive_any(data)
        return self.receive_http(data, "https" if self.kind is DoorKind.HTTPS else "http")

    def receive_tls(self, data: bytes) -> Decision:
        """For a ClientHello; its bytes go on to the service unchanged."""
        found = read_client_hello(data)
        match found:
            case NeedMore(at_least):
                return NeedBytes(at_least)
            case ClientHello(host):
                destination = self._by_host.get(host)
                if destination is not None:
                    return destination
                service = (self.routes.find_host(host) if host else None) or self.default
                if service is None:
                    return TurnAway("no-route", f"no route for {host or 'a client without SNI'}", last_bytes=UNRECOGNIZED_NAME, host=host)
                if len(self._by_host) >= MAX_REMEMBERED:
                    self._by_host.clear()
                destination = self._by_host[host] = Destination(service, host, "tls")
                return destination
            case _:
                return TurnAway("bad-hello", found.reason)

    def receive_http(self, data: bytes, scheme: str) -> Decision:
        """For the first request of a connection, which decides for all that follow."""
        head = read_request_head(data)
        if head is None:
            return NeedBytes(len(data) + 1)
        if isinstance(head, BadHead):
            return TurnAway("bad-request", head.reason, head.status)
        if head.path.startswith(STREAM_PATH):
            return self._receive_stream(head, scheme)
        found = self.routes.find(head.host, head.path)
        if found is not None and found.by_path:
            return Destination(found.service, head.host, scheme, head, one_request(head))
        service = found.service if found is not None else self.default
        if service is None:
            return TurnAway("no-route", f"no route for {head.host or 'a request without Host'}", 404, accept=head.accept, host=head.host)
        return Destination(service, head.host, scheme, head)

    def _receive_stream(self, head: RequestHead, scheme: str) -> Decision:
        path, _, query = head.path.removeprefix(STREAM_PATH).partition("?")
        asked = parse_qs(query, keep_blank_values=True)
        nodes = asked.get("node", [])
        if "upgrade" not in head.connection or head.upgrade != STREAM_PROTOCOL:
            return TurnAway("bad-request", f"{STREAM_PATH} is for upgrades to {STREAM_PROTOCOL}", 426, accept=head.accept, host=head.host)
        if path not in self.streams:
            return TurnAway("no-route", "no such stream can be asked for here", 404, accept=head.accept, host=head.host)
        if not asked.keys() <= {"node"} or not all(map(is_name, nodes)) or len(nodes) > 1 or len(head.ticket) > MAX_TICKET_BYTES:
            text = "the node is no name, something else is asked for, or the ticket is too long"
            return TurnAway("bad-request", text, 400, accept=head.accept, host=head.host)
        node = RelayId(nodes[0]) if nodes else None
        return Destination(ServiceName(path), head.host, scheme, head, b"", SWITCHING, node, head.ticket)

    def _receive_any(self, data: bytes) -> Decision:
        if data[0] == _TLS_HANDSHAKE:
            return self.receive_tls(data)
        if _REQUEST.match(data):
            return self.receive_http(data, "http")
        if _PERHAPS_REQUEST.fullmatch(data):
            return NeedBytes(len(data) + 1)
        service = self.ssh if data.startswith(_SSH) and self.ssh is not None else self.default
        return Destination(service) if service is not None else TurnAway("unknown-protocol", "neither TLS nor HTTP")
