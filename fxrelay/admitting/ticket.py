"""Pure: what a ticket must say to be good for a service at this moment, and the making of one.

A ticket is a JWT (RFC 7519), signed by whoever knows the user: a portal, or an administrator with `fxrelay ticket mint`.

    iss      who made it; compared where the service's configuration names one
    sub      the user
    aud      the service's name, or what its configuration says: one text, or a list with it
    service  the service, where `aud` stands for several; compared if it is there
    node     the only node it is good for; optional
    groups   the user's groups, a list of texts; optional
    jti      random: a ticket is good for one stream
    iat, exp, nbf    integers; exp - iat at most `max_life_s`
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, Final

import jwt

from fxtunnel.kit.compact_jwt import LATEST_UNIX
from fxtunnel.kit.signed_claims import Algorithm, BadToken, KeySet, SignedClaims, TokenProblem, verified_claims
from fxtunnel.model import RelayId, ServiceName, is_name

MAX_USER_CHARS: Final = 128
MAX_GROUPS: Final = 64
MAX_GROUP_BYTES: Final = 2_048
"""Of all groups: they travel in a cookie as well."""
MIN_ID_CHARS: Final = 8
MAX_ID_CHARS: Final = 128


class TicketProblem(StrEnum):
    """Why a ticket does not let in, beside the flaws of any token."""

    MISSING = "missing"
    BAD_CLAIMS = "bad-claims"
    EXPIRED = "expired"
    NOT_YET = "not-yet-valid"
    LIVES_TOO_LONG = "lives-too-long"
    WRONG_AUDIENCE = "wrong-audience"
    WRONG_ISSUER = "wrong-issuer"
    WRONG_SERVICE = "wrong-service"
    WRONG_NODE = "wrong-node"
    USED = "used"
    FORGOTTEN = "older-than-the-memory"
    UNKNOWABLE = "store-away"


class BadTicket(Exception):
    """A ticket that does not let in. `str()` is for the log; it holds nothing by which the ticket could be used."""

    def __init__(self, why: TicketProblem | TokenProblem, text: str) -> None:
        self.why = why
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class TicketRules:
    """What a service asks of its tickets. Times in seconds."""

    keys: KeySet
    audience: str
    issuer: str = ""
    algorithms: tuple[Algorithm, ...] = (Algorithm.EDDSA,)
    max_life_s: float = 60.0
    leeway_s: float = 10.0
    is_required: bool = True
    refuses_without_store: bool = True
    """Whether a ticket is refused while nobody can tell whether another relay has seen it."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A sound ticket. `use_id` stands for it in memory and logs: who knows it cannot make the ticket of it."""

    user: str
    groups: tuple[str, ...]
    node: RelayId | None
    use_id: str
    issued_unix: int
    expires_unix: int
    """When it cannot be used any more, leeway included."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The user whose stream or request it is. `node` is the only node that will do; `ticket` is the one that has to be used first."""

    user: str = ""
    groups: tuple[str, ...] = ()
    node: RelayId | None = None
    ticket: Ticket | None = None


def read_ticket(token: str, rules: TicketRules, service: ServiceName, now_unix: float) -> Ticket:
    """What `token` says, if it is good for `service` now. That it was not used before is not for this function to say.

    Raises:
        BadTicket: it is not.
    """
    try:
        signed = verified_claims(token, rules.keys, rules.algorithms)
    except BadToken as exc:
        raise BadTicket(exc.problem, str(exc)) from exc
    claims = signed.claims
    _check_address(claims, rules, service)
    issued, expires = _check_times(claims, rules, now_unix)
    return Ticket(_user(claims), _groups(claims), _node(claims), _use_id(signed), issued, int(expires + rules.leeway_s) + 1)


@dataclass(frozen=True, slots=True)
class UnsignedTicket:
    """A ticket to be made. `audience` empty: the service's name."""

    user: str
    service: ServiceName
    node: str = ""
    groups: tuple[str, ...] = ()
    audience: str = ""
    issuer: str = ""
    ttl_s: int = 60
    extra: Mapping[str, Any] = field(default_factory=dict)


def mint_ticket(unsigned: UnsignedTicket, key: Any, algorithm: Algorithm, kid: str, now_unix: float) -> str:
    """A fresh ticket, signed with a private key of that algorithm."""
    issued = int(now_unix)
    claims: dict[str, Any] = {
        **unsigned.extra,
        "sub": unsigned.user,
        "aud": unsigned.audience or unsigned.service,
        "jti": secrets.token_urlsafe(16),
        "iat": issued,
        "exp": issued + unsigned.ttl_s,
    }
    if unsigned.audience and unsigned.audience != unsigned.service:
        claims["service"] = unsigned.service
    for name, value in (("iss", unsigned.issuer), ("node", unsigned.node), ("groups", list(unsigned.groups))):
        if value:
            claims[name] = value
    return jwt.encode(claims, key, algorithm=algorithm.value, headers={"kid": kid})


def _check_address(claims: Mapping[str, object], rules: TicketRules, service: ServiceName) -> None:
    audience = claims.get("aud")
    named = audience if isinstance(audience, list) else [audience]
    if rules.audience not in named:
        raise BadTicket(TicketProblem.WRONG_AUDIENCE, f"its audience is {_shown(audience)}, expected {rules.audience}")
    if rules.issuer and claims.get("iss") != rules.issuer:
        raise BadTicket(TicketProblem.WRONG_ISSUER, f"its issuer is {_shown(claims.get('iss'))}, expected {rules.issuer}")
    if claims.get("service", service) != service:
        raise BadTicket(TicketProblem.WRONG_SERVICE, f"it is for the service {_shown(claims.get('service'))}")


def _check_times(claims: Mapping[str, object], rules: TicketRules, now_unix: float) -> tuple[int, int]:
    # bool is an int in Python, and 1.5 or "1700000000" are no times of ours.
    values = [claims.get("iat"), claims.get("exp"), claims.get("nbf", claims.get("iat"))]
    issued, expires, not_before = (value if type(value) is int and 0 <= value <= LATEST_UNIX else -1 for value in values)
    if min(issued, expires, not_before) < 0:
        raise BadTicket(TicketProblem.BAD_CLAIMS, "iat and exp (and nbf, if it is there) must be integers")
    if not 0 < expires - issued <= rules.max_life_s:
        raise BadTicket(TicketProblem.LIVES_TOO_LONG, f"it lives {expires - issued} s, at most {rules.max_life_s:g} s are allowed")
    if expires + rules.leeway_s < now_unix:
        raise BadTicket(TicketProblem.EXPIRED, f"it expired {now_unix - expires:.0f} s ago")
    start = max(issued, not_before)
    if start - rules.leeway_s > now_unix:
        raise BadTicket(TicketProblem.NOT_YET, f"it is valid in {start - now_unix:.0f} s only; are the clocks right?")
    return issued, expires


def _user(claims: Mapping[str, object]) -> str:
    user = claims.get("sub")
    problem = problem_of_user(user)
    if problem:
        raise BadTicket(TicketProblem.BAD_CLAIMS, problem)
    return str(user)


def problem_of_user(user: object) -> str:
    """Why nobody can be called this in a ticket; "" for a user's name."""
    if not isinstance(user, str) or not 0 < len(user) <= MAX_USER_CHARS or not user.isprintable() or user != user.strip():
        return f"sub must be a user: printable, 1 to {MAX_USER_CHARS} characters, no space around them"
    # Clients without a ticket count as a user named by their address: no ticket may name such a user.
    try:
        ip_address(user)
    except ValueError:
        return ""
    return "sub is an address"


def _groups(claims: Mapping[str, object]) -> tuple[str, ...]:
    groups = claims.get("groups", [])
    if not isinstance(groups, list) or len(groups) > MAX_GROUPS:
        raise BadTicket(TicketProblem.BAD_CLAIMS, f"groups must be a list of at most {MAX_GROUPS} texts")
    found = tuple(group for group in groups if isinstance(group, str) and 0 < len(group) <= MAX_USER_CHARS and group.isprintable())
    if len(found) < len(groups):
        raise BadTicket(TicketProblem.BAD_CLAIMS, "groups must be printable texts")
    if sum(len(group.encode()) for group in found) > MAX_GROUP_BYTES:
        raise BadTicket(TicketProblem.BAD_CLAIMS, f"groups have more than {MAX_GROUP_BYTES} bytes")
    return found


def _node(claims: Mapping[str, object]) -> RelayId | None:
    node = claims.get("node")
    if node is None:
        return None
    if not isinstance(node, str) or not is_name(node):
        raise BadTicket(TicketProblem.BAD_CLAIMS, "node is no node's id")
    return RelayId(node)


def _use_id(signed: SignedClaims) -> str:
    jti = signed.claims.get("jti")
    if not isinstance(jti, str) or not MIN_ID_CHARS <= len(jti) <= MAX_ID_CHARS or not jti.isprintable():
        raise BadTicket(TicketProblem.BAD_CLAIMS, f"jti must be {MIN_ID_CHARS} to {MAX_ID_CHARS} printable characters")
    # Two who make tickets may count 1, 2, 3 both: their keys tell them apart.
    return hashlib.sha256(f"{signed.key.thumbprint}\0{jti}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _shown(value: object) -> str:
    """For a log: it was signed by somebody we know, and may still be anything."""
    text = value if isinstance(value, str) else type(value).__name__ if value is not None else "missing"
    return text[:64] if text.isprintable() else ascii(text[:64])
