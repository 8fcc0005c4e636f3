"""Pure: the states of one login on its way to a reserved server, and what leads from one to the next.

    NONE -> ENTERED -> FORWARDED -> AUTHENTICATING -> AUTHENTICATED -> COMMITTED -> HELD -> RELEASED
    side exits: REJECTED_RESERVED, AUTH_FAILED, EXPIRED, ABORTED, SERVER_DOWN

Login adapters drive it; a stream of a TCP service goes through it at once, being the login itself.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class AttemptState(StrEnum):
    """Where a login is."""

    NONE = "none"
    ENTERED = "entered"
    FORWARDED = "forwarded"
    AUTHENTICATING = "authenticating"
    AUTHENTICATED = "authenticated"
    COMMITTED = "committed"
    HELD = "held"
    RELEASED = "released"
    REJECTED_RESERVED = "rejected-reserved"
    AUTH_FAILED = "auth-failed"
    EXPIRED = "expired"
    ABORTED = "aborted"
    SERVER_DOWN = "server-down"


class AttemptEvent(StrEnum):
    """What moves it on."""

    ENTER = "enter"
    FORWARD = "forward"
    REQUEST = "request"
    SUCCESS = "success"
    FAILURE = "failure"
    GRANT = "grant"
    REJECT = "reject"
    LET_IN = "let-in"
    LOGOUT = "logout"
    EXPIRE = "expire"
    CLIENT_GONE = "client-gone"
    SERVER_GONE = "server-gone"


_WAITING: Final = (AttemptState.ENTERED, AttemptState.FORWARDED, AttemptState.AUTHENTICATING, AttemptState.AUTHENTICATED)
TRANSITIONS: Final[dict[tuple[AttemptState, AttemptEvent], AttemptState]] = {
    (AttemptState.NONE, AttemptEvent.ENTER): AttemptState.ENTERED,
    (AttemptState.NONE, AttemptEvent.REJECT): AttemptState.REJECTED_RESERVED,
    (AttemptState.ENTERED, AttemptEvent.FORWARD): AttemptState.FORWARDED,
    (AttemptState.FORWARDED, AttemptEvent.REQUEST): AttemptState.AUTHENTICATING,
    (AttemptState.AUTHENTICATING, AttemptEvent.REQUEST): AttemptState.AUTHENTICATING,
    (AttemptState.FORWARDED, AttemptEvent.SUCCESS): AttemptState.AUTHENTICATED,
    (AttemptState.AUTHENTICATING, AttemptEvent.SUCCESS): AttemptState.AUTHENTICATED,
    (AttemptState.FORWARDED, AttemptEvent.FAILURE): AttemptState.AUTH_FAILED,
    (AttemptState.AUTHENTICATING, AttemptEvent.FAILURE): AttemptState.AUTH_FAILED,
    (AttemptState.AUTHENTICATED, AttemptEvent.GRANT): AttemptState.COMMITTED,
    (AttemptState.AUTHENTICATED, AttemptEvent.REJECT): AttemptState.REJECTED_RESERVED,
    (AttemptState.COMMITTED, AttemptEvent.LET_IN): AttemptState.HELD,
    (AttemptState.COMMITTED, AttemptEvent.LOGOUT): AttemptState.RELEASED,
    (AttemptState.COMMITTED, AttemptEvent.EXPIRE): AttemptState.EXPIRED,
    (AttemptState.HELD, AttemptEvent.LOGOUT): AttemptState.RELEASED,
    (AttemptState.HELD, AttemptEvent.EXPIRE): AttemptState.EXPIRED,
    **{(state, AttemptEvent.EXPIRE): AttemptState.EXPIRED for state in _WAITING},
    **{(state, AttemptEvent.CLIENT_GONE): AttemptState.ABORTED for state in _WAITING},
    **{(state, AttemptEvent.SERVER_GONE): AttemptState.SERVER_DOWN for state in _WAITING},
}


class InvalidTransition(Exception):
    """Something happened to a login that cannot happen to it now: a bug of the caller's. Let it fly."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A login and where it is. Authentication may take several requests (step 4a)."""

    attempt_id: str
    state: AttemptState = AttemptState.NONE

    def after(self, happening: AttemptEvent) -> "Attempt":
        """The attempt after `happening`.

        Raises:
            InvalidTransition: it cannot happen now.
        """
        state = TRANSITIONS.get((self.state, happening))
        if state is None:
            raise InvalidTransition(f"{happening} after {self.state}")
        return replace(self, state=state)
