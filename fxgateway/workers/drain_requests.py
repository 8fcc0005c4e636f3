"""Task: carries out `fxgateway drain` in all workers, including those that are started later."""

from collections.abc import Callable, Collection
from typing import Final

import trio

from fxgateway.steering import DRAIN, UNDO, UNKNOWN
from fxgateway.workers.child import Child
from fxgateway.workers.pending_calls import NoAnswer, PendingCalls
from fxtunnel.model import RelayId

ANSWER_S: Final = 1.5
"""For a worker to answer. Less than `fxgateway drain` waits for us (console.ASK_TIMEOUT_S), so that it hears which worker does not."""
NOBODY_WAITS: Final = 0
"""The number of a question whose answer nobody reads."""


class DrainRequests:
    """The drains that an administrator has asked for, until the gateway is restarted."""

    def __init__(self, children: Collection[Child], calls: PendingCalls, on_drain: Callable[[], None]) -> None:
        self.is_drained = False
        self._drained: set[RelayId] = set()
        self._children = children
        self._calls = calls
        self._on_drain = on_drain

    async def steer(self, method: str, relay_id: RelayId | None) -> int:
        """See `fxgateway.steering.Steer`; the sum over all workers.

        Raises:
            NoAnswer: a worker does not say what is left. The drain is noted all the same, and will hold for that worker, too.
        """
        self._note(method, relay_id)
        left: list[int] = []
        problems: list[NoAnswer] = []

        async def ask(child: Child) -> None:
            if child.channel is not None and child.is_ready:
                try:
                    answer = await self._calls.ask(child.channel, "steer", ANSWER_S, method=method, relay=relay_id)
                except NoAnswer as exc:
                    problems.append(exc)
                else:
                    left.append(int(answer["left"]))

        async with trio.open_nursery() as nursery:
            for child in self._children:
                nursery.start_soon(ask, child)
        if problems:
            raise problems[0]
        known = [count for count in left if count != UNKNOWN]
        return sum(known) if known or relay_id is None else UNKNOWN

    def remind(self, child: Child) -> None:
        """Repeat the drains to a worker that has become ready and may not have heard of them."""
        drains: list[RelayId | None] = [*([None] if self.is_drained else []), *self._drained]
        for relay_id in drains:
            if child.channel is not None:
                child.channel.send({"op": "steer", "n": NOBODY_WAITS, "method": DRAIN, "relay": relay_id})

    def _note(self, method: str, relay_id: RelayId | None) -> None:
        if relay_id is None:
            if method == DRAIN and not self.is_drained:
                self.is_drained = True
                self._on_drain()
        elif method == DRAIN:
            self._drained.add(relay_id)
        elif method == UNDO:
            self._drained.discard(relay_id)
