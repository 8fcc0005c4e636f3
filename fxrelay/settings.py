"""Port: everything an administrator can write in relay.toml, with its default, its bounds and what it is for."""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails

from fxrelay.cluster.settings import ClusterSection, NodeSection
from fxrelay.service_settings import ServiceSection
from fxtunnel.control.messages import MESSAGE_BYTES
from fxtunnel.kit.sections import LogSettings, ResumeSettings, Seconds, Section, Size, WholeFile, clash, tables
from fxtunnel.kit.settings import MAX_SOCKET_PATH_BYTES, Address, ConfigPath, NameField, load_settings

ENVIRON_PREFIX: Final = "FXRELAY"
SERVICES_BYTES: Final = MESSAGE_BYTES - 2_048
"""What all services may take of the message by which a gateway is told of them. The rest is for what a hello says besides."""


def _status_path(state_dir: Path, status: str) -> Path:
    return state_dir / status.removeprefix("unix:")


class RelaySection(Section):
    """Who this relay is."""

    id: NameField = Field(description="The relay's name, the same at every gateway.")
    state_dir: ConfigPath = Field(Path("state"), description="Directory of the relay's own key; only its user may enter it (mode 0700).")
    status: str = Field(
        "status.sock", min_length=1, validate_default=True, description="Unix socket of `fxrelay status`; relative to state_dir."
    )
    links: int = Field(1, ge=1, le=8, description="Data links to each gateway; with 2, new streams keep away from bulk.")
    address: str = Field("", description="IP address at which other relays reach this node's services directly; empty: they cannot.")

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        try:
            return str(ipaddress.ip_address(value)) if value else value
        except ValueError:
            raise ValueError(f"expected an IP address, found {value!r}") from None

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


class LimitSettings(Section):
    """What gateways may take of this relay. docs/dos.md says what each protects."""

    streams_per_link: int = Field(16_384, ge=1, le=1_000_000, description="Streams on one data link.")
    streams: int = Field(16_384, ge=1, le=1_000_000, description="Streams in all.")
    connect_timeout_s: Seconds = Field(
        5.0, ge=0.1, le=300, description="Seconds for a service to accept a connection, all its addresses together."
    )
    idle_timeout_s: Seconds = Field(
        86_400.0, ge=1, le=31_536_000, description="Seconds without a byte in either direction before a stream ends."
    )
    head_timeout_s: Seconds = Field(10.0, ge=0.1, le=300, description="Seconds for an HTTP request's head, and for TLS ended here.")
    keep_alive_s: Seconds = Field(75.0, ge=1, le=86_400, description="Seconds that an HTTP connection may wait for its next request.")
    stall_timeout_s: Seconds = Field(
        60.0, ge=1, le=86_400, description="Seconds without a byte of an HTTP request's body, or taken of a response, before it ends."
    )
    drain_s: Seconds = Field(30.0, ge=0, le=86_400, description="Seconds that open streams have left after SIGTERM.")
    handover_s: Seconds = Field(
        10.0,
        ge=0,
        le=300,
        description="Seconds that a relay which is restarted still takes what nobody else can, until its successor is there.",
    )
    memory_bytes: Size = Field(
        256 << 20, ge=32 << 20, le=1 << 44, description="Memory for buffers, the kernel's socket buffers included; at least 32MiB."
    )


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


class RelayLogSettings(LogSettings):
    """What is logged, on standard error."""

    access: bool = Field(False, description="Whether each HTTP request is logged, at level info, by the logger fxrelay.access.")


class RelaySettings(WholeFile):
    """A whole relay.toml. `gateways` and `services` are written [[gateway]] and [[service]], once for each."""

    relay: RelaySection = Field(description="Who this relay is.")
    gateways: tuple[GatewaySection, ...] = Field(
        (), alias="gateway", max_length=64, description="Gateways to dial; none: this node only reports."
    )
    services: tuple[ServiceSection, ...] = Field((), alias="service", max_length=4096, description="What this relay serves.")
    cluster: ClusterSection = Field(default_factory=ClusterSection, description="What the members of a cluster share.")
    node: NodeSection = Field(default_factory=NodeSection, description="What this node says about itself.")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="What gateways may take of this relay.")
    resume: ResumeSettings = Field(default_factory=ResumeSettings, description="Carrying streams over a cut of the tunnel.")
    liveness: LivenessSettings = Field(default_factory=LivenessSettings, description="Dialling, and finding dead paths.")
    log: RelayLogSettings = Field(default_factory=RelayLogSettings, description="What is logged.")

    @classmethod
    def find_clashes(cls, raw: Mapping[str, object]) -> list[InitErrorDetails]:
        """Service names and enrolment files that are used twice, and more services than a gateway can be told of."""
        found: list[InitErrorDetails] = []
        for section, key in (("gateway", "file"), ("service", "name")):
            seen: dict[str, int] = {}
            for index, entry in tables(raw, section):
                value = entry.get(key)
                if isinstance(value, str) and seen.setdefault(value, index) != index:
                    found.append(clash(f"{section}[{seen[value]}] already has {key} {value!r}", (section, index, key), value))
        names = [str(entry.get("name", "")) for _, entry in tables(raw, "service")]
        told_bytes = sum(len(name) + _OFFER_BYTES for name in names)
        if told_bytes > SERVICES_BYTES and tables(raw, "gateway"):
            text = f"{len(names)} services with such names are too many: a gateway is told of all in one message, which would have about "
            text += f"{told_bytes:,} bytes of {SERVICES_BYTES:,}. Shorten the names, or have another relay serve some"
            found.append(clash(text, ("service",), f"{len(names)} services"))
        return found


_OFFER_BYTES: Final = len('{"name":"","protocol":"http"},')
_WHOLE: Final = frozenset({"services", "node", "log"})
"""Sections that a reload takes up as they are."""
_TAKEN_UP: Final[Mapping[str, frozenset[str]]] = {
    "cluster": frozenset({"paths", "force_indirect", "networks"}),
    "limits": frozenset(
        {
            "streams_per_link",
            "streams",
            "connect_timeout_s",
            "idle_timeout_s",
            "head_timeout_s",
            "keep_alive_s",
            "stall_timeout_s",
            "drain_s",
            "handover_s",
        }
    ),
    "resume": frozenset({"hold_s", "replay_bytes"}),
}
"""What it takes up of others."""


def take_up(running: RelaySettings, written: RelaySettings) -> tuple[RelaySettings, list[str]]:
    """What counts after a reload: as written, but for what waits for a restart, which stays; and the keys of that, where it differs."""
    stays: dict[str, Any] = {}
    waiting: list[str] = []
    for name, field in RelaySettings.model_fields.items():
        before, after = getattr(running, name), getattr(written, name)
        if name in _WHOLE or before == after:
            continue
        if not isinstance(after, Section):
            stays[name] = before
            waiting.append(f"[[{field.alias}]]")
            continue
        late = type(after).model_fields.keys() - _TAKEN_UP.get(name, ())
        keys = [key for key in type(after).model_fields if key in late and getattr(before, key) != getattr(after, key)]
        stays[name] = after.model_copy(update={key: getattr(before, key) for key in keys})
        waiting += [f"{name}.{key}" for key in keys]
    return written.model_copy(update=stays), waiting


def load(path: Path, environ: Mapping[str, str]) -> RelaySettings:
    """The settings of a relay.toml, with FXRELAY__SECTION__KEY of `environ` laid over them.

    Raises:
        ConfigError: the file is missing or wrong; holds every problem.
    """
    return load_settings(RelaySettings, path, prefix=ENVIRON_PREFIX, environ=environ)
