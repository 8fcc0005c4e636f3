"""Task: the links to one gateway process: a control link, which hands out tickets, and the data sessions dialled with them."""

from collections.abc import Sequence
from typing import Final, Protocol

import trio

from fxrelay.uplink.control_link import ControlLink
from fxrelay.uplink.dial import within
from fxrelay.uplink.ports import LinkSession, UplinkConfig, UplinkSessionOwner
from fxrelay.uplink.slot import Slot
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.messages import Closing, Message
from fxtunnel.errors import FxError, PeerRefused, TunnelClosed
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.kit.tls import HandshakeFailed, HandshakeProblem
from fxtunnel.model import GatewayId, SessionId
from fxtunnel.protocol.hello import Hello, Welcome

RENEWAL_S: Final = 60.0
"""How often sessions are looked at for whether they are worn: half of the stream ids are left then."""
GIVEN_UP: Final = "too many processes of the gateway go away at once"


class ProcessLinksOwner(Protocol):
    """What the links to a process need of their uplink."""

    @property
    def gateway_id(self) -> GatewayId:
        """For log lines."""

    @property
    def wants_sessions(self) -> bool:
        """Whether a session that is over should be made anew."""

    async def dial_data(self, hello: Hello, worker: str, process: str) -> tuple[LinkSocket, Welcome]:
        """A welcomed data link to that worker of the gateway; empty: there is only one. `process`: to no other one; empty: to any.

        Raises TunnelError.
        """

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """A session that the gateway has begun."""

    def ends_with(self, exc: FxError) -> bool:
        """Whether this failure is final; if so, the uplink has begun to end."""


class ProcessLinks:
    """Implements `SlotOwner`: a relay's links to one process of a gateway.

    A gateway that is being restarted has two processes for a while, and each has links of its own. Those to the departing process last
    until its last stream has ended.
    """

    def __init__(self, owner: ProcessLinksOwner, config: UplinkConfig, slots: "SlotFactory") -> None:
        self.link: ControlLink | None = None
        self.hold_s = 0.0
        """How long the gateway keeps a session without a link, in seconds."""
        self.process = ""
        """Which run of the gateway; empty before the first welcome, and for gateways that do not say."""
        self.worker = ""
        """The number of the worker that has our sessions; empty if the gateway has only one process."""
        self.departs = trio.Event()
        """Set when the process drains: no new sessions, and those that are open can be resumed only if it `is_named`."""
        self.is_named = False
        """Whether the process can still be dialled by its name after it has handed its address on."""
        self._owner = owner
        self._config = config
        self._link_changed = trio.Event()
        self._dialling: dict[trio.CancelScope, LinkSession | None] = {}
        self._new_slot = slots
        self.slots: list[Slot] = [slots(self) for _ in range(config.links)]

    @property
    def gateway_id(self) -> GatewayId:
        """See `SlotOwner`."""
        return self._owner.gateway_id

    @property
    def wants_sessions(self) -> bool:
        """See `SlotOwner`."""
        return self._owner.wants_sessions and not self.departs.is_set()

    @property
    def sessions(self) -> list[LinkSession]:
        """Those that are not over."""
        return [slot.session for slot in self.slots if slot.session is not None]

    @property
    def streams(self) -> int:
        """Open streams."""
        return sum(session.statistics().mux.streams for session in self.sessions)

    @property
    def is_up(self) -> bool:
        """Whether a data link is up."""
        return any(session.statistics().is_up for session in self.sessions)

    async def run_slots(self) -> None:
        """Keep the data sessions while any is wanted or open. One that is worn makes way for another, and ends with its last stream."""
        async with trio.open_nursery() as nursery:
            for slot in self.slots:
                nursery.start_soon(slot.run)
            while self.wants_sessions:
                with trio.move_on_after(RENEWAL_S):
                    await self.departs.wait()
                for successor in self._successors():
                    nursery.start_soon(successor.run)

    async def open_link(self, session: LinkSession | None) -> tuple[LinkSocket, Welcome]:
        """See `SlotOwner`. `session` must be detached."""
        with trio.CancelScope() as scope:
            self._dialling[scope] = session
            self._give_up_dialling()
            try:
                session_id = None if session is None else session.id
                ticket, worker = await self._ticket(session_id)
                received = 0 if session is None else session.received
                process = self.process if self.departs.is_set() else ""
                return await self._owner.dial_data(Hello(ticket, session_id, received, caps=self._config.caps), worker, process)
            except HandshakeFailed as exc:
                if not self.departs.is_set() or exc.problem is not HandshakeProblem.NO_COMMON_PROTOCOL:
                    raise
                self.lose()
            finally:
                del self._dialling[scope]
        raise PeerRefused(Refusal.UNKNOWN_SESSION, "its process of the gateway goes away")

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """See `SlotOwner`."""
        return self._owner.new_session(owner, session_id)

    def ends_with(self, exc: FxError) -> bool:
        """See `SlotOwner`. Nothing that a departing process says is final for the whole uplink."""
        return not self.departs.is_set() and self._owner.ends_with(exc)

    def depart(self) -> None:
        """The process drains, and its address belongs to a successor. Open sessions live on while their links do, or can be resumed."""
        self.departs.set()
        self._give_up_dialling()

    def lose(self) -> None:
        """The process cannot be reached any more, not even by name."""
        self.is_named = False
        self.depart()

    def set_link(self, link: ControlLink | None) -> None:
        """A control link is up, or lost."""
        self.link = link
        self._link_changed.set()
        self._link_changed = trio.Event()

    def send(self, message: Message) -> bool:
        """Send it if there is a control link; whether there was."""
        if self.link is None:
            return False
        try:
            self.link.send_nowait(message)
        except TunnelClosed:
            return False
        return True

    def close_sessions(self, code: Code, text: str) -> None:
        """End every session, with a goodbye."""
        for slot in self.slots:
            slot.close(code, text)

    def give_up(self) -> None:
        """Too many processes depart at once: end what is still open at this one, soon. May be repeated."""
        self.lose()
        self.close_sessions(Code.OVERLOAD, GIVEN_UP)
        if self.link is not None:
            self.link.end_soon(Closing(code=Code.OVERLOAD, message=GIVEN_UP))

    async def say_goodbye(self, code: Code, text: str) -> None:
        """End the control link with a last message, if there is one; returns when it has ended. Set a deadline around it."""
        if self.link is not None:
            self.link.end_soon(Closing(code=code, message=text))
        while self.link is not None:
            await self._link_changed.wait()

    def _successors(self) -> list[Slot]:
        """New slots, for as many sessions as have become worn. Those that have made way are ended when nothing is open on them."""
        self.slots = [slot for slot in self.slots if slot.session is not None or not slot.retires]
        worn = [slot for slot in self.slots if not slot.retires and slot.is_worn] if self.wants_sessions else []
        for slot in worn:
            slot.retires = True
        if any(slot.session is not None and slot.session.statistics().is_up for slot in self.slots if not slot.retires):
            for slot in self.slots:
                if slot.retires:
                    slot.close_if_done()
        successors = [self._new_slot(self) for _ in worn]
        self.slots += successors
        return successors

    def _give_up_dialling(self) -> None:
        """Cancel pointless dials: those for new sessions of a departing process and, if it cannot be named, all dials to it."""
        for scope, session in self._dialling.items():
            if self.departs.is_set() and (session is None or not self.is_named):
                scope.cancel()

    @property
    def _kept(self) -> tuple[SessionId, ...]:
        return tuple(session.id for session in self.sessions)

    async def _ticket(self, session_id: SessionId | None) -> tuple[str, str]:
        """A ticket, over this control link or a later one, and the worker that knows it."""
        while True:
            link = self.link
            if link is None:
                await self._link_changed.wait()
                continue
            try:
                with within(self._config.dial_timeout_s, f"{self.gateway_id} gave no ticket"):
                    return await link.ticket(session_id, self._kept if session_id is None else None), link.welcome.worker
            except TunnelClosed:
                if self.link is link:
                    await self._link_changed.wait()


def too_many(departing: Sequence[ProcessLinks], most: int) -> Sequence[ProcessLinks]:
    """Those beyond so many: first where nothing is open, then the oldest. Not the last, as what was sent there may still be on its way."""
    return sorted(departing[:-1], key=lambda links: links.streams > 0)[: max(0, len(departing) - most)]


class SlotFactory(Protocol):
    """Makes the slots of the links to a process."""

    def __call__(self, owner: ProcessLinks) -> Slot:
        """One of them."""
