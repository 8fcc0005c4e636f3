"""Task: the certificates and keys of a configuration, read from their files and checked."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxgateway.routing.preread_router import DoorKind
from fxgateway.settings import GatewaySettings
from fxtunnel.errors import ConfigError
from fxtunnel.kit import web_tls
from fxtunnel.kit.certificates import expires_unix
from fxtunnel.kit.link_tls import LinkContext
from fxtunnel.kit.tls import server_context


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a gateway shows: `tunnel` to relays, good until `tunnel_expires_unix`; `doors` where TLS ends, by the doors' labels."""

    tunnel: LinkContext
    tunnel_expires_unix: float
    doors: Mapping[str, ssl.SSLContext]


def load_certificates(settings: GatewaySettings, alpn: Sequence[str]) -> Certificates:
    """Those of a configuration. `alpn`: what may be spoken on the tunnels' port. Blocking: reads files.

    Raises:
        ConfigError: a certificate or key cannot be used.
    """
    tunnel = settings.tunnel
    context = server_context(tunnel.certificate, tunnel.key, alpn)
    try:
        until_unix = expires_unix(tunnel.certificate.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError.one(tunnel.certificate, "", f"was replaced while it was read: {exc}") from exc
    return Certificates(
        context,
        until_unix,
        {door.label: web_tls.server_context(settings.certificates_of(door)) for door in settings.doors if door.kind is DoorKind.HTTPS},
    )
