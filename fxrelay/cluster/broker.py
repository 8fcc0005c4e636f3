"""Task: broker.json, the file that says which Redis the members of a cluster share: FastX's keys, and some of ours."""

import difflib
import ipaddress
import json
import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic.alias_generators import to_camel

from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit.files import read_secret

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 6379
DEFAULT_NAMESPACE: Final = "fastx-cluster"
MAX_NODES: Final = 32
_NO_REDIS: Final = "without a Redis, leave `broker` out of relay.toml: the relays of one machine then share an SQLite file"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a Redis or a Sentinel listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Login:
    """Who we are to Redis, and to Sentinels; empty: nobody asks."""

    username: str
    password: SecretStr
    sentinel_password: SecretStr


NOBODY: Final = Login("", SecretStr(""), SecretStr(""))


@dataclass(frozen=True, slots=True)
class Tls:
    """How the server is checked. `servername`: the name its certificate must have, if that is not the host's."""

    context: ssl.SSLContext
    servername: str = ""


@dataclass(frozen=True, slots=True)
class Broker:
    """A Redis. With `sentinel_name` the endpoints are Sentinels that know where that one is; with `is_cluster` it is a Redis Cluster.

    `tls` is None only for a Redis on this machine. `appendfsync` is what Redis's configuration says; empty: ask.
    """

    endpoints: tuple[Endpoint, ...]
    login: Login = NOBODY
    namespace: str = DEFAULT_NAMESPACE
    db: int = 0
    tls: Tls | None = None
    sentinel_name: str = ""
    is_cluster: bool = False
    appendfsync: str = ""


def load_broker(path: Path) -> Broker:
    """Read and check a broker.json, and the certificates it names. Blocking, and quick; connects to nothing.

    Raises:
        ConfigError: not private (the message holds the `chmod`), or wrong; holds every problem. No value is repeated: one is the password.
    """
    if not os.path.lexists(path):
        raise ConfigError.one(path, "", f"does not exist; docs/CLUSTER.md shows one. {_NO_REDIS[0].upper()}{_NO_REDIS[1:]}")
    try:
        raw = json.loads(read_secret(path))
    except (ValueError, RecursionError) as exc:
        raise ConfigError.one(path, "", "is not JSON") from exc
    if not isinstance(raw, dict):
        raise ConfigError.one(path, "", "is not a JSON object")
    problems = [ConfigProblem(str(path), key, message) for key, message in _clashes(raw)]
    content = None
    try:
        content = _Content.model_validate(raw)
    except ValidationError as exc:
        problems = [*_problems(path, exc), *problems]
    if content is None or problems:
        raise ConfigError(problems)
    tls = Tls(_context(content, path), content.servername) if content.tls else None
    return Broker(
        tuple(Endpoint(entry.host, entry.port) for entry in content.sentinels) or (Endpoint(content.host, content.port),),
        Login(content.username, content.password or SecretStr(""), content.sentinel_password or SecretStr("")),
        content.namespace,
        content.db,
        tls,
        content.sentinel_name,
        content.cluster,
        content.appendfsync,
    )


def _host(text: str) -> str:
    if not text or len(text) > 253 or not text.isascii() or not text.isprintable() or set(text) & set(" /@?#[]"):
        raise ValueError("expected a host name or an IP address")
    if ":" in text:
        ipaddress.IPv6Address(text)
    return text


_Host = Annotated[str, AfterValidator(_host)]
_Port = Annotated[int, Field(ge=1, le=65_535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=to_camel)


class _Sentinel(_Section):
    host: _Host
    port: _Port = 26_379


class _Content(_Section):
    transporter_type: str = ""
    host: str = ""
    port: _Port = DEFAULT_PORT
    password: SecretStr | None = None
    # It becomes part of keys and channels; braces and globs have a meaning there.
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")] = DEFAULT_NAMESPACE
    reject_unauthorized: bool = True
    ca: str = ""
    cert: str = ""
    key: str = ""
    servername: str = ""
    username: str = ""
    db: Annotated[int, Field(ge=0, le=65_535)] = 0
    tls: bool = True
    sentinels: Annotated[list[_Sentinel], Field(max_length=MAX_NODES)] = []
    sentinel_name: str = ""
    sentinel_password: SecretStr | None = None
    cluster: bool = False
    appendfsync: Annotated[str, Field(pattern=r"^(always|everysec|no)?$")] = ""


def _clashes(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between fields, read from what nobody has checked yet, so that it is reported with all the rest."""
    kind = raw.get("transporterType", "")
    if kind == "":
        yield "transporterType", f'is required: "redis"; {_NO_REDIS}'
    elif kind != "redis" and isinstance(kind, str):
        yield "transporterType", f'expected "redis"; {_NO_REDIS}'
    sentinels = raw.get("sentinels") or []
    if not sentinels:
        try:
            _host(str(raw.get("host", "")))
        except ValueError as exc:
            yield "host", f"is required: {exc}"
        if raw.get("sentinelName"):
            yield "sentinels", "is required with sentinelName"
    elif not raw.get("sentinelName"):
        yield "sentinelName", "is required with sentinels: the name they know the Redis by"
    if raw.get("cluster") is True and sentinels:
        yield "cluster", "a Redis Cluster has no Sentinels; keep one of the two"
    if raw.get("cluster") is True and raw.get("db"):
        yield "db", "a Redis Cluster has database 0 only"
    if bool(raw.get("cert")) != bool(raw.get("key")):
        yield "cert", "cert and key belong together"
    if raw.get("tls") is False and not all(map(_is_local, _hosts(raw, sentinels))):
        yield (
            "tls",
            "may be false for a Redis on this machine only (127.0.0.1, ::1, localhost): its password would cross the network readable",
        )


def _hosts(raw: Mapping[str, Any], sentinels: Any) -> list[object]:
    if isinstance(sentinels, list) and sentinels:
        return [entry.get("host") for entry in sentinels if isinstance(entry, dict)]
    return [raw.get("host")]


def _is_local(host: object) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _context(content: _Content, path: Path) -> ssl.SSLContext:
    """What the server's certificate is checked against: `ca` and nothing else, or the system's authorities if there is none."""
    ca, cert, key = (Path(path.absolute().parent, name) if name else None for name in (content.ca, content.cert, content.key))
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as exc:
        raise ConfigError.one(path, "ca", f"cannot be used: {_reason(exc)}") from exc
    if cert is not None and key is not None:
        read_secret(key)  # refuses a key that others may read
        try:
            context.load_cert_chain(cert, key, password="")
        except (OSError, ValueError) as exc:
            raise ConfigError.one(path, "cert", f"cert and key cannot be used: {_reason(exc)}") from exc
    if not content.reject_unauthorized:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        logger.warning(
            "%s: rejectUnauthorized is false: whoever can answer in place of this Redis gets its password and can misplace or refuse "
            "sessions; give the authority's certificate as `ca` instead",
            path,
        )
    return context


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        return "not in PEM format, encrypted, or not belonging together"
    return getattr(exc, "strerror", None) or str(exc)


def _problems(path: Path, exc: ValidationError) -> list[ConfigProblem]:
    found = []
    for error in exc.errors(include_url=False, include_context=False, include_input=False):
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            section = _Sentinel if len(error["loc"]) > 1 else _Content
            known = [info.alias or name for name, info in section.model_fields.items()]
            close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.75)
            message = f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known here: {', '.join(known)}"
        found.append(ConfigProblem(str(path), ".".join(str(part) for part in error["loc"]), message))
    return found
