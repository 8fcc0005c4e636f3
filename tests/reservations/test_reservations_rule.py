"""The rule of one record: who is let in, what expires, what is bounded, and what a store that has forgotten is told."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance import reservations as rule
from fxrelay.balance.holders import Holders, against
from fxrelay.balance.login_attempt import TRANSITIONS, Attempt, AttemptEvent, AttemptState, InvalidTransition
from fxrelay.balance.reservation_text import BadRecord, decode_record, encode_record
from fxrelay.balance.reservations import (
    ENTRY_HARD_MS,
    ENTRY_TTL_MS,
    MAX_ENTRIES,
    MAX_ENTRIES_PER_ADDRESS,
    MAX_LOGINS,
    Entry,
    Granted,
    Login,
    Moment,
    OwnerRelogin,
    Reason,
    Record,
    Rejected,
    Token,
)
from fxtunnel.model import RelayId

NOW = 1_000_000_000
LEASE = 15_000


def at(now_ms: int = NOW, number: int = 1, epoch: str = "e", horizon_ms: int | None = None) -> Moment:
    return Moment(now_ms, epoch, number, now_ms if horizon_ms is None else horizon_ms)


def login(user: str = "ann", login_id: str = "l1", now_ms: int = NOW) -> Login:
    return Login(login_id, user, "r1", now_ms + LEASE, LEASE)


def entered(record: Record, entry_id: str, user: str = "ann", address: str = "192.0.2.1", when: Moment | None = None) -> Record:
    found = rule.enter(record, entry_id, user, address, "r1", when or at())
    assert isinstance(found, Record)
    return found


def held(user: str = "ann", login_id: str = "l1", number: int = 1) -> Record:
    found = rule.commit(entered(Record(), "x", user), "x", login(user, login_id), OwnerRelogin.PREFER, at(number=number))
    assert isinstance(found, Granted)
    return found.record


def test_the_first_to_authenticate_gets_the_server_and_the_others_are_cleared() -> None:
    record = entered(entered(Record(), "a", "ann"), "b", "bob")
    granted = rule.commit(record, "b", login("bob"), OwnerRelogin.PREFER, at(number=7))
    assert isinstance(granted, Granted)
    assert (granted.token, granted.is_new, granted.record.holder, granted.record.entries) == (Token("e", 7), True, "bob", ())
    late = rule.commit(granted.record, "a", login("ann"), OwnerRelogin.PREFER, at(number=8))
    assert isinstance(late, Rejected)
    assert (late.reason, late.holder) == (Reason.RESERVED, "bob")


def test_who_enters_after_the_commit_with_an_old_list_is_rejected_though_his_entry_is_there() -> None:
    record = entered(held("ann"), "c", "cid")
    assert [entry.user for entry in record.entries] == ["cid"]
    rejected = rule.commit(record, "c", login("cid"), OwnerRelogin.PREFER, at())
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.record.entries) == (Reason.RESERVED, ())


def test_an_entry_is_needed_and_a_commit_may_be_repeated() -> None:
    missing = rule.commit(Record(), "a", login(), OwnerRelogin.PREFER, at())
    assert isinstance(missing, Rejected)
    assert missing.reason is Reason.NO_ENTRY
    record = held()
    again = rule.commit(record, "x", login(), OwnerRelogin.PREFER, at(number=9))
    assert again == Granted(record, record.token, False)


@pytest.mark.parametrize(("relogin", "reason"), [(OwnerRelogin.PREFER, None), (OwnerRelogin.DENY, Reason.OWN_LOGIN)])
def test_a_users_second_login(relogin: OwnerRelogin, reason: Reason | None) -> None:
    outcome = rule.commit(entered(held(), "y"), "y", login("ann", "l2"), relogin, at(number=5))
    if reason is None:
        assert isinstance(outcome, Granted)
        assert (outcome.token, len(outcome.record.logins)) == (Token("e", 1), 2)
    else:
        assert isinstance(outcome, Rejected)
        assert outcome.reason is reason
    assert against({RelayId("a"): "ann"}, "ann", relogin)[RelayId("a")] == ("ann" if reason is None else "")


def test_the_last_logout_frees_the_server_at_once_or_later() -> None:
    record = rule.commit(entered(held(), "y"), "y", login("ann", "l2"), OwnerRelogin.PREFER, at()).record
    record = rule.release(record, "l1", 5_000, at())
    assert record.holder == "ann"
    assert not rule.release(record, "l2", 0, at()).logins
    lingering = rule.release(record, "l2", 5_000, at())
    assert rule.purge(lingering, at(NOW + 4_999)).holder == "ann"
    assert not rule.purge(lingering, at(NOW + 5_001)).holder
    assert rule.release(lingering, "l2", 5_000, at(NOW + 4_000)) == lingering
    back = rule.commit(entered(lingering, "z"), "z", login("ann", "l3"), OwnerRelogin.DENY, at())
    assert isinstance(back, Granted)
    assert [each.login_id for each in back.record.logins] == ["l3"]


@pytest.mark.parametrize("keeps", ["linger", "sessions"])
def test_a_login_that_has_ended_counts_again_when_it_is_made_with_the_same_token(keeps: str) -> None:
    ended = rule.release(held(), "l1", 5_000, at()) if keeps == "linger" else rule.put_off(held(), "l1", 5_000, at())
    assert [each.is_lingering for each in ended.logins] == [True]
    missing = rule.commit(ended, "z", login(), OwnerRelogin.PREFER, at())
    assert isinstance(missing, Rejected)
    back = rule.commit(entered(ended, "z"), "z", login(), OwnerRelogin.PREFER, at())
    assert isinstance(back, Granted)
    assert back.record.logins == (login(),)


def test_a_users_sessions_keep_the_server_after_his_last_logout() -> None:
    mine = replace(login(), is_for_sessions=True)
    record = replace(held(), logins=(mine,))
    kept = rule.put_off(record, "l1", LEASE, at(NOW + 9_000, number=2))
    assert (kept.holder, kept.logins[0].awaits_sessions, kept.logins[0].expires_ms) == ("ann", True, NOW + 9_000 + LEASE)
    assert isinstance(rule.commit(entered(kept, "y", "bob"), "y", login("bob", "l2"), OwnerRelogin.PREFER, at(number=3)), Rejected)
    again = rule.commit(entered(kept, "y"), "y", login(login_id="l2"), OwnerRelogin.PREFER, at(number=3))
    assert isinstance(again, Granted)
    assert [known.login_id for known in again.record.logins] == ["l1", "l2"]
    renewed = rule.renew(again.record, login(login_id="l2"), again.token, NOW, at(number=4))
    assert isinstance(renewed, Granted)
    assert renewed.record.logins[0].awaits_sessions
    later = rule.put_off(renewed.record, "l2", LEASE, at(number=5))
    assert [(known.login_id, known.awaits_sessions) for known in later.logins] == [("l2", True)], "one is enough: the last"
    assert rule.put_off(later, "l1", LEASE, at(number=6)) == rule.release(later, "l1", 0, at(number=6)) == later
    assert rule.release(kept, "l1", 0, at(number=3)).holder == ""
    assert not rule.release(kept, "l1", 60_000, at(number=3)).logins[0].awaits_sessions
    assert rule.put_off(Record("e", 1), "l1", LEASE, at(number=6)).logins == (), "what is gone does not come back"


def test_an_entry_slides_with_its_requests_but_not_for_ever() -> None:
    record = entered(Record(), "a")
    for elapsed_ms in range(0, ENTRY_HARD_MS, ENTRY_TTL_MS - 1_000):
        record = rule.touch(record, "a", at(NOW + elapsed_ms))
        assert record.entries
    assert not rule.touch(record, "a", at(NOW + ENTRY_HARD_MS)).entries
    assert not rule.purge(entered(Record(), "a"), at(NOW + ENTRY_TTL_MS)).entries


def test_a_flood_from_one_address_does_not_keep_others_out() -> None:
    record = Record()
    for number in range(MAX_ENTRIES_PER_ADDRESS):
        record = entered(record, f"f{number}", "x", "198.51.100.1")
    refused = rule.enter(record, "more", "x", "198.51.100.1", "r1", at())
    assert isinstance(refused, Rejected)
    assert refused.reason is Reason.TOO_MANY
    for number in range(MAX_ENTRIES * 2):
        record = entered(record, f"g{number}", "x", f"198.51.100.{number // MAX_ENTRIES_PER_ADDRESS + 2}", at(NOW + number))
    assert len(record.entries) == MAX_ENTRIES
    record = entered(record, "honest", "ann", "192.0.2.1", at(NOW + 500))
    assert isinstance(rule.commit(record, "honest", login(now_ms=NOW + 500), OwnerRelogin.PREFER, at(NOW + 500)), Granted)


def test_logins_are_bounded() -> None:
    record = held()
    for number in range(2, MAX_LOGINS + 1):
        record = rule.commit(entered(record, "y"), "y", login("ann", f"l{number}"), OwnerRelogin.PREFER, at()).record
    outcome = rule.commit(entered(record, "y"), "y", login("ann", "one-more"), OwnerRelogin.PREFER, at())
    assert isinstance(outcome, Rejected)
    assert decode_record(encode_record(outcome.record)) == outcome.record


def test_a_lease_that_lapsed_is_taken_up_again_unless_somebody_came() -> None:
    record, late = held(), NOW + LEASE + 1
    token = record.token
    assert not rule.purge(record, at(late)).logins
    back = rule.renew(record, login(now_ms=late), token, NOW, at(late, number=4))
    assert isinstance(back, Granted)
    assert back.token == token
    taken = rule.commit(entered(record, "b", "bob", when=at(late)), "b", login("bob", "l2", late), OwnerRelogin.PREFER, at(late, number=5))
    fenced = rule.renew(taken.record, login(now_ms=late), token, NOW, at(late, number=6))
    assert isinstance(fenced, Rejected)
    assert (fenced.reason, fenced.holder) == (Reason.FENCED, "bob")
    gone = rule.release(taken.record, "l2", 0, at(late))
    assert isinstance(rule.renew(gone, login(now_ms=late), token, NOW, at(late, number=7)), Rejected)


def test_who_is_released_by_an_administrator_is_fenced() -> None:
    record = held()
    cleared = rule.clear(at(number=3))
    assert not cleared.logins
    assert isinstance(rule.renew(cleared, login(), record.token, NOW, at(number=4)), Rejected)


@pytest.mark.parametrize("old_first", [True, False])
def test_a_store_that_forgot_is_told_and_the_later_grant_is_right(old_first: bool) -> None:
    """Two relays say that they hold a server: one of them was stopped long ago and does not know that it lost it."""
    stale, right = (Token("e", 3), login("ann", "l1")), (Token("e", 9), login("bob", "l2"))
    record = entered(Record(), "c", "cid", when=at(epoch="f"))  # what others enter meanwhile is no grant
    outcomes = {}
    for token, mine in [stale, right] if old_first else [right, stale]:
        outcomes[mine.user] = rule.renew(record, mine, token, NOW, at(number=len(outcomes) + 1, epoch="f"))
        record = outcomes[mine.user].record
    assert record.holder == "bob"
    assert isinstance(outcomes["bob"], Granted)
    assert isinstance(outcomes["ann"], Granted) is old_first
    if old_first:
        new_token = outcomes["ann"].token
        assert isinstance(rule.renew(record, stale[1], new_token, NOW, at(number=9, epoch="f")), Rejected)


def test_both_logins_of_a_user_are_said_again() -> None:
    record = Record()
    for login_id in ("l1", "l2"):
        outcome = rule.renew(record, login("ann", login_id), Token("e", 3), NOW, at(number=5, epoch="f"))
        assert isinstance(outcome, Granted)
        record = outcome.record
    assert [each.login_id for each in record.logins] == ["l1", "l2"]
    assert record.token == Token("f", 5)


def test_what_another_epoch_left_behind_counts_for_nothing() -> None:
    outcome = rule.commit(entered(held(), "b", "bob", when=at(epoch="f")), "b", login("bob", "l2"), OwnerRelogin.PREFER, at(epoch="f"))
    assert isinstance(outcome, Granted)
    assert rule.purge(held(), at(epoch="f")) == Record("f")


def test_while_nobody_could_renew_those_who_were_alive_count_as_alive() -> None:
    late = NOW + LEASE * 3
    assert rule.purge(held(), at(late, horizon_ms=NOW)).holder == "ann"
    assert not rule.purge(held(), at(late)).holder


def test_a_clock_that_was_set_back_makes_nobody_wait_longer() -> None:
    back = NOW - 3_600_000
    record = rule.purge(held(), at(back))
    assert record.holder == "ann"
    assert not rule.purge(record, at(back + LEASE)).holder


def test_link_daemons_are_known_by_the_claim_whatever_it_says() -> None:
    assert rule.is_daemon({"fastx/daemon": False})
    assert not rule.is_daemon({"sub": "ann"})


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
COUNT = st.integers(0, 1 << 53)
LOGINS = st.lists(st.builds(Login, TEXT, st.just("ann"), TEXT, COUNT, COUNT, st.booleans(), st.booleans()), max_size=4).map(tuple)
ENTRIES = st.lists(st.builds(Entry, TEXT, TEXT, TEXT, TEXT, COUNT, COUNT), max_size=4).map(tuple)


@given(st.builds(Record, TEXT, COUNT, COUNT, LOGINS, ENTRIES, st.none() | st.builds(Token, TEXT, COUNT), COUNT))
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    assert decode_record(encode_record(record)) == record


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)).map(str))
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(BadRecord):
        decode_record(text)


@pytest.mark.parametrize(
    "change", [('"v":1', '"v":2'), ('"fence":1', '"fence":-1'), ('"fence":1', '"fence":true'), ('"user":"ann"', '"user":7'), ("[", "{")]
)
def test_a_record_with_a_wrong_field_is_refused(change: tuple[str, str]) -> None:
    text = encode_record(held())
    assert decode_record(text).holder == "ann"
    with pytest.raises(BadRecord):
        decode_record(text.replace(*change))
    assert decode_record(None) == Record()
    two = text.replace('"logins":[', '"logins":[{"id":"l9","user":"bob","relay":"r","expiresMs":1,"ttlMs":1},')
    with pytest.raises(BadRecord, match="two users"):
        decode_record(two)


def test_the_states_of_a_login_follow_the_seven_steps() -> None:
    attempt = Attempt("a")
    seen = [attempt.state]
    for happening in (
        AttemptEvent.ENTER,
        AttemptEvent.FORWARD,
        AttemptEvent.REQUEST,
        AttemptEvent.REQUEST,
        AttemptEvent.SUCCESS,
        AttemptEvent.GRANT,
        AttemptEvent.LET_IN,
        AttemptEvent.LOGOUT,
    ):
        attempt = attempt.after(happening)
        seen.append(attempt.state)
    assert [state.value for state in dict.fromkeys(seen)] == [
        "none",
        "entered",
        "forwarded",
        "authenticating",
        "authenticated",
        "committed",
        "held",
        "released",
    ]
    assert all(state is not attempt.state for state, _ in TRANSITIONS)
    with pytest.raises(InvalidTransition):
        Attempt("b", AttemptState.ENTERED).after(AttemptEvent.GRANT)
    reachable = {AttemptState.NONE, *TRANSITIONS.values()}
    assert reachable == set(AttemptState)


def test_holders_keep_the_newest_of_an_epoch() -> None:
    holders, server = Holders(), RelayId("s")
    assert holders.learn(server, Record("e", 1, 0, (login(),), revision=4))
    assert not holders.learn(server, Record("e", 0, revision=3))
    assert holders.users(NOW) == {server: "ann"}
    assert holders.users(NOW + LEASE) == {}
    assert holders.learn(server, Record("f", revision=1))
    holders.forget({server, RelayId("never known")})
    assert not holders.standings()
