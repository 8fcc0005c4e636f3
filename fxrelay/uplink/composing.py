"""Task: links and sessions as the configuration describes them."""

from fxrelay.settings import GatewaySection, RelaySettings
from fxrelay.uplink.control_link import BEATS_PER_DEATH
from fxrelay.uplink.dial import Proxy
from fxrelay.uplink.ports import UplinkConfig
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.protocol.hello import CAP_RESUME


def uplink_config(settings: RelaySettings, gateway: GatewaySection) -> UplinkConfig:
    """How one gateway is dialled."""
    return UplinkConfig(
        links=settings.relay.links,
        proxy=Proxy.parse(gateway.proxy) if gateway.proxy is not None else None,
        dial_timeout_s=settings.liveness.dial_timeout_s,
        min_backoff_s=settings.liveness.min_backoff_s,
        max_backoff_s=settings.liveness.max_backoff_s,
        dead_after_s=settings.liveness.dead_after_s,
        caps=(CAP_RESUME,) if settings.resume.enabled else (),
    )


def session_config(settings: RelaySettings) -> SessionConfig:
    """The bounds of sessions."""
    return SessionConfig(
        max_streams=settings.limits.streams_per_link,
        max_ring_bytes=settings.resume.replay_bytes,
        resume=settings.resume.enabled,
        hold_s=settings.resume.hold_s,
        heartbeat_s=min(SessionConfig().heartbeat_s, settings.liveness.dead_after_s / BEATS_PER_DEATH),
        dead_after_s=settings.liveness.dead_after_s,
    )
