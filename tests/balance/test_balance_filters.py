"""Which servers are asked about, and the first reason why another is not."""

from collections.abc import Callable
from typing import Any

import pytest
from balance_samples import DESK, LOGIN, START, ids, member
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance.builtins import fewest_sessions
from fxrelay.balance.candidates import CandidateList, CandidateSubset, Op
from fxrelay.balance.filters import (
    DRAINING,
    EXCLUDED,
    FULL,
    LOGIN_DISABLED,
    NO_MATCH,
    NOT_ASKED_FOR,
    NOT_IN_POOL,
    NOT_SERVED,
    RESERVED,
    START_DISABLED,
    UNREACHABLE,
    CandidateFilter,
    FilterContext,
    Pool,
    everyone,
)
from fxrelay.balance.model import Request
from fxrelay.cluster.members import Member, MemberState
from fxrelay.cluster.roster import Roster
from fxrelay.cluster.server import ServerObject
from fxtunnel.model import RelayId

A = RelayId("a")
QUIET = FilterContext({})


def reason(
    found: Member,
    pool: Pool = DESK,
    request: Request = LOGIN,
    around: FilterContext = QUIET,
    reaches: Callable[[ServerObject], bool] = everyone,
) -> str | None:
    candidates, dropped = CandidateFilter(pool, request.action, reaches).apply([found], request.user, around)
    assert len(candidates) + len(dropped) == 1
    return dropped[0].reason if dropped else None


TRIED = FilterContext({}, excluded=ids("a"))
BOBS = FilterContext({}, holders={A: "bob"})


def nobody(server: ServerObject) -> bool:
    return False


# Each applies to a server to which all those after it apply as well.
IN_ORDER: list[tuple[str, dict[str, Any]]] = [
    (NOT_IN_POOL, {"pool": Pool("desk", frozenset(ids("b")), {"gpu": True})}),
    (NO_MATCH, {"pool": Pool("desk", None, {"gpu": True})}),
    ("stale", {"state": MemberState.STALE}),
    (DRAINING, {"draining": True}),
    (UNREACHABLE, {"reaches": nobody}),
    (LOGIN_DISABLED, {"disable": ["login"]}),
    (NOT_ASKED_FOR, {"only": RelayId("b")}),
    (EXCLUDED, {"excluded": ids("a")}),
    (RESERVED, {"holders": {A: "bob"}}),
    (FULL, {"sessions": 3, "maxSessions": 3}),
]


@pytest.mark.parametrize("first", range(len(IN_ORDER)), ids=[name for name, _ in IN_ORDER])
def test_the_first_reason_is_told(first: int) -> None:
    facts: dict[str, Any] = {}
    for _, more in reversed(IN_ORDER[first:]):
        facts |= more
    pool = facts.pop("pool", DESK)
    state = facts.pop("state", MemberState.UP)
    reaches = facts.pop("reaches", everyone)
    around = FilterContext({}, facts.pop("excluded", ()), facts.pop("holders", None), only=facts.pop("only", None))
    assert reason(member("a", state, **facts), pool, LOGIN, around, reaches) == IN_ORDER[first][0]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (member("a"), None),
        (member("a", services=[]), NOT_SERVED),
        (member("a", services=[{"name": "ssh", "port": 22}]), NOT_SERVED),
        (member("a", MemberState.STALE), "stale"),
        (member("a", MemberState.DOWN), "down"),
        (member("a", draining=True), DRAINING),
        (member("a", is_drained=True), DRAINING),
        (member("a", disable=["login"]), LOGIN_DISABLED),
        (member("a", disabled=frozenset({"login"})), LOGIN_DISABLED),
        (member("a", disable=["start"]), None),
        (member("a", sessions=4, maxSessions=5), None),
        (member("a", sessions=5, maxSessions=5), FULL),
        (member("a", sessions=6, maxSessions=5), FULL),
        (member("a", sessions=6, maxSessions=0), None),
        (member("a", weight=0), None),
    ],
)
def test_why_a_server_is_left_out_for_a_login(found: Member, expected: str | None) -> None:
    assert reason(found) == expected


@pytest.mark.parametrize(
    ("found", "around", "expected"),
    [
        (member("a", disable=["login"]), QUIET, None),
        (member("a", disable=["start"]), QUIET, START_DISABLED),
        (member("a", disabled=frozenset({"start"})), QUIET, START_DISABLED),
        (member("a", disable=["login", "start"]), QUIET, START_DISABLED),
        (member("a"), BOBS, None),
        (member("a", sessions=5, maxSessions=5), QUIET, FULL),
    ],
)
def test_why_a_server_is_left_out_for_a_session_start(found: Member, around: FilterContext, expected: str | None) -> None:
    assert reason(found, request=START, around=around) == expected


@pytest.mark.parametrize(
    ("around", "expected"),
    [
        (TRIED, EXCLUDED),
        (FilterContext({}, only=A), None),
        (FilterContext({}, only=RelayId("b")), NOT_ASKED_FOR),
        (BOBS, RESERVED),
        (FilterContext({}, holders={A: "ann"}), None),
        (FilterContext({}, holders={RelayId("b"): "bob"}), None),
        (FilterContext({}, holders={}), None),
    ],
)
def test_what_is_not_the_servers_own(around: FilterContext, expected: str | None) -> None:
    assert reason(member("a"), around=around) == expected


@pytest.mark.parametrize(
    ("pool", "fields", "expected"),
    [
        (Pool("desk"), {}, None),
        (Pool("other"), {}, NOT_SERVED),
        (Pool("other", frozenset(ids("a"))), {}, None),  # named nodes need not publish the service
        (Pool("desk", frozenset(ids("b"))), {}, NOT_IN_POOL),
        (Pool("desk", frozenset()), {}, NOT_IN_POOL),
        (Pool("desk", None, {}), {}, None),
        (Pool("desk", None, {"gpu": True}), {}, NO_MATCH),
        (Pool("desk", None, {"gpu": True}), {"staticData": {"gpu": True}}, None),
        (Pool("desk", None, {"gpu": True}), {"staticData": {"gpu": "true"}}, NO_MATCH),
        (Pool("desk", None, {"gpu": True}), {"gpu": True, "metadata": {"gpu": True}}, NO_MATCH),
        (Pool("desk", None, {"group": "cad"}), {"staticData": {"group": ["office", "cad"]}}, None),
        (Pool("desk", None, {"group": "cad"}), {"staticData": {"group": ["office"]}}, NO_MATCH),
        (Pool("desk", None, {"group": "cad"}), {"staticData": {"group": "cadence"}}, NO_MATCH),
        (Pool("desk", None, {"group": ["a", "b"]}), {"staticData": {"group": ["a", "b"]}}, None),
        (Pool("desk", None, {"group": "cad", "gpu": True}), {"staticData": {"group": "cad"}}, NO_MATCH),
        (Pool("desk", None, {"group": None}), {}, NO_MATCH),
        (Pool("desk", frozenset(ids("a")), {"gpu": True}), {"staticData": {}}, NO_MATCH),
    ],
)
def test_which_servers_belong_to_a_pool(pool: Pool, fields: dict[str, Any], expected: str | None) -> None:
    assert reason(member("a", **fields), pool) == expected


def test_what_is_on_its_way_makes_a_server_full() -> None:
    busy = member("a", sessions=3, maxSessions=5)
    assert reason(busy, around=FilterContext({A: 1})) is None
    assert reason(busy, around=FilterContext({A: 2})) == FULL
    assert reason(busy, around=FilterContext({RelayId("b"): 2})) is None


@given(st.permutations(["c", "a", "b", "b2"]), st.dictionaries(st.sampled_from(["a", "b", "x"]), st.integers(1, 5)))
def test_candidates_come_in_order_of_id_with_what_is_on_its_way(order: list[str], counts: dict[str, int]) -> None:
    around = FilterContext({RelayId(key): value for key, value in counts.items()}, excluded=ids("c"))
    candidates, dropped = CandidateFilter(DESK, LOGIN.action).apply([member(each) for each in order], LOGIN.user, around)
    assert [(each.server_id, each.in_flight) for each in candidates] == [(each, counts.get(each, 0)) for each in ("a", "b", "b2")]
    assert [(each.server_id, each.reason) for each in dropped] == [("c", EXCLUDED)]


def test_what_is_remembered_of_a_member_ends_with_the_next_word_of_it() -> None:
    asked = []

    def reaches(server: ServerObject) -> bool:
        asked.append(server.sessions)
        return server.sessions != 2

    candidate_filter = CandidateFilter(DESK, LOGIN.action, reaches)

    def names(*found: Member) -> list[str]:
        return [each.server_id for each in candidate_filter.apply(found, LOGIN.user, QUIET)[0]]

    first, other = member("a", sessions=1), member("b", sessions=1)
    assert [names(first, other), names(first, other)] == [["a", "b"]] * 2
    assert asked == [1, 1], "once for each member"
    assert names(member("a", sessions=2), other) == ["b"]
    assert names(member("a", sessions=3, maxSessions=3), other) == ["b"]
    assert names(member("a", sessions=3), other) == ["a", "b"]
    assert asked == [1, 1, 2, 3, 3]


def test_servers_that_are_no_more_are_not_remembered_for_ever() -> None:
    candidate_filter = CandidateFilter(DESK, LOGIN.action)
    for number in range(1_000):
        candidate_filter.apply([member(f"n{number}")], LOGIN.user, QUIET)
    assert len(candidate_filter._known) < 200


CHANGES = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"),
        st.sampled_from(["up", "stale", "full", "drained", "gone"]),
        st.dictionaries(st.sampled_from("abc"), st.integers(1, 3)),
    ),
    max_size=30,
)


@given(CHANGES, st.booleans(), st.booleans())
def test_a_sieve_that_looks_at_changes_alone_says_what_one_says_that_looks_at_everything(
    changes: list[tuple[str, str, dict[str, int]]], is_guided: bool, is_open: bool
) -> None:
    roster: Roster[Member] = Roster()
    for each in "abcdefgh":
        roster.put(RelayId(each), member(each, sessions=3, maxSessions=5))
    candidate_filter = CandidateFilter(DESK, LOGIN.action)
    for server_id, change, counts in changes:
        state = MemberState.STALE if change == "stale" else MemberState.UP
        if change == "gone":
            roster.remove(RelayId(server_id))
        else:
            roster.put(
                RelayId(server_id),
                member(server_id, state, is_drained=change == "drained", sessions=5 if change == "full" else 3, maxSessions=5),
            )
        around = FilterContext(
            {RelayId(key): value for key, value in counts.items()},
            () if is_open else ids("d"),
            {} if is_open else {RelayId("e"): "bob", RelayId("f"): "ann"},
            only=RelayId("a") if is_guided else None,
        )
        peeked = candidate_filter.peek(roster, LOGIN.user, around)
        chosen = fewest_sessions(LOGIN, peeked, RelayId("a"))
        peeked = list(peeked)
        candidates, dropped = candidate_filter.apply(roster, LOGIN.user, around)
        assert peeked == candidates
        assert chosen == fewest_sessions(LOGIN, candidates, RelayId("a"))
        expected, others = CandidateFilter(DESK, LOGIN.action).apply(list(roster), LOGIN.user, around)
        assert candidates == expected
        assert sorted(dropped, key=lambda each: each.server_id) == sorted(others, key=lambda each: each.server_id)


def test_who_is_full_leaves_the_list_and_comes_back_by_edits() -> None:
    roster: Roster[Member] = Roster()
    for number in range(20):
        roster.put(RelayId(f"n{number:02}"), member(f"n{number:02}", sessions=3, maxSessions=5))
    candidate_filter = CandidateFilter(DESK, LOGIN.action)

    def edits(in_flight: int, tried: tuple[RelayId, ...] = ()) -> list[tuple[Op, int]]:
        mark = offered.mark
        candidates = candidate_filter.peek(roster, LOGIN.user, FilterContext({RelayId("n07"): in_flight}, tried))
        part = candidates if isinstance(candidates, CandidateSubset) else offered.without(())
        assert (part.offered is offered, part.is_current) == (True, True)
        return [(edit.op, edit.at) for edit in offered.since(mark) or ()]

    offered = candidate_filter.peek(roster, LOGIN.user, QUIET)
    assert isinstance(offered, CandidateList)
    assert edits(1) == []
    assert edits(2) == [(Op.LEAVE, 7)]
    assert edits(3) == []
    assert edits(1, ids("n03")) == [(Op.ENTER, 7)]
    roster.put(RelayId("n09"), member("n09", sessions=5, maxSessions=5))
    assert edits(1) == [(Op.LEAVE, 9)]
    assert candidate_filter.peek(roster, LOGIN.user, FilterContext({RelayId("n07"): 1}, ids("n00", "n09"))) == offered[1:]
    assert {
        each.server_id: each.reason for each in candidate_filter.apply(roster, LOGIN.user, FilterContext({}, ids("n00", "n09")))[1]
    } == {
        "n00": EXCLUDED,
        "n09": EXCLUDED,
    }


def test_a_roster_tells_what_has_changed_since_somebody_looked() -> None:
    roster: Roster[str] = Roster()
    roster.put(RelayId("a"), "a1")
    roster.put(RelayId("b"), "b1")
    assert roster.since(None) is None
    mark = roster.mark
    assert roster.since(mark) == []
    roster.put(RelayId("a"), "a2")
    roster.put(RelayId("c"), "c1")
    roster.put(RelayId("a"), "a3")
    assert roster.since(mark) == ["a3", "c1"]
    assert list(roster) == ["b1", "c1", "a3"]
    assert "c1" in roster
    roster.remove(RelayId("x"))
    assert roster.since(mark) is not None
    roster.remove(RelayId("b"))
    assert roster.since(mark) is None
    assert (roster.get(RelayId("b")), len(roster)) == (None, 2)
