"""Port: gateway.json, the enrolment file an administrator carries from the gateway to a relay."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

from cryptography import x509
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit.files import read_secret
from fxtunnel.kit.settings import dotted, said_plainly
from fxtunnel.model import NAME_PATTERN, GatewayId

FILE_VERSION: Final = 1
MAX_URLS: Final = 16
_DEFAULT_PORT: Final = 443
_INVITE: Final = "ask the gateway's administrator for a new gateway.json (fxgateway invite)"


@dataclass(frozen=True, slots=True)
class GatewayUrl:
    """Where a gateway listens. `host` is a name or an IP address, without brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "GatewayUrl":
        """The address in wss://HOST[:PORT].

        Raises:
            ValueError: anything else.
        """
        expected = f"expected wss://HOST[:PORT], found {text!r}"
        try:
            parts = urlsplit(text)
            port = _DEFAULT_PORT if parts.port is None else parts.port
        except ValueError as exc:
            raise ValueError(expected) from exc
        is_bare = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None
        if parts.scheme != "wss" or not parts.hostname or not port or not is_bare or not text.isascii() or not text.isprintable():
            raise ValueError(expected)
        return cls(parts.hostname, port)

    @property
    def authority(self) -> str:
        """`host:port` as HTTP and people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"wss://{self.authority}"


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The right to hand over a public key, until `expires_unix`."""

    token: SecretStr
    expires_unix: int


@dataclass(frozen=True, slots=True)
class GatewayFile:
    """What a relay needs to know of a gateway. `ca_pem` is all it trusts there; `enrolment` may be gone once the relay is enrolled."""

    path: Path
    gateway_id: GatewayId
    urls: tuple[GatewayUrl, ...]
    ca_pem: str
    enrolment: Enrolment | None


def load_gateway_file(path: Path) -> GatewayFile:
    """Read and check a gateway.json. Blocking, and quick: for start-up and `fxrelay check`.

    Raises:
        ConfigError: not private (the message holds the `chmod`), or wrong; holds every problem.
    """
    try:
        raw = json.loads(read_secret(path))
    except (ValueError, RecursionError) as exc:
        raise ConfigError.one(path, "", f"is not JSON; {_INVITE}") from exc
    if not isinstance(raw, dict):
        raise ConfigError.one(path, "", f"is not a JSON object; {_INVITE}")
    # Before all else: of another version nothing that follows can be said with confidence.
    version = raw.get("version")
    if type(version) is int and version != FILE_VERSION:
        older = "fxrelay" if version > FILE_VERSION else "fxgateway"
        raise ConfigError.one(path, "version", f"is {version}, and this fxrelay reads version {FILE_VERSION}: update {older}")
    try:
        content = _Content.model_validate(raw)
    except ValidationError as exc:
        raise ConfigError(_problems(path, exc)) from None
    enrolment = content.enrolment
    return GatewayFile(
        path,
        GatewayId(content.gateway_id),
        tuple(GatewayUrl.parse(url) for url in content.urls),
        content.ca,
        None if enrolment is None else Enrolment(enrolment.token, enrolment.expires_unix),
    )


def _checked_url(text: str) -> str:
    GatewayUrl.parse(text)
    return text


def _checked_certificates(text: str) -> str:
    try:
        x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise ValueError("expected one or more certificates in PEM format") from None
    return text


def _checked_token(token: SecretStr) -> SecretStr:
    text = token.get_secret_value()
    if not text.startswith("fxe_") or not 8 <= len(text) <= 256 or not text.isascii() or not text.isprintable():
        raise ValueError("expected an enrolment token, fxe_…")
    return token


class _Section(BaseModel):
    # Fields a later gateway adds are ignored: within one version they are optional.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _EnrolmentContent(_Section):
    token: Annotated[SecretStr, AfterValidator(_checked_token)]
    expires_unix: Annotated[int, Field(ge=0, lt=2**53)]


class _Content(_Section):
    version: int
    gateway_id: Annotated[str, Field(pattern=NAME_PATTERN)]
    # strict mode would want a tuple, which JSON has not
    urls: Annotated[list[Annotated[str, AfterValidator(_checked_url)]], Field(min_length=1, max_length=MAX_URLS)]
    ca: Annotated[str, AfterValidator(_checked_certificates)]
    enrolment: _EnrolmentContent | None = None


def _problems(path: Path, exc: ValidationError) -> list[ConfigProblem]:
    """One line for each thing that is wrong. Values stay out of it, but for URLs: one of them is the token."""
    return [
        ConfigProblem(
            str(path),
            dotted(error["loc"]),
            f"is missing; {_INVITE}" if error["type"] == "missing" else said_plainly(error),
        )
        for error in exc.errors(include_url=False, include_context=False, include_input=False)
    ]
