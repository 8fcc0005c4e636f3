"""Task: the rules of HTTP services from the configuration: certificates and keys are read here. Blocking: for a worker thread."""

import os
import secrets
from pathlib import Path
from typing import Final

from fxrelay.service_settings import ServiceSection
from fxrelay.settings import LimitSettings, RelaySettings
from fxrelay.web.affinity import KEY_BYTES, Affinity, ClaimAffinity, CookieAffinity
from fxrelay.web.passes import Passes
from fxrelay.web.ports import WebLimits, WebRules
from fxrelay.web.reaching import MAX_IDLE_LINKS
from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit.files import make_private_dir, read_secret, write_secret
from fxtunnel.kit.web_tls import server_context
from fxtunnel.model import ServiceName

KEY_FILE: Final = "cookies.key"
MIN_KEY_BYTES: Final = 32


def web_rules(settings: RelaySettings) -> dict[ServiceName, WebRules]:
    """What the configuration says about each HTTP service. Makes the cookies' key at its first use.

    Raises:
        ConfigError: every certificate and key that cannot be used.
    """
    found: dict[ServiceName, WebRules] = {}
    problems: list[ConfigProblem] = []
    for section in settings.services:
        if section.protocol == "http":
            try:
                found[ServiceName(section.name)] = _rules(section, settings.relay.state_dir)
            except ConfigError as exc:
                problems += exc.problems
    if problems:
        raise ConfigError(problems)
    return found


def verify_web_files(settings: RelaySettings) -> list[ConfigProblem]:
    """What `web_rules` would refuse; makes nothing."""
    problems: list[ConfigProblem] = []
    for section in settings.services:
        try:
            if section.tls is not None:
                server_context([(section.tls.cert, section.tls.key)])
            if section.cookie_key is not None:
                _read_key(section.cookie_key)
        except ConfigError as exc:
            problems += exc.problems
    return problems


def files_of_a_stream(sections: tuple[ServiceSection, ...]) -> int:
    """How many descriptors a stream of these services may hold at once: a connection to an HTTP pool has links to several nodes."""
    return 1 + MAX_IDLE_LINKS if any(section.protocol == "http" and section.port is not None for section in sections) else 1


def web_limits(limits: LimitSettings) -> WebLimits:
    """The bounds of HTTP connections."""
    return WebLimits(limits.head_timeout_s, limits.keep_alive_s, limits.stall_timeout_s, limits.idle_timeout_s)


def _rules(section: ServiceSection, state_dir: Path) -> WebRules:
    name = ServiceName(section.name)
    affinity: Affinity | None = None
    if section.affinity is not None and section.affinity.claim is not None:
        affinity = ClaimAffinity(section.affinity.claim)
    elif section.affinity is not None and section.affinity.cookie is not None:
        affinity = CookieAffinity(section.affinity.cookie, name, cookie_key(section.cookie_key, state_dir))
    passes = None
    if section.ticket is not None and section.ticket.session_s:
        passes = Passes(name, section.ticket.session_s, cookie_key(section.cookie_key, state_dir))
    return WebRules(
        name,
        section.hosts,
        section.trust_forwarded,
        section.node_paths,
        affinity,
        section.response_timeout_s,
        section.max_body,
        server_context([(section.tls.cert, section.tls.key)]) if section.tls is not None else None,
        section.is_guarded,
        passes,
        section.ticket is not None and section.ticket.required,
    )


def cookie_key(path: Path | None, state_dir: Path) -> bytes:
    """The key of a service's cookies; made, if there is no file of its own. Raises ConfigError."""
    if path is None:
        path = state_dir / KEY_FILE
        if not os.path.lexists(path):
            make_private_dir(state_dir)
            write_secret(path, secrets.token_hex(KEY_BYTES).encode() + b"\n")
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise ConfigError.one(path, "", f"does not exist; run: (umask 077; openssl rand -hex 32 > {path})")
    key = read_secret(path).strip()
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError.one(path, "", f"holds less than {MIN_KEY_BYTES} bytes; run: openssl rand -hex 32")
    return key
