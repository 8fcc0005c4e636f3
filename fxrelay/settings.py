"""Port: everything an administrator can write in relay.toml, with its default, its bounds and what it is for."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fxtunnel.kit.settings import Address, AddressField, ConfigPath, NameField, load_settings

ENVIRON_PREFIX: Final = "FXRELAY"
MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path holds 108 bytes with the closing zero (unix(7))."""

_SIZE: Final = re.compile(r"(\d{1,18})\s*(B|KiB|MiB|GiB)?")
_UNITS: Final = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _parse_size(value: object) -> object:
    """Bytes from a number or from text such as "64MiB"; whatever is neither is pydantic's to refuse."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError('expected a number of bytes, or a size such as "64MiB" (B, KiB, MiB, GiB)')
    return int(found[1]) * _UNITS[found[2]]


Size = Annotated[int, BeforeValidator(_parse_size)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """What all parts have in common: nothing unknown is accepted, nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _status_path(state_dir: Path, status: str) -> Path:
    return state_dir / status.removeprefix("unix:")


class RelaySection(Section):
    """Who this relay is."""

    id: NameField = Field(description="The relay's name, the same at every gateway.")
    state_dir: ConfigPath = Field(Path("state"), description="Directory of the relay's own key; only its user may enter it (mode 0700).")
    status: str = Field(
        "status.sock", min_length=1, validate_default=True, description="Unix socket of `fxrelay status`; relative to state_dir."
    )
    links: int = Field(1, ge=1, le=8, description="Data links to each gateway.")

    @field_validator("status")
    @classmethod
    def _check_status(cls, value: str, info: ValidationInfo) -> str:
        state_dir = info.data.get("state_dir")
        if state_dir is not None:
            path = _status_path(state_dir, value)
            if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
                raise ValueError(f"is longer than a socket's path may be ({MAX_SOCKET_PATH_BYTES} bytes): {path}")
        return value

    @property
    def status_address(self) -> Address:
        """Where status is served."""
        return Address(path=_status_path(self.state_dir, self.status))


class GatewaySection(Section):
    """A gateway to dial."""

    file: ConfigPath = Field(description="Enrolment file made by `fxgateway init` or `fxgateway invite`; mode 0600.")
    proxy: SecretStr | None = Field(None, description="HTTP proxy on the way, reached with CONNECT: http://[USER:PASSWORD@]HOST:PORT.")

    @field_validator("proxy")
    @classmethod
    def _check_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        # The text may hold a password, so no message repeats it.
        try:
            parts = urlsplit(value.get_secret_value())
            usable = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0 and parts.path in ("", "/")
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("expected http://[USER:PASSWORD@]HOST:PORT")
        return value


class ServiceSection(Section):
    """A service of this relay: the only addresses it ever connects to are the targets written here."""

    name: NameField = Field(description="The name doors ask for.")
    protocol: Literal["tcp"] = Field("tcp", description="How it is carried.")
    target: AddressField = Field(description="Where it listens: host:port, or unix:/path.")


class LimitSettings(Section):
    """What gateways may take of this relay. docs/dos.md says what each protects."""

    streams_per_link: int = Field(16_384, ge=1, le=1_000_000, description="Streams on one data link.")
    streams: int = Field(16_384, ge=1, le=1_000_000, description="Streams in all.")
    connect_timeout_s: Seconds = Field(5.0, ge=0.1, le=300, description="Seconds for a service to accept a connection.")
    idle_timeout_s: Seconds = Field(
        86_400.0, ge=1, le=31_536_000, description="Seconds without a byte in either direction before a stream ends."
    )
    drain_s: Seconds = Field(30.0, ge=0, le=86_400, description="Seconds that open streams have left after SIGTERM.")
    memory_bytes: Size = Field(
        256 << 20, ge=32 << 20, le=1 << 44, description="Memory for buffers, the kernel's socket buffers included; at least 32MiB."
    )


class ResumeSettings(Section):
    """Carrying streams over a cut of the tunnel."""

    enabled: bool = Field(True, description="Whether cut data links are continued; if not, their streams end in RST.")
    hold_s: Seconds = Field(
        30.0, ge=0, le=3_600, description="Seconds to come back before streams are reset; the gateway may hold them shorter."
    )
    replay_bytes: Size = Field(16 << 20, ge=1 << 20, le=1 << 30, description="Unacknowledged bytes kept per data link for a repeat.")


class LivenessSettings(Section):
    """Dialling gateways, and finding paths that are connected but dead."""

    dial_timeout_s: Seconds = Field(10.0, ge=0.1, le=120, description="Seconds for a connection to a gateway to stand, TLS included.")
    min_backoff_s: Seconds = Field(
        0.25, ge=0.01, le=60, description="Upper end of the random wait before the first new attempt; doubles each time."
    )
    max_backoff_s: Seconds = Field(30.0, ge=0.01, le=3_600, description="Upper end of the random wait between attempts.")
    dead_after_s: Seconds = Field(10.0, ge=0.2, le=15, description="Seconds of silence after which a link is dead.")

    @field_validator("max_backoff_s")
    @classmethod
    def _check_against_minimum(cls, value: float, info: ValidationInfo) -> float:
        least_s = info.data.get("min_backoff_s")
        if least_s is not None and value < least_s:
            raise ValueError(f"must not be less than min_backoff_s, which is {least_s:g}")
        return value


class LogSettings(Section):
    """What is logged, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity that is logged.")
    style: Literal["auto", "json", "text"] = Field("auto", description="One JSON object a line, or text; auto: text on a terminal.")


class RelaySettings(Section):
    """A whole relay.toml. `gateways` and `services` are written [[gateway]] and [[service]], once for each."""

    relay: RelaySection = Field(description="Who this relay is.")
    gateways: tuple[GatewaySection, ...] = Field(alias="gateway", min_length=1, max_length=64, description="Gateways to dial.")
    services: tuple[ServiceSection, ...] = Field((), alias="service", max_length=4096, description="What this relay serves.")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="What gateways may take of this relay.")
    resume: ResumeSettings = Field(default_factory=ResumeSettings, description="Carrying streams over a cut of the tunnel.")
    liveness: LivenessSettings = Field(default_factory=LivenessSettings, description="Dialling, and finding dead paths.")
    log: LogSettings = Field(default_factory=LogSettings, description="What is logged.")

    @model_validator(mode="wrap")
    @classmethod
    def _check_clashes(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Reports double use together with whatever else is wrong: pydantic alone would wait until the rest is right."""
        clashes = _clashes(value) if isinstance(value, dict) else []
        if not clashes:
            return handler(value)
        try:
            handler(value)
        except ValidationError as exc:
            clashes = [*_details(exc), *clashes]
        raise ValidationError.from_exception_data(cls.__name__, clashes)


def load(path: Path, environ: Mapping[str, str]) -> RelaySettings:
    """The settings of a relay.toml, with FXRELAY__SECTION__KEY of `environ` laid over them.

    Raises:
        ConfigError: the file is missing or wrong; holds every problem.
    """
    return load_settings(RelaySettings, path, prefix=ENVIRON_PREFIX, environ=environ)


def _clashes(raw: dict[object, object]) -> list[InitErrorDetails]:
    """Service names and enrolment files that are used twice in a configuration that has not been checked yet."""
    found: list[InitErrorDetails] = []
    for section, key in (("gateway", "file"), ("service", "name")):
        seen: dict[str, int] = {}
        entries = raw.get(section)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            value = entry.get(key) if isinstance(entry, dict) else None
            if isinstance(value, str) and seen.setdefault(value, index) != index:
                message = f"{section}[{seen[value]}] already has {key} {value!r}"
                found.append(InitErrorDetails(type=PydanticCustomError("clash", message), loc=(section, index, key), input=value))
    return found


def _details(exc: ValidationError) -> list[InitErrorDetails]:
    """The errors of `exc`, to be raised again among others. The texts are final: pydantic formats no custom error without context."""
    return [
        InitErrorDetails(type=PydanticCustomError(error["type"], error["msg"]), loc=error["loc"], input=error["input"])
        for error in exc.errors(include_url=False)
    ]
