"""Every interleaving of three users and two servers: our rule holds, and the published algorithm is shown not to."""

import sys
from dataclasses import replace
from functools import partial

import published_machine as published
import pytest
import reservation_world as ours
from reservation_search import search

from fxrelay.balance import reservations as rule
from fxrelay.balance.reservations import Granted, Login, Moment, OwnerRelogin, Record, Rejected, Token

# What the published algorithm and its repairs allow: two users on one server; a server that stays reserved by a login nobody has.
EXPECTED = {
    "literal": (True, True),
    "atomic check and clear": (True, True),
    "rejected login revoked": (True, False),
    "login after the check": (True, False),
    "logins read again": (False, False),
}


def show(text: str) -> None:
    sys.stdout.write(text + "\n")


@pytest.mark.parametrize("name", EXPECTED)
def test_what_each_variant_of_the_published_algorithm_allows(name: str) -> None:
    two_users, leak = EXPECTED[name]
    variant = published.VARIANTS[name]
    for expected, problem in ((two_users, published.two_users), (leak, published.leaked)):
        found = search(published.START, partial(published.steps, variant), problem, max_depth=40, max_states=400_000)
        show(f"\n{name}: {problem.__name__}\n{found.told()}")
        assert bool(found.problem) is expected, found.told()
        assert expected or found.complete, "not every state was seen"


def test_the_hole_that_atomicity_does_not_close() -> None:
    """After a commit has cleared the entries, a balancer with an old list sends somebody else, who enters, and finds his entry."""
    found = search(
        published.START,
        partial(published.steps, published.Variant(True, True, True)),
        published.two_users,
        max_depth=40,
        max_states=400_000,
    )
    show("\n" + found.told())
    kinds = [action.partition(":")[0] for action in found.trace]
    first_in = kinds.index("5a check and clear")
    assert "2 enter" in kinds[first_in:], "the second entry comes after the first one's commit"
    assert not any("publishes" in action for action in found.trace)


@pytest.mark.parametrize(
    ("users", "servers", "max_states", "is_everything"), [(2, 1, 100_000, True), (3, 1, 15_000, False), (3, 2, 20_000, False)]
)
def test_our_rule_holds_in_every_interleaving(users: int, servers: int, max_states: int, is_everything: bool) -> None:
    found = search(ours.canonical(ours.start(users, servers)), ours.steps, ours.problem, max_depth=80, max_states=max_states)
    show(f"\n{users} users, {servers} servers: {found.told()}, {found.depth} steps deep, {'all' if found.complete else 'not all'} of them")
    assert not found.problem, found.told()
    assert found.complete is is_everything
    assert found.depth > 10


def test_the_search_would_find_a_rule_that_asks_for_the_entry_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def literal(record: Record, entry_id: str, login: Login, relogin: OwnerRelogin, at: Moment) -> Granted | Rejected:
        outcome = rule.commit(replace(record, logins=()), entry_id, login, relogin, at)
        return replace(outcome, record=replace(outcome.record, logins=(*record.logins, login))) if isinstance(outcome, Granted) else outcome

    monkeypatch.setattr(ours, "_commit", literal)
    found = search(ours.canonical(ours.start(2, 1)), ours.steps, ours.problem, max_depth=40, max_states=50_000)
    assert "are on server" in found.problem or "does not know" in found.problem


def test_the_search_would_find_a_lease_that_is_renewed_after_it_was_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(record: Record, login: Login, token: Token, since_ms: int, at: Moment) -> Granted | Rejected:
        return Granted(replace(rule.purge(record, at), logins=(login,)), token, False)

    monkeypatch.setattr(ours, "_renew", trusting)
    found = search(ours.canonical(ours.start(2, 1)), ours.steps, ours.problem, max_depth=40, max_states=50_000)
    show("\n" + found.told())
    assert found.problem
