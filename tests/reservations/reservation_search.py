"""A small explicit-state model checker: every interleaving, breadth first, each state once; the shortest trace to what must not be."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
Steps = Callable[[S], Iterable[tuple[str, S]]]


@dataclass(frozen=True)
class Found(Generic[S]):
    """What a search came to. `trace` is empty if every state reached is as it must be; `complete`: there are no other states."""

    states: int
    depth: int
    complete: bool
    problem: str = ""
    trace: tuple[str, ...] = ()

    def told(self) -> str:
        lines = [f"{step:2}. {action}" for step, action in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"    => {self.problem}"]) if self.trace else f"{self.states} states, nothing wrong"


def search(start: S, steps: Steps[S], problem: Callable[[S], str], max_depth: int, max_states: int) -> Found[S]:
    """All states that `steps` lead to from `start`, until `problem` says something about one."""
    came_from: dict[S, tuple[S, str] | None] = {start: None}
    level = [start]
    depth = 0
    while level and depth <= max_depth:
        following: list[S] = []
        for state in level:
            said = problem(state)
            if said:
                return Found(len(came_from), depth, False, said, _trace(state, came_from))
            if depth == max_depth or len(came_from) >= max_states:
                continue
            for action, after in steps(state):
                if after not in came_from:
                    came_from[after] = (state, action)
                    following.append(after)
        level = following
        depth += 1
    return Found(len(came_from), depth, not level and len(came_from) < max_states and depth <= max_depth)


def _trace(state: S, came_from: dict[S, tuple[S, str] | None]) -> tuple[str, ...]:
    actions = []
    before = came_from[state]
    while before is not None:
        actions.append(before[1])
        before = came_from[before[0]]
    return tuple(reversed(actions))
