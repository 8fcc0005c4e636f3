"""Port: what an administrator can write about one service in relay.toml."""

import re
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from fxrelay.login_settings import LoginSection
from fxtunnel.kit.sections import Seconds, Section, Size
from fxtunnel.kit.settings import NameField, OptionalAddress, OptionalPath

_HTTP_ONLY: Final = frozenset(
    {"tls", "hosts", "trust_forwarded", "node_paths", "affinity", "cookie_key", "response_timeout_s", "max_body", "login"}
)
_POOL_ONLY: Final = frozenset(
    {"host", "nodes", "where", "balance", "action", "node_paths", "affinity", "reservations", "guard_start", "login"}
)
_RESERVING: Final = frozenset({"linger_s", "owner_relogin", "hold_while_sessions", "queue"})
_HOST: Final = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?|\[[0-9A-Fa-f:.]+\]")
_COOKIE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class TlsSection(Section):
    """TLS that ends at this relay: the gateway sees nothing of it."""

    cert: OptionalPath = Field(description="Certificate chain, PEM.")
    key: OptionalPath = Field(description="Its private key, PEM, unencrypted; mode 0600.")


class AffinitySection(Section):
    """How a client comes back to the node it was at."""

    cookie: str | None = Field(None, description="Name of a cookie that this relay sets and signs.")
    claim: str | None = Field(None, min_length=1, max_length=64, description="Claim of the JWT in Authorization that names a node.")

    @field_validator("cookie")
    @classmethod
    def _check_cookie(cls, value: str | None) -> str | None:
        if value is not None and _COOKIE.fullmatch(value) is None:
            raise ValueError("expected a cookie's name: 1 to 64 of the characters A-Z a-z 0-9 _ -")
        return value

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.cookie is None) == (self.claim is None):
            raise ValueError("expected either `cookie` or `claim`")
        return self


class QueueSection(Section):
    """Waiting for a reserved server instead of being turned away."""

    max: int = Field(100, ge=1, le=100_000, description="Streams that may wait at this relay.")
    wait_s: Seconds = Field(30.0, ge=0.1, le=3_600, description="Seconds a stream waits.")


class TicketSection(Section):
    """Tickets without which a stream or a request is not served: JWTs that somebody else makes, each for one stream."""

    keys: OptionalPath = Field(description="Public keys of those who may make tickets: PEM, or a JWK set; read again at a reload.")
    audience: str = Field("", max_length=256, description="What `aud` must be; default: the service's name.")
    issuer: str = Field("", max_length=256, description="What `iss` must be; empty: it is not looked at.")
    algorithms: tuple[Literal["EdDSA", "ES256", "RS256"], ...] = Field(("EdDSA",), min_length=1, description="Signatures that are taken.")
    max_life_s: Seconds = Field(60.0, ge=1, le=3_600, description="Longest life of a ticket, from iat to exp.")
    leeway_s: Seconds = Field(10.0, ge=0, le=300, description="How far the clocks of those who make tickets may be off.")
    required: bool = Field(True, description="Whether everybody needs one; if not, who shows none is served by his address.")
    session_s: Seconds = Field(
        28_800.0,
        ge=0,
        le=604_800,
        description="HTTP: how long the cookie holds that a ticket is changed for; 0: each request needs a ticket.",
    )
    without_store: Literal["refuse", "local"] = Field(
        "refuse", description="While the store is away: refuse tickets, or take those that this relay itself has not seen."
    )


class StreamLimitsSection(Section):
    """How many streams of the service one user or one address may have at this relay."""

    per_user_streams: int = Field(0, ge=0, le=1_000_000, description="Of the user of a ticket or a login; 0: no limit.")
    per_address_streams: int = Field(0, ge=0, le=1_000_000, description="Of an IPv4 address or an IPv6 /64; 0: no limit.")


class ServiceSection(Section):
    """A service. With `target` it is one address. With `port` it is a pool: the same port on every node of the pool, one of which is
    chosen for each stream. A relay never connects to anything that is not written here.
    """

    name: NameField = Field(description="The name doors ask for.")
    protocol: Literal["tcp", "http"] = Field(
        "tcp", description='How it is carried: "tcp" unread; "http": the relay reads requests, and each may go to another node.'
    )
    target: OptionalAddress | None = Field(None, description="Where it listens: host:port, or unix:/path.")
    port: int | None = Field(None, ge=1, le=65_535, description="The port on each node of the pool.")
    host: str = Field("127.0.0.1", description="Where a pool's service listens, as seen from this node itself.")
    nodes: Literal["*"] | tuple[NameField, ...] = Field("*", description='The pool: "*" for every node that publishes the service, or ids.')
    where: dict[str, Any] = Field(default_factory=dict, description='Only nodes whose static data has these values: {group = "gpu"}.')
    balance: tuple[str, ...] = Field((), description="The balancing chain: builtin:NAME, js:FILE, exec:FILE, python:MODULE:FUNCTION.")
    action: Literal["session/start", "user/login"] = Field(
        "session/start", description="What a stream counts as for the chain and for servers whose logins or starts are switched off."
    )
    proxy_protocol: Literal["v1", "v2"] | None = Field(None, description="Tell the service the client's address by this PROXY protocol.")

    reservations: bool = Field(False, description="A node belongs to one user as long as he has a stream there; action is user/login.")
    linger_s: Seconds = Field(0.0, ge=0, le=604_800, description="Seconds a node stays its user's after his last stream.")
    owner_relogin: Literal["prefer", "deny"] = Field(
        "prefer", description="A user's second stream: to the node that is his already, or to another one."
    )
    guard_start: bool = Field(False, description="Nodes reserved for others get no session/start either.")
    hold_while_sessions: bool = Field(False, description="A node stays its user's while it has sessions of his.")
    queue: QueueSection | None = Field(None, description="Wait for a reserved node: {max = 100, wait_s = 30}.")

    ticket: TicketSection | None = Field(None, description='Tickets: {keys = "FILE", audience = "…", issuer = "…"}.')
    owner: str | None = Field(None, description="Who may have what: python:MODULE:FUNCTION or exec:FILE, asked about every stream.")
    limits: StreamLimitsSection | None = Field(None, description="{per_user_streams = 8, per_address_streams = 64}.")
    login: LoginSection | None = Field(None, description="Where logins of an HTTP service happen: needed for its reservations.")

    tls: TlsSection | None = Field(
        None, description='End TLS here: {cert = "FILE", key = "FILE"}. Without it the stream carries plain HTTP.'
    )
    hosts: tuple[str, ...] = Field((), description="Names the service goes by, `*.` allowed; requests for others get 421. None: any.")
    trust_forwarded: bool = Field(False, description="Keep Forwarded and X-Forwarded-* of requests: only behind a proxy that sets them.")
    node_paths: bool = Field(False, description="/node/ID/… and /rnode/ID/… (without its beginning) lead to that node of the pool.")
    affinity: AffinitySection | None = Field(
        None, description='How a client comes back to its node: {cookie = "NAME"}, signed by this relay, or {claim = "iss"} of its JWT.'
    )
    cookie_key: OptionalPath | None = Field(
        None,
        description="File with the cookies' key, the same on all relays (mode 0600, 32 bytes or more); none: one is made in state_dir.",
    )
    response_timeout_s: Seconds = Field(
        60.0,
        ge=0.1,
        le=86_400,
        description="Seconds for a response to begin once its request was sent, and for the service to take more of a body.",
    )
    max_body: Size = Field(0, ge=0, le=1 << 50, description="Largest body of a request; 0: no bound.")

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if _HOST.fullmatch(name) is None:
                raise ValueError(f"expected host names without port, `*.` allowed in front, found {name!r}")
        return tuple(name.lower().removesuffix(".") for name in value)

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if (self.target is None) == (self.port is None):
            raise ValueError("expected either `target` (one address) or `port` (a pool of nodes)")
        if self.target is not None and self.target.port == 0:
            raise ValueError("nothing listens on port 0")
        if self.target is not None:
            pool_only = self.model_fields_set & (_POOL_ONLY | _RESERVING)
            if pool_only:
                raise ValueError(f"{', '.join(sorted(pool_only))}: only for a pool, which has `port` instead of `target`")
        return self

    @model_validator(mode="after")
    def _check_reservations(self) -> Self:
        if self.reservations and self.protocol == "http" and self.login is None:
            raise ValueError("reservations: an HTTP service needs [service.login], which says where its logins happen")
        if self.login is not None and "action" in self.model_fields_set:
            raise ValueError("action: with [service.login] requests tell themselves which of them are logins; leave `action` out")
        if self.reservations and self.action == "session/start" and "action" in self.model_fields_set:
            raise ValueError("reservations: a stream that reserves a node is a user/login; leave `action` out")
        if self.guard_start and self.is_login and self.login is None:
            raise ValueError("guard_start: only for a pool whose action is session/start; logins are always kept off")
        if not self.is_login and _RESERVING & self.model_fields_set:
            raise ValueError(
                f"{', '.join(sorted(_RESERVING & self.model_fields_set))}: only for a pool with reservations or action user/login"
            )
        return self

    @model_validator(mode="after")
    def _check_entry(self) -> Self:
        if self.ticket is None and self.login is None and self.limits is not None and self.limits.per_user_streams:
            raise ValueError("limits.per_user_streams: only with `ticket` or [service.login]; without them nobody says who the user is")
        if self.ticket is not None and self.protocol != "http" and "session_s" in self.ticket.model_fields_set:
            raise ValueError('ticket.session_s: only for protocol = "http"')
        return self

    @model_validator(mode="after")
    def _check_protocol(self) -> Self:
        http_only = _HTTP_ONLY & self.model_fields_set
        if self.protocol != "http" and http_only:
            raise ValueError(f'{", ".join(sorted(http_only))}: only for protocol = "http"')
        takes_key = self.ticket is not None or self.login is not None or (self.affinity is not None and self.affinity.cookie is not None)
        if self.cookie_key is not None and not takes_key:
            raise ValueError("cookie_key: only with affinity = {cookie = …}, ticket or [service.login]")
        if self.login is not None and (self.ticket is not None or self.owner is not None):
            raise ValueError("login: not together with ticket or owner: its requests are sent to nodes before anybody asked those")
        return self

    @property
    def is_login(self) -> bool:
        """Whether its streams are logins, or it has requests that are."""
        return self.reservations or self.action == "user/login" or self.login is not None

    @property
    def is_guarded(self) -> bool:
        """Whether not everybody may have it."""
        return self.ticket is not None or self.owner is not None or self.limits is not None

    @property
    def is_pool(self) -> bool:
        """Whether a node is chosen for each stream."""
        return self.port is not None
