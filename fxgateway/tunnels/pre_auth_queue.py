"""Task: peers that have not yet proved who they are: how many, from where and for how long, and whose turn is next (decision 0019)."""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

import trio

from fxgateway.tunnels.retry_spacing import RetrySpacing
from fxtunnel.control.busy import RetryAfter
from fxtunnel.kit.sources import source_of

TURN_S: Final = 1.0
"""A peer that takes longer than this goes on without its turn: the others must not lose theirs to a slow one."""
FULL_WAIT_S: Final = 4.0
"""Newcomers who would wait longer than this for a turn are told to come again. A relay gives up after 10 s (`dial_timeout_s`)."""
LONGEST_WAIT_S: Final = 7.0
"""A peer that has waited this long, because things went slower than estimated, is told to come again before it gives up by itself."""
LATE_SHARE: Final = 2
"""There may be this many times as many late peers as there are turns; beyond that the one that has been late longest is evicted."""
CROWD_SHARE: Final = 4
"""When the queue is full, a source that has this many times as many peers waiting as the newcomer's source makes room for it."""
SILENT_S: Final = 0.25
"""No peer makes room for another of its own source before this: its hello may be on its way, and in a crowd nobody would ever get to
speak."""
_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class PortLimits:
    """Bounds for peers that have not proved who they are. They protect memory, descriptors and CPU from strangers."""

    hello_timeout_s: float = 5.0
    hello_bytes: int = 16_384
    pending: int = 512
    pending_per_source: int = 64
    at_once: int = 32


class TooBusy(Exception):
    """The gateway is too busy for this peer now. Tell it when to come again."""

    def __init__(self, retry_after: RetryAfter) -> None:
        super().__init__(f"come again in {retry_after.retry_after_s:.1f} s")
        self.retry_after = retry_after


class PreAuthPeer:
    """One such peer. Do all work for it inside `scope`, whose deadline stands still while the peer waits for us."""

    __slots__ = ("completes", "entered_at", "is_evicted", "is_stranger", "scope", "served_at", "source", "turn")

    def __init__(self, source: str, entered_at: float, deadline: float) -> None:
        self.source = source
        self.entered_at = entered_at
        self.scope = trio.CancelScope(deadline=deadline)
        self.completes = False
        """It completes what is half done: its relay has a control link, and this is the data link. It goes before others of its source."""
        self.is_evicted = False
        self.is_stranger = True
        self.turn = trio.Event()
        self.served_at = math.inf


class PreAuthQueue:
    """Where peers wait until they have proved who they are.

    A peer first owes us its first bytes, then waits for a turn. At most `at_once` peers have a turn at the same time, so that what is begun
    gets finished, and turns rotate among the sources. When the queue is full, the peer that has been silent longest is evicted: a good
    relay needs milliseconds. If nobody is silent, newcomers are turned away before any work is done for them, unless another source has far
    more than its share of the queue. Work in progress is never thrown away for a newcomer, but a peer that keeps us waiting in the middle
    of it loses its turn and, if too many do that, its place. Nobody's time runs while this process itself is not running.
    """

    def __init__(self) -> None:
        self._strangers: set[PreAuthPeer] = set()
        self._by_source: dict[str, int] = {}
        self._silent: OrderedDict[PreAuthPeer, None] = OrderedDict()
        self._waiting: OrderedDict[str, deque[PreAuthPeer]] = OrderedDict()
        self._waiting_count = 0
        self._served: OrderedDict[PreAuthPeer, None] = OrderedDict()
        self._late: OrderedDict[PreAuthPeer, None] = OrderedDict()
        self._at_once = 1
        self._spacing = RetrySpacing()
        self._is_crowded = trio.Event()

    def __len__(self) -> int:
        return len(self._strangers)

    async def run(self) -> None:
        """Take turns back from peers that are too slow to keep them, until cancelled."""
        while True:
            await self._is_crowded.wait()
            while self._waiting:
                due = trio.current_time() + _LOOK_S
                await trio.sleep_until(due)
                self._give_back(trio.current_time() - due)
                self._end_long_turns()
            self._is_crowded = trio.Event()

    def enter(self, address: str, limits: PortLimits, *, has_spoken: bool = False) -> PreAuthPeer:
        """A peer from this IP address comes in, and its time begins. Pair it with `leave`. `has_spoken`: its first bytes have arrived.

        Raises:
            TooBusy: it would have to wait too long, or the queue is full and nobody has to make room.
        """
        now, source = trio.current_time(), source_of(address)
        self._at_once = limits.at_once
        if self._spacing.wait_s(self._waiting_count) > FULL_WAIT_S and self._spacing.wait_s(self._ahead_of(source)) > FULL_WAIT_S:
            raise TooBusy(self.retry_after())
        if self._by_source.get(source, 0) >= limits.pending_per_source:
            self._make_room(self._silent_one(now, source))
        elif len(self._strangers) >= limits.pending:
            self._make_room(next(iter(self._silent), None) or self._last_of_crowd(source))
        peer = PreAuthPeer(source, now, now + limits.hello_timeout_s)
        self._strangers.add(peer)
        if not has_spoken:
            self._silent[peer] = None
        self._by_source[source] = self._by_source.get(source, 0) + 1
        return peer

    async def wait_turn(self, peer: PreAuthPeer) -> None:
        """Its first bytes have arrived: wait until it is to be served. Its time stands still meanwhile; the turn ends with `leave`.

        Raises:
            TooBusy: it has waited too long.
        """
        left_s = peer.scope.deadline - trio.current_time()
        peer.scope.deadline = math.inf
        self._silent.pop(peer, None)
        queue = self._waiting.setdefault(peer.source, deque())
        if peer.completes:
            queue.appendleft(peer)
        else:
            queue.append(peer)
        self._waiting_count += 1
        self._begin_turns()
        with trio.move_on_after(LONGEST_WAIT_S):
            await peer.turn.wait()
        if not peer.turn.is_set():
            raise TooBusy(self.retry_after())
        peer.scope.deadline = trio.current_time() + left_s

    def retry_after(self) -> RetryAfter:
        """Book a time at which one more peer is to come again."""
        return self._spacing.book(trio.current_time(), self._waiting_count)

    def admit(self, peer: PreAuthPeer) -> None:
        """It has proved who it is, and is not a stranger any more. It keeps its turn until it leaves."""
        self._forget(peer)

    def _forget(self, peer: PreAuthPeer) -> None:
        self._silent.pop(peer, None)
        self._late.pop(peer, None)
        if peer in self._strangers:
            self._strangers.remove(peer)
            self._by_source[peer.source] -= 1
            if not self._by_source[peer.source]:
                del self._by_source[peer.source]
        peer.is_stranger = False

    def leave(self, peer: PreAuthPeer) -> None:
        """It has been served, or is gone. May be repeated."""
        self._forget(peer)
        queue = self._waiting.get(peer.source)
        if queue is not None and peer in queue:
            queue.remove(peer)
            self._waiting_count -= 1
            if not queue:
                del self._waiting[peer.source]
        if peer in self._served:
            self._end_turn(peer)
            self._begin_turns()

    def _make_room(self, loser: PreAuthPeer | None) -> None:
        if loser is None:
            raise TooBusy(self.retry_after())
        self._evict(loser)

    def _ahead_of(self, source: str) -> int:
        """How many turns come before that of one more peer of this source: all of its own source's, and as many of each other source."""
        own = len(self._waiting.get(source, ()))
        return own + sum(min(len(queue), own + 1) for other, queue in self._waiting.items() if other != source)

    def _silent_one(self, now: float, source: str) -> PreAuthPeer | None:
        """The peer of this source that has been silent longest, if that is SILENT_S or more."""
        for peer in self._silent:
            if now - peer.entered_at < SILENT_S:
                return None
            if peer.source == source:
                return peer
        return None

    def _last_of_crowd(self, source: str) -> PreAuthPeer | None:
        """The last peer of the source with the longest queue, if that is CROWD_SHARE times this source's. No work was done for it yet."""
        longest = max(self._waiting.values(), key=len, default=None)
        if longest is None or len(longest) <= CROWD_SHARE * (1 + self._by_source.get(source, 0)):
            return None
        return longest[-1]

    def _evict(self, peer: PreAuthPeer) -> None:
        peer.is_evicted = True
        peer.scope.cancel()
        self.leave(peer)

    def _begin_turns(self) -> None:
        while self._waiting and len(self._served) < self._at_once:
            source, queue = self._waiting.popitem(last=False)
            peer = queue.popleft()
            self._waiting_count -= 1
            if queue:
                self._waiting[source] = queue  # behind the other sources
            self._served[peer] = None
            peer.served_at = trio.current_time()
            peer.turn.set()
        if self._waiting:
            self._is_crowded.set()

    def _end_turn(self, peer: PreAuthPeer) -> None:
        del self._served[peer]
        self._spacing.note_done(trio.current_time(), is_crowded=bool(self._waiting))

    def _give_back(self, late_s: float) -> None:
        """This process itself was held up for that long: do not count it against peers that have a turn, or had one."""
        for peer in (*self._served, *self._late):
            peer.served_at += late_s
            peer.scope.deadline += late_s

    def _end_long_turns(self) -> None:
        now = trio.current_time()
        while self._served:
            peer = next(iter(self._served))
            if now - peer.served_at < TURN_S:
                break
            self._end_turn(peer)
            if peer.is_stranger:
                self._late[peer] = None
                if len(self._late) > LATE_SHARE * self._at_once:
                    self._evict(next(iter(self._late)))
        self._begin_turns()
