"""The checker of histories: it tells good ones from bad ones."""

import pytest
from lock_history import Operation, Stay, falling_tokens, is_linearizable, overlaps

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


def test_overlaps_and_tokens() -> None:
    first, second = Stay("ann", 0, 5, 1, "e"), Stay("bob", 5, 9, 2, "e")
    assert not overlaps([first, second])
    assert not falling_tokens([first, second])
    assert overlaps([first, Stay("bob", 4, 9, 2, "e")])
    assert not overlaps([first, Stay("ann", 4, 9, 1, "e")])
    assert falling_tokens([first, Stay("bob", 5, 9, 1, "e")])
    assert falling_tokens([Stay("ann", 0, 5, 7, "e"), Stay("bob", 5, 9, 6, "e")])
    assert not falling_tokens([Stay("ann", 0, 5, 7, "e"), Stay("bob", 5, 9, 6, "f")])
