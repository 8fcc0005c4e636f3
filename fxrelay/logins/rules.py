"""Port: what is said about the logins of one HTTP service, and the presets for services that are known."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

MAX_BODY_BYTES: Final = 16_384
"""Of a request of a login: it is held until a server has been chosen, and for a repeat."""
MAX_ANSWER_BYTES: Final = 1 << 20
"""Of the answer to one: it is held until the login is committed."""

_SPOT: Final = re.compile(r"(bearer)|(cookie|header|json|field):([!-~]{1,128})")


class Where(Enum):
    """What part of a message."""

    BEARER = "bearer"
    COOKIE = "cookie"
    HEADER = "header"
    JSON = "json"
    FIELD = "field"
    """A parameter of a request: in its query, its form, or at the top of its JSON."""


@dataclass(frozen=True, slots=True)
class ValueLocation:
    """Where in a message a value stands."""

    where: Where
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> "ValueLocation":
        """From `bearer`, `cookie:NAME`, `header:NAME`, `json:a.b.c` or `field:NAME`.

        Raises:
            ValueError: anything else.
        """
        found = _SPOT.fullmatch(text)
        if found is None:
            raise ValueError(f"expected bearer, cookie:NAME, header:NAME, json:a.b or field:NAME, found {text!r}")
        if found[1]:
            return cls(Where.BEARER)
        where, name = Where(found[2]), found[3]
        return cls(where, name.lower() if where is Where.HEADER else name)


@dataclass(frozen=True, slots=True)
class Calls:
    """Requests that are meant, by method and path; a path that ends in `*` means all that begin so. Those of logins are as `plain_path`
    makes them.
    """

    paths: tuple[str, ...] = ()
    methods: frozenset[str] = frozenset({"POST"})


@dataclass(frozen=True, slots=True)
class Signs:
    """How an answer is told to be a login's success: all that is given here must hold. No `status`: any of 2xx and 3xx.

    `json_path` leads to a value that must be `json_value`; where it leads to another text, the login goes on with further requests.
    `cookie` must be set.
    """

    status: frozenset[int] = frozenset()
    cookie: str = ""
    json_path: str = ""
    json_value: str = ""


@dataclass(frozen=True, slots=True)
class Stages:
    """How the requests of one login are told to belong together: what is found at one of `given` in an answer comes back as one of
    `returned` in the next request.
    """

    given: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()


class Retry(Enum):
    """What to do for a login whose server was given to somebody else in the meantime."""

    REPLAY = "replay"
    """Send the same request to another server."""
    TELL = "tell"
    """Say so."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Times in seconds. A login ends after `lifetime_s` in any case, and after `idle_s` without a request (0: not so).

    `per_address`: logins of one client address that may be under way or waiting at once, at this relay.
    """

    max_body_bytes: int = MAX_BODY_BYTES
    max_answer_bytes: int = MAX_ANSWER_BYTES
    lifetime_s: float = 43_200.0
    idle_s: float = 0.0
    per_address: int = 8


@dataclass(frozen=True, slots=True)
class LoginRules:
    """The logins of one service. `user` is the parameter with the user's name.

    `token` is where a success shows its token: in the answer, or with `token_in_request` in the request. `headers` are the fields by which
    requests show it afterwards, besides `Authorization: Bearer`.
    """

    login: Calls
    logout: Calls
    user: str
    signs: Signs
    stages: Stages = Stages()
    token: ValueLocation | None = None
    token_in_request: bool = False
    headers: tuple[str, ...] = ()
    retry: Retry = Retry.TELL
    bounds: Bounds = field(default_factory=Bounds)


FASTX3: Final = LoginRules(
    Calls(("/v3/api/auth/ssh", "/v3/api/user/login"), frozenset({"GET", "POST"})),
    Calls(("/v3/api/auth/logout", "/v3/api/user/logout"), frozenset({"GET", "POST"})),
    "username",
    Signs(frozenset({200}), "", "result.stage", "success"),
    Stages(("result.authtoken", "result.token"), ("authtoken", "token")),
    ValueLocation(Where.JSON, "result.token"),
    headers=("x-fastx-token",),
    retry=Retry.REPLAY,
)
"""The login API of FastX 3: stages `login`, then any of `public-key`, `keyboard-interactive`, `password`, then `success`."""
FORM: Final = LoginRules(Calls(("/login",)), Calls(("/logout",), frozenset({"GET", "POST"})), "username", Signs())
"""A page with a form. Which answer is a success has to be said."""
OWN: Final = LoginRules(Calls(), Calls(), "username", Signs())
PRESETS: Final = {"fastx3": FASTX3, "form": FORM, "own": OWN}
