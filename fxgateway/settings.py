"""Port: everything an administrator can write in gateway.toml, with its default, its bounds and what it is for."""

import hashlib
import re
from collections.abc import Mapping
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails

from fxgateway.door_settings import (
    CertificateSettings,
    DoorSettings,
    GatewayLogSettings,
    RouteSettings,
    doors_without_certificate,
    doors_without_way,
    route_clashes,
)
from fxtunnel.kit.sections import ResumeSettings, Seconds, Section, Size, WholeFile, clash, tables
from fxtunnel.kit.settings import Address, AddressField, ConfigPath, NameField, OptionalPath, load_settings

ENVIRON_PREFIX: Final = "FXGATEWAY"
DEFAULT_PORT: Final = 443

_HOST: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")


class TunnelSettings(Section):
    """Where relays come in."""

    listen: AddressField = Field(description="Address on which relays are taken in, host:port.")
    public_url: str = Field(description="How relays reach this address from where they are: wss://HOST[:PORT], 443 without one.")
    certificate: ConfigPath = Field(Path("server.pem"), description="The gateway's TLS certificate, with its chain, in PEM.")
    key: ConfigPath = Field(Path("server.key"), description="The private key of the certificate; mode 0600.")
    ca: ConfigPath = Field(Path("ca.pem"), description="The authority that relays pin; `fxgateway invite` puts it into enrolment files.")
    state_dir: ConfigPath = Field(Path("."), description="Directory of relays.json: the relays' public keys and open enrolment tokens.")
    gateway_id: NameField = Field(
        "",
        description="The gateway's name in what relays sign; made from public_url when absent. Gateways that share a URL need their own.",
    )
    workers: int = Field(1, ge=1, le=64, description="Processes that share the work; each uses one core.")

    @field_validator("public_url")
    @classmethod
    def _check_public_url(cls, value: str) -> str:
        split_public_url(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _name_the_gateway(cls, value: object) -> object:
        """A file without gateway_id still belongs to the gateway.json files that were made for its URL."""
        if not isinstance(value, dict) or "gateway_id" in value or not isinstance(value.get("public_url"), str):
            return value
        return {**value, "gateway_id": gateway_id_of(value["public_url"])}

    @property
    def public_host(self) -> str:
        """The name or address that relays verify in the certificate."""
        return split_public_url(self.public_url)[0]

    @property
    def steering_path(self) -> Path:
        """The socket of `fxgateway drain`."""
        return self.state_dir / "control.sock"

    @property
    def identities_path(self) -> Path:
        """relays.json."""
        return self.state_dir / "relays.json"


class AdminSettings(Section):
    """Where health, metrics and status are served. There is no authentication: keep it on this machine."""

    listen: AddressField = Field(
        Address.parse("127.0.0.1:9101"),
        description="Address of /healthz, /readyz, /metrics and /relays: host:port, or unix:/path (mode 0600).",
    )


class LimitSettings(Section):
    """What one client, one relay, or all of them together may take. docs/dos.md says what each protects."""

    connections: int = Field(16_384, ge=1, le=1_000_000, description="Clients in all.")
    connections_per_door: int = Field(16_384, ge=1, le=1_000_000, description="Clients per door.")
    connections_per_source: int = Field(256, ge=1, le=1_000_000, description="Clients per source: an IPv4 address or an IPv6 /64.")
    open_rate_per_source_per_s: Seconds = Field(100.0, gt=0, le=1e6, description="New connections per second from one source.")
    open_burst_per_source: int = Field(200, ge=1, le=1_000_000, description="New connections from one source before that rate applies.")
    exempt_sources: tuple[IPv4Network | IPv6Network, ...] = Field(
        (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")),
        max_length=1024,
        description="Networks to which the limits per source do not apply (CIDR).",
    )
    streams_per_link: int = Field(16_384, ge=1, le=1_000_000, description="Streams on one data link.")
    hello_timeout_s: Seconds = Field(5.0, ge=0.1, le=60, description="Seconds for a relay to prove who it is.")
    hello_bytes: Size = Field(16_384, ge=9_216, le=65_536, description="Bytes taken from a peer that has not proved who it is.")
    pending_handshakes: int = Field(512, ge=1, le=100_000, description="Peers that have not yet proved who they are, in all.")
    pending_handshakes_per_source: int = Field(64, ge=1, le=100_000, description="The same per source, exempt_sources included.")
    handshakes_at_once: int = Field(32, ge=1, le=10_000, description="Of those, how many are worked on at the same time; the others wait.")
    open_timeout_s: Seconds = Field(10.0, ge=0.1, le=300, description="Seconds for a relay to accept a stream.")
    idle_timeout_s: Seconds = Field(
        86_400.0, ge=1, le=31_536_000, description="Seconds without a byte in either direction before a stream ends."
    )
    drain_s: Seconds = Field(30.0, ge=0, le=86_400, description="Seconds that open streams have left after SIGTERM.")
    relay_wait_s: Seconds = Field(
        3.0, ge=0, le=60, description="Seconds after start that clients wait in a door's queue until its services have relays again."
    )
    memory_bytes: Size = Field(
        256 << 20, ge=32 << 20, le=1 << 44, description="Memory for buffers, the kernel's socket buffers included; at least 32MiB."
    )
    links_per_relay: int = Field(8, ge=1, le=64, description="Data links of one relay.")
    relays: int = Field(4096, ge=1, le=100_000, description="Relays connected at once.")


class LivenessSettings(Section):
    """Finding paths that are connected but dead."""

    heartbeat_s: Seconds = Field(3.0, ge=0.1, le=7.5, description="Seconds between probes.")
    dead_after_s: Seconds = Field(
        10.0, ge=0.2, le=15, description="Seconds of silence after which a link is dead; at least 2 x heartbeat_s."
    )

    @field_validator("dead_after_s")
    @classmethod
    def _check_against_heartbeat(cls, value: float, info: ValidationInfo) -> float:
        heartbeat_s = info.data.get("heartbeat_s")
        if heartbeat_s is not None and value < 2 * heartbeat_s:
            raise ValueError(f"must be at least twice heartbeat_s, which is {heartbeat_s:g}: one late probe is not a dead link")
        return value


class SandboxMode(Enum):
    """Whether the gateway gives up, once it runs, what it does not need."""

    AUTO = "auto"
    REQUIRED = "required"
    OFF = "off"


class SandboxSettings(Section):
    """What the gateway gives up when it starts (Landlock, seccomp): opening other files, running programs, connecting to anything."""

    mode: SandboxMode = Field(
        SandboxMode.AUTO, description="auto: as far as the kernel can. required: no start without files and connections. off: nothing."
    )
    read: tuple[OptionalPath, ...] = Field((), max_length=64, description="More directories to read from: certificates of later reloads.")


class GatewaySettings(WholeFile):
    """A whole gateway.toml. `doors` and `routes` are written [[door]] and [[route]], once for each."""

    tunnel: TunnelSettings = Field(description="Where relays come in.")
    doors: tuple[DoorSettings, ...] = Field((), alias="door", max_length=4096, description="Where clients come in.")
    routes: tuple[RouteSettings, ...] = Field(
        (), alias="route", max_length=16_384, description="Which service a host and a path lead to, at doors that look at them."
    )
    admin: AdminSettings = Field(default_factory=AdminSettings, description="Health, metrics and status.")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="What clients and relays may take.")
    resume: ResumeSettings = Field(default_factory=ResumeSettings, description="Carrying streams over a cut of the tunnel.")
    liveness: LivenessSettings = Field(default_factory=LivenessSettings, description="Finding dead paths.")
    certificates: tuple[CertificateSettings, ...] = Field(
        (), alias="certificate", max_length=1024, description="Certificates for all doors of kind https, chosen by the name asked for."
    )
    log: GatewayLogSettings = Field(default_factory=GatewayLogSettings, description="What is logged.")
    sandbox: SandboxSettings = Field(default_factory=SandboxSettings, description="What is given up at the start.")

    @classmethod
    def find_clashes(cls, raw: Mapping[str, object]) -> list[InitErrorDetails]:
        """Addresses and door names that are used twice."""
        entries: list[tuple[tuple[str | int, ...], object]] = [(("tunnel",), raw.get("tunnel"))]
        entries += [(("door", index), door) for index, door in tables(raw, "door")]
        entries.append((("admin",), raw.get("admin")))
        found: list[InitErrorDetails] = []
        addresses: dict[str, str] = {}
        names: dict[str, str] = {}
        for loc, entry in entries:
            if not isinstance(entry, dict):
                continue
            listen, name = entry.get("listen"), entry.get("name")
            where = str(loc[0]) if len(loc) == 1 else f"{loc[0]}[{loc[1]}]"
            if isinstance(listen, str) and not listen.endswith(":0") and addresses.setdefault(listen, where) != where:
                found.append(clash(f"{addresses[listen]} already listens on {listen}", (*loc, "listen"), listen))
            if isinstance(name, str) and name and names.setdefault(name, where) != where:
                found.append(clash(f"{names[name]} is already named {name!r}", (*loc, "name"), name))
        return found + route_clashes(raw) + doors_without_way(raw) + doors_without_certificate(raw)

    def certificates_of(self, door: DoorSettings) -> list[tuple[Path, Path]]:
        """Certificates and keys of a door that ends TLS, its own first."""
        own = [(door.certificate, door.key)] if door.certificate is not None and door.key is not None else []
        return own + [(entry.certificate, entry.key) for entry in self.certificates]

    def listens(self) -> list[tuple[str, Address]]:
        """Every address the gateway listens on, with the key that names it."""
        doors = [(f"door[{index}].listen", door.listen) for index, door in enumerate(self.doors)]
        return [("tunnel.listen", self.tunnel.listen), *doors, ("admin.listen", self.admin.listen)]


def take_up(running: GatewaySettings, written: GatewaySettings) -> tuple[GatewaySettings, list[str]]:
    """What counts after a reload: as written, but for what waits for a restart, which stays; and the keys of that, where it differs."""
    stays: dict[str, Section] = {}
    waiting: list[str] = []
    for name in ("tunnel", "admin", "sandbox", "liveness", "resume", "limits"):
        before, after = getattr(running, name), getattr(written, name)
        keys = [key for key in type(after).model_fields if _waits(name, key) and getattr(before, key) != getattr(after, key)]
        stays[name] = after.model_copy(update={key: getattr(before, key) for key in keys})
        waiting += [f"{name}.{key}" for key in keys]
    return written.model_copy(update=stays), waiting


def _waits(section: str, key: str) -> bool:
    match section:
        case "tunnel":
            return key not in ("certificate", "key")
        case "resume":
            return key in ("enabled", "hold_s")  # as they are told to relays
        case "limits":
            return key == "memory_bytes"
        case _:
            return True


def load(path: Path, environ: Mapping[str, str]) -> GatewaySettings:
    """The settings of a gateway.toml, with FXGATEWAY__SECTION__KEY of `environ` laid over them.

    Raises:
        ConfigError: the file is missing or wrong; holds every problem.
    """
    return load_settings(GatewaySettings, path, prefix=ENVIRON_PREFIX, environ=environ)


def split_public_url(url: str) -> tuple[str, int]:
    """Host and port of a gateway's wss:// URL.

    Raises:
        ValueError: it is not one; the text says what was expected.
    """
    expected = f"expected wss://HOST[:PORT], found {url!r}"
    try:
        parts = urlsplit(url)
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError as exc:
        raise ValueError(f"{expected}: {exc}") from exc
    # urlsplit drops line breaks without a word.
    if not url.isprintable() or parts.scheme != "wss" or not _is_host(parts) or port == 0:
        raise ValueError(expected)
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        raise ValueError(f"{expected}: nothing may follow the port or precede the host")
    return parts.hostname or "", port


def gateway_id_of(public_url: str) -> str:
    """The gateway id that belongs to a URL when no other is configured."""
    return "gw-" + hashlib.sha256(public_url.strip().rstrip("/").lower().encode()).hexdigest()[:8]


def _is_host(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    if "[" not in parts.netloc:
        return len(host) <= 253 and _HOST.fullmatch(host) is not None
    # urlsplit has already checked that what stands in brackets is an IPv6 address; a zone means something on one machine only.
    return ":" in host and "%" not in host
