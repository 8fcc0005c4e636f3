"""Pump: a client that moves from one worker to another, as a message that travels with its socket."""

import socket
from base64 import b64decode, b64encode
from typing import Any

from fxgateway.doors.client import Client
from fxgateway.doors.door import Door
from fxgateway.doors.recorded import RECORDED, AccessRecord, RecordedClient
from fxgateway.doors.web_client import TlsWebClient, WebClient, Words
from fxgateway.routing.failover import FailoverState
from fxgateway.routing.preread_router import Destination
from fxgateway.workers.bridge import PlainEnd
from fxgateway.workers.channel import Message
from fxtunnel.model import ServiceName
from fxtunnel.protocol.opening import Opening


def pack(client: Client, early: bytes, named: str) -> Message:
    """The message for a client. `early` are its first bytes; `named` is its ip:port, if its socket will not tell that at the other end."""
    access_record = client.access_record
    words = client.words if isinstance(client, WebClient) else None
    return {
        "op": "client",
        "door": str(client.door.config.listen),
        "address": client.address,
        "named": named,
        "service": client.service,
        "trace": client.trace,
        "tags": _text(client.tags),
        "journey": client.failover,
        "relay": client.relay_name,
        "early": _text(early),
        "has_ended": client.has_ended,
        "words": None if words is None else [_text(words.accept), _text(words.instead), _text(words.greeting), words.is_greeted],
        "diary": None if access_record is None else [access_record.peer, access_record.came_at, access_record.host, access_record.scheme],
    }


def unpack(door: Door, sock: socket.socket, message: Message) -> tuple[Client, bytes]:
    """The client, belonging to one of our doors, and its first bytes. It owns `sock`; its `begin` has not been called yet."""
    service, address = ServiceName(message["service"]), str(message["address"])
    is_recorded = door.config.access is not None
    client: Client
    if message["words"] is None:
        kind = RecordedClient if is_recorded else Client
        client = kind(door, sock, address, service, _bytes(message["tags"]))
    else:
        web = TlsWebClient if isinstance(sock, PlainEnd) else WebClient
        client = (RECORDED[web] if is_recorded else web)(door, sock, address, Destination(service), Opening(service))
        client.tags = _bytes(message["tags"])
        accept, instead, greeting, is_greeted = message["words"]
        client.words = Words(_bytes(accept), _bytes(instead), _bytes(greeting), bool(is_greeted))
    client.trace, client.named, client.relay_name = message["trace"], message["named"], message["relay"]
    if is_recorded:
        client.access_record = _access_record(message["diary"], client)
    client.failover = FailoverState._make(tuple(field) if isinstance(field, list) else field for field in message["journey"])
    client.has_ended = bool(message["has_ended"])
    return client, _bytes(message["early"])


def _access_record(facts: list[Any] | None, client: Client) -> AccessRecord:
    # A reload may have come to one worker a moment before the other.
    return AccessRecord(client.named or client.peer(), client.reactor.now) if facts is None else AccessRecord(*facts)


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return b64decode(text)
