"""The checker of histories: it tells good ones from bad ones."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lock_history import Operation, Stay, _after, falling_tokens, is_linearizable, overlaps, read_history

ANN = Operation("acquire", "ann", 0, 1)
ANN_OUT = Operation("release", "ann", 5, 6)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([ANN, ANN_OUT, Operation("acquire", "bob", 7, 8)], True),
        ([ANN, ANN_OUT, Operation("acquire", "bob", 4, 5.5)], True),
        ([ANN, ANN_OUT, Operation("acquire", "bob", 2, 4)], False),
        ([ANN, ANN_OUT, Operation("acquire", "ann", 2, 4), Operation("acquire", "bob", 7, 8)], False),
        ([ANN, Operation("reject", "bob", 2, 3)], True),
        ([ANN, ANN_OUT, Operation("reject", "bob", 7, 8)], False),
        ([Operation("reject", "bob", 2, 3)], False),
        ([Operation("acquire", "ann", 0, 1, False), Operation("reject", "bob", 2, 3)], True),
        ([Operation("acquire", "ann", 4, 9, False), Operation("reject", "bob", 2, 3)], False),
        ([Operation("acquire", "ann", 0, 9, False), Operation("reject", "bob", 2, 3)], True),
        ([ANN, Operation("release", "ann", 5, 20, False), Operation("reject", "bob", 30, 31)], True),
        ([ANN, Operation("release", "ann", 5, 20, False), Operation("acquire", "bob", 6, 7)], True),
    ],
)
def test_what_a_lock_would_answer(operations: list[Operation], expected: bool) -> None:
    assert is_linearizable(operations) is expected


def test_many_who_are_refused_at_once_are_looked_at_once() -> None:
    crowd = [Operation("reject", f"u{number}", 2, 4, holder="ann") for number in range(60)]
    assert is_linearizable([ANN, *crowd, ANN_OUT])
    assert not is_linearizable([ANN, *crowd, ANN_OUT, Operation("reject", "bob", 7, 8)])


def tried(operations: list[Operation]) -> bool:
    """The same by trying every order of some of them, the certain ones among these."""
    wanted = {number for number, operation in enumerate(operations) if operation.is_certain}
    for size in range(len(wanted), len(operations) + 1):
        for order in permutations(range(len(operations)), size):
            if wanted <= set(order) and _fits([operations[number] for number in order]):
                return True
    return False


def _fits(order: list[Operation]) -> bool:
    state, latest = ("", 0), 0.0
    for operation in order:
        latest = max(latest, operation.begins)
        after = _after(state, operation) if latest <= operation.ends else None
        if after is None:
            return False
        state = after
    return True


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    moments = draw(st.permutations(range(10)))
    return [
        Operation(
            draw(st.sampled_from(["acquire", "release", "reject"])),
            draw(st.sampled_from(["ann", "bob"])),
            *sorted(moments[2 * number : 2 * number + 2]),
            draw(st.booleans()),
            draw(st.sampled_from(["", "ann"])),
        )
        for number in range(draw(st.integers(1, 5)))
    ]


@given(histories())
def test_every_order_tried_says_the_same(operations: list[Operation]) -> None:
    assert is_linearizable(operations) is tried(operations)


def test_overlaps_and_tokens() -> None:
    first, second = Stay("ann", 0, 5, 1, "e"), Stay("bob", 5, 9, 2, "e")
    assert not overlaps([first, second])
    assert not falling_tokens([first, second])
    assert overlaps([first, Stay("bob", 4, 9, 2, "e")])
    assert not overlaps([first, Stay("ann", 4, 9, 1, "e")])
    assert falling_tokens([first, Stay("bob", 5, 9, 1, "e")])
    assert falling_tokens([Stay("ann", 0, 5, 7, "e"), Stay("bob", 5, 9, 6, "e")])
    assert not falling_tokens([Stay("ann", 0, 5, 7, "e"), Stay("bob", 5, 9, 6, "f")])


def test_who_was_let_in_before_his_relay_was_killed_may_be_let_in_again_unseen() -> None:
    ann = {"user": "ann", "server": "s", "relay": "r1"}
    told = {"event": "no", "user": "bob", "server": "s", "relay": "r2", "reason": "reserved", "holder": "ann"}
    lines = [
        {"event": "ask", **ann, "t": 1.0},
        {"event": "in", **ann, "t": 1.1, "call": 1.0, "fence": 1, "epoch": "e"},
        {"event": "in", "user": "cid", "server": "s", "relay": "r2", "t": 30.1, "call": 30.0, "fence": 2, "epoch": "e"},
        {"event": "out", "user": "cid", "server": "s", "relay": "r2", "t": 31.0},
        {"event": "ask", **ann, "t": 40.0},
        {**told, "t": 41.1, "call": 41.0},
    ]
    _, operations = read_history(lines, [("r1", 2.0), ("r1", 40.5)], 60.0, 12.0)
    assert is_linearizable(operations["s"])
    _, operations = read_history(lines[:4] + lines[5:], [("r1", 2.0), ("r1", 40.5)], 60.0, 12.0)
    assert not is_linearizable(operations["s"])  # nobody has asked for her
