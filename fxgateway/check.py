"""Task: what can be known before the gateway runs: its files, its certificate, its addresses. Blocking, for the commands."""

import contextlib
import datetime as dt
import ipaddress
import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fxgateway.routing.preread_router import DoorKind
from fxgateway.settings import GatewaySettings
from fxgateway.setup import read_authority
from fxgateway.tunnels.identities import Identities
from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit import web_tls
from fxtunnel.kit.files import read_secret
from fxtunnel.kit.listeners import ListenError, listen
from fxtunnel.kit.tls import server_context
from fxtunnel.kit.tls_problems import describe_dates
from fxtunnel.kit.unpaced import is_loopback
from fxtunnel.protocol.alpn import ALPN_SPOKEN

ENDS_SOON: Final = dt.timedelta(days=30)
MIN_WORKER_BYTES: Final = 32 << 20
_AUTHORITY_KEY: Final = "ca.key"
_AUTHORITY_HOME: Final = "/etc/fxgateway-ca"
"""As in certs/README.md."""
_BESIDE: Final = ("gateway.json", _AUTHORITY_KEY)
"""What `init` leaves next to the configuration. The administrator may have moved it away; what is still there must be private."""


def verify_files(settings: GatewaySettings, config_path: Path, now: dt.datetime) -> list[ConfigProblem]:
    """Everything wrong with certificate, key, state directory and the secrets beside them; empty if `run` can use them."""
    tunnel = settings.tunnel
    problems = _collect(lambda: server_context(tunnel.certificate, tunnel.key, ALPN_SPOKEN))
    if tunnel.certificate.is_file():
        problems += _certificate_problems(settings, now)
    if not tunnel.state_dir.is_dir():
        problems.append(
            ConfigProblem(
                str(config_path), "tunnel.state_dir", f"{tunnel.state_dir} is not a directory; run: mkdir -m 700 -p {tunnel.state_dir}"
            )
        )
    elif not os.access(tunnel.state_dir, os.R_OK | os.W_OK | os.X_OK):
        problems.append(ConfigProblem(str(config_path), "tunnel.state_dir", f"{tunnel.state_dir} cannot be written by uid {os.geteuid()}"))
    if os.path.lexists(tunnel.identities_path):
        problems += _collect(Identities(tunnel.identities_path).load)
    for door in settings.doors:
        if door.kind is DoorKind.HTTPS:
            problems += _collect(partial(web_tls.server_context, settings.certificates_of(door)))
    for path in (config_path.parent / name for name in _BESIDE):
        if os.path.lexists(path):
            problems += _collect(partial(read_secret, path))
    return problems


def verify_authority(settings: GatewaySettings) -> list[ConfigProblem]:
    """What is wrong with the authority's certificate. A gateway runs without it; `fxgateway invite` does not."""
    return _collect(partial(read_authority, settings.tunnel.ca))


def verify_listens(settings: GatewaySettings, config_path: Path, held: frozenset[str]) -> list[ConfigProblem]:
    """Every address that cannot be bound. `held` are those that this gateway itself is listening on right now.

    All are bound at once, so two entries that exclude each other are found, and given back before this returns.
    """
    problems = []
    with contextlib.ExitStack() as stack:
        for key, address in settings.listens():
            if str(address) in held:
                continue
            try:
                stack.callback(listen(address).close)
            except ListenError as exc:
                problems.append(ConfigProblem(str(config_path), key, str(exc)))
            else:
                if address.path is not None:
                    stack.callback(address.path.unlink)
    return problems


def warnings(settings: GatewaySettings, config_path: Path, now: dt.datetime) -> list[str]:
    """What works, but is probably not meant, or not for long."""
    found = [*_ending_certificates(settings, now), *_authority_keys(settings, config_path)]
    if not settings.doors:
        found.append("there is no [[door]]: no client can come in")
    found += [
        f"door {door.label} ends TLS: this host sees what its clients say; kind sni leaves that to the relays"
        for door in settings.doors
        if door.kind is DoorKind.HTTPS
    ]
    host = settings.admin.listen.host
    if host is not None and not is_loopback(host):
        found.append(f"admin.listen {settings.admin.listen} can be reached from other machines, and asks nobody for a password")
    tunnel = settings.tunnel
    if tunnel.workers > 1 and settings.limits.memory_bytes < tunnel.workers * MIN_WORKER_BYTES:
        found.append(f"limits.memory_bytes is divided by tunnel.workers: give at least {tunnel.workers * MIN_WORKER_BYTES >> 20}MiB")
    if tunnel.workers > (os.cpu_count() or 1):
        found.append(f"tunnel.workers is {tunnel.workers}, and this machine has {os.cpu_count()} processors")
    return found


def _ending_certificates(settings: GatewaySettings, now: dt.datetime) -> list[str]:
    paths = [settings.tunnel.certificate, settings.tunnel.ca]
    paths += [path for door in settings.doors if door.kind is DoorKind.HTTPS for path, _ in settings.certificates_of(door)]
    found = []
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError, ValueError):  # what cannot be read is a problem, or, for the authority, nobody's here
            end = min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(path.read_bytes()))
            if end - now < ENDS_SOON:
                found.append(f"{path} ends on {end:%Y-%m-%d}; see certs/README.md")
    return found


def _authority_keys(settings: GatewaySettings, config_path: Path) -> list[str]:
    """What signs certificates, where only those should be."""
    tunnel = settings.tunnel
    found = []
    for directory in dict.fromkeys(path.absolute().parent for path in (config_path, tunnel.certificate)):
        key = directory / _AUTHORITY_KEY
        if os.path.lexists(key):
            moved = shlex.join(map(str, (*([tunnel.ca] if tunnel.ca.is_file() else []), key)))
            found.append(
                f"{key} is for issuing certificates only, and whoever breaks into the gateway could answer relays in its place with it. "
                f"As root: install -d -m 700 {_AUTHORITY_HOME} && install -m 600 -t {_AUTHORITY_HOME} {moved} && rm {shlex.quote(str(key))}"
            )
    return found


def _certificate_problems(settings: GatewaySettings, now: dt.datetime) -> list[ConfigProblem]:
    tunnel = settings.tunnel
    where = str(tunnel.certificate)
    try:
        leaf = x509.load_pem_x509_certificates(tunnel.certificate.read_bytes())[0]
    except OSError as exc:
        return [ConfigProblem(where, "", f"cannot be read: {exc.strerror}")]
    except ValueError:
        return []  # server_context has said so
    problems = []
    dates = describe_dates(leaf.public_bytes(Encoding.DER), now)
    if dates:
        problems.append(ConfigProblem(where, "", f"is not valid now: {dates}; issue a new one, or set this machine's clock"))
    names = _names(leaf)
    if not any(_matches(name, tunnel.public_host) for name in names):
        problems.append(
            ConfigProblem(where, "", f"is for {', '.join(names) or 'nobody'}, not for {tunnel.public_host} of tunnel.public_url")
        )
    return problems


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [*found.get_values_for_type(x509.DNSName), *(str(ip) for ip in found.get_values_for_type(x509.IPAddress))]


def _matches(name: str, host: str) -> bool:
    """Whether a certificate's name covers a host (RFC 9525, 6.3: a wildcard stands for one whole label)."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host)) == name
    if name.startswith("*."):
        return host.partition(".")[2].lower() == name[2:].lower()
    return host.lower() == name.lower()


def _collect(probe: Callable[[], object]) -> list[ConfigProblem]:
    try:
        probe()
    except ConfigError as exc:
        return list(exc.problems)
    return []
