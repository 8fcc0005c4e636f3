"""Users with several streams, by relays that have not heard of each other: around the ledger as it is, and a store in memory.

Every stream may be sent to any server, whatever is known: that is the oldest list there can be. What was renewed since the last `time
passes` is alive, everything else is over.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fxrelay.balance.homes import decode_homes
from fxrelay.balance.reservation_text import decode_record
from fxrelay.balance.reservations import Granted, OwnerRelogin, Reason, Rejected, Token
from fxrelay.cluster.ports import RESERVATION_USERS, RESERVATIONS, Both, Present, Update
from fxrelay.reserving.ledger import Ledger
from fxrelay.reserving.record_updates import RecordUpdate
from fxtunnel.model import RelayId

SERVERS = ("s1", "s2")
LEASE_S = 10.0
LEASE_MS = 10_000


class MemoryStore:
    """As much of a store as a ledger needs. Its clock and the numbers of its writes stand still."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, str], str] = {}
        self.now_ms = 10_000_000

    def epoch(self) -> str:
        return "e"

    def update(self, collection: str, key: str, change: Callable[[Present], str | None]) -> Present:
        (present,) = self.update_all([Update(collection, key, change)])
        return present

    def update_all(self, updates: Sequence[Update]) -> list[Present]:
        results = []
        for update in updates:
            where = (update.collection, update.key)
            present = Present(
                self.texts.get(where), 7, self.now_ms, "e", self.texts.get(update.beside) if update.beside is not None else None
            )
            change = update.change(present)
            if change is not None:
                self.texts[where] = change.text if isinstance(change, Both) else change
            if isinstance(change, Both) and update.beside is not None:
                self.texts.pop(update.beside, None)
                if change.beside is not None:
                    self.texts[update.beside] = change.beside
            results.append(present)
        return results


class Stream(NamedTuple):
    """`turn` tells its login from the one before."""

    user: str
    phase: str = "idle"
    server: str = ""
    turn: int = 0


class World(NamedTuple):
    streams: tuple[Stream, ...]
    texts: tuple[tuple[tuple[str, str], str], ...] = ()


class Steps:
    """What may happen next. `asks_homes`: commits ask whether the user has another server."""

    def __init__(self, asks_homes: bool) -> None:
        self._would_do = SERVERS.__contains__ if asks_homes else None
        self._store = MemoryStore()
        store: Any = self._store
        self._ledger = Ledger(store, RelayId("r"), LEASE_S)
        while self._ledger.look().settles_in_ms(self._store.now_ms):
            self._store.now_ms += 1_000
        self._marks = {where: text for where, text in self._store.texts.items() if where[0] not in (RESERVATIONS, RESERVATION_USERS)}

    def __call__(self, world: World) -> Iterator[tuple[str, World]]:
        updates = self._ledger.updates
        for number, stream in enumerate(world.streams):
            login_id, name = f"{number}{stream.turn}", f"{stream.user}'s stream {number}"
            gone = Stream(stream.user, turn=1 - stream.turn)
            if stream.phase == "idle":
                for server in SERVERS:
                    yield f"1 select: {name} gets {server}", _with(world, number, stream._replace(phase="selected", server=server))
            elif stream.phase == "selected":
                ask = updates.take(stream.server, login_id, stream.user, "192.0.2.1", OwnerRelogin.PREFER, self._would_do)
                outcome, after = self._done(world, ask)
                if isinstance(outcome, Granted):
                    yield f"5a commit: {name} is in at {stream.server}", _with(after, number, stream._replace(phase="in"))
                    yield f"5a commit: {name} at {stream.server}, the answer is lost", _with(after, number, gone)
                else:
                    then = stream._replace(phase="elsewhere") if outcome.reason is Reason.ELSEWHERE else gone
                    yield f"5b reject: {name} at {stream.server}: {outcome.reason}", _with(after, number, then)
            elif stream.phase == "elsewhere":
                after = world
                for home in decode_homes(dict(world.texts).get((RESERVATION_USERS, stream.user))):
                    after = self._done(after, updates.sweep(home, stream.user))[1]
                yield f"{name} is told where its user is", _with(after, number, gone)
            else:
                _, after = self._done(world, updates.release(stream.server, login_id, stream.user, 0))
                yield f"7 log out: {name} from {stream.server}", _with(after, number, gone)
                yield f"{name}'s relay crashes", _with(world, number, gone)
        for server in SERVERS:
            yield f"{server} is swept", self._done(world, updates.sweep(server))[1]
        yield "time passes", self._time_passes(world)

    def _time_passes(self, world: World) -> World:
        """Who is in renews in time (step 6); everything else is over."""
        old = []
        for where, text in world.texts:
            found = json.loads(text)
            if where[0] == RESERVATIONS:
                for login in found["logins"]:
                    login["expiresMs"] = self._store.now_ms - LEASE_MS
            old.append((where, json.dumps(found, separators=(",", ":"))))
        world = world._replace(texts=tuple(old))
        for number, stream in enumerate(world.streams):
            if stream.phase == "in":
                ask = self._ledger.updates.renew(stream.server, f"{number}{stream.turn}", stream.user, Token("e", 7), self._store.now_ms)
                outcome, world = self._done(world, ask)
                assert isinstance(outcome, Granted), "who is in was not renewed"
        return world

    def _done(self, world: World, ask: RecordUpdate[Any]) -> tuple[Any, World]:
        self._store.texts = {**self._marks, **dict(world.texts)}
        outcome, _ = self._ledger.do(ask)
        assert not isinstance(outcome, Rejected) or outcome.reason not in (Reason.STALE, Reason.UNSETTLED)
        after = {where: text for where, text in self._store.texts.items() if where not in self._marks}
        return outcome, world._replace(texts=tuple(sorted(after.items())))


def problem(world: World) -> str:
    """Two users on one server; one user on two; a user's document that does not know of a server he is on."""
    inside = sorted({(stream.server, stream.user) for stream in world.streams if stream.phase == "in"})
    texts = dict(world.texts)
    for place, (server, user) in enumerate(inside):
        if decode_record(texts.get((RESERVATIONS, server))).holder != user:
            return f"{server} does not know that {user} is in"
        if server not in decode_homes(texts.get((RESERVATION_USERS, user))):
            return f"it is not written down that {user} is on {server}"
        for other_server, other in inside[place + 1 :]:
            if other_server == server:
                return f"{user} and {other} are on {server}"
            if other == user:
                return f"{user} is on {server} and on {other_server}"
    return ""


def _with(world: World, number: int, stream: Stream) -> World:
    streams = list(world.streams)
    streams[number] = stream
    return world._replace(streams=tuple(streams))
