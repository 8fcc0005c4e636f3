"""Task: what the entries of a chain may ask for besides their input: who this relay is, and numbers that all relays share."""

from typing import Final

import trio

from fxrelay.cluster.ports import Store
from fxrelay.cluster.threads import Threads
from fxtunnel.errors import StoreError
from fxtunnel.model import RelayId

NEXT_NUMBER_S: Final = 1.0
"""For the store to answer: a stream waits meanwhile, and a number of this relay's own will do."""


class ClusterEnvironment:
    """What entries may ask for: the counter all relays share, or one of this relay's own while the store is away."""

    def __init__(self, local_id: RelayId, store: Store, threads: Threads) -> None:
        self._local_id = local_id
        self._store = store
        self._threads = threads
        self._own: dict[str, int] = {}

    @property
    def local_id(self) -> RelayId:
        """See `Environment`."""
        return self._local_id

    async def next_number(self, counter: str) -> int:
        """See `Environment`."""
        number: int | None = None
        try:
            with trio.move_on_after(NEXT_NUMBER_S):
                number = await self._threads.run(lambda: self._store.add(counter, 1))
        except StoreError:
            pass  # the follower says so in status and log
        self._own[counter] = number = self._own.get(counter, 0) + 1 if number is None else number
        return number
