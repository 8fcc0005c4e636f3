"""Port: what an administrator can write about the logins of an HTTP service: [service.login] in relay.toml."""

import re
from typing import Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from fxrelay.logins.rules import MAX_BODY_BYTES, PRESETS, ValueLocation, Where
from fxtunnel.kit.jwt_verifying import ALGORITHMS
from fxtunnel.kit.key_page import is_key_url
from fxtunnel.kit.sections import Seconds, Section, Size
from fxtunnel.kit.settings import OptionalPath

_COOKIE: Final = re.compile(r"[A-Za-z0-9_-]{1,60}")
_PATH: Final = re.compile(r"/[!-)+->@-~]*\*?")
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})


class JwtSection(Section):
    """How the login's JWT is verified. What it says is then believed: whose login it is, and how long it is good."""

    keys: OptionalPath | None = Field(None, description="File with the public keys: PEM, JWK, or a JWK set.")
    url: str = Field("", description="Where a JWK set is fetched instead, https:// (http:// only on this host); kept for ten minutes.")
    ca: OptionalPath | None = Field(None, description="Certificates to trust for `url`, PEM; none: the system's.")
    algorithms: tuple[str, ...] = Field(("EdDSA", "ES256"), min_length=1, description="The signatures that are taken; no others.")
    issuer: str = Field("", max_length=256, description="What `iss` must be; empty: anything.")
    audience: str = Field("", max_length=256, description="What `aud` must be or contain; empty: anything.")
    user_claim: str = Field("sub", min_length=1, max_length=64, description="The claim that names the user.")

    @field_validator("algorithms")
    @classmethod
    def _check_algorithms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in ALGORITHMS:
                raise ValueError(f"expected some of {', '.join(ALGORITHMS)}, found {name!r}")
        return value

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.keys is None) == (not self.url):
            raise ValueError("expected either `keys` (a file) or `url` (of a JWK set)")
        if self.url and not is_key_url(self.url):
            raise ValueError("url: expected https://, or http:// with a loopback address")
        if self.ca is not None and not self.url:
            raise ValueError("ca: only with `url`")
        return self


class LoginSection(Section):
    """Where logins of a service happen and how their outcome is told. What a preset says, every key here can say otherwise."""

    preset: Literal["fastx3", "form", "own"] = Field("own", description="Services that are known: fastx3, form; own: nothing is preset.")
    paths: tuple[str, ...] | None = Field(None, min_length=1, description="Paths of requests of a login; `*` at the end: all below.")
    methods: tuple[str, ...] | None = Field(None, min_length=1, description="Their methods.")
    user: str | None = Field(None, min_length=1, max_length=64, description="The parameter with the user's name (query, form, JSON).")
    success_status: tuple[int, ...] | None = Field(None, min_length=1, description="Statuses of a success; none: 2xx and 3xx.")
    success_cookie: str | None = Field(None, description="A cookie that only a success sets.")
    success_json: str | None = Field(None, description='"a.b=value": what a success says there; other texts: the login goes on.')
    stage_json: tuple[str, ...] | None = Field(None, description="Where an answer has what the next request of the login repeats.")
    stage_fields: tuple[str, ...] | None = Field(None, description="The parameters that repeat it.")
    logout_paths: tuple[str, ...] | None = Field(None, description="Paths of requests that end a login.")
    logout_methods: tuple[str, ...] | None = Field(None, min_length=1, description="Their methods.")
    token: str | None = Field(
        None,
        description='Where the login\'s token stands: "response:json:a.b", "response:cookie:NAME", "request:bearer", and others.',
    )
    token_headers: tuple[str, ...] | None = Field(None, description="Fields that show the token later, besides Authorization: Bearer.")
    jwt: JwtSection | None = Field(None, description="How that token is verified; none: users are whom the service lets in by name.")
    retry: Literal["replay", "tell"] | None = Field(
        None, description="Who loses his server while he logs in: the same request to another one, or a page that says so."
    )
    cookie: str = Field("fxlogin", description="Name of the cookie that brings users back to their server; signed with cookie_key.")
    max_body: Size = Field(MAX_BODY_BYTES, ge=256, le=1 << 20, description="Largest body of a request of a login.")
    lifetime_s: Seconds = Field(43_200.0, ge=1, le=31_536_000, description="Seconds after which a login ends in any case.")
    idle_s: Seconds = Field(0.0, ge=0, le=31_536_000, description="Seconds without a request after which it ends; 0: not so.")
    per_address: int = Field(8, ge=1, le=1_024, description="Logins of one client address that may be under way or wait at once.")

    @field_validator("paths", "logout_paths")
    @classmethod
    def _check_paths(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for path in value or ():
            if _PATH.fullmatch(path) is None:
                raise ValueError(f"expected paths that begin with / and have no query, `*` allowed at the end, found {path!r}")
        return value

    @field_validator("methods", "logout_methods")
    @classmethod
    def _check_methods(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for method in value or ():
            if method not in _METHODS:
                raise ValueError(f"expected some of {', '.join(sorted(_METHODS))}, found {method!r}")
        return value

    @field_validator("cookie")
    @classmethod
    def _check_cookie(cls, value: str) -> str:
        if _COOKIE.fullmatch(value) is None:
            raise ValueError("expected a cookie's name: 1 to 60 of the characters A-Z a-z 0-9 _ -")
        return value

    @field_validator("success_json")
    @classmethod
    def _check_json(cls, value: str | None) -> str | None:
        if value is not None and not all(value.partition("=")[::2]):
            raise ValueError('expected "path.in.the.answer=value"')
        return value

    @field_validator("token")
    @classmethod
    def _check_token(cls, value: str | None) -> str | None:
        if value is not None:
            side, _, location = value.partition(":")
            if side not in ("request", "response"):
                raise ValueError("expected request: or response: before it")
            where = ValueLocation.parse(location).where
            if where is Where.JSON and side == "request":
                raise ValueError("a request has no json: its parameters are field:NAME")
            if side == "response" and where in (Where.BEARER, Where.FIELD):
                raise ValueError("a response has no bearer and no field: expected json, cookie or header")
        return value

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        preset = PRESETS[self.preset]
        if not (self.paths or preset.login.paths):
            raise ValueError("paths: is required without a preset")
        has_signs = self.success_status or self.success_cookie or self.success_json or preset.signs.json_path
        if not has_signs:
            raise ValueError("expected success_status, success_cookie or success_json: which answer lets somebody in has to be said")
        if self.jwt is not None and not (self.token or preset.token):
            raise ValueError("jwt: only with `token`, which says where it stands")
        return self
