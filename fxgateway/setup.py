"""Task: `fxgateway init` and `fxgateway invite`: a gateway's first files, and further enrolment files. Blocking, for the commands."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from pydantic import BaseModel

from fxgateway.door_settings import GatewayLogSettings
from fxgateway.settings import GatewaySettings, LimitSettings, LivenessSettings, SandboxSettings, gateway_id_of, split_public_url
from fxgateway.tunnels.identities import Identities
from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import issue_server_certificate, new_authority
from fxtunnel.kit.files import write_atomic, write_secret
from fxtunnel.kit.sections import ResumeSettings
from fxtunnel.kit.tokens import new_enrolment_token

# In the order they are put in place: whoever finds a gateway.toml finds the rest as well.
FILES: Final = ("ca.key", "ca.pem", "server.key", "server.pem", "relays.json", "gateway.json", "gateway.toml")
AUTHORITY_DIR: Final = "/etc/fxgateway-ca"
ENROLMENT_VERSION: Final = 1
_DAY_S: Final = 86_400
_PUBLIC_MODE: Final = 0o644


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What an enrolment file says; the token in it lets a relay enrol until `expires_unix`."""

    gateway_id: str
    public_url: str
    ca_pem: str
    token: str = field(repr=False)
    expires_unix: int

    def encode(self) -> bytes:
        """The content of gateway.json."""
        content = {
            "version": ENROLMENT_VERSION,
            "gateway_id": self.gateway_id,
            "urls": [self.public_url],
            "ca": self.ca_pem,
            "enrolment": {"token": self.token, "expires_unix": self.expires_unix},
        }
        return json.dumps(content, indent=2).encode() + b"\n"


def existing(directory: Path) -> list[Path]:
    """Which of the files that `write_gateway` writes are there already."""
    return [directory / name for name in FILES if os.path.lexists(directory / name)]


def write_gateway(directory: Path, public_url: str, token_days: int, now_unix: float) -> int | None:
    """Make everything a gateway needs in `directory`, replacing what is there. Returns the port it listens on, if the URL names none.

    All files are complete before the first one is put in place, so a failure leaves the old ones untouched.

    Raises:
        ConfigError: the URL is not usable, or the directory cannot be written.
    """
    try:
        host, port = split_public_url(public_url)
    except ValueError as exc:
        raise ConfigError.one("--public-url", "", str(exc)) from exc
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkdtemp makes it 0700; in the same directory, because a rename does not leave its file system.
        draft = Path(tempfile.mkdtemp(prefix=".init-", dir=directory))
    except OSError as exc:
        raise ConfigError.one(directory, "", f"cannot be written: {exc.strerror or exc}") from exc
    try:
        _write_all(draft, host, port, public_url, token_days, now_unix)
        for name in FILES:
            os.replace(draft / name, directory / name)
    except OSError as exc:
        raise ConfigError.one(directory, "", f"cannot be written: {exc.strerror or exc}") from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return port if urlsplit(public_url).port is None else None


def move_key_away(directory: Path) -> str:
    """The commands, on one line, that put the authority's key where only root reads it."""
    certificate, key = (shlex.quote(str((directory / name).absolute())) for name in ("ca.pem", "ca.key"))
    away = shlex.quote(AUTHORITY_DIR)
    return f"install -d -m 700 {away} && install -m 600 -t {away} {certificate} {key} && rm {key}"


def invite(settings: GatewaySettings, token_days: int, now_unix: float) -> Enrolment:
    """A new enrolment for a running or stopped gateway; its token is entered in relays.json.

    Raises:
        ConfigError: the authority's certificate or relays.json cannot be used.
    """
    tunnel = settings.tunnel
    ca_pem = read_authority(tunnel.ca)
    return _enrolment(tunnel.identities_path, tunnel.gateway_id, tunnel.public_url, ca_pem, token_days, now_unix)


def read_authority(path: Path) -> str:
    """The certificates of tunnel.ca, as they go into gateway.json.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        ca_pem = path.read_text("ascii")
        x509.load_pem_x509_certificates(ca_pem.encode())
    except OSError as exc:
        raise ConfigError.one(path, "", f"cannot be read ({exc.strerror}); relays need the authority's certificate (tunnel.ca)") from exc
    except ValueError as exc:
        raise ConfigError.one(path, "", "holds no certificate in PEM; relays need the authority's (tunnel.ca)") from exc
    return ca_pem


def token_in(path: Path) -> str:
    """The enrolment token of a gateway.json.

    Raises:
        ConfigError: it is none, or cannot be read.
    """
    try:
        return str(json.loads(path.read_bytes())["enrolment"]["token"])
    except OSError as exc:
        raise ConfigError.one(path, "", f"cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError, KeyError, TypeError) as exc:
        raise ConfigError.one(path, "", "is no enrolment file: there is no token in it") from exc


def refuse_to_overwrite(path: Path) -> None:
    """An older enrolment file may be replaced by a new one; anything else may not.

    Raises:
        ConfigError: something else is at `path`.
    """
    if os.path.lexists(path) and not _is_enrolment(path):
        raise ConfigError.one(path, "", "is there already and is not an enrolment file; choose another name with --out")


def render_config(public_url: str, port: int, gateway_id: str, wildcard: str) -> str:
    """A gateway.toml with every key: those that differ from place to place set, the others commented out with their defaults."""
    return f"""# fxgateway: after a change run `fxgateway check --config gateway.toml`, then send the daemon SIGHUP.
# Doors, services and limits change without touching open streams. Relative paths are relative to this file.
# FXGATEWAY__SECTION__KEY in the environment goes before what is written here.

[tunnel]
# Relays come in here. How they reach it, as seen from where they are:
listen = "{wildcard}:{port}"
public_url = "{public_url}"
# The name in what relays sign. Keep it: gateway.json files carry it.
gateway_id = "{gateway_id}"
certificate = "server.pem"
key = "server.key"
ca = "ca.pem"
state_dir = "."
# Processes that share the work; each uses one core.
# workers = 1

# Clients come in here; one [[door]] for each address. `service` is the name under which relays offer it.
[[door]]
listen = "0.0.0.0:2222"
service = "ssh"
# name = "ssh-door"
# kind = "tcp"            # or sni, http, https, auto: then [[route]]s decide, and `service` is for those whom none leads
# ssh = "ssh"             # of kind auto: for SSH clients
# streams = ["ssh"]       # of kinds http, https and auto: what `fxgateway connect` may ask for
# sniff_s = 0.3           # of kind auto: silence after which a client gets `service`
# max_connections = 1000
# proxy_from = ["10.0.0.5"]   # proxies that say by a PROXY header whom they speak for
# certificate = "web.pem"     # of kind https, which ends TLS here; or [[certificate]] tables with the same two keys, for all such doors
# key = "web.key"

# Where doors that look at names lead: by host, and (but for kind sni) by path.
# [[route]]
# host = "*.cluster.example.com"
# path = "/"
# service = "web"

# /healthz /readyz /metrics /relays. There is no password: keep it on this machine, or use "unix:admin.sock".
[admin]
listen = "127.0.0.1:9101"

[limits]
{_commented(LimitSettings)}
[resume]
{_commented(ResumeSettings)}
[liveness]
{_commented(LivenessSettings)}
[log]
{_commented(GatewayLogSettings)}
# What is given up at the start (Landlock, seccomp): other files, programs, connections.
[sandbox]
{_commented(SandboxSettings)}"""


def _write_all(draft: Path, host: str, port: int, public_url: str, token_days: int, now_unix: float) -> None:
    gateway_id = gateway_id_of(public_url)
    authority = new_authority(f"fxgateway {gateway_id}")
    certificate, key = issue_server_certificate(authority, [host])
    enrolment = _enrolment(draft / "relays.json", gateway_id, public_url, authority.cert_pem, token_days, now_unix)
    write_secret(draft / "ca.key", authority.key_pem())
    write_atomic(draft / "ca.pem", authority.cert_pem.encode(), _PUBLIC_MODE)
    write_secret(draft / "server.key", key)
    write_atomic(draft / "server.pem", certificate.encode(), _PUBLIC_MODE)
    write_secret(draft / "gateway.json", enrolment.encode())
    config = render_config(public_url, port, gateway_id, "[::]" if ":" in host else "0.0.0.0")  # noqa: S104 - relays come from outside
    write_atomic(draft / "gateway.toml", config.encode(), _PUBLIC_MODE)


def _enrolment(identities_path: Path, gateway_id: str, public_url: str, ca_pem: str, token_days: int, now_unix: float) -> Enrolment:
    token = new_enrolment_token()
    expires_unix = int(now_unix) + token_days * _DAY_S
    Identities(identities_path).add_token(token, expires_unix)
    return Enrolment(gateway_id, public_url, ca_pem, token, expires_unix)


def _is_enrolment(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "gateway_id" in content and "urls" in content


def _commented(model: type[BaseModel]) -> str:
    return "".join(_lines(model))


def _lines(model: type[BaseModel]) -> Iterator[str]:
    for name, key in model.model_fields.items():
        yield f"# {key.description}\n# {name} = {_toml(name, key.default)}\n"


def _toml(name: str, value: object) -> str:
    """A default as a person would write it."""
    match value:
        case bool():
            return str(value).lower()
        case int() if name.endswith("_bytes"):
            shift, unit = (20, "MiB") if value >= 1 << 20 else (10, "KiB")
            return f'"{value >> shift}{unit}"'
        case tuple():
            return "[" + ", ".join(_toml(name, item) for item in value) + "]"
        case Enum():
            return _toml(name, value.value)
        case str() | IPv4Network() | IPv6Network():
            return f'"{value}"'
        case _:
            return str(value)
