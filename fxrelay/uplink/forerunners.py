"""Task: the processes of this relay that have made way, for the hello of the one that follows. A file in the state directory tells of them.

Each says so itself, with a drain message. That is lost where its control link has fallen silent; the gateway would then take its successor
for somebody else with its key, and fence it off.
"""

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fxrelay.uplink.identity import Identity
from fxtunnel.control.messages import Earlier
from fxtunnel.errors import ConfigError
from fxtunnel.kit.files import read_secret, write_secret
from fxtunnel.model import InstanceId, is_name

logger = logging.getLogger(__name__)

FILE: Final = "made-way.json"
MAX_KEPT: Final = 8
"""The latest ones: a gateway lets so many instances of a relay drain at once (PROTOCOL.md, 3.1)."""
MAX_LEFT_S: Final = 86_400.0
"""Until a forerunner has ended, at most: what one message can say. A clock that was set back must not make it longer."""
WRITE_S: Final = 2.0
"""For a disk that is slow. The launcher waits ten seconds in all."""


class Forerunners:
    """Those of `identity`'s relay. `load` while the state directory is held; `add_ourselves` before it is given up."""

    def __init__(self, identity: Identity, now_unix: Callable[[], float] = time.time) -> None:
        self._path: Path = identity.state_dir / FILE
        self._instance = identity.instance
        self._now_unix = now_unix
        self._until_unix: dict[InstanceId, tuple[float, bool]] = {}
        """When each has to have ended, and whether it serves until its successor does."""

    def load(self) -> None:
        """Read the file, if there is one. Blocking. One that cannot be used is only logged."""
        if not self._path.exists():
            return
        try:
            self._until_unix = dict(map(_entry, json.loads(read_secret(self._path))))
        except (ConfigError, ValueError, TypeError, LookupError, RecursionError) as exc:
            logger.warning("%s cannot be used, and is ignored: %s", self._path, exc)

    def earlier(self) -> tuple[Earlier, ...]:
        """Those that may still have streams, for a hello."""
        now_unix = self._now_unix()
        left = [(instance, until_unix - now_unix, serves) for instance, (until_unix, serves) in self._until_unix.items()]
        latest = [entry for entry in left if entry[1] > 0][-MAX_KEPT:]
        return tuple(Earlier(instance=instance, deadline_s=min(left_s, MAX_LEFT_S), handover=serves) for instance, left_s, serves in latest)

    async def add_ourselves(self, deadline_s: float, *, handover: bool) -> None:
        """Tell our successor of those before us and of us, who have `deadline_s`. If that cannot be written, it is only logged."""
        now_unix = self._now_unix()
        entries = [(earlier.instance, now_unix + earlier.deadline_s, earlier.handover) for earlier in self.earlier()]
        entries.append((self._instance, now_unix + deadline_s, handover))
        data = json.dumps([{"instance": name, "until_unix": until, "handover": serves} for name, until, serves in entries]).encode()
        try:
            with trio.move_on_after(WRITE_S) as patience:
                await trio.to_thread.run_sync(partial(write_secret, self._path, data + b"\n"), abandon_on_cancel=True)
        except ConfigError as exc:
            logger.warning("our successor does not hear that we make way: %s", exc)
        if patience.cancelled_caught:
            logger.warning("our successor does not hear that we make way: %s was not written within %g s", self._path, WRITE_S)


def _entry(entry: dict[str, object]) -> tuple[InstanceId, tuple[float, bool]]:
    """Raises ValueError, TypeError or LookupError for what is none."""
    name, until_unix, serves = entry["instance"], entry["until_unix"], entry["handover"]
    if not isinstance(name, str) or not is_name(name) or not isinstance(until_unix, int | float) or not isinstance(serves, bool):
        raise ValueError("an entry with other fields than it has to have")
    return InstanceId(name), (float(until_unix), serves)
