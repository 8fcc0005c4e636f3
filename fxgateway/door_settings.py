"""Port: what an administrator can write in gateway.toml about doors and where they lead."""

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails

from fxgateway.routing.preread_router import DoorKind
from fxtunnel.kit.sections import LogSettings, Seconds, Section, clash, tables
from fxtunnel.kit.settings import AddressField, ConfigPath, NameField, OptionalPath, beside_the_file

_LABEL: Final = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_HOST: Final = re.compile(rf"\*|(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")
_PATH: Final = re.compile(r"/[!-~]{0,1023}")


class CertificateSettings(Section):
    """A certificate of doors that end TLS; clients that ask for one of its names get it."""

    certificate: ConfigPath = Field(description="TLS certificate, with its chain, in PEM.")
    key: ConfigPath = Field(description="The private key of the certificate; mode 0600.")


class GatewayLogSettings(LogSettings):
    """What is logged."""

    access: str = Field("off", description='A line of JSON for each client that has ended: "stderr", the path of a file, or "off".')

    @field_validator("access")
    @classmethod
    def _find_file(cls, value: str, info: ValidationInfo) -> str:
        return value if value in ("off", "stderr") else str(beside_the_file(Path(value), info))


class DoorSettings(Section):
    """An address where clients come in, and where they get to: always one service, or what they ask for by name."""

    listen: AddressField = Field(description="Address for clients, host:port; or unix:/path.")
    kind: DoorKind = Field(
        DoorKind.TCP,
        description="tcp: all get `service`. sni: TLS, unread, by the name asked for. http: by Host and path. auto: by the first bytes. "
        "https: TLS ends here, and this host sees what clients say; then as http.",
    )
    certificate: OptionalPath | None = Field(None, description="At a door of kind https: TLS certificate, with its chain, in PEM.")
    key: OptionalPath | None = Field(None, description="The private key of the certificate; mode 0600.")
    service: NameField = Field("", description="Name of the service, as relays offer it; at other kinds than tcp, where no route leads.")
    ssh: NameField = Field("", description="Service of SSH clients at a door of kind auto, instead of `service`.")
    streams: tuple[NameField, ...] = Field(
        (), max_length=1024, description="Services that `fxgateway connect` may ask for at a door of kind http, https or auto."
    )
    sniff_s: Seconds = Field(
        0.3, ge=0.01, le=5, description="Seconds of silence at a door of kind auto after which a client waits for the server: `service`."
    )
    name: str = Field(
        "", max_length=128, pattern=r"^[ -~]*$", description="What logs and metrics call the door; the listen address if empty."
    )
    max_connections: int | None = Field(
        None, ge=1, le=1_000_000, description="Open connections of this door instead of connections_per_door."
    )
    proxy_from: tuple[IPv4Network | IPv6Network, ...] = Field(
        (),
        max_length=1024,
        description="Proxies (addresses, or networks as CIDR) that say by a PROXY header, v1 or v2, whom they speak for; they must.",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind is DoorKind.TCP and not self.service:
            raise ValueError("expected `service`: at a door of kind tcp every client gets the same")
        if self.streams and self.kind not in (DoorKind.HTTP, DoorKind.HTTPS, DoorKind.AUTO):
            raise ValueError("streams: only for a door that speaks HTTP")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: one of them is missing")
        if self.certificate is not None and self.kind is not DoorKind.HTTPS:
            raise ValueError("certificate: only a door of kind https ends TLS; at the others the certificate is the service's")
        if self.kind is not DoorKind.AUTO:
            only_auto = sorted({"ssh", "sniff_s"} & self.model_fields_set)
            if only_auto:
                raise ValueError(f"{', '.join(only_auto)}: only for a door of kind auto")
        return self

    @property
    def label(self) -> str:
        """The door's name in logs and metrics."""
        return self.name or str(self.listen)


class RouteSettings(Section):
    """A host, and perhaps a path, and the service they lead to. The most specific host decides, then the longest path."""

    host: str = Field(description="A name, *.NAME for every name below it, or * for all.")
    path: str = Field("/", description="A prefix of whole segments; doors that see no path (sni) know only /.")
    service: NameField = Field(description="Name of the service, as relays offer it.")

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        if len(value) > 253 or not _HOST.fullmatch(value):
            raise ValueError(f"expected NAME, *.NAME or *, in ASCII and without a port, found {value!r}")
        return value.lower()

    @field_validator("path")
    @classmethod
    def _check_path(cls, value: str) -> str:
        if not _PATH.fullmatch(value) or "?" in value or "#" in value:
            raise ValueError(f"expected a path that begins with / and has neither query nor fragment, found {value!r}")
        return value


def route_clashes(raw: Mapping[str, object]) -> list[InitErrorDetails]:
    """Routes of the same host and path."""
    found: list[InitErrorDetails] = []
    seen: dict[tuple[str, str], int] = {}
    for index, route in tables(raw, "route"):
        host, path = route.get("host"), route.get("path", "/")
        if isinstance(host, str) and isinstance(path, str):
            first = seen.setdefault((host.lower(), path.rstrip("/")), index)
            if first != index:
                found.append(clash(f"route[{first}] already has this host and path", ("route", index), host))
    return found


def doors_without_way(raw: Mapping[str, object]) -> list[InitErrorDetails]:
    """Doors that nobody could get anywhere by."""
    if any(True for _ in tables(raw, "route")):
        return []
    return [
        clash("leads nowhere: it has no `service`, and there is no [[route]]", ("door", index), str(door.get("kind")))
        for index, door in tables(raw, "door")
        if door.get("kind", "tcp") != "tcp" and not door.get("service") and not door.get("streams")
    ]


def doors_without_certificate(raw: Mapping[str, object]) -> list[InitErrorDetails]:
    """Doors that are to end TLS and cannot."""
    if any(True for _ in tables(raw, "certificate")):
        return []
    return [
        clash("needs `certificate` and `key`, or a [[certificate]]", ("door", index), "https")
        for index, door in tables(raw, "door")
        if door.get("kind") == "https" and not door.get("certificate")
    ]
