"""Task: worker threads for the blocking calls of store and transporter, a few of their own."""

from collections.abc import Callable
from typing import Final, TypeVar

import trio

from fxtunnel.errors import StoreError

T = TypeVar("T")

CLUSTER_THREADS: Final = 6
"""A store that hangs may hold these threads, and none of those the rest of the relay needs."""


def _ignored() -> None:
    """Nobody wants to know."""


class Threads:
    """The threads of one relay's cluster. `store_failed` is called, in the trio thread, for each call that ends in a StoreError; also to be
    called by who waited in vain.
    """

    def __init__(self, store_failed: Callable[[], None] = _ignored) -> None:
        self.store_failed = store_failed
        self._limiter = trio.CapacityLimiter(CLUSTER_THREADS)

    async def run(self, call: Callable[[], T]) -> T:
        """Run a blocking call in a thread. Cancelling abandons it: it ends by its own deadline, and its result is lost."""
        try:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        except StoreError:
            self.store_failed()
            raise
