"""Tickets: one use, thirty seconds, bounded."""

import itertools

from fxgateway.tunnels.tickets import LIFETIME_S, LinkTicket, TicketBook
from fxtunnel.model import InstanceId, RelayId, SessionId

A, B = RelayId("a"), RelayId("b")
ONE = InstanceId("1")


def book(**limits: int) -> TicketBook:
    numbers = itertools.count()
    return TicketBook(lambda: f"t{next(numbers)}", **limits)


def test_a_ticket_is_good_once() -> None:
    tickets = book()
    text = tickets.issue(A, ONE, SessionId("s"), now=5.0)
    assert tickets.redeem(text, now=6.0) == LinkTicket(A, ONE, SessionId("s"), 5.0 + LIFETIME_S)
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


def test_used_tickets_count_no_longer() -> None:
    tickets = book(per_relay=2)
    waiting = tickets.issue(A, ONE, None, now=0)
    for _ in range(10):
        assert tickets.redeem(tickets.issue(A, ONE, None, now=0), now=0)
    assert tickets.redeem(waiting, now=0)
    assert not tickets._by_relay  # not even its name is kept


def test_expired_tickets_are_forgotten_when_others_are_issued() -> None:
    tickets = book()
    tickets.issue(A, ONE, None, now=0)
    tickets.issue(B, ONE, None, now=LIFETIME_S)
    assert len(tickets) == 1


def test_what_the_documents_say() -> None:
    """PROTOCOL.md and dos.md: 30 s, 32 of a relay."""
    tickets = TicketBook(itertools.count().__next__)
    texts = [tickets.issue(A, ONE, None, now=0) for _ in range(40)]
    assert LIFETIME_S == 30.0
    assert [tickets.redeem(text, now=29.9) is not None for text in texts] == [False] * 8 + [True] * 32
