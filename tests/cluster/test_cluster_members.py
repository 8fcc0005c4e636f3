"""Who is in the cluster: replays, reorderings, two processes with one id, ages, and what administrators switched off."""

import random

import pytest
from cluster_fakes import server_text

from fxrelay.cluster import members as table
from fxrelay.cluster.members import NOTHING_OFF, Ages, Control, Member, Members, MemberState, Outcome
from fxtunnel.model import RelayId

A = RelayId("a")


def make() -> Members:
    return Members(Ages(30, 90))


def member(members: Members, now: float) -> Member:
    found = members.get(A, now)
    assert found is not None
    return found


def test_only_a_higher_number_of_the_same_process_counts() -> None:
    members = make()
    assert members.hear(server_text(seq=2, sessions=2), 0.0) == (Outcome.APPLIED, A)
    assert members.hear(server_text(seq=2, sessions=9), 5.0) == (Outcome.REPLAYED, A)
    assert members.hear(server_text(seq=1, sessions=9), 6.0) == (Outcome.REPLAYED, A)
    found = member(members, 7.0)
    assert (found.server.sessions, found.heard_at) == (2, 0.0)
    assert members.hear(server_text(seq=3, sessions=3), 8.0)[0] is Outcome.APPLIED
    assert (member(members, 8.0).server.sessions, member(members, 8.0).heard_at) == (3, 8.0)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_ends_with_the_newest(seed: int) -> None:
    texts = [server_text(seq=number, sessions=number) for number in range(1, 20)] * 2
    random.Random(seed).shuffle(texts)
    members = make()
    for text in texts:
        members.hear(text, 0.0)
    assert member(members, 0.0).server.sessions == 19
    assert len(members) == 1


def test_who_has_said_goodbye_stands_there_as_ended_until_it_is_down() -> None:
    members = make()
    members.hear(server_text(draining=True), 0.0)
    assert member(members, 0.0).standing == "up"
    members.hear(server_text(seq=2, draining=True, agent={"ended": True}), 1.0)
    assert members.statistics(1.0) == {"up": 0, "stale": 0, "ended": 1, "down": 0}
    assert [member(members, now).standing for now in (1.0, 40.0, 91.0)] == ["ended", "ended", "down"]
    members.hear(server_text(instance="i2", started=2_000), 92.0)
    assert member(members, 92.0).standing == "up"


def test_malformed_updates_are_counted() -> None:
    members = make()
    assert members.hear("{", 0.0) == (Outcome.MALFORMED, None)
    assert members.outcomes[Outcome.MALFORMED] == 1
    assert len(members) == 0


def test_ages_make_stale_and_down() -> None:
    members = make()
    members.hear(server_text(), 100.0, age_s=5.0)
    states = {now: member(members, now).state for now in (124.9, 125.0, 184.9, 185.0)}
    assert list(states.values()) == [MemberState.UP, MemberState.STALE, MemberState.STALE, MemberState.DOWN]
    assert members.statistics(125.0) == {"up": 0, "stale": 1, "ended": 0, "down": 0}


def test_an_update_from_the_future_is_not_younger_than_now() -> None:
    members = make()
    members.hear(server_text(), 10.0, age_s=-500.0)
    assert member(members, 10.0).heard_at == 10.0


def test_a_restarted_process_replaces_the_old_one_at_once() -> None:
    members = make()
    members.hear(server_text(seq=50, measuredAt=5_000), 0.0)
    assert members.hear(server_text(instance="i2", started=6_000, measuredAt=6_001), 1.0)[0] is Outcome.APPLIED
    assert member(members, 1.0).server.instance == "i2"
    assert member(members, 1.0).rivals == ()
    assert members.hear(server_text(seq=51, measuredAt=5_500), 2.0)[0] is Outcome.OLDER_INSTANCE
    assert member(members, 2.0).rivals == (), "it was measured before the other began: a message that was late"


@pytest.mark.parametrize("first", ["i1", "i2"])
def test_of_two_living_processes_the_later_one_wins_and_both_are_told(first: str) -> None:
    members = make()
    told = {
        "i1": [server_text(seq=n, measuredAt=10_000 + n) for n in (1, 2)],
        "i2": [server_text(instance="i2", started=6_000, seq=n, measuredAt=10_000 + n) for n in (1, 2)],
    }
    order = [first, "i2" if first == "i1" else "i1"] * 2
    for step, instance in enumerate(order):
        members.hear(told[instance][step // 2], float(step))
    assert member(members, 4.0).server.instance == "i2"
    assert member(members, 4.0).rivals == ("i1",)
    assert member(members, 40.0).rivals == (), "the other one has gone"


def test_processes_that_started_together_are_told_apart_alike_everywhere() -> None:
    winners = set()
    for order in (("i1", "i2"), ("i2", "i1")):
        members = make()
        for instance in order:
            members.hear(server_text(instance=instance), 0.0)
        winners.add(member(members, 0.0).server.instance)
    assert winners == {"i2"}


def test_the_older_process_takes_over_when_the_newer_one_falls_silent() -> None:
    members = make()
    members.hear(server_text(instance="i2", started=6_000, measuredAt=7_000), 0.0)
    assert members.hear(server_text(seq=5, measuredAt=36_000), 29.0)[0] is Outcome.OLDER_INSTANCE
    assert members.hear(server_text(seq=6, measuredAt=37_000), 30.0)[0] is Outcome.APPLIED
    assert member(members, 30.0).state is MemberState.UP
    assert member(members, 30.0).server.instance == "i1"


def test_an_old_document_of_the_older_process_takes_nothing_over() -> None:
    members = make()
    members.hear(server_text(instance="i2", started=6_000, measuredAt=7_000), 0.0)
    assert members.hear(server_text(seq=5), 100.0, age_s=101.0)[0] is Outcome.OLDER_INSTANCE


def test_controls_hold_before_and_after_the_server_is_known() -> None:
    members = make()
    members.control("a", Control(draining=True))
    members.hear(server_text(), 0.0)
    assert member(members, 0.0).is_drained
    members.control("a", Control(disable=frozenset({"start"})))
    assert (member(members, 0.0).is_drained, member(members, 0.0).disabled) == (False, {"start"})
    members.replace_controls({})
    assert member(members, 0.0).disabled == frozenset()
    members.replace_controls({"a": Control(True), "not/a/name": Control(True)})
    assert member(members, 0.0).is_drained


def test_what_is_switched_off_is_told() -> None:
    members = make()
    members.control("b", Control(True, frozenset({"start", "login"})))
    members.control("a", Control(disable=frozenset({"login"})))
    members.control("c", Control(True))
    members.control("c", NOTHING_OFF)
    assert members.switched_off() == {"a": ("login",), "b": ("drain", "login", "start")}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"disable": 1}', '{"disable": [["login"], {}, 3, "all"]}', '{"draining": 1}', "[" * 10_000]
)
def test_a_control_that_is_not_understood_switches_nothing_off(text: str) -> None:
    assert Control.parse(text) == NOTHING_OFF


def test_controls_survive_the_store() -> None:
    control = Control(True, frozenset({"login", "start"}))
    assert Control.parse(control.encode()) == control


def test_servers_that_are_down_and_deleted_are_forgotten() -> None:
    members = make()
    members.hear(server_text("a"), 0.0)
    members.hear(server_text("b"), 0.0)
    members.forget_unless(frozenset({"b"}), 90.0)
    assert len(members) == 2, "not longer than down_s"
    members.forget_unless(frozenset({"b"}), 91.0)
    assert [found.server.server_id for found in members.members(91.0)] == ["b"]


def test_invented_names_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_MEMBERS", 3)
    members = make()
    outcomes = [members.hear(server_text(f"n{number}"), 0.0)[0] for number in range(5)]
    assert outcomes == [Outcome.APPLIED] * 3 + [Outcome.TOO_MANY] * 2
    for number in range(5):
        members.control(f"c{number}", Control(True))
    assert members.hear(server_text("n0", seq=2), 1.0)[0] is Outcome.APPLIED


def test_a_member_stays_the_same_object_until_something_changes() -> None:
    members = make()
    members.hear(server_text(), 0.0)
    first = member(members, 0.0)
    assert member(members, 29.9) is first
    stale = member(members, 30.0)
    assert (stale.state, stale is first) == (MemberState.STALE, False)
    assert member(members, 10.0).state is MemberState.UP, "the reader's clock can be set back, when it turns out to have been deaf"
    members.control("a", Control(draining=True))
    assert member(members, 10.0).is_drained
    members.hear(server_text(seq=2), 40.0)
    assert (member(members, 69.9).state, member(members, 70.0).state) == (MemberState.UP, MemberState.STALE)
