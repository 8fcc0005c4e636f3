"""Task: worker threads for the blocking calls of store and transporter, a few of their own."""

from collections.abc import Callable
from typing import Final, TypeVar

import trio

T = TypeVar("T")

CLUSTER_THREADS: Final = 6
"""A store that hangs may hold these threads, and none of those the rest of the relay needs."""


class Threads:
    """The threads of one relay's cluster."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(CLUSTER_THREADS)

    async def run(self, call: Callable[[], T]) -> T:
        """Run a blocking call. Cancelling abandons it: it ends by its own deadline and its result is lost."""
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
