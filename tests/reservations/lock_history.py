"""What a recorded history says: whether two users were ever on one server, whether tokens rise, and whether it is that of a lock.

A server is a lock that one user holds, perhaps by several logins. The history is linearizable if every operation can be given a moment
between its beginning and its end so that, in that order, a lock would have given the same answers (Wing and Gong; Lowe, "Testing for
linearizability"). Operations whose answer nobody saw may have happened or not.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["acquire", "release", "reject"]


@dataclass(frozen=True)
class Operation:
    kind: Kind
    user: str
    begins: float
    ends: float
    is_certain: bool = True
    holder: str = ""
    """Of a rejection: who was said to hold it, if that was said."""


@dataclass(frozen=True)
class Stay:
    user: str
    begins: float
    ends: float
    fence: int
    epoch: str


def overlaps(stays: list[Stay]) -> list[str]:
    """Two users on one server at once."""
    found, latest = [], None
    for stay in sorted(stays, key=lambda stay: stay.begins):
        if latest is not None and latest.user != stay.user and stay.begins < latest.ends:
            found.append(f"{latest} and {stay}")
        if latest is None or stay.ends > latest.ends:
            latest = stay
    return found


def falling_tokens(stays: list[Stay]) -> list[str]:
    """Grants whose token is not higher than that of the user before, or that two users got."""
    found = []
    users: dict[tuple[str, int], str] = {}
    before: Stay | None = None
    for stay in sorted(stays, key=lambda stay: stay.begins):
        if users.setdefault((stay.epoch, stay.fence), stay.user) != stay.user:
            found.append(f"{stay} has a token of {users[stay.epoch, stay.fence]}")
        if before is not None and before.epoch == stay.epoch and stay.fence < before.fence + (stay.user != before.user):
            found.append(f"{before}, then {stay}")
        before = stay
    return found


State = tuple[str, int]
"""The holder and how many logins he has."""


def is_linearizable(operations: list[Operation]) -> bool:
    """Whether a lock could have answered so."""
    events = sorted(
        [(operation.begins, 0, index) for index, operation in enumerate(operations)]
        + [(operation.ends, 1, index) for index, operation in enumerate(operations)]
    )
    configurations: set[tuple[State, frozenset[int]]] = {(("", 0), frozenset())}
    pending: set[int] = set()
    for _, is_end, index in events:
        if not is_end:
            pending.add(index)
            continue
        configurations = _spread(configurations, pending, operations)
        if operations[index].is_certain:
            configurations = {found for found in configurations if index in found[1]}
        pending.discard(index)
        configurations = {(state, done - {index}) for state, done in configurations}
        if not configurations:
            return False
    return True


def _spread(
    configurations: set[tuple[State, frozenset[int]]], pending: set[int], operations: list[Operation]
) -> set[tuple[State, frozenset[int]]]:
    seen = {(state, _with_rejections(state, done, pending, operations)) for state, done in configurations}
    fresh = list(seen)
    while fresh:
        state, done = fresh.pop()
        for index in pending - done:
            after = _after(state, operations[index])
            if after is None:
                continue
            found = (after, _with_rejections(after, done | {index}, pending, operations))
            if found not in seen:
                seen.add(found)
                fresh.append(found)
    return seen


def _with_rejections(state: State, done: frozenset[int], pending: set[int], operations: list[Operation]) -> frozenset[int]:
    """And every rejection that can be answered now: it changes nothing, so no order is lost. Else n that wait at once are 2^n sets."""
    return done | {index for index in pending - done if operations[index].kind == "reject" and _after(state, operations[index]) is not None}


def _after(state: State, operation: Operation) -> State | None:
    holder, count = state
    match operation.kind:
        case "acquire":
            return (operation.user, count + 1) if holder in ("", operation.user) else None
        case "reject":
            return state if holder not in ("", operation.user) and operation.holder in ("", holder) else None
        case "release":
            if holder != operation.user:
                return None
            return (holder, count - 1) if count > 1 else ("", 0)


def read_history(
    lines: list[dict[str, Any]], kills: list[tuple[str, float]], end: float, slack_s: float
) -> tuple[dict[str, list[Stay]], dict[str, list[Operation]]]:
    """Stays and operations by server. `kills`: relay and time; `slack_s`: how long after it something may still take effect."""
    stays: dict[str, list[Stay]] = defaultdict(list)
    operations: dict[str, list[Operation]] = defaultdict(list)
    inside: dict[tuple[str, str], dict[str, Any]] = {}
    asked: dict[str, dict[str, Any]] = {}
    # Of those whose answer nobody saw, only those count that somebody else was told of: the others can be left out of any order.
    named: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        if line["event"] == "no" and line["reason"] == "reserved":
            named[line["server"], line["holder"]].append(line["t"])
    ghosts: dict[tuple[str, str], float] = {}

    def leave(line: dict[str, Any], at: float) -> None:
        server, user = line["server"], line["user"]
        stays[server].append(Stay(user, line["t"], at, line["fence"], line["epoch"]))
        operations[server].append(Operation("release", user, at, at + slack_s, False))

    events = sorted(
        [(line["t"], 0, line) for line in lines] + [(at, 1, {"event": "kill", "relay": relay}) for relay, at in kills],
        key=lambda event: event[:2],
    )
    visible: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    present: dict[tuple[str, str], str] = {}
    for at, _, line in events:
        if line["event"] == "in":
            visible[line["server"], line["user"]].append((line["call"], end))
            present[line["server"], line["user"]] = line["relay"]
        elif line["event"] in ("out", "lost"):
            visible[line["server"], line["user"]][-1] = (visible[line["server"], line["user"]][-1][0], at + 1.0)
            present.pop((line["server"], line["user"]), None)
        elif line["event"] == "kill":
            for key in [key for key, relay in present.items() if relay == line["relay"]]:
                visible[key][-1] = (visible[key][-1][0], at)
                del present[key]

    def is_visible(server: str, user: str, t: float) -> bool:
        return any(begins <= t <= ends for begins, ends in visible[server, user])

    def perhaps(line: dict[str, Any], begins: float) -> None:
        server, user = line["server"], line["user"]
        ends = begins + 2 * slack_s
        is_told = any(begins <= t <= ends and not is_visible(server, user, t) for t in named[server, user])
        if is_told and begins > ghosts.get((server, user), 0.0):
            ghosts[server, user] = begins + slack_s  # whichever ask of that time it was
            operations[server].append(Operation("acquire", user, begins, begins + slack_s, False))
            operations[server].append(Operation("release", user, begins, ends, False))

    for at, _, line in events:
        match line["event"]:
            case "ask":
                asked[line["user"]] = line
            case "in":
                asked.pop(line["user"], None)
                operations[line["server"]].append(Operation("acquire", line["user"], line["call"], at))
                inside[line["user"], line["server"]] = line
            case "out" | "lost":
                leave(inside.pop((line["user"], line["server"])), at)
            case "no":
                asked.pop(line["user"], None)
                if line["reason"] == "reserved":
                    operations[line["server"]].append(Operation("reject", line["user"], line["call"], at, True, line["holder"]))
                else:
                    perhaps(line, line["call"])
            case "kill":
                for key in [key for key, found in inside.items() if found["relay"] == line["relay"]]:
                    leave(inside.pop(key), at)
                for user in [user for user, found in asked.items() if found["relay"] == line["relay"]]:
                    cut = asked.pop(user)
                    perhaps(cut, cut["t"])
    for found in inside.values():
        leave(found, end)
    return stays, operations
