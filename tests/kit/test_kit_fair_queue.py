"""Sources that want the same thing take turns."""

from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.kit.fair_queue import FairQueue


@given(st.lists(st.one_of(st.sampled_from("abc"), st.just("take"), st.just("discard")), max_size=60))
def test_nothing_is_lost_and_nobody_is_passed_over(steps: list[str]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    waiting: list[tuple[str, int]] = []
    overtaken: dict[tuple[str, int], list[str]] = {}
    for number, step in enumerate(steps):
        if step not in ("take", "discard"):
            item = step, number
            queue.put(step, item)
            waiting.append(item)
            overtaken[item] = []
        elif waiting and step == "discard":
            item = waiting.pop(number % len(waiting))
            queue.discard(item[0], item)
        elif waiting:
            item = queue.take()
            assert item == next(each for each in waiting if each[0] == item[0])  # in order within its source
            waiting.remove(item)
            for other in waiting:
                overtaken[other].append(item[0])
            ahead = overtaken[item]
            own = ahead.count(item[0])
            assert all(ahead.count(source) <= own + 1 for source in "abc")
        assert bool(queue) == bool(waiting)
