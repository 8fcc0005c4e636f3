"""Pure: the codes of PROTOCOL.md, 8."""

from enum import IntEnum, StrEnum


class Code(IntEnum):
    """Why a stream or a session ended. The wire carries the number."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL = 2
    FRAME_SIZE = 3
    INTERNAL_ERROR = 4
    NO_SERVICE = 16
    CONNECT_FAILED = 17
    CONNECT_TIMEOUT = 18
    BUSY = 19
    DRAINING = 20
    UNSUPPORTED = 21
    BAD_TICKET = 22
    FORBIDDEN = 23
    OVER_LIMIT = 24
    PEER_RESET = 32
    IDLE_TIMEOUT = 33
    LINK_LOST = 34
    FENCED = 35
    REVOKED = 36
    SHUTDOWN = 37
    OVERLOAD = 38
    CANCELLED = 39

    @property
    def label(self) -> str:
        """The name as PROTOCOL.md writes it, for logs and metrics: `connect-failed`."""
        return self.name.lower().replace("_", "-")

    @property
    def is_final(self) -> bool:
        """Whether a REFUSE with it holds for all relays: the client itself is not to have the stream."""
        return Code.BAD_TICKET <= self <= Code.OVER_LIMIT

    @classmethod
    def from_wire(cls, number: int) -> "Code":
        """The code for a number a peer sent; numbers of later versions become INTERNAL_ERROR."""
        try:
            return cls(number)
        except ValueError:
            return cls.INTERNAL_ERROR


class Refusal(StrEnum):
    """Why the gateway turned a relay away, over HTTP, in `refused` or in DENIED."""

    BAD_REQUEST = "bad-request"
    BAD_TOKEN = "bad-token"  # noqa: S105 - a code, not a token
    EXPIRED_TOKEN = "expired-token"  # noqa: S105 - a code, not a token
    BAD_ASSERTION = "bad-assertion"
    UNKNOWN_RELAY = "unknown-relay"
    CLOCK_SKEW = "clock-skew"
    REVOKED = "revoked"
    NAME_TAKEN = "name-taken"
    VERSION_MISMATCH = "version-mismatch"
    TOO_MANY = "too-many"
    DRAINING = "draining"
    BAD_TICKET = "bad-ticket"
    UNKNOWN_SESSION = "unknown-session"
    BAD_RESUME = "bad-resume"
    UNSUPPORTED = "unsupported"

    @property
    def is_final(self) -> bool:
        """Whether trying again without an administrator's help is pointless."""
        return self in _FINAL

    @property
    def status(self) -> int:
        """The HTTP status that carries this refusal (PROTOCOL.md, 8)."""
        return _STATUS.get(self, 400)


_FINAL = frozenset(
    {
        Refusal.BAD_REQUEST,
        Refusal.BAD_TOKEN,
        Refusal.EXPIRED_TOKEN,
        Refusal.BAD_ASSERTION,
        Refusal.UNKNOWN_RELAY,
        Refusal.REVOKED,
        Refusal.NAME_TAKEN,
        Refusal.VERSION_MISMATCH,
    }
)
_STATUS = {
    Refusal.BAD_TOKEN: 401,
    Refusal.EXPIRED_TOKEN: 401,
    Refusal.BAD_ASSERTION: 401,
    Refusal.UNKNOWN_RELAY: 401,
    Refusal.CLOCK_SKEW: 401,
    Refusal.REVOKED: 403,
    Refusal.NAME_TAKEN: 409,
    Refusal.VERSION_MISMATCH: 426,
    Refusal.TOO_MANY: 429,
    Refusal.DRAINING: 503,
}
