"""Tickets: one use, thirty seconds, bounded."""

import itertools

from fxgateway.tunnels.tickets import LIFETIME_S, Ticket, TicketBook
from fxtunnel.model import InstanceId, RelayId, SessionId

A, B = RelayId("a"), RelayId("b")
ONE = InstanceId("1")


def book(**limits: int) -> TicketBook:
    numbers = itertools.count()
    return TicketBook(lambda: f"t{next(numbers)}", **limits)


def test_a_ticket_is_good_once() -> None:
    tickets = book()
    text = tickets.issue(A, ONE, SessionId("s"), now=5.0)
    assert tickets.redeem(text, now=6.0) == Ticket(A, ONE, SessionId("s"), 5.0 + LIFETIME_S)
    assert tickets.redeem(text, now=6.0) is None
    assert len(tickets) == 0


def test_a_ticket_expires() -> None:
    tickets = book()
    early, late = tickets.issue(A, ONE, None, now=0.0), tickets.issue(A, ONE, None, now=1.0)
    assert tickets.redeem(early, now=LIFETIME_S) is None
    assert len(tickets) == 1
    assert tickets.redeem(late, now=LIFETIME_S) is not None


def test_unknown_text_is_no_ticket() -> None:
    assert book().redeem("t0", now=0) is None


def test_a_greedy_relay_loses_its_own_tickets_only() -> None:
    tickets = book(per_relay=2)
    other = tickets.issue(B, ONE, None, now=0)
    first, *rest = [tickets.issue(A, ONE, None, now=0) for _ in range(3)]
    assert tickets.redeem(first, now=0) is None
    assert all(tickets.redeem(text, now=0) for text in [other, *rest])


def test_all_tickets_together_are_bounded() -> None:
    tickets = book(in_all=3)
    texts = [tickets.issue(RelayId(f"r{i}"), ONE, None, now=0) for i in range(5)]
    assert len(tickets) == 3
    assert [tickets.redeem(text, now=0) is not None for text in texts] == [False, False, True, True, True]
