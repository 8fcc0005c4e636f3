"""Pure: one-use tickets that admit data links."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fxtunnel.model import InstanceId, RelayId, SessionId

LIFETIME_S: Final = 30.0
"""A relay dials as soon as it has its ticket, which takes it at most two dial timeouts of 10 s."""


@dataclass(frozen=True, slots=True)
class LinkTicket:
    """What a ticket admits: one data link of this instance, for a new session (None) or to resume one."""

    relay_id: RelayId
    instance: InstanceId
    session_id: SessionId | None
    expires_at: float


class TicketBook:
    """The unused tickets. A relay that asks for more than `per_relay` loses its own oldest one, never another relay's.

    `new_text` makes an unguessable text; times are monotonic seconds.
    """

    def __init__(self, new_text: Callable[[], str], *, per_relay: int = 32, in_all: int = 65_536) -> None:
        self._new_text = new_text
        self._per_relay = per_relay
        self._in_all = in_all
        self._tickets: OrderedDict[str, LinkTicket] = OrderedDict()  # in the order of issue, which is that of expiry
        self._by_relay: dict[RelayId, OrderedDict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def issue(self, relay_id: RelayId, instance: InstanceId, session_id: SessionId | None, now: float) -> str:
        """A ticket for one use within LIFETIME_S."""
        self._expire(now)
        mine = self._by_relay.get(relay_id)
        if mine is not None and len(mine) >= self._per_relay:
            self._take(next(iter(mine)))
        elif len(self._tickets) >= self._in_all:
            self._take(next(iter(self._tickets)))
        text = self._new_text()
        self._tickets[text] = LinkTicket(relay_id, instance, session_id, now + LIFETIME_S)
        self._by_relay.setdefault(relay_id, OrderedDict())[text] = None
        return text

    def redeem(self, text: str, now: float) -> LinkTicket | None:
        """What `text` admits; it is spent by this. None: never issued, used, or too old."""
        self._expire(now)
        return self._take(text)

    def _expire(self, now: float) -> None:
        while self._tickets:
            text, oldest = next(iter(self._tickets.items()))
            if oldest.expires_at > now:
                return
            self._take(text)

    def _take(self, text: str) -> LinkTicket | None:
        ticket = self._tickets.pop(text, None)
        if ticket is not None:
            mine = self._by_relay[ticket.relay_id]
            del mine[text]
            if not mine:
                del self._by_relay[ticket.relay_id]
        return ticket
