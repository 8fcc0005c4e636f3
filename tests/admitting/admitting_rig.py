"""Tickets that are good, memories that can fail, and relays whose service wants tickets."""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from delivery_rig import GATEWAY, ScriptedChooser
from plane import SERVICE, Plane, RelaySide

from fxrelay.admitting.memory import Use
from fxrelay.admitting.owner import OwnerQuery
from fxrelay.admitting.quotas import NO_LIMITS, StreamLimits
from fxrelay.admitting.stream_admission import EntryRules, StreamAdmission
from fxrelay.admitting.streams import StreamEntries
from fxrelay.admitting.ticket import Ticket, TicketRules, UnsignedTicket, mint_ticket
from fxrelay.delivery.delivery import DeliveryLimits
from fxrelay.delivery.placing import Placer
from fxrelay.delivery.services import Endpoint, PoolService, Service
from fxtunnel.kit.settings import Address
from fxtunnel.kit.signed_claims import Algorithm, KeySet, signing_key
from fxtunnel.model import RelayId, ServiceName

KEY = Ed25519PrivateKey.generate()
SIGNING = signing_key(KEY.public_key())
NOW = 1_700_000_000
RULES = TicketRules(KeySet([SIGNING]), SERVICE)


def mint(user: str = "alice", node: str = "", *, service: str = SERVICE, now: float = NOW, groups: tuple[str, ...] = ()) -> str:
    """A ticket for SERVICE."""
    return mint_ticket(UnsignedTicket(user, ServiceName(service), node, groups), KEY, Algorithm.EDDSA, SIGNING.kid, now)


class Memory:
    """Implements `TicketMemory` for several relays at once. `is_away`: the store does not answer."""

    def __init__(self) -> None:
        self.spent: list[str] = []
        self.given_back: list[str] = []
        self.is_away = False
        self.hangs = False

    async def spend(self, ticket: Ticket) -> Use:
        if self.hangs:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return Use.UNKNOWABLE if self.is_away else self.spend_here(ticket)

    def spend_here(self, ticket: Ticket) -> Use:
        if ticket.use_id in self.spent:
            return Use.AGAIN
        self.spent.append(ticket.use_id)
        return Use.FIRST

    async def give_back(self, ticket: Ticket) -> None:
        await trio.sleep(0.05)  # as long as a store takes: the gateway must not be quicker
        self.spent.remove(ticket.use_id)
        self.given_back.append(ticket.use_id)


@dataclass
class ScriptedOwner:
    """Implements `Owner`: says what the test wants, and notes what it was asked."""

    reason: Callable[[OwnerQuery], str | None] = lambda question: None
    asked: list[OwnerQuery] = field(default_factory=list)

    async def why_not(self, question: OwnerQuery) -> str | None:
        self.asked.append(question)
        await trio.lowlevel.checkpoint()
        return self.reason(question)


def porter_of(
    memory: Memory,
    name: str = "a",
    *,
    ticket: TicketRules | None = RULES,
    owner: ScriptedOwner | None = None,
    limits: StreamLimits = NO_LIMITS,
) -> StreamAdmission:
    admission = StreamAdmission(memory, RelayId(name), lambda: NOW)
    admission.reconfigure({SERVICE: EntryRules(ticket, owner, limits)})
    return admission


async def add_guarded_relay(
    plane: Plane,
    admission: StreamAdmission,
    port: int,
    show: Callable[[], str],
    *,
    chooser: ScriptedChooser | None = None,
    host: str = "127.0.0.1",
    limits: DeliveryLimits | None = None,
    asked: list[str] | None = None,
) -> RelaySide:
    """A relay that serves SERVICE at `port`, as a pool if there is a chooser. Each stream that comes shows what `show` says."""
    name = admission.own_id
    relay = await plane.add_relay(name=name, limits=limits)
    endpoints = (Endpoint(2, (host, port), is_local=True),)
    service = (
        Service(SERVICE, Address(host, port), endpoints, is_guarded=True)
        if chooser is None
        else PoolService(SERVICE, host, port, endpoints, is_guarded=True)
    )
    relay.table.replace([service])
    relay.desk.placer = placer = Placer(chooser or ScriptedChooser())
    placer.entries = StreamEntries(admission, lambda _: chooser is not None)

    def on_open(stream, opening) -> None:
        if asked is not None:
            asked.append(name)
        relay.desk.on_open(relay.session, stream, opening._replace(ticket=show()), GATEWAY)

    relay.session.mux._on_open = on_open
    await plane.nursery.start(placer.run)
    return relay
