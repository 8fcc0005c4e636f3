"""Pure: the server object: what a compute node says about itself, and what the others believe of it.

A server object travels as JSON with the names of docs/CLUSTER.md. It comes from the store, so every field is checked. Unknown
fields are kept in the text, for scripts, but never looked at. Static data and metrics are objects of their own and cannot pose as core
fields.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fxrelay.cluster.plain_json import read_json, size_of
from fxtunnel.model import InstanceId, RelayId, is_name

MAX_SERVER_BYTES: Final = 65_536
"""Of one server object's JSON text."""
MAX_STATIC_BYTES: Final = 16_384
MAX_METRICS_BYTES: Final = 32_768
"""With the static data three quarters of a server object at most: there is room left for everything else."""
MAX_SERVICES: Final = 256
MAX_TUNNELS: Final = 64
SWITCHES: Final = frozenset({"login", "start"})
_MAX_COUNT: Final = 1 << 52
"""Exact in JavaScript, for scripts. Counts are also bytes of memory and milliseconds since 1970."""
_MAX_NUMBER: Final = 1 << 40
"""Loads, percents and seconds."""
_MAX_TEXT: Final = 256


class BadServer(Exception):
    """Not a server object. The text says which field is wrong; drop it and count it."""


@dataclass(frozen=True, slots=True)
class ServerObject:
    """One node. Sizes in bytes, `*_ms` on the store's clock, `cpu` in percent of all cores, `uptime_s` of the machine.

    `services` maps service names to ports, 0 for what cannot be reached over TCP from elsewhere. `gateways` are the ids of gateways it has
    a tunnel to. `address` is where other relays reach it directly, or empty. `owners` are the users of the sessions that it lists. `text`
    is the JSON it came as, for scripts and status. `max_sessions` 0: no limit.
    """

    server_id: RelayId
    instance: InstanceId
    started_ms: int
    seq: int
    measured_ms: int
    hostname: str
    address: str
    sessions: int
    unique_user_sessions: int
    logins: int
    unique_user_logins: int
    load1: float
    cpu: float
    available_bytes: int
    free_bytes: int
    total_bytes: int
    uptime_s: float
    weight: int
    max_sessions: int
    disable: frozenset[str]
    draining: bool
    has_ended: bool
    enable_reservations: bool
    force_indirect: bool
    services: Mapping[str, int]
    gateways: frozenset[str]
    static_data: Mapping[str, Any]
    owners: frozenset[str]
    text: str

    def document(self) -> dict[str, Any]:
        """The whole object as scripts see it; a fresh copy every time."""
        found: dict[str, Any] = json.loads(self.text)
        return found


def parse_server(text: str) -> ServerObject:
    """Check a server object that came from outside.

    Raises:
        BadServer: it is too large, no JSON object, or a core field is missing or of the wrong kind.
    """
    found = _read(text)
    agent = _object(found, "agent")
    disable = _list(found, "disable")
    if not SWITCHES.issuperset(map(str, disable)):
        raise BadServer('disable: expected a list of "login" and "start"')
    loadavg = _list(found, "loadavg")
    return ServerObject(
        server_id=RelayId(_name(found, "serverId")),
        instance=InstanceId(_name(agent, "instanceId")),
        started_ms=_count(agent, "startedAt"),
        seq=_count(found, "seq"),
        measured_ms=_count(found, "measuredAt"),
        hostname=_text(found, "hostname"),
        address=_text(found, "address"),
        sessions=_count(found, "sessions"),
        unique_user_sessions=_count(found, "uniqueUserSessions"),
        logins=_count(found, "logins"),
        unique_user_logins=_count(found, "uniqueUserLogins"),
        load1=_number({"loadavg": loadavg[0] if loadavg else 0}, "loadavg"),
        cpu=_number(found, "cpu"),
        available_bytes=_count(found, "availmem"),
        free_bytes=_count(found, "freemem"),
        total_bytes=_count(found, "totalmem"),
        uptime_s=_number(found, "uptime"),
        weight=_count(found, "weight", 100),
        max_sessions=_count(found, "maxSessions"),
        disable=frozenset(map(str, disable)),
        draining=_flag(found, "draining"),
        has_ended=_flag(agent, "ended"),
        enable_reservations=_flag(found, "enableReservations"),
        force_indirect=_flag(found, "forceIndirect"),
        services=_services(_list(found, "services")),
        gateways=_gateways(_list(agent, "tunnels")),
        static_data=_object(found, "staticData"),
        owners=frozenset(session["owner"] for session in listed_sessions(found) if isinstance(session.get("owner"), str)),
        text=text,
    )


def listed_sessions(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sessions that a server lists; entries that are not objects are left out."""
    listed = found.get("sessionList")
    return [session for session in listed if isinstance(session, dict)] if isinstance(listed, list) else []


def _read(text: str) -> dict[str, Any]:
    """The object in it, if that is within its bounds."""
    if len(text) > MAX_SERVER_BYTES or (not text.isascii() and len(text.encode(errors="replace")) > MAX_SERVER_BYTES):
        raise BadServer(f"longer than {MAX_SERVER_BYTES} bytes")
    try:
        found = read_json(text)
    except ValueError as exc:
        raise BadServer(f"no JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise BadServer("no JSON object")
    for key, limit_bytes in (("staticData", MAX_STATIC_BYTES), ("metrics", MAX_METRICS_BYTES)):
        if size_of(_object(found, key)) > limit_bytes:
            raise BadServer(f"{key}: longer than {limit_bytes} bytes")
    return found


def _services(entries: list[Any]) -> dict[str, int]:
    if len(entries) > MAX_SERVICES:
        raise BadServer(f"services: more than {MAX_SERVICES}")
    services = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadServer("services: expected objects")
        port = _count(entry, "port")
        if port > 65_535:
            raise BadServer(f"services: no port {port}")
        services[_name(entry, "name")] = port
    return services


def _gateways(entries: list[Any]) -> frozenset[str]:
    if len(entries) > MAX_TUNNELS:
        raise BadServer(f"agent.tunnels: more than {MAX_TUNNELS}")
    if not all(isinstance(entry, dict) for entry in entries):
        raise BadServer("agent.tunnels: expected objects")
    return frozenset(_name(entry, "gatewayId") for entry in entries)


def _object(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = found.get(key, {})
    if not isinstance(value, dict):
        raise BadServer(f"{key}: expected an object")
    return value


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key, [])
    if not isinstance(value, list):
        raise BadServer(f"{key}: expected a list")
    return value


def _name(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    if not isinstance(value, str) or not is_name(value):
        raise BadServer(f"{key}: expected a name")
    return value


def _text(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key, "")
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise BadServer(f"{key}: expected printable text of at most {_MAX_TEXT} characters")
    return value


def _count(found: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = found.get(key, default)
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise BadServer(f"{key}: expected a whole number, 0 or more")
    return value


def _number(found: Mapping[str, Any], key: str) -> float:
    value = found.get(key, 0)
    if (
        type(value) not in (int, float) or not 0 <= value <= _MAX_NUMBER
    ):  # false for NaN; compared first, since a whole number may be too large for a float
        raise BadServer(f"{key}: expected a number, 0 or more")
    return float(value)


def _flag(found: Mapping[str, Any], key: str) -> bool:
    value = found.get(key, False)
    if type(value) is not bool:
        raise BadServer(f"{key}: expected true or false")
    return value
