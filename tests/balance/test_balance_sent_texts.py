"""Texts that each go to the other process once: what arrives is what was sent, however much of it was sent before."""

from collections.abc import Sequence

import pytest
from balance_samples import candidate
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance.candidates import MAX_EDITS, CandidateList, CandidateSubset
from fxrelay.balance.model import Candidate
from fxrelay.balance.sent_texts import MAX_LISTS, PASSING, ReceivedTexts, SentTexts
from fxtunnel.model import RelayId

TEXTS = st.text(st.characters(blacklist_characters="\x1e", blacklist_categories=["Cs"]), min_size=1, max_size=5)


@given(st.lists(st.lists(TEXTS, max_size=8), max_size=8))
def test_what_arrives_is_what_was_sent(calls: list[list[str]]) -> None:
    sent, received = SentTexts(), ReceivedTexts()
    for texts in calls:
        assert received.unpack(sent.pack(texts)).texts == texts


def test_only_what_is_new_travels() -> None:
    sent = SentTexts()
    texts = [f"{number:01000}" for number in range(100)]
    assert len(sent.pack(texts)) > 100_000
    texts[7] = "new"
    again = sent.pack(texts)
    assert (len(again), b"new" in again) == (24 + 400 + 3, True)


def test_what_is_outdated_is_not_kept_for_ever() -> None:
    sent, received = SentTexts(), ReceivedTexts()
    for turn in range(5_000):
        texts = [f"a{turn}", f"b{turn}"]
        assert received.unpack(sent.pack(texts)).texts == texts
    assert len(sent._places) <= 1_010
    assert len(received._kept) <= 1_010


def test_a_call_that_was_missed_is_noticed() -> None:
    sent, received = SentTexts(), ReceivedTexts()
    sent.pack(["a"])
    with pytest.raises(ValueError, match="0 texts are kept, not 1"):
        received.unpack(sent.pack(["a", "b"]))


KINDS = st.sampled_from(["change", "enter", "leave", "count", "send", "without", "only", "late"])
CHANGES = st.lists(st.tuples(KINDS, st.integers(0, 9), st.integers(0, 5)), max_size=60)


def texts_of(candidates: Sequence[Candidate]) -> list[str]:
    return [each.server.text for each in candidates]


def some_of(offered: CandidateList, what: str, at: int, value: int) -> CandidateList | CandidateSubset:
    if what == "without":
        return offered.without([place for place in range(len(offered)) if (at + place * value) % 3 == 0])
    return offered if what == "send" else offered.only([RelayId(f"n{(at + each) % 6}") for each in range(value)])


@given(CHANGES)
def test_a_list_that_is_only_edited_arrives_as_it_is(changes: list[tuple[str, int, int]]) -> None:
    sent, received = SentTexts(), ReceivedTexts()
    offered, turn = CandidateList([candidate(f"n{number}") for number in range(3)]), 0
    for what, at, value in [*changes, ("send", 0, 0)]:
        place = at % (len(offered) + 1)
        if what == "enter":
            if offered.place(RelayId(f"n{value}")) is None:
                offered.enter(candidate(f"n{value}", in_flight=at % 2, sessions=value))
        elif what in ("send", "without", "only"):
            wanted = some_of(offered, what, at, value)
            listed = received.unpack(sent.pack_offered(wanted))
            assert listed.meant() == texts_of(wanted)
            assert wanted.counted() == [(place, each) for place, each in enumerate(wanted) if each.in_flight]
            assert [each.server_id in wanted.ids() for each in wanted] == [True] * len(wanted)
            assert [each.server_id in wanted.ids() for each in offered] == [each in wanted for each in offered]
            assert listed.texts == texts_of(offered)
            assert (listed.edits is None, listed.turn) == (turn == 0, turn + 1)
            turn = listed.turn
        elif what == "late":
            part = offered.without([place] if place < len(offered) else [])
            offered.enter(candidate("x"))
            listed = received.unpack(sent.pack_offered(part))
            assert (listed.meant(), listed.number) == (texts_of(part), PASSING), "the list has changed: they travel by themselves"
            offered.leave(len(offered) - 1)
        elif place < len(offered) and what == "leave":
            offered.leave(place)
        elif place < len(offered):
            server = candidate(offered[place].server_id, sessions=at).server if what == "change" else offered[place].server
            offered.change(place, Candidate(server, value if what == "count" else 0))
    assert offered.counted() == [(place, each) for place, each in enumerate(offered) if each.in_flight]
    assert all(each.server_id in offered.ids() for each in offered)
    assert [offered.place(each.server_id) for each in offered] == list(range(len(offered)))


def test_of_a_list_the_other_end_has_only_edits_travel() -> None:
    sent, other = SentTexts(), CandidateList([candidate("x")])
    offered = CandidateList([candidate(f"n{number}") for number in range(500)])
    assert len(sent.pack_offered(offered)) > 50_000
    offered.change(7, Candidate(offered[7].server, 3))
    assert len(sent.pack_offered(offered)) == 24
    assert len(sent.pack_offered(offered.without([1, 3]))) == 24 + 8
    assert len(sent.pack_offered(offered.only([offered[9].server_id]))) == 24 + 4
    changed = candidate("n7", sessions=9)
    offered.change(7, changed)
    sent.pack_offered(other)
    assert len(sent.pack_offered(offered)) == 24 + 12 + len(changed.server.text)
    for number in range(MAX_EDITS + 1):
        offered.change(8, candidate("n8", sessions=number))
    assert len(sent.pack_offered(offered)) > 2_000, "too much has changed: the list is sent again, its texts are not"


def test_more_lists_than_are_kept_arrive_all_the_same() -> None:
    sent, received = SentTexts(), ReceivedTexts()
    lists = [CandidateList([candidate(f"n{number}"), candidate("m")]) for number in range(MAX_LISTS + 3)]
    for _ in range(3):
        for offered in lists:
            assert received.unpack(sent.pack_offered(offered)).texts == [each.server.text for each in offered]
            assert received.unpack(sent.pack(["passing"])).texts == ["passing"]
    assert len(received._lists) <= MAX_LISTS + 1
