"""Pure: the states of one login on its way to a reserved server, and what leads from one to the next.

    NONE -> ENTERED -> FORWARDED -> AUTHENTICATING -> AUTHENTICATED -> COMMITTED -> HELD -> RELEASED
    side exits: REJECTED_RESERVED, AUTH_FAILED, EXPIRED, ABORTED, SERVER_DOWN

Login adapters drive it; a stream of a TCP service goes through it at once, being the login itself.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from fxrelay.balance.reservations import Step


class State(StrEnum):
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


class Happening(StrEnum):
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


STEPS: Final[dict[State, Step]] = {
    State.NONE: Step.SELECT,
    State.ENTERED: Step.ENTER,
    State.FORWARDED: Step.FORWARD,
    State.AUTHENTICATING: Step.AUTHENTICATE,
    State.AUTHENTICATED: Step.AUTHENTICATE,
    State.COMMITTED: Step.COMMIT,
    State.REJECTED_RESERVED: Step.COMMIT,
    State.HELD: Step.RESERVED,
    State.RELEASED: Step.RELEASE,
    State.EXPIRED: Step.RELEASE,
}
"""The published step whose result each state is; side exits have none."""

_WAITING: Final = (State.ENTERED, State.FORWARDED, State.AUTHENTICATING, State.AUTHENTICATED)
TRANSITIONS: Final[dict[tuple[State, Happening], State]] = {
    (State.NONE, Happening.ENTER): State.ENTERED,
    (State.NONE, Happening.REJECT): State.REJECTED_RESERVED,
    (State.ENTERED, Happening.FORWARD): State.FORWARDED,
    (State.FORWARDED, Happening.REQUEST): State.AUTHENTICATING,
    (State.AUTHENTICATING, Happening.REQUEST): State.AUTHENTICATING,
    (State.FORWARDED, Happening.SUCCESS): State.AUTHENTICATED,
    (State.AUTHENTICATING, Happening.SUCCESS): State.AUTHENTICATED,
    (State.FORWARDED, Happening.FAILURE): State.AUTH_FAILED,
    (State.AUTHENTICATING, Happening.FAILURE): State.AUTH_FAILED,
    (State.AUTHENTICATED, Happening.GRANT): State.COMMITTED,
    (State.AUTHENTICATED, Happening.REJECT): State.REJECTED_RESERVED,
    (State.COMMITTED, Happening.LET_IN): State.HELD,
    (State.COMMITTED, Happening.LOGOUT): State.RELEASED,
    (State.COMMITTED, Happening.EXPIRE): State.EXPIRED,
    (State.HELD, Happening.LOGOUT): State.RELEASED,
    (State.HELD, Happening.EXPIRE): State.EXPIRED,
    **{(state, Happening.EXPIRE): State.EXPIRED for state in _WAITING},
    **{(state, Happening.CLIENT_GONE): State.ABORTED for state in _WAITING},
    **{(state, Happening.SERVER_GONE): State.SERVER_DOWN for state in _WAITING},
}


class WrongOrder(Exception):
    """Something happened to a login that cannot happen to it now: a bug of the caller's. Let it fly."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A login and where it is; `requests` counts those that authentication took so far (step 4a: it may take several)."""

    attempt_id: str
    state: State = State.NONE
    requests: int = 0

    def after(self, happening: Happening) -> "Attempt":
        """The attempt after `happening`.

        Raises:
            WrongOrder: it cannot happen now.
        """
        state = TRANSITIONS.get((self.state, happening))
        if state is None:
            raise WrongOrder(f"{happening} after {self.state}")
        return replace(self, state=state, requests=self.requests + (happening is Happening.REQUEST))

    @property
    def is_over(self) -> bool:
        """Whether nothing can happen to it any more."""
        return all(state is not self.state for state, _ in TRANSITIONS)
