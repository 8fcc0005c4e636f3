"""Pure: the members of the cluster, from the updates that arrive: the newest of each node, its age, and ids that two processes claim."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from fxrelay.cluster.roster import Roster
from fxrelay.cluster.server import BadServer, ServerObject, listed_sessions, parse_server
from fxtunnel.model import InstanceId, RelayId, is_name

MAX_MEMBERS: Final = 65_536
"""Nodes kept; a store full of invented names must not fill the memory."""
QUARREL_S: Final = 30.0
"""How long after its last update a second process with the same id is still reported."""


class MemberState(Enum):
    """What an update's age says. STALE servers get no more sessions; DOWN ones are listed as such."""

    UP = "up"
    STALE = "stale"
    DOWN = "down"


STANDINGS: Final = ("up", "stale", "ended", "down")


class Outcome(Enum):
    """What became of an update."""

    APPLIED = "applied"
    REPLAYED = "replayed"
    OLDER_INSTANCE = "older-instance"
    MALFORMED = "malformed"
    TOO_MANY = "too-many"


@dataclass(frozen=True, slots=True)
class Control:
    """What administrators switched off for a server, whatever the server says itself."""

    draining: bool = False
    disable: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> "Control":
        """From the store. What is not understood counts as not switched off."""
        try:
            return cls.of(json.loads(text))
        except (ValueError, RecursionError):
            return cls()

    @classmethod
    def of(cls, found: object) -> "Control":
        """From a JSON value. What is not understood counts as not switched off."""
        if not isinstance(found, dict):
            return cls()
        disable = found.get("disable")
        words = disable if isinstance(disable, list) else []
        return cls(found.get("draining") is True, frozenset(word for word in words if word in ("login", "start")))

    def encode(self) -> str:
        """For the store."""
        return json.dumps({"draining": self.draining, "disable": sorted(self.disable)})


NOTHING_OFF: Final = Control()


@dataclass(frozen=True, slots=True)
class Member:
    """A node as it is believed to be. It stays the same object until something about it changes. `heard_at` is the time of its last update,
    by the clock that the table is given; `rivals` are other processes that claim the same id.
    """

    server: ServerObject
    state: MemberState
    heard_at: float
    is_drained: bool = False
    disabled: frozenset[str] = frozenset()
    rivals: tuple[InstanceId, ...] = ()

    @property
    def standing(self) -> str:
        """For people: `standing` of it."""
        return standing(self.server, self.state)


def standing(server: ServerObject, state: MemberState) -> str:
    """A node's state in one of the words of STANDINGS. "ended" is one whose relay's last word was that, before its age makes it "down"."""
    return "ended" if server.has_ended and state is not MemberState.DOWN else state.value


def sessions_of(members: Iterable[Member], user: str) -> tuple[dict[str, Any], ...]:
    """The sessions of a user, as servers that are not down list them."""
    found = [member.server for member in members if user in member.server.owners and member.state is not MemberState.DOWN]
    found.sort(key=lambda server: server.server_id)
    return tuple(session for server in found for session in listed_sessions(server.document()) if session.get("owner") == user)


@dataclass(slots=True)
class _Record:
    server: ServerObject
    heard_at: float
    control: Control = NOTHING_OFF
    rivals: dict[InstanceId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ages:
    """Seconds without an update after which a server is stale, and down."""

    stale_s: float = 30.0
    down_s: float = 90.0


class Members:
    """The table. Times are the reader's monotonic seconds, so that no other clock has to be right."""

    def __init__(self, ages: Ages) -> None:
        self._ages = ages
        self._records: dict[RelayId, _Record] = {}
        self._controls: dict[RelayId, Control] = {}
        self._members: Roster[Member] = Roster()
        self._looked_at = 0.0
        self._next_change_at = math.inf
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)

    def __len__(self) -> int:
        return len(self._records)

    def hear(self, text: str, now: float, age_s: float = 0.0) -> tuple[Outcome, RelayId | None]:
        """Take an update in; `age_s` is how old the store says it is. Returns what became of it, and whose it was if that could be read.

        Of one process only a higher `seq` counts. Of two processes with one id the later one wins, until it is stale and the other is not;
        the other is kept as rival.
        """
        try:
            server = parse_server(text)
        except BadServer:
            return self._count(Outcome.MALFORMED), None
        heard_at = now - max(age_s, 0.0)
        record = self._records.get(server.server_id)
        if record is None:
            if len(self._records) >= MAX_MEMBERS:
                return self._count(Outcome.TOO_MANY), server.server_id
            control = self._controls.get(server.server_id, NOTHING_OFF)
            record = self._records[server.server_id] = _Record(server, heard_at, control)
            self._describe(record, now)
            return self._count(Outcome.APPLIED), server.server_id
        known = record.server
        if server.instance == known.instance:
            if server.seq <= known.seq:
                return self._count(Outcome.REPLAYED), server.server_id
        elif (server.started_ms, server.instance) < (known.started_ms, known.instance) and not self._succeeds(heard_at, record, now):
            if heard_at > record.heard_at - QUARREL_S and server.measured_ms > known.started_ms:
                record.rivals[server.instance] = heard_at
                self._describe(record, now)
            return self._count(Outcome.OLDER_INSTANCE), server.server_id
        elif known.measured_ms > server.started_ms:
            record.rivals[known.instance] = record.heard_at
        record.server = server
        record.heard_at = heard_at
        record.rivals.pop(server.instance, None)
        self._describe(record, now)
        return self._count(Outcome.APPLIED), server.server_id

    def control(self, server_id: str, control: Control) -> None:
        """An administrator switched something off, or on again."""
        if not is_name(server_id):
            return
        if control == NOTHING_OFF:
            self._controls.pop(RelayId(server_id), None)
        elif len(self._controls) < MAX_MEMBERS or server_id in self._controls:
            self._controls[RelayId(server_id)] = control
        record = self._records.get(RelayId(server_id))
        if record is not None:
            record.control = control
            known = self._members.get(RelayId(server_id))
            if known is not None:
                self._members.put(RelayId(server_id), replace(known, is_drained=control.draining, disabled=control.disable))

    def switched_off(self) -> dict[str, tuple[str, ...]]:
        """What administrators have switched off, by node, as far as it was heard: `drain`, `login`, `start`."""
        return {
            server_id: (*(("drain",) if control.draining else ()), *sorted(control.disable))
            for server_id, control in sorted(self._controls.items())
        }

    def replace_controls(self, controls: Mapping[str, Control]) -> None:
        """What is switched off is exactly this: from reading the whole store."""
        for gone in [known for known in self._controls if known not in controls]:
            self.control(gone, NOTHING_OFF)
        for server_id, control in controls.items():
            self.control(server_id, control)

    def forget_unless(self, still_there: frozenset[str], now: float) -> None:
        """Drop servers that are down and no longer in the store."""
        for server_id, record in list(self._records.items()):
            if server_id not in still_there and now - record.heard_at > self._ages.down_s:
                del self._records[server_id]
                self._members.remove(server_id)

    def get(self, server_id: RelayId, now: float) -> Member | None:
        """One member."""
        self._look(now)
        return self._members.get(server_id)

    def members(self, now: float) -> Roster[Member]:
        """All of them, down ones too; to be read before anything else is heard."""
        self._look(now)
        return self._members

    def statistics(self, now: float) -> dict[str, int]:
        """How many there are of each standing."""
        counts = dict.fromkeys(STANDINGS, 0)
        for record in self._records.values():
            counts[standing(record.server, self._state(now - record.heard_at))] += 1
        return counts

    def _look(self, now: float) -> None:
        """Describe anew what time alone has changed. Usually nothing: a decision should not cost a look at each of ten thousand clocks."""
        if self._looked_at <= now < self._next_change_at:
            return
        self._looked_at, self._next_change_at = now, math.inf
        for server_id, record in self._records.items():
            known = self._members.get(server_id)
            if known is None or known.rivals or known.state is not self._state(now - record.heard_at):
                self._describe(record, now)
            else:
                self._note_next_change(record, now)

    def _describe(self, record: _Record, now: float) -> None:
        record.rivals = {instance: heard_at for instance, heard_at in record.rivals.items() if now - heard_at < QUARREL_S}
        self._members.put(
            record.server.server_id,
            Member(
                record.server,
                self._state(now - record.heard_at),
                record.heard_at,
                record.control.draining,
                record.control.disable,
                tuple(record.rivals),
            ),
        )
        self._note_next_change(record, now)

    def _note_next_change(self, record: _Record, now: float) -> None:
        age_s = now - record.heard_at
        if age_s < self._ages.down_s:
            next_age_s = self._ages.stale_s if age_s < self._ages.stale_s else self._ages.down_s
            self._next_change_at = min(self._next_change_at, record.heard_at + next_age_s)
        if record.rivals:
            self._next_change_at = min(self._next_change_at, min(record.rivals.values()) + QUARREL_S)

    def _succeeds(self, heard_at: float, record: _Record, now: float) -> bool:
        """Whether an older process takes over because the newer one has fallen silent: that one has ended, or its clock was wrong."""
        return now - heard_at < self._ages.stale_s <= now - record.heard_at

    def _state(self, age_s: float) -> MemberState:
        if age_s >= self._ages.down_s:
            return MemberState.DOWN
        return MemberState.STALE if age_s >= self._ages.stale_s else MemberState.UP

    def _count(self, outcome: Outcome) -> Outcome:
        self.outcomes[outcome] += 1
        return outcome
