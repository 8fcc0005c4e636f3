"""Texts that each go to the other process once: what arrives is what was sent, however much of it was sent before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance.sent_texts import ReceivedTexts, SentTexts

TEXTS = st.text(st.characters(blacklist_characters="\x1e", blacklist_categories=["Cs"]), min_size=1, max_size=5)


@given(st.lists(st.lists(TEXTS, max_size=8), max_size=8))
def test_what_arrives_is_what_was_sent(calls: list[list[str]]) -> None:
    sent, received = SentTexts(), ReceivedTexts()
    for texts in calls:
        assert received.unpack(sent.pack(texts)) == tuple(texts)


def test_only_what_is_new_travels() -> None:
    sent = SentTexts()
    texts = [f"{number:01000}" for number in range(100)]
    assert len(sent.pack(texts)) > 100_000
    texts[7] = "new"
    again = sent.pack(texts)
    assert (len(again), b"new" in again) == (8 + 400 + 3, True)


def test_what_is_outdated_is_not_kept_for_ever() -> None:
    sent, received = SentTexts(), ReceivedTexts()
    for turn in range(5_000):
        texts = [f"a{turn}", f"b{turn}"]
        assert received.unpack(sent.pack(texts)) == tuple(texts)
    assert len(sent._places) <= 1_010
    assert len(received._kept) <= 1_010


def test_a_call_that_was_missed_is_noticed() -> None:
    sent, received = SentTexts(), ReceivedTexts()
    sent.pack(["a"])
    with pytest.raises(ValueError, match="0 texts are kept, not 1"):
        received.unpack(sent.pack(["a", "b"]))
