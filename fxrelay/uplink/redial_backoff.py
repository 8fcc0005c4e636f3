"""Pure: how long an uplink waits before it dials for a control link again. Times are monotonic seconds."""

import random
from dataclasses import dataclass
from typing import Final

from fxrelay.uplink.dial import Unanswered, Unreachable
from fxrelay.uplink.failure_policy import LogBackoff, retry_after_s
from fxrelay.uplink.ports import UplinkConfig
from fxtunnel.errors import FxError
from fxtunnel.kit.backoff import FullJitter

SETTLED_S: Final = 1.0
"""A control link that lasted this long counts as a success: the waits that earlier failures had built up are forgotten."""
RECENT_S: Final = 120.0
"""For this long after a loss the gateway is dialled often: most likely it is being restarted, and should have its relays back at once.
Also after our own start, as long as nobody answers there: whoever starts us may be starting the gateway as well."""
RECENT_CAP_S: Final = 2.0
"""Longest wait within RECENT_S. Also behind a proxy that accepts connections for a gateway that is down: with 4 s the last relay was back
after 6.7 s (measured)."""
ABSENT_CAP_S: Final = 1.0
"""The same while nothing listens at the address: an attempt costs the gateway nothing then."""
FLAP_CAP_S: Final = 1.0
"""Longest wait after a control link that came up and broke at once: the path works, and streams wait for tickets."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no control link. `at_least_s` is the wait that the gateway has asked for.

    `is_answered`: a gateway, or something that may be one, has taken the connection. `is_absent`: nothing listens there, or no route leads
    there.
    """

    at_least_s: float = 0.0
    is_answered: bool = True
    is_absent: bool = False

    @classmethod
    def of(cls, exc: FxError) -> "Failure":
        """What the error of a dial, or of a link, tells."""
        return cls(retry_after_s(exc), not isinstance(exc, Unanswered), isinstance(exc, Unreachable))


INTERNAL: Final = Failure()
"""A bug of ours: nothing is known of the gateway."""


class RedialBackoff:
    """The waits of one uplink to one process of its gateway. All have full jitter, so that many relays do not dial at the same moment."""

    def __init__(self, config: UplinkConfig, rng: random.Random) -> None:
        def up_to(cap_s: float) -> FullJitter:
            return FullJitter(base_s=config.min_backoff_s, cap_s=min(config.max_backoff_s, cap_s), rng=rng)

        self.failures = LogBackoff()
        """Which failures are worth a log line."""
        self.busy = LogBackoff()
        """Which appointments with a busy gateway are."""
        self._backoff = up_to(config.max_backoff_s)
        self._flaps = up_to(FLAP_CAP_S)
        self._recent = up_to(RECENT_CAP_S)
        self._absent = up_to(ABSENT_CAP_S)

    def unwelcome_s(self, failure: Failure, now: float, began_at: float, lost_at: float) -> float:
        """Seconds to wait after an attempt that brought no welcome. `began_at`: when the uplink was started; `lost_at`: when a link of it
        was lost last.
        """
        since = lost_at if failure.is_answered else max(lost_at, began_at)
        if now - since >= RECENT_S:
            return self._backoff.next_s(failure.at_least_s)
        return (self._absent if failure.is_absent else self._recent).next_s(failure.at_least_s)

    def lost_s(self, failure: Failure, lasted_s: float) -> float:
        """Seconds to wait after a link that had its welcome, `lasted_s` ago, and broke."""
        for waits in (self._backoff, self._recent, self._absent):
            waits.reset()
        if lasted_s >= SETTLED_S:
            self._flaps.reset()
            self.failures.reset()
            self.busy.reset()
        return self._flaps.next_s(failure.at_least_s)
