"""Pure: admission shared by several processes: each counts its own connections and hears of the others'.

Within one process limits are exact. Across processes they may be exceeded by what has come in since the others were last told.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fxgateway.routing.admission import REMEMBERED_SOURCES, Admission, AdmissionLimits, Verdict
from fxtunnel.kit.sources import source_of

FILES_OF_A_BRIDGE: Final = 2


@dataclass(frozen=True, slots=True)
class Counts:
    """The connections that one process has open: in all, per door, per source. `taken`: how many came in per source since the last report.
    `files`: the descriptors that they take there.

    A report holds all of `doors`, but of `sources` only those that have changed, unless it is meant to hold everything.
    """

    connections: int = 0
    doors: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    taken: Mapping[str, int] = field(default_factory=dict)
    files: int = 0


class SharedAdmission(Admission):
    """An `Admission` that counts the connections of other processes as well. `at_most_here` bounds each process alone (its descriptors)."""

    def __init__(self, limits: AdmissionLimits, at_most_here: int) -> None:
        super().__init__(limits)
        self.at_most_here = at_most_here
        self.on_change: Callable[[], None] = lambda: None
        """Called when there is something new for `changes`."""
        self._here = 0
        self._bridges = 0
        self._doors_here: dict[str, int] = {}
        self._sources_here: dict[str, int] = {}
        self._changed: set[str] = set()
        self._taken: dict[str, int] = {}
        self._others: dict[int, Counts] = {}
        self._passed_on: dict[int, int] = {}
        """Connections that others have got from here since they last reported."""

    @property
    def files_here(self) -> int:
        """The descriptors that clients take in this process."""
        return self._here + FILES_OF_A_BRIDGE * self._bridges

    def admit(self, door: str, address: str, now: float) -> Verdict:
        """See `Admission`."""
        if self.files_here >= self.at_most_here:
            return Verdict.FULL
        verdict = super().admit(door, address, now)
        if verdict is Verdict.ADMIT:
            key = self._count_here(door, address, 1)
            if key:
                self._taken[key] = self._taken.get(key, 0) + 1
        return verdict

    def adopt(self, door: str, address: str, now: float) -> None:
        """Count a connection that another process has admitted, and no longer counts."""
        self.connections += 1
        self._doors[door] = self._doors.get(door, 0) + 1
        if self._is_exempt(address):
            self._exempt_open[address] = self._exempt_open.get(address, 0) + 1
        else:
            self._move(source_of(address), 1, now)
        self._count_here(door, address, 1)

    def release(self, door: str, address: str) -> None:
        """See `Admission`."""
        self._count_here(door, address, -1)
        super().release(door, address)

    def bridge(self, bridges: int) -> None:
        """So many connections that other processes count take descriptors here as well."""
        self._bridges = bridges
        self._changed.add("")
        self.on_change()

    def has_room(self, other: int) -> bool:
        """Whether another process may be given one more connection."""
        counts = self._others.get(other, Counts())
        return counts.files + self._passed_on.get(other, 0) < self.at_most_here

    def passed_on(self, other: int) -> None:
        """Another process has been given a connection."""
        self._passed_on[other] = self._passed_on.get(other, 0) + 1

    def counts(self) -> Counts:
        """All counts, for a process that has heard nothing yet."""
        return Counts(self._here, dict(self._doors_here), dict(self._sources_here), files=self.files_here)

    def changes(self) -> Counts | None:
        """What has changed since the last call, to be told to the others; None if nothing has."""
        if not self._changed and not self._taken:
            return None
        sources = {key: self._sources_here.get(key, 0) for key in self._changed if key}
        found = Counts(self._here, dict(self._doors_here), sources, self._taken, self.files_here)
        self._changed, self._taken = set(), {}
        return found

    def note(self, other: int, counts: Counts, now: float) -> None:
        """Another process has reported what it has open."""
        before = self._others.get(other, Counts())
        sources = dict(before.sources)
        for key, count in counts.sources.items():
            self._move(key, count - sources.pop(key, 0), now)
            if count:
                sources[key] = count
        for key, taken in counts.taken.items():
            source = self._sources.get(key)
            if source is None and len(self._sources) < REMEMBERED_SOURCES:
                source = self._remember(key, now)
            if source is not None:
                self._refill(source, now)
                source.tokens -= taken
        self._move_doors(before, counts)
        self._others[other] = Counts(counts.connections, counts.doors, sources, files=counts.files)
        self._passed_on.pop(other, None)

    def forget(self, other: int, now: float) -> None:
        """Another process is gone, and what it had open with it."""
        before = self._others.pop(other, Counts())
        self._passed_on.pop(other, None)
        for key, count in before.sources.items():
            self._move(key, -count, now)
        self._move_doors(before, Counts())

    def _count_here(self, door: str, address: str, step: int) -> str:
        self._here += step
        _add(self._doors_here, door, step)
        key = source_of(address)
        if address in self._exempt_open:
            key = ""  # counted in all and per door only
        else:
            _add(self._sources_here, key, step)
        self._changed.add(key)
        self.on_change()
        return key

    def _move(self, key: str, step: int, now: float) -> None:
        if step:
            # Even when the table is full: the number of connections is bounded, and with it that of these sources.
            (self._sources.get(key) or self._remember(key, now)).count += step

    def _move_doors(self, before: Counts, after: Counts) -> None:
        self.connections += after.connections - before.connections
        for door in {*before.doors, *after.doors}:
            _add(self._doors, door, after.doors.get(door, 0) - before.doors.get(door, 0))


def _add(counts: dict[str, int], key: str, step: int) -> None:
    count = counts.get(key, 0) + step
    if count:
        counts[key] = count
    else:
        counts.pop(key, None)
