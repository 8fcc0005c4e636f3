"""Pure: the parent's table of which worker has which relay, so that each name is held once and its epoch only rises."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from fxtunnel.model import InstanceId, RelayId

PLACED_S: Final = 5.0
"""How long a connection that was sent to a worker counts as a relay there, unless its relay says hello first."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a relay's name."""

    worker: int
    instance: InstanceId
    epoch: int


@dataclass(frozen=True, slots=True)
class Granted:
    """The worker that asked has the name now, under this epoch. `former`: the holder at another worker, to be fenced off there."""

    epoch: int
    former: Holder | None = None


class RelayOwners:
    """Every relay of every worker. At most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._holders: dict[RelayId, Holder] = {}
        self._epochs: dict[RelayId, int] = {}
        self._placed: dict[int, list[float]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def holder(self, relay_id: RelayId) -> Holder | None:
        """Who has it now."""
        return self._holders.get(relay_id)

    def claim(self, worker: int, relay_id: RelayId, instance: InstanceId) -> Granted | None:
        """A relay has said hello to this worker; None when there is no room for another one."""
        self.unplace(worker)
        former = self._holders.get(relay_id)
        if former is None and len(self._holders) >= self.limit:
            return None
        if former is not None and (former.worker, former.instance) == (worker, instance):
            return Granted(former.epoch)
        epoch = self._epochs[relay_id] = self._epochs.get(relay_id, 0) + 1
        self._holders[relay_id] = Holder(worker, instance, epoch)
        return Granted(epoch, former if former is not None and former.worker != worker else None)

    def unplace(self, worker: int) -> None:
        """A connection that was sent there has become a relay, or turned out to be none."""
        if self._placed.get(worker):
            self._placed[worker].pop(0)

    def note(self, worker: int, relay_id: RelayId, instance: InstanceId, epoch: int) -> None:
        """A worker says that it has this relay."""
        if epoch >= self._epochs.get(relay_id, 0):
            self._epochs[relay_id] = epoch
            self._holders[relay_id] = Holder(worker, instance, epoch)

    def gone(self, worker: int, relay_id: RelayId) -> None:
        """A worker says that it has this relay no more."""
        holder = self._holders.get(relay_id)
        if holder is not None and holder.worker == worker:
            del self._holders[relay_id]

    def worker_gone(self, worker: int) -> None:
        """A worker has died, and all it had with it."""
        self._holders = {relay_id: holder for relay_id, holder in self._holders.items() if holder.worker != worker}
        self._placed.pop(worker, None)

    def place(self, workers: Collection[int], now: float) -> int | None:
        """The worker with the fewest relays, counting those on their way; the newcomer is counted there. None if there is no worker.

        Ties go to the worker with fewer relays that have arrived: a connection on its way may turn out not to be a relay.
        """
        here = Counter(holder.worker for holder in self._holders.values())
        counts: dict[int, tuple[int, int]] = {}
        for worker in sorted(workers):
            placed = self._placed[worker] = [since for since in self._placed.get(worker, []) if now - since < PLACED_S]
            counts[worker] = here[worker] + len(placed), here[worker]
        if not counts:
            return None
        best = min(counts, key=counts.__getitem__)
        self._placed[best].append(now)
        return best
