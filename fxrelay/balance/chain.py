"""Task: runs a balancing chain: each entry in its order, until one names a server or fails."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Final, cast

from fxrelay.balance import builtins
from fxrelay.balance.builtins import BUILTINS, Choose
from fxrelay.balance.candidates import CandidateList, CandidateSubset
from fxrelay.balance.model import (
    Cancellable,
    Candidate,
    ChainEntry,
    Chosen,
    Decision,
    Dropped,
    Environment,
    Failed,
    Narrowed,
    Passed,
    ReactorEntry,
    Request,
    Step,
    Verdict,
)
from fxrelay.balance.verdicts import NO_SERVER_SELECTED
from fxtunnel.model import RelayId

NO_CANDIDATES: Final = "NoServerAvailable"
ROUND_ROBIN: Final = f"builtin:{builtins.ROUND_ROBIN}"


@dataclass(frozen=True, slots=True)
class Builtin:
    """An entry that comes with the product."""

    name: str
    pick: Choose

    async def choose(self, request: Request, candidates: Sequence[Candidate], environment: Environment) -> Verdict:
        """See `ChainEntry`."""
        return self.pick(request, candidates, environment.local_id)


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """`builtin:round-robin`, with a counter that all relays share, so that it is even whichever relay decides."""

    name: str
    counter: str

    async def choose(self, request: Request, candidates: Sequence[Candidate], environment: Environment) -> Verdict:
        """See `ChainEntry`."""
        return builtins.round_robin(candidates, await environment.next_number(self.counter))


def counter_of(service: str) -> str:
    """The counter by which `builtin:round-robin` goes through a service's servers."""
    return f"round-robin:{service}"


def builtin(name: str, service: str) -> ChainEntry | None:
    """The built-in entry of this name for a service's chain, or None."""
    if name == builtins.ROUND_ROBIN:
        return RoundRobin(ROUND_ROBIN, counter_of(service))
    pick = BUILTINS.get(name)
    return Builtin(f"builtin:{name}", pick) if pick is not None else None


async def decide(
    chain: Sequence[ChainEntry], request: Request, candidates: Sequence[Candidate], dropped: Sequence[Dropped], environment: Environment
) -> Decision:
    """Choose a server.

    Safe to cancel; a script that runs then is stopped. A candidate list that is empty before or within the chain is a failure of its own:
    no entry is asked about nothing.
    """
    deciding = _deciding(chain, candidates, dropped)
    try:
        entry, offered = next(deciding)
        while True:
            entry, offered = deciding.send(await entry.choose(request, offered, environment))
    except StopIteration as done:
        decision: Decision = done.value
        return decision


def is_instant(chain: Sequence[ChainEntry]) -> bool:
    """Whether `decide_nowait` can ask every entry."""
    return all(isinstance(entry, Builtin) for entry in chain)


def decide_nowait(
    chain: Sequence[ChainEntry], request: Request, candidates: Sequence[Candidate], dropped: Sequence[Dropped], environment: Environment
) -> Decision:
    """As `decide`, for a chain that `is_instant`."""
    deciding = _deciding(chain, candidates, dropped)
    try:
        entry, offered = next(deciding)
        while True:
            assert isinstance(entry, Builtin)
            entry, offered = deciding.send(entry.pick(request, offered, environment.local_id))
    except StopIteration as done:
        decision: Decision = done.value
        return decision


def needs_no_task(chain: Sequence[ChainEntry]) -> bool:
    """Whether `Deciding` can ask every entry."""
    return all(isinstance(entry, Builtin | ReactorEntry) for entry in chain)


class Deciding:
    """As `decide`, from the reactor, for a chain that `needs_no_task`. `then` is called once, later, with the decision; with None where an
    entry that is not the first could not be asked: then `decide`. Candidates may change meanwhile: each entry is asked about those that
    are there then.
    """

    def __init__(
        self,
        chain: Sequence[ChainEntry],
        asked: tuple[Request, Sequence[Candidate], Environment],
        then: Callable[[Decision | None], None],
    ) -> None:
        self._request, candidates, self._environment = asked
        self._then = then
        self._steps = _deciding(chain, candidates, ())
        self._asked: Cancellable | None = None

    def begin(self) -> bool:
        """Ask the first entries. False: that cannot be done now, and `then` will not be called."""
        try:
            decision, is_waiting = self._go_on(*next(self._steps))
        except StopIteration:
            return False
        return decision is None and is_waiting

    def cancel(self) -> None:
        """See `Cancellable`."""
        if self._asked is not None:
            self._asked.cancel()

    def _go_on(self, entry: ChainEntry, offered: Sequence[Candidate]) -> tuple[Decision | None, bool]:
        """The decision, if there is one, and whether an entry is being asked."""
        try:
            while isinstance(entry, Builtin):
                entry, offered = self._steps.send(entry.pick(self._request, offered, self._environment.local_id))
        except StopIteration as done:
            return done.value, False
        self._asked = cast("ReactorEntry", entry).ask(self._request, offered, self._environment, self._told)
        return None, self._asked is not None

    def _told(self, verdict: Verdict) -> None:
        self._asked = None
        try:
            decision, is_waiting = self._go_on(*self._steps.send(verdict))
        except StopIteration as done:
            decision, is_waiting = done.value, False
        if not is_waiting:
            self._then(decision)


def _deciding(
    chain: Sequence[ChainEntry], candidates: Sequence[Candidate], dropped: Sequence[Dropped]
) -> Generator[tuple[ChainEntry, Sequence[Candidate]], Verdict, Decision]:
    """Generator: yields an entry and the candidates to ask it about, is sent its verdict, and returns the decision."""
    steps: list[Step] = []
    offered = candidates
    failure = Failed(NO_SERVER_SELECTED, "no entry of the balancing chain chose a server")
    for entry in chain:
        if not offered:
            break
        began = time.perf_counter()
        count = len(offered)
        verdict = yield entry, offered
        steps.append(Step(entry.name, count, verdict, time.perf_counter() - began))
        match verdict:
            case Chosen(server_id):
                return Decision(server_id, None, tuple(dropped), tuple(steps))
            case Failed():
                return Decision(None, verdict, tuple(dropped), tuple(steps))
            case Narrowed(server_ids):
                offered = _in_order(offered, server_ids)
            case Passed():
                pass
    if not candidates:
        failure = Failed(NO_CANDIDATES, "no server is available for this service now")
    return Decision(None, failure, tuple(dropped), tuple(steps))


def _in_order(candidates: Sequence[Candidate], server_ids: Sequence[RelayId]) -> list[Candidate]:
    whole = candidates.offered if isinstance(candidates, CandidateSubset) else candidates
    if isinstance(whole, CandidateList):
        return whole.only(server_ids)
    by_id = {candidate.server_id: candidate for candidate in candidates}
    return [by_id[server_id] for server_id in server_ids if server_id in by_id]  # one may have left meanwhile
