"""Very many relays in one process: the real uplink and the real sessions, without services, stores and files of their own.

    python -m tests.chaos.relays '{"gateway_file": "gateway.json", "port": 5000, "first": 0, "count": 1000, "sources": 250}'

Prints a line of JSON when all have begun to dial, and another for each line on its standard input. The keys come from the relays' names, so
that whoever makes the gateway's relays.json knows them too.
"""

import hashlib
import json
import random
import sys
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fxrelay.uplink import dial
from fxrelay.uplink.gateway_file import GatewayUrl, load_gateway_file
from fxrelay.uplink.identity import Identity
from fxrelay.uplink.ports import LinkSession, UplinkConfig, UplinkSessionOwner, UplinkState
from fxrelay.uplink.uplink import Uplink, UplinkEnvironment
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.session import Session
from fxtunnel.errors import FxError
from fxtunnel.kit.process import settle
from fxtunnel.kit.tls import client_context
from fxtunnel.kit.tokens import public_to_text, thumbprint
from fxtunnel.model import GatewayId, InstanceId, Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol.credit import WindowBudget
from tests.chaos.load import say, words

SOURCE: ContextVar[str] = ContextVar("source")
BUDGET_BYTES = 256 << 20


@dataclass
class Order:
    """`count` relays, from number `first` on, on so many addresses of this machine; 1: all behind one, as behind a NAT."""

    gateway_file: str
    port: int
    first: int
    count: int
    sources: int
    options: dict[str, float] = field(default_factory=dict)


def name_of(number: int) -> RelayId:
    """Of a simulated relay."""
    return RelayId(f"sim-{number}")


@lru_cache
def key_of(relay_id: RelayId) -> Ed25519PrivateKey:
    """The same in every process."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(relay_id.encode()).digest())


def record_of(relay_id: RelayId) -> dict[str, Any]:
    """As relays.json has it."""
    public = key_of(relay_id).public_key()
    key = {"kid": thumbprint(public), "public_key": public_to_text(public), "enrolled_unix": 1, "token_id": "chaos"}
    return {"keys": [key], "revoked": None}


class Enrolled(Identity):
    """A relay that every gateway knows."""

    async def is_enrolled(self, gateway_id: GatewayId) -> bool:
        """As it says."""
        await trio.lowlevel.checkpoint()
        return True


class Sessions:
    """Implements `SessionFactory` with sessions that take no streams."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._budget = WindowBudget(BUDGET_BYTES)

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """See `SessionFactory`."""
        return Session(self._reactor, session_id, owner, SessionConfig(), self._budget)


async def _connect(host: str, port: int, name: str) -> trio.SocketStream:
    try:
        return await trio.open_tcp_stream(host, port, local_address=SOURCE.get())
    except OSError as exc:
        raise dial.TunnelError(f"cannot connect to {name}: {exc}") from exc


@lru_cache
def _context(ca_pem: str, alpn: str) -> Any:
    return client_context(ca_pem, [alpn])


async def run(order: Order, reactor: Reactor) -> None:
    """All relays, until standard input ends."""
    dial._connect = _connect  # each from an address of its own
    dial.client_context = lambda ca_pem, alpn: _context(ca_pem, alpn[0])  # or they would take 100 KiB each
    file = replace(load_gateway_file(Path(order.gateway_file)), urls=(GatewayUrl("127.0.0.1", order.port),))
    sessions = Sessions(reactor)
    uplinks = []
    failures: list[str] = []
    async with trio.open_nursery() as nursery:

        async def one(uplink: Uplink, source: int) -> None:
            SOURCE.set(f"127.{1 + source // 250}.0.{1 + source % 250}" if order.sources > 1 else "127.0.0.1")
            try:
                await uplink.run()
            except FxError as exc:
                failures.append(str(exc))

        for number in range(order.first, order.first + order.count):
            relay_id = name_of(number)
            identity = Enrolled(relay_id, InstanceId(f"{number:032x}"), Path(), key_of(relay_id))
            around = UplinkEnvironment(random.Random(number))
            config = UplinkConfig(**order.options)
            uplink = Uplink(file, identity, (Offer(ServiceName(f"s{number % 50}")),), sessions, config, around)
            uplinks.append(uplink)
            nursery.start_soon(one, uplink, number % order.sources)
        settle()
        say({"started": len(uplinks)})
        async for _ in words():
            statistics = [uplink.statistics() for uplink in uplinks]
            up = [entry for entry in statistics if entry.state is UplinkState.UP and any(session.is_up for session in entry.sessions)]
            say(
                {
                    "up": len(up),
                    "failures": failures[:3],
                    "states": sorted({entry.last_error for entry in statistics if entry not in up})[:5],
                }
            )
        nursery.cancel_scope.cancel()


def main() -> None:
    """See above."""
    order = Order(**json.loads(sys.argv[1]))
    reactor = Reactor()
    try:
        reactor.host_trio(lambda: run(order, reactor))
    finally:
        reactor.close()


if __name__ == "__main__":
    main()
