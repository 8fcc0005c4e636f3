"""Pump: clients that leave a record in the access log when they end."""

from collections.abc import Mapping
from typing import Any, Final, Protocol

from fxgateway.doors.client import Client
from fxgateway.doors.web_client import TlsWebClient, WebClient
from fxtunnel.codes import Code


class AccessSink(Protocol):
    """Where records go."""

    def put(self, record: dict[str, Any]) -> None:
        """Take one without blocking, or drop it."""


class AccessRecord:
    """What is remembered of a client until it ends. Times are the reactor's, 0 for what has not happened yet."""

    __slots__ = ("accepted_at", "came_at", "first_at", "host", "peer", "scheme", "why")

    def __init__(self, peer: str, now: float, host: str = "", scheme: str = "") -> None:
        self.peer = peer
        self.came_at = now
        self.host = host
        self.scheme = scheme
        self.accepted_at = 0.0
        self.first_at = 0.0
        self.why = ""


class Recorded(Client):
    """Mixin for a client that keeps an access record, set before it begins. Goes before the client's own class, and only observes."""

    __slots__ = ()

    access_record: AccessRecord

    def on_accept(self) -> None:
        """See `Endpoint`."""
        self.access_record.accepted_at = self.reactor.now
        self.access_record.why = ""
        super().on_accept()

    def on_data(self, data: memoryview) -> None:
        """See `Endpoint`."""
        if not self.access_record.first_at:
            self.access_record.first_at = self.reactor.now
        super().on_data(data)

    def on_last_data(self, data: memoryview) -> None:
        """See `Endpoint`."""
        if not self.access_record.first_at:
            self.access_record.first_at = self.reactor.now
        super().on_last_data(data)

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        self.access_record.why = f"relay: {code.label}"
        super().on_reset(code)

    def fail(self, code: Code) -> None:
        """See `Splice`."""
        self.access_record.why = f"{'client' if code is Code.PEER_RESET else 'gateway'}: {code.label}"
        super().fail(code)

    def turn_away(self, reason: str) -> None:
        """See `Client`."""
        self.access_record.why = f"gateway: {reason}"
        super().turn_away(reason)

    def released(self) -> None:
        """See `Splice`."""
        sink, access_record, stream = self.door.config.access, self.access_record, self.stream
        if sink is not None:
            sink.put(
                {
                    "trace": self.trace,
                    "door": self.door.name,
                    "client": access_record.peer,
                    "host": access_record.host,
                    "scheme": access_record.scheme,
                    "service": self.service,
                    "relay": self.relay_name,
                    "bytes_in": stream.bytes_out if stream is not None else 0,
                    "bytes_out": stream.bytes_in if stream is not None else 0,
                    "accepted_s": round(access_record.accepted_at - access_record.came_at, 6) if access_record.accepted_at else None,
                    "first_byte_s": round(access_record.first_at - access_record.came_at, 6) if access_record.first_at else None,
                    "duration_s": round(self.reactor.now - access_record.came_at, 6),
                    "end": access_record.why or "closed",
                }
            )
        super().released()


class RecordedClient(Recorded):
    """See `Client`."""

    __slots__ = ()


class RecordedWebClient(Recorded, WebClient):
    """See `WebClient`."""

    __slots__ = ()


class RecordedTlsWebClient(Recorded, TlsWebClient):
    """See `TlsWebClient`."""

    __slots__ = ()


RECORDED: Final[Mapping[type[WebClient], type[WebClient]]] = {WebClient: RecordedWebClient, TlsWebClient: RecordedTlsWebClient}
